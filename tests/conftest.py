import json
import os

# The Hugging Face libraries read these variables when they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# The models of the tests are tiny: several threads would mostly wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from PIL import Image

from eccl.modeling_eccl import ECCLModel
from helpers import make_backbone, make_benchmark, make_exported, tiny_config


def pytest_collection_modifyitems(items):
    """Starts the longest test early: at the end of the slow tests, one process would wait for it for two minutes."""
    items.sort(key=lambda item: "test_soak" not in item.nodeid)


@pytest.fixture(autouse=True, scope="session")
def _private_caches(tmp_path_factory):
    """Keeps the tests away from the user's caches: they neither read nor write them."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = str(tmp_path_factory.mktemp("datasets"))


@pytest.fixture
def tiny_model() -> ECCLModel:
    torch.manual_seed(0)
    return ECCLModel(tiny_config()).eval()


@pytest.fixture
def tiny_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(0, 58, (3, 12), generator=generator)
    input_ids[:, 0] = 58
    for row, end in enumerate((5, 11, 8)):
        input_ids[row, end:] = 59
    return {"input_ids": input_ids, "pixel_values": torch.randn(3, 3, 32, 16, generator=generator)}


@pytest.fixture
def make_raw(tmp_path):
    """Writes a folder in the layout of CUHK-PEDES, with PNG and JPEG files of unusual sizes.

    It holds six images of five persons: three in the training set, one each in the validation and the test set. Returns
    the folder and its records.
    """

    def make(name: str = "CUHK-PEDES", annotation: str = "reid_raw.json", path_key: str = "file_path"):
        root = tmp_path / name
        (root / "imgs" / "cam_a").mkdir(parents=True)
        records = []
        sizes = ((37, 91), (64, 128), (128, 384), (51, 160), (40, 77), (33, 99))
        for index, size in enumerate(sizes):
            path = f"cam_a/{index}.{'png' if index % 2 else 'jpg'}"
            Image.new("RGB", size, (40 * index, 255 - 40 * index, 120)).save(root / "imgs" / path)
            captions = [f"A person in a coat number {index}.", "Someone walks by with a red bag."]
            split = ("train", "train", "train", "train", "val", "test")[index]
            records.append({"split": split, "captions": captions, path_key: path, "id": (7, 7, 9, 12, 20, 30)[index]})
        (root / annotation).write_text(json.dumps(records))
        return root, records

    return make


@pytest.fixture(scope="session")
def benchmark(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "set"
    make_benchmark(folder)
    return folder


@pytest.fixture(scope="session")
def backbone(benchmark, tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbone") / "model"
    make_backbone(benchmark, folder)
    return folder


@pytest.fixture(scope="session")
def exported(backbone, tmp_path_factory):
    """A folder with a small model, its processor, and their ONNX export in the subfolder `onnx`, int8 too."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    make_exported(backbone, folder)
    return folder


@pytest.fixture(scope="session")
def laboratory(tmp_path_factory):
    """Runs commands on hostile input, each in a process with limits."""
    from fuzzing import Laboratory

    return Laboratory(tmp_path_factory.mktemp("laboratory"))


@pytest.fixture(scope="session")
def sound(laboratory, benchmark, backbone):
    """A sound folder of each kind, by the name of the kind."""
    from sound_folders import make_sound_folders

    return make_sound_folders(laboratory.folder / "sound", benchmark, backbone)


@pytest.fixture(scope="session")
def server_address(tmp_path_factory):
    """The address of a Milvus server. Tests that use it are slow, and in the group "milvus"."""
    from milvus_server import running_server

    with running_server(tmp_path_factory.mktemp("milvus")) as address:
        yield address
