"""The imports of every file, read from its syntax tree: which room may import which (DESIGN, section 1)."""

import ast
import sys

import pytest

from helpers import ROOT

ROOT_FILES = {
    "configuration_eccl",
    "modeling_eccl",
    "processing_eccl",
    "pipeline_eccl",
    "encoding_eccl",
}
ROOMS = ("utils", "hub", "dataset_scripts", "training", "search", "eval")
# For each file, or else for its room: the packages, and the files and rooms of this project, that it may import.
TRAINING_PACKAGES = {
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "peft",
    "safetensors",
    "numpy",
    "pyarrow",
    "PIL",
}
HUB_PACKAGES = {"torch", "transformers", "huggingface_hub", "numpy", "PIL"}
ALLOWED = {
    "configuration_eccl.py": {"transformers", "huggingface_hub"},
    "modeling_eccl.py": {*HUB_PACKAGES, "eccl.configuration_eccl"},
    "processing_eccl.py": {*HUB_PACKAGES, "eccl.configuration_eccl"},
    "pipeline_eccl.py": {
        *HUB_PACKAGES,
        *("eccl.configuration_eccl", "eccl.modeling_eccl", "eccl.processing_eccl"),
    },
    "encoding_eccl.py": {*HUB_PACKAGES, "datasets", "tqdm", *(f"eccl.{name}" for name in ROOT_FILES)},
    "utils": {"transformers", "PIL", "huggingface_hub", "eccl.processing_eccl", "eccl.utils"},
    "utils/recipes.py": {"yaml"},
    "hub": {*HUB_PACKAGES, "peft", "onnxruntime", *(f"eccl.{name}" for name in ROOT_FILES), "eccl.hub", "eccl.utils"},
    "dataset_scripts": {
        *("datasets", "PIL", "numpy", "tqdm", "pyarrow", "filelock", "imagehash", "huggingface_hub", "transformers"),
        *("eccl.processing_eccl", "eccl.dataset_scripts", "eccl.hub.publish", "eccl.utils"),
    },
    # The loss of pre-training on the synthetic benchmark is next to its generator.
    "dataset_scripts/synthetic/attribute_loss.py": {
        *("torch", "datasets", "eccl.dataset_scripts.base", "eccl.dataset_scripts.synthetic.generator"),
        *(f"eccl.training.{name}" for name in ("arguments", "losses", "objective", "pairs")),
    },
    "training/losses.py": {"torch"},
    "training/memory.py": {"torch", "eccl.training.losses"},
    # The table of losses has a row for it.
    "training/objective.py": {*TRAINING_PACKAGES, "eccl.training", "eccl.dataset_scripts.synthetic.attribute_loss"},
    "training": {
        *TRAINING_PACKAGES,
        *(f"eccl.{name}" for name in ROOT_FILES),
        *("eccl.training", "eccl.hub", "eccl.eval.person_retrieval"),
    },
    # The only file that talks to Milvus.
    "search/store.py": {"pymilvus", "milvus_lite", "grpc", "numpy", "eccl.utils.files"},
    "search": {
        *(*HUB_PACKAGES, "datasets", "accelerate", "tqdm", "cv2", "gradio", "fastapi", "starlette", "uvicorn", "anyio"),
        *(f"eccl.{name}" for name in ROOT_FILES),
        *("eccl.search", "eccl.hub", "eccl.dataset_scripts", "eccl.utils"),
    },
    # The metric travels to the Hub by itself.
    "eval/person_retrieval": {"datasets", "evaluate", "numpy"},
    "eval": {
        *(*HUB_PACKAGES, "datasets", "evaluate", "accelerate", "safetensors", "yaml", "tqdm", "peft", "pyarrow"),
        *(f"eccl.{name}" for name in ROOT_FILES),
        *(f"eccl.{room}" for room in ROOMS),
    },
    "train_eccl.py": {
        *("torch", "transformers", "datasets", "accelerate", "peft", "yaml"),
        *(f"eccl.{name}" for name in ROOT_FILES),
        *(f"eccl.{room}" for room in ROOMS),
    },
    "__init__.py": {"transformers", "eccl"},
}
SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py")))
)


def imports_of(source: str) -> set[str]:
    """Every module that a file imports, at its top or inside a function; relative names are made absolute."""
    package = ["eccl", *source.split("/")[:-1]]
    found = set()
    for node in ast.walk(ast.parse((ROOT / source).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            module = ".".join([*base, *(node.module or "").split(".")]).rstrip(".")
            names = {f"{module}.{alias.name}" for alias in node.names}
            found |= names if module == "eccl" or not node.module else {module}
    return {name for name in found if name.split(".")[0] not in sys.stdlib_module_names}


def allowed_for(source: str) -> set[str]:
    parts = source.split("/")
    for length in range(len(parts), 0, -1):
        if "/".join(parts[:length]) in ALLOWED:
            return ALLOWED["/".join(parts[:length])]
    raise AssertionError(f"{source} is in no room: add it to ALLOWED")


def test_every_file_of_the_repository_is_in_a_room():
    elsewhere = {"tests", "assets", "build", "demo"}
    folders = [path for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")]
    files = {*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))}
    names = {path.relative_to(ROOT).as_posix() for path in files}
    assert {name for name in names if name.split("/")[0] not in elsewhere} == set(SOURCES)
    assert len(SOURCES) > 50


@pytest.mark.parametrize("source", SOURCES)
def test_a_file_imports_only_what_its_room_may(source):
    allowed = allowed_for(source)
    for name in imports_of(source):
        parents = {".".join(name.split(".")[:length]) for length in range(1, name.count(".") + 2)}
        assert parents & allowed, f"{source} imports {name}"


def test_nothing_imports_the_training_command():
    for source in SOURCES:
        assert not any("train_eccl" in name for name in imports_of(source)), source


@pytest.mark.parametrize("source", SOURCES)
def test_nothing_evaluates_text_or_unpickles(source):
    for node in ast.walk(ast.parse((ROOT / source).read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        assert name not in ("eval", "exec") and not name.startswith("pickle."), source
        if name == "torch.load":
            assert any(word.arg == "weights_only" and word.value.value is True for word in node.keywords), source
