"""Kinds of bad input times the places that meet them: nothing wrong passes silently.

The tables below list the places. A test at the end of each part finds the places in the source: a new reader of
pictures, loader of weights or command fails it until it has a row.
"""

import argparse
import ast
import configparser
import functools
import hashlib
import importlib
import io
import itertools
import json
import os
import random
import shutil
import struct
import sys
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file
from sound_folders import SIZE, make_sound_folders
from transformers import pipeline

import eccl.dataset_scripts  # noqa: F401  (registers the builders)
from eccl.dataset_scripts.base import FEATURES
from eccl.encoding_eccl import embed_images
from eccl.eval.heat_map import draw_heat_map
from eccl.hub.adapter import load_adapter
from eccl.hub.loading import load_model
from eccl.modeling_eccl import ECCLModel
from eccl.pipeline_eccl import TextToPersonRetrievalPipeline
from eccl.processing_eccl import ECCLImageProcessor, read_image
from eccl.search.explanation import draw_explanation, explain
from eccl.search.gallery import Gallery
from eccl.training.augmentation import augment_image
from eccl.utils.sheets import draw_contact_sheet, draw_ranked_images
from helpers import ROOT, clip_tokenizer, run, train_eccl


@pytest.fixture(scope="module")
def checkpoints(benchmark, backbone, tmp_path_factory):
    """A sound checkpoint of each kind, by the name of the kind."""
    return make_sound_folders(tmp_path_factory.mktemp("sound") / "checkpoints", benchmark, backbone)


# -- Pictures: every reader refuses the same files, and shows the others alike


def png_of_size(width: int, height: int) -> bytes:
    """The header of a PNG, without pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def png_with_long_text() -> bytes:
    info, file = PngInfo(), io.BytesIO()
    info.add_text("comment", "x" * 2**21, zip=True)
    Image.new("RGB", (8, 16)).save(file, "PNG", pnginfo=info)
    return file.getvalue()


def truncated_jpeg() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((64, 128), 80).convert("RGB").save(file, "JPEG")
    return file.getvalue()[:600]


def tiff_of_floats(value: float) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((16, 8), value, np.float32)).save(file, "TIFF")
    return file.getvalue()


BAD_FILES = {
    "a decompression bomb": lambda: png_of_size(30_000, 30_000),
    "a PNG with 2 MiB of text": png_with_long_text,
    "a truncated JPEG": truncated_jpeg,
    "an empty file": lambda: b"",
    "a text": lambda: b"no picture",
    "a PostScript file": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 16\nshowpage\n",
    "a format that Pillow reads and this project does not": lambda: b"P6 8 16 255\n" + bytes(8 * 16 * 3),
    "grey values that are NaN": lambda: tiff_of_floats(float("nan")),
    "negative grey values": lambda: tiff_of_floats(-1.0),
    "a named pipe": None,
    "a folder": None,
}


@pytest.fixture(params=BAD_FILES)
def bad_file(request, tmp_path):
    """A file that is no picture, with the name of one."""
    path = tmp_path / "photos" / "bad.png"
    path.parent.mkdir()
    if request.param == "a named pipe":
        os.mkfifo(path)
    elif request.param == "a folder":
        path.mkdir()
    else:
        path.write_bytes(BAD_FILES[request.param]())
    return path


def rows_of(path: Path) -> datasets.Dataset:
    """A data set of one row, as the builders make it, but without their checks."""
    row = {"image": str(path), "person_id": 1, "image_id": 0, "captions": ["a man"], "file_path": path.name}
    return datasets.Dataset.from_list([row], features=FEATURES)


def undecoded(path: Path) -> list[dict]:
    return list(rows_of(path).cast_column("image", datasets.Image(decode=False))["image"])


def builder_rows(path: Path) -> datasets.Dataset:
    folder = path.parent / "CUHK-PEDES"
    if not folder.is_dir():
        (folder / "imgs").mkdir(parents=True)
        shutil.move(path, folder / "imgs" / path.name)
        record = {"split": "train", "captions": ["a man"], "file_path": path.name, "id": 1}
        (folder / "reid_raw.json").write_text(json.dumps([record]))
    return datasets.load_dataset("cuhk_pedes", data_dir=str(folder), split="train")


def search_in(checkpoints: Path) -> TextToPersonRetrievalPipeline:
    model, processor = load_model(checkpoints / "merged")
    return TextToPersonRetrievalPipeline(model=model, processor=processor)


def pixels(checkpoints: Path, image) -> np.ndarray:
    return ECCLImageProcessor(size={"height": 32, "width": 16})(image, return_tensors="np")["pixel_values"][0]


def encode(checkpoints: Path, dataset) -> np.ndarray:
    return embed_images(*load_model(checkpoints / "merged"), dataset, progress=False).numpy()


def index(checkpoints: Path, images) -> np.ndarray:
    return search_in(checkpoints).index(images, progress=False).image_embeds.numpy()


@functools.cache
def gallery_of(checkpoints: Path) -> Gallery:
    """A gallery with one picture; it stays open."""
    base = checkpoints / "base.png"
    Image.effect_noise((24, 48), 60).convert("RGB").save(base)
    gallery = Gallery.open(*load_model(checkpoints / "merged"), checkpoints / "gallery.db")
    gallery.add([base], progress=False)
    return gallery


def vector_in_gallery(checkpoints: Path, path: Path) -> np.ndarray:
    gallery = gallery_of(checkpoints)
    gallery.add([path], progress=False)
    identity = hashlib.sha256(path.read_bytes()).hexdigest()
    return np.asarray(gallery.store.get([identity])[identity]["vector"])


def score_of_query(checkpoints: Path, path: Path) -> np.ndarray:
    gallery = gallery_of(checkpoints)
    scores = {match.path: match.score for match in gallery.search(None, len(gallery), image=path)}
    return np.asarray(scores[str(checkpoints / "base.png")])


# Each gives an array that depends on the pixels of the picture.
READERS = {
    "read_image of a path": lambda path, _: np.asarray(read_image(path)),
    "read_image of an open file": lambda path, _: np.asarray(read_image(path.open("rb"))),
    "read_image of a PIL image": lambda path, _: np.asarray(read_image(Image.open(path))),
    "the image processor": lambda path, checkpoints: pixels(checkpoints, Image.open(path)),
    "augmentation": lambda path, _: np.asarray(augment_image(path, 32, 16, random.Random(0))),
    "the pipeline, a list": lambda path, checkpoints: index(checkpoints, [str(path)]),
    "the pipeline, a generator": lambda path, checkpoints: index(checkpoints, (each for each in [path])),
    "the pipeline, undecoded": lambda path, checkpoints: index(checkpoints, undecoded(path)),
    "the pipeline, a column": lambda path, checkpoints: index(checkpoints, rows_of(path)["image"]),
    "the pipeline, a data set": lambda path, checkpoints: index(checkpoints, rows_of(path)),
    "a builder": lambda path, _: np.asarray(read_image(builder_rows(path)[0]["image"])),
    "embed_images": lambda path, checkpoints: encode(checkpoints, rows_of(path)),
    "a sheet of results": lambda path, _: np.asarray(draw_ranked_images([("a man", [(path, None)])], height=90)),
    "a contact sheet": lambda path, _: np.asarray(draw_contact_sheet(rows_of(path))),
    "a heat map": lambda path, _: np.asarray(draw_heat_map(read_image(path), torch.zeros(2, 1), "a man")),
    "a gallery": lambda path, checkpoints: vector_in_gallery(checkpoints, path),
    "the query of a gallery": lambda path, checkpoints: score_of_query(checkpoints, path),
    "an explanation": lambda path, checkpoints: explain(*load_model(checkpoints / "merged"), path, "a man").overall,
    "a drawn explanation": lambda path, _: np.asarray(draw_explanation(path, np.zeros((4, 2), dtype=np.float32))),
}
# Pillow or datasets open the file in these places, before this project sees it.
OPENED_BY_OTHERS = {
    "read_image of an open file",
    "read_image of a PIL image",
    "the image processor",
    "a contact sheet",
}


@pytest.mark.parametrize("reader", [name for name in READERS if name not in OPENED_BY_OTHERS])
def test_every_reader_names_the_file_that_it_cannot_read(reader, bad_file, checkpoints):
    with pytest.raises(ValueError, match=r"bad\.png") as error:
        READERS[reader](bad_file, checkpoints)
    assert "\n" not in str(error.value) or reader == "a builder"


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_has_a_limit_on_pixels(reader, checkpoints, tmp_path, monkeypatch):
    Image.new("RGB", (60, 100)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60 * 100)
    READERS[reader](tmp_path / "large.png", checkpoints)
    Image.new("RGB", (61, 100)).save(tmp_path / "large.png")
    shutil.rmtree(tmp_path / "CUHK-PEDES", ignore_errors=True)
    with pytest.raises(ValueError, match=r"61 x 100 pixels, the limit is 6,000"):
        READERS[reader](tmp_path / "large.png", checkpoints)


def test_no_other_program_is_started(tmp_path, monkeypatch):
    """Pillow would start Ghostscript for PostScript, whatever the name of the file is."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript is started"))
    Image.new("RGB", (8, 16)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"a\.jpg cannot be read as an image: cannot identify"):
        read_image(tmp_path / "a.jpg")


def test_an_index_can_skip_every_bad_file_and_lists_it(bad_file, checkpoints):
    Image.new("RGB", (8, 16), "red").save(bad_file.with_name("a.png"))
    Image.new("RGB", (8, 16), "blue").save(bad_file.with_name("c.png"))
    search = search_in(checkpoints)
    images = [bad_file.with_name(name) for name in ("a.png", "bad.png", "c.png")]
    with pytest.raises(ValueError, match=r"bad\.png"):
        search.index(images, progress=False)
    search.index(images, progress=False, on_bad_image="skip")
    assert len(search.skipped) == 1 and "bad.png" in search.skipped[0]
    found = search("a man", top_k=3)
    assert sorted((match["index"], Path(match["path"]).name) for match in found) == [(0, "a.png"), (2, "c.png")]


def turned(image: Image.Image, path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)


GREY = np.asarray(Image.effect_noise((24, 48), 90))
# The same picture, stored in another way; all must give what its 8-bit twin gives.
WAYS_TO_STORE = {
    "turned, with an EXIF orientation": ("png", lambda path: turned(Image.fromarray(GREY), path)),
    "16-bit grey": ("png", lambda path: Image.fromarray(GREY.astype(np.uint16) * 257).save(path)),
    "16-bit grey, big-endian": (
        "tif",
        lambda path: Image.frombytes("I;16B", (24, 48), (GREY.astype(">u2") * 257).tobytes()).save(path),
    ),
    "32-bit integers of 16 bits": ("tif", lambda path: Image.fromarray(GREY.astype(np.int32) * 257).save(path)),
    "floats from 0 to 1": ("tif", lambda path: Image.fromarray((GREY / 255).astype(np.float32)).save(path)),
    "floats from 0 to 255": ("tif", lambda path: Image.fromarray(GREY.astype(np.float32)).save(path)),
    "palette": ("gif", lambda path: Image.fromarray(GREY).save(path)),
    "transparent": ("png", lambda path: Image.fromarray(np.stack([GREY] * 3 + [255 - GREY], -1)).save(path)),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("way", WAYS_TO_STORE)
def test_a_picture_means_the_same_in_every_place(reader, way, checkpoints, tmp_path):
    suffix, store = WAYS_TO_STORE[way]
    for name in ("twin", "stored"):
        (tmp_path / name).mkdir()
    twin, stored = tmp_path / "twin" / "a.png", tmp_path / "stored" / f"a.{suffix}"
    Image.fromarray(GREY).convert("RGB").save(twin)
    store(stored)
    expected, found = (READERS[reader](path, checkpoints) for path in (twin, stored))
    np.testing.assert_array_equal(found, expected)


@functools.cache
def calls_of_files() -> dict[str, set[str]]:
    """What each file of the package calls."""
    tracked = [path.relative_to(ROOT) for path in sorted(ROOT.rglob("*.py"))]
    places = [place for place in tracked if place.parts[0] not in ("tests", "assets", "build", "demo")]
    return {
        place.as_posix(): {
            ast.unparse(node.func)
            for node in ast.walk(ast.parse((ROOT / place).read_text(encoding="utf-8")))
            if isinstance(node, ast.Call)
        }
        for place in places
        if not place.parts[0].startswith(".")
    }


def calls(name: str) -> set[str]:
    """The files of the package that call a function or method of this name."""
    return {place for place, called in calls_of_files().items() if any(each.endswith(name) for each in called)}


def test_the_table_of_readers_is_complete():
    # `describe` reads the sizes of images that were read before, the page that of an upload before it is decoded.
    assert calls("Image.open") == {"processing_eccl.py", "dataset_scripts/quality.py", "search/app_service.py"}
    assert calls("read_image") == {
        "processing_eccl.py",  # the image processor
        "pipeline_eccl.py",
        "encoding_eccl.py",
        "training/augmentation.py",
        "training/pairs.py",
        "dataset_scripts/image_checks.py",  # the builders
        "dataset_scripts/tables.py",
        "dataset_scripts/quality.py",  # images that were read before
        "eval/heat_map.py",
        "utils/sheets.py",
        "search/indexing.py",
        "search/gallery.py",
        "search/explanation.py",
        "search/app_service.py",  # an upload, which has no name: its tests are in tests/search
    }


# -- Weights: every loader refuses what is not the model's, by the name of the tensor


def change_weights(folder: Path, change) -> None:
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def longest_name(tensors: dict) -> str:
    """A layer's weight, which every kind of checkpoint has."""
    return max(sorted(name for name, tensor in tensors.items() if tensor.ndim == 2 and "layers.1" in name), key=len)


def remove(tensors: dict) -> None:
    del tensors[longest_name(tensors)]


def add(tensors: dict) -> None:
    name = longest_name(tensors)
    tensors[name.replace("layers.1", "layers.7")] = tensors[name].clone()


def reshape(tensors: dict) -> None:
    name = longest_name(tensors)
    tensors[name] = torch.zeros(len(tensors[name]) + 1, tensors[name].shape[1])


def poison(value: float):
    def change(tensors: dict) -> None:
        tensors[longest_name(tensors)][0, 0] = value

    return change


DAMAGES = {
    "a missing tensor": (remove, r"layers\.1"),
    "a tensor of another model": (add, r"layers\.7"),
    "a tensor of another shape": (reshape, r"layers\.1"),
    "NaN": (poison(float("nan")), r"layers\.1"),
    "infinity": (poison(float("inf")), r"layers\.1"),
}
LOADERS = {
    "load_model, merged": ("merged", lambda folder, _: load_model(folder)),
    "load_model, adapter": ("adapter", lambda folder, _: load_model(folder)),
    "load_model, CLIP": ("clip", lambda folder, _: load_model(folder)),
    "load_adapter": ("adapter", lambda folder, _: load_adapter(folder)),
    "a second adapter": (
        "adapter",
        lambda folder, sound: load_adapter(sound / "adapter").load_adapter(str(folder), "second"),
    ),
    "from_clip, ECCL": ("backbone", lambda folder, _: ECCLModel.from_clip(str(folder), SIZE, prompt_depth=2)),
    "from_clip, CLIP": ("clip", lambda folder, _: ECCLModel.from_clip(str(folder), SIZE, prompt_depth=2)),
    "the pipeline": (
        "merged",
        lambda folder, _: pipeline("text-to-person-retrieval", model=str(folder), trust_remote_code=True),
    ),
}


# transformers refuses a tensor of another shape before the pipeline is made.
LOADED_BY_TRANSFORMERS = ("the pipeline", "a tensor of another shape")


@pytest.mark.parametrize(
    "loader, damage", [pair for pair in itertools.product(LOADERS, DAMAGES) if pair != LOADED_BY_TRANSFORMERS]
)
def test_every_loader_names_the_tensor_that_does_not_fit(loader, damage, checkpoints, tmp_path):
    kind, load = LOADERS[loader]
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoints / kind, folder)
    change, named = DAMAGES[damage]
    change_weights(folder, change)
    with pytest.raises(ValueError, match=named) as error:
        load(folder, checkpoints)
    assert "damaged" in str(error.value)


@pytest.mark.parametrize("loader", [name for name in LOADERS if name != "the pipeline"])
@pytest.mark.parametrize("keep", [0, 40])
def test_every_loader_names_the_checkpoint_whose_file_is_cut_off(loader, keep, checkpoints, tmp_path):
    kind, load = LOADERS[loader]
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoints / kind, folder)
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="damaged"):
        load(folder, checkpoints)


@pytest.mark.parametrize("loader", LOADERS)
def test_every_loader_takes_what_is_whole(loader, checkpoints):
    kind, load = LOADERS[loader]
    load(checkpoints / kind, checkpoints)


@pytest.mark.parametrize("kind", ["merged", "adapter", "clip"])
def test_a_checkpoint_without_its_vocabulary_is_refused(kind, checkpoints, tmp_path):
    shutil.copytree(checkpoints, tmp_path / "all")
    (tmp_path / "all" / ("backbone" if kind == "adapter" else kind) / "tokenizer.json").unlink()
    base = str(tmp_path / "all" / "backbone") if kind == "adapter" else None
    with pytest.raises(ValueError, match=r"the tokenizer of .* has no vocabulary: tokenizer\.json"):
        load_model(tmp_path / "all" / kind, base)


@pytest.mark.parametrize("place", ["load_model", "the pipeline"])
@pytest.mark.parametrize(
    "file, change, message",
    [
        (
            "processor_config.json",
            {"image_processor": {"size": {"height": 64, "width": 32}}},
            "images of 64 x 32 pixels",
        ),
        ("tokenizer.json", {}, "the tokenizer has 49408 tokens, the model embeds 514"),
    ],
)
def test_a_processor_of_another_model_is_refused(place, file, change, message, checkpoints, tmp_path):
    shutil.copytree(checkpoints / "merged", tmp_path / "mixed")
    if file == "tokenizer.json":
        clip_tokenizer().save_pretrained(tmp_path / "mixed")
    else:
        content = json.loads((tmp_path / "mixed" / file).read_text())
        for key, value in change.items():
            content[key] = content[key] | value if isinstance(value, dict) else value
        (tmp_path / "mixed" / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        LOADERS["load_model, merged" if place == "load_model" else place][1](tmp_path / "mixed", checkpoints)


def test_the_table_of_loaders_is_complete():
    """Each place that loads weights goes through one of the functions that check them."""
    assert calls("Model.from_pretrained") == {"hub/adapter.py"}  # `ECCLPeftModel`, which checks
    assert calls("model_class.from_pretrained") == {"modeling_eccl.py"}
    assert calls("super().from_pretrained") == {"modeling_eccl.py"}
    # It reads only files with the digests that `onnx.json` names; tests/hub/test_export.py damages them.
    assert calls("InferenceSession") == {"hub/onnx_encoder.py"}


# -- Commands: one line and exit status 2, before the work


def find_commands() -> dict[str, object]:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options.entry_points"]["console_scripts"].split()
    modules = [line.split(":")[0] for line in lines if line.startswith("eccl.")]
    commands = {name.removeprefix("eccl."): importlib.import_module(name) for name in modules}
    return commands | {"train_eccl": train_eccl}


COMMANDS = find_commands()


def options_of(command) -> list[argparse.Action]:
    actions = command.make_parser()._actions
    # Without the name of one of its commands, `eccl-gallery` searches.
    return next((action.choices["search"]._actions for action in actions if is_list_of_commands(action)), actions)


def is_list_of_commands(action: argparse.Action) -> bool:
    return isinstance(action, argparse._SubParsersAction)


def has(command, name: str) -> bool:
    return any(action.dest == name for action in options_of(command))


@pytest.fixture
def values(checkpoints, benchmark, tmp_path):
    """For each option that a command requires, a value that is right."""
    photos = tmp_path / "gallery"
    photos.mkdir()
    Image.effect_noise((16, 32), 90).convert("RGB").save(photos / "good.png")
    return {
        "model": checkpoints / "merged",
        "images": photos,
        "image": photos / "good.png",
        "query": "a man in a coat",
        "sentence": "a man in a coat",
        "phrase": "coat",
        "gallery": "gallery.db",
        "dataset": "cuhk_pedes",
        "name": "cuhk_pedes",
        "data_dir": benchmark,
        "output_dir": tmp_path / "out",
        "checkpoint": ROOT / "tests" / "goldens" / "clip_openai.pt",
        "folder": checkpoints / "merged",
    }


def words_for(command, values: dict, **changes) -> list[str]:
    """The arguments of a command: its required options, and the changed ones."""
    given = values | changes
    if command is train_eccl:
        words = ["--dataset_name", "cuhk_pedes", "--data_dir", str(given["data_dir"]), "--init_from"]
        words += [str(changes.get("model", given["model"].parent / "backbone"))]
        words += ["--output_dir", str(given["output_dir"]), "--max_steps", "1", "--disable_tqdm", "True"]
        return [*words, "--per_device_train_batch_size", "4", "--image_size", "32", "16"]
    words = []
    # A benchmark needs its folder; other data sets do not. A folder can be searched without a gallery.
    wanted = {"data_dir", *(("model", "images", "query") if command is COMMANDS["search.commands"] else ())}
    # Without a data set, it draws its own.
    wanted |= {"dataset"} if command is COMMANDS["eval.compare_methods"] else set()
    for action in options_of(command):
        if not action.option_strings:
            words += [] if action.nargs == "?" else [str(given[action.dest])]
        elif action.required or action.dest in changes or action.dest in wanted:
            words += [action.option_strings[0], str(given[action.dest])]
    return words


def refusal(command, words: list[str], capsys) -> str:
    """Runs a command that must refuse its arguments, and returns the line that says why."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        command.main(words)
    err = capsys.readouterr().err
    assert end.value.code == 2, err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and err.rstrip().endswith(lines[0]), err
    return lines[0]


# The page needs a gallery before it needs a model: its tests are in tests/search. `eccl-space` only writes the name.
NOT_LOADING = ("search.app", "search.space")
WITH_MODEL = [name for name, command in COMMANDS.items() if has(command, "model") and name not in NOT_LOADING]
WITH_MODEL.append("train_eccl")


@pytest.mark.parametrize("name", WITH_MODEL)
@pytest.mark.parametrize("damage", ["a missing tensor", "NaN"])
def test_every_command_refuses_a_model_that_is_not_whole(name, damage, values, tmp_path, capsys):
    kind = "backbone" if name == "train_eccl" else "merged"
    folder = tmp_path / "damaged"
    shutil.copytree(values["model"].parent / kind, folder)
    change, named = DAMAGES[damage]
    change_weights(folder, change)
    line = refusal(COMMANDS[name], words_for(COMMANDS[name], values, model=folder), capsys)
    assert "damaged" in line and named.replace("\\", "") in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", WITH_MODEL)
def test_every_command_refuses_a_model_that_is_not_there(name, values, tmp_path, capsys):
    absent = tmp_path / "absent"
    assert str(absent) in refusal(COMMANDS[name], words_for(COMMANDS[name], values, model=absent), capsys)


READS_PICTURES = [
    name for name, command in COMMANDS.items() if any(has(command, x) for x in ("images", "image", "data_dir"))
]


@pytest.mark.parametrize("name", READS_PICTURES)
def test_every_command_names_a_picture_that_it_cannot_read(name, values, benchmark, tmp_path, capsys):
    shutil.copytree(benchmark, tmp_path / "set")
    bad = next((tmp_path / "set" / "imgs").rglob("*.jpg"))
    bad.write_bytes(b"no picture")
    changes = {"images": bad.parent, "image": bad, "data_dir": tmp_path / "set"}
    # `eccl-gallery` searches either a folder or with a picture.
    changes = {option: value for option, value in changes.items() if has(COMMANDS[name], option)}
    if len(changes) > 1 and name == "search.commands":
        del changes["image"]
    assert bad.name in refusal(COMMANDS[name], words_for(COMMANDS[name], values, **changes), capsys)


WITH_OUTPUT = [
    (name, option)
    for name, option in itertools.product(COMMANDS, ["output", "output_dir", "cache_dir"])
    if has(COMMANDS[name], option)
]


@pytest.mark.parametrize("name, option", WITH_OUTPUT)
def test_every_command_refuses_an_output_that_cannot_be_written(name, option, values, tmp_path, capsys, monkeypatch):
    command = COMMANDS[name]
    (tmp_path / "file").write_text("")
    # The check comes before the work.
    for module in ("hub.loading", "eval.scoring"):
        monkeypatch.setattr(importlib.import_module(f"eccl.{module}"), "load_model", None)
    path = tmp_path / "file" / ("out.png" if option == "output" else "out")
    assert "file" in refusal(command, words_for(command, values, **{option: path}), capsys)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_refuses_words_instead_of_numbers(name, values, capsys):
    command = COMMANDS[name]
    numbers = [action for action in options_of(command) if callable(action.type) and action.option_strings]
    numbers = [action for action in numbers if action.nargs is None and isinstance(action.default, int)]
    for action in numbers[:40]:
        if isinstance(action.default, bool) or action.help == argparse.SUPPRESS:
            continue
        option = action.option_strings[0]
        line = refusal(command, [*words_for(command, values), option, "many"], capsys)
        assert option.lstrip("-") in line and "many" in line


def test_a_name_that_is_not_utf8_can_be_printed(values, tmp_path, monkeypatch):
    name = os.fsdecode(b"caf\xe9.png")
    Image.new("RGB", (8, 16)).save(values["images"] / "x.png")
    (values["images"] / "x.png").rename(values["images"] / name)
    output = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", output)
    COMMANDS["search.commands"].main(words_for(COMMANDS["search.commands"], values))
    output.flush()
    assert rb"caf\udce9.png" in output.buffer.getvalue()


def test_a_picture_is_not_written_into_the_gallery_that_is_searched(values, capsys):
    command = COMMANDS["search.commands"]
    output = values["images"] / "found.png"
    line = refusal(command, words_for(command, values, output=output), capsys)
    assert "the next search would find it" in line and not output.exists()


# -- Training: settings that make no sense


@pytest.mark.parametrize(
    "setting, message",
    [
        ("--max_steps -1 --num_train_epochs -1", "num_train_epochs is -1"),
        ("--max_steps -1 --num_train_epochs 0", "num_train_epochs is 0"),
        ("--max_steps 0", "max_steps is 0"),
        ("--learning_rate -1", "learning_rate is -1"),
        ("--lora_learning_rate nan", "lora_learning_rate is nan"),
        ("--tal_temperature nan", "tal_temperature is nan"),
        ("--identity_memory_momentum 1.5", "identity_memory_momentum is 1.5"),
        ("--tal_margin -0.1", "tal_margin is -0.1"),
        ("--sdm_temperature nan", "sdm_temperature is nan"),
        ("--interaction_depth 0", "interaction_depth is 0"),
        ("--mask_probability 1.5", "mask_probability is 1.5"),
        ("--learning_rate_factors bias=-1", "learning_rate_factors: the factor of 'bias' is '-1'"),
        ("--learning_rate_factors cross=5", "learning_rate_factors: no trained parameter has 'cross' in its name"),
        ("--no_weight_decay bais", "no_weight_decay: no trained parameter has 'bais' in its name"),
        ("--lora_rank 0", "lora_rank is 0"),
        ("--warmup_epochs -1", "warmup_epochs is -1"),
        ("--per_device_train_batch_size 0", "per_device_train_batch_size is 0"),
        ("--per_device_train_batch_size 64 --dataloader_drop_last True", "dataloader_drop_last drops every batch"),
    ],
)
def test_training_refuses_a_setting_that_makes_no_sense(setting, message, values, tmp_path, capsys):
    line = refusal(train_eccl, [*words_for(train_eccl, values), *setting.split()], capsys)
    assert message in line and not (tmp_path / "out" / "config.json").exists()


def test_a_warmup_that_is_longer_than_the_run_is_said(values, caplog):
    words = words_for(train_eccl, values)
    words[words.index("--max_steps") : words.index("--max_steps") + 2] = ["--num_train_epochs", "1"]
    train_eccl.parse_arguments([*words, "--warmup_epochs", "4"])
    assert "warmup_epochs is 4, and the run has 1 epochs" in caplog.text


def test_the_published_recipe_takes_a_backbone_of_any_depth(values, benchmark, checkpoints, tmp_path):
    words = f"eccl_cuhk_pedes --init_from {checkpoints / 'backbone'} --max_steps 1 --per_device_train_batch_size 4"
    run(words + " --image_size 32 16 --eval_strategy no --load_best_model_at_end False", data_dir=benchmark,
        output_dir=tmp_path / "out")  # fmt: skip
    assert ECCLModel.from_pretrained(tmp_path / "out").config.prompt_depth == 2
