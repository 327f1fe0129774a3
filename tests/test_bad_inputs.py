"""A table of bad inputs: each is refused in one line, within ten seconds, and changes nothing.

Each row makes one mistake, or one attack, in a folder that is sound. `SECURITY.md` names this test.
"""

import functools
import io
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from fuzzing import Laboratory
from PIL import Image

pytestmark = pytest.mark.slow


def edit(file: str, **changes):
    """Sets values in a JSON file; the keys may have dots, written as two underscores."""

    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        for keys, value in changes.items():
            *parents, last = keys.split("__")
            place = content
            for key in parents:
                place = place[key]
            place[last] = value
        (folder / file).write_text(json.dumps(content))

    return change


config, processor, settings = (functools.partial(edit, f"{name}config.json") for name in ("", "processor_", "adapter_"))


def sparse(file: str, size: int):
    """Makes a file that is as large as its size says, and takes no place on the disk."""

    def change(folder: Path) -> None:
        with (folder / file).open("r+b") as opened:
            opened.truncate(size)

    return change


def write(file: str, content: str | bytes):
    def change(folder: Path) -> None:
        (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def header(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


# -- Checkpoints that were changed; the command is the search in a gallery

CONFIGURATIONS = {
    "100,000 layers": (config(text_config__num_hidden_layers=100_000), "num_hidden_layers is 100000"),
    "100,000 vision layers": (
        config(vision_config__num_hidden_layers=10**5),
        "num_hidden_layers is 100000",
    ),
    "no layers": (config(text_config__num_hidden_layers=0), "num_hidden_layers is 0"),
    "a wide layer": (config(text_config__hidden_size=10**9), "hidden_size is 1000000000"),
    "a wide inner layer": (
        config(vision_config__intermediate_size=10**12),
        "intermediate_size is 1000000",
    ),
    "a number of 5,000 digits": (
        lambda folder: (folder / "config.json").write_text(
            (folder / "config.json").read_text().replace('"hidden_size": 16', f'"hidden_size": 1{"0" * 5000}')
        ),
        "merged cannot be loaded: Exceeds the limit",
    ),
    "many heads": (config(text_config__num_attention_heads=10**6), "num_attention_heads is 1000000"),
    "no heads": (config(text_config__num_attention_heads=0), "num_attention_heads is 0"),
    "heads that do not fit": (config(text_config__num_attention_heads=3), "number of attention heads"),
    "a large vocabulary": (config(text_config__vocab_size=10**12), "vocab_size is 1000000000000"),
    "more words than weights": (config(text_config__vocab_size=1_999_999), "do not belong together"),
    "many positions": (config(text_config__max_position_embeddings=10**9), "max_position_embeddings is"),
    "a large image": (config(vision_config__image_size=[10**6, 10**6]), "patches, the limit is"),
    "small patches": (config(vision_config__patch_size=0), "patch_size is 0"),
    "large patches": (config(vision_config__patch_size=10**6), "patch_size is 1000000"),
    "many channels": (config(vision_config__num_channels=10**9), "num_channels is 1000000000"),
    "a wide projection": (config(projection_dim=10**9), "projection_dim is 1000000000"),
    "a negative projection": (config(projection_dim=-1), "projection_dim is -1"),
    "many prompts": (config(num_prompt_tokens=10**9), "num_prompt_tokens is 1000000000"),
    "deep prompts": (config(prompt_depth=10**9), "prompt_depth is 1000000000"),
    "another width": (config(projection_dim=17), "of another shape"),
    "an unknown activation": (config(text_config__hidden_act="exec"), "exec"),
    "a text as a size": (config(vision_config__image_size="large"), "image_size"),
    "a list as a number": (config(text_config__hidden_size=[16]), "hidden_size"),
    "a number as an encoder": (config(text_config=3), "text_config"),
    "a kernel of the Hub": (config(attn_implementation="evil/kernel"), "must not choose a kernel"),
    "quantised weights": (
        config(quantization_config={"quant_method": "hqq"}),
        "quantization_config is set",
    ),
    "an unknown precision": (config(dtype="float7"), "float7"),
    "another kind of model": (config(model_type="bert"), "model_type 'bert'"),
    "a list as a configuration": (write("config.json", "[]"), "config.json"),
    "an empty configuration": (write("config.json", ""), "config.json"),
    "a configuration of 200,000 brackets": (write("config.json", nested(200_000)), "does not describe a model"),
    "a configuration that is no text": (write("config.json", b"\xff\xfe\x00"), "config.json"),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "a number as a configuration": (write("config.json", "4"), "config.json"),
    "a billion labels": (config(text_config__num_labels=10**9), "num_labels is 1000000000"),
    "an encoder that is null": (config(vision_config=None), "do not belong together"),
    "layers that are null": (config(text_config__num_hidden_layers=None), "num_hidden_layers"),
    "a text instead of true": (config(text_config__output_hidden_states="x"), "output_hidden_states is 'x'"),
    "null instead of true": (config(return_dict=None), "return_dict is None"),
    "a tolerance that is null": (config(text_config__layer_norm_eps=None), "layer_norm_eps"),
    "a configuration of 8 GiB": (sparse("config.json", 2**33), "bytes, the limit is"),
    "a tokenizer of 8 GiB": (sparse("tokenizer.json", 2**33), "bytes, the limit is"),
    "half a pixel": (processor(image_processor__size={"height": 32.5, "width": 16}), "each side must"),
    "an object as deviations": (processor(image_processor__image_std={"a": 1}), "image_std is"),
    "a text as a factor": (processor(image_processor__rescale_factor="x"), "rescale_factor is 'x'"),
    "half a word": (processor(max_text_length=73.5), "max_text_length is 73.5"),
    "another size of images": (
        processor(image_processor__size={"height": 64, "width": 16}),
        "64 x 16",
    ),
    "huge images": (
        processor(image_processor__size={"height": 10**7, "width": 1}),
        "each side must",
    ),
    "no words": (processor(max_text_length=-4), "max_text_length is -4"),
    "a processor of brackets": (write("processor_config.json", nested(200_000)), "cannot be loaded"),
    "an empty vocabulary": (write("tokenizer.json", "{}"), "merged"),
    "no vocabulary": (lambda folder: (folder / "tokenizer.json").unlink(), "has no vocabulary"),
}
WEIGHTS = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "empty weights": (write("model.safetensors", b""), "do not belong together"),
    "a header of 2**60 bytes": (
        write("model.safetensors", (2**60).to_bytes(8, "little") + bytes(10**6)),
        "list of tensors",
    ),
    "a header of brackets": (
        write("model.safetensors", header(nested(100_000).encode()) + bytes(10**6)),
        "the weights of",
    ),
    "a tensor that overlaps the end": (
        write(
            "model.safetensors",
            header(b'{"a":{"dtype":"F32","shape":[1000000000],"data_offsets":[0,4000000000]}}') + bytes(10**6),
        ),
        "the weights of",
    ),
    "a pickle": (write("model.safetensors", pickle.dumps({"a": 1}) + bytes(10**6)), "merged"),
    "an index that leaves the folder": (
        lambda folder: (
            (folder / "model.safetensors").rename(folder.parent / "other.safetensors"),
            (folder / "model.safetensors.index.json").write_text(
                json.dumps({"metadata": {}, "weight_map": {"logit_scale": "../other.safetensors"}})
            ),
        ),
        "it must be a file in the same folder",
    ),
    "an index of an absolute path": (
        lambda folder: (
            (folder / "model.safetensors").unlink(),
            (folder / "model.safetensors.index.json").write_text('{"weight_map": {"logit_scale": "/etc/hostname"}}'),
        ),
        "it must be a file in the same folder",
    ),
    "an index of numbers": (
        lambda folder: (
            (folder / "model.safetensors").unlink(),
            (folder / "model.safetensors.index.json").write_text('{"weight_map": {"logit_scale": 1}}'),
        ),
        "it must be a file in the same folder",
    ),
    "an index of a secret": (
        lambda folder: (
            (folder / "model.safetensors").unlink(),
            (folder / ".env").write_text("TOKEN=x"),
            (folder / "model.safetensors.index.json").write_text('{"weight_map": {"logit_scale": ".env"}}'),
        ),
        "it must be a file in the same folder, of weights",
    ),
    "an index that is a list": (
        lambda folder: (
            (folder / "model.safetensors").unlink(),
            (folder / "model.safetensors.index.json").write_text("[]"),
        ),
        "is not an index of weights",
    ),
}
# A pattern that takes a time that doubles with each letter of a name.
PATTERN = "(([a-z_.0-9]+)+)+!"
ADAPTERS = {
    "a pattern of modules": (settings(target_modules=PATTERN), "target_modules is"),
    "a pattern of excluded modules": (settings(exclude_modules=PATTERN), "exclude_modules is"),
    "a pattern of ranks": (settings(rank_pattern={PATTERN: 4}), "rank_pattern is"),
    "a pattern of factors": (settings(alpha_pattern={PATTERN: 4}), "alpha_pattern is"),
    "a pattern of layers": (settings(layers_pattern=PATTERN, layers_to_transform=[1]), "layers_"),
    "rank 10,000,000": (settings(r=10**7), "the rank of LoRA is 10000000"),
    "rank 0": (settings(r=0), "r"),
    "a text as a rank": (settings(r="4"), "4"),
    "an infinite factor": (settings(lora_alpha=float("inf")), "lora_alpha is inf"),
    "another task": (settings(task_type="FEATURE_EXTRACTION"), "task_type 'FEATURE_EXTRACTION'"),
    "another method": (settings(peft_type="IA3"), "peft_type"),
    "an unknown method": (settings(peft_type="X"), "X"),
    "copied layers": (settings(layer_replication=[[0, 2]] * 1000), "layer_replication is"),
    "a module to import": (settings(megatron_config={"a": 1}, megatron_core="os"), "megatron_co"),
    "a decomposition": (settings(init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
    "other trained modules": (settings(modules_to_save=["text_model"]), "modules_to_save is"),
    "magnitudes": (settings(use_dora=True), "use_dora is True"),
    "a list as settings": (write("adapter_config.json", "[]"), "adapter"),
    "settings of 200,000 brackets": (write("adapter_config.json", nested(200_000)), "cannot be loaded"),
    "many prompts in an adapter": (config(num_prompt_tokens=10**6), "num_prompt_tokens is 1000000"),
    "a large image in an adapter": (config(vision_config__image_size=[8**6, 8**6]), "patches, the limit"),
    "a base that is not there": (
        lambda folder: (
            (folder / "base_folder.txt").unlink(),
            settings(base_model_name_or_path="/nowhere/base")(folder),
        ),
        "is not there: /nowhere/base",
    ),
    "no base": (settings(base_model_name_or_path=None), "does not name the model"),
}


def gallery_words(folder: Path, sound: Path) -> list[object]:
    return ["--model", folder, "--images", sound / "gallery", "--query", "a man"]


@pytest.mark.parametrize(
    "kind, name",
    [
        *(("merged", name) for name in (*CONFIGURATIONS, *WEIGHTS)),
        *(("adapter", name) for name in ADAPTERS),
    ],
)
def test_a_bad_checkpoint(kind, name, laboratory, sound):
    change, said = (CONFIGURATIONS | WEIGHTS if kind == "merged" else ADAPTERS)[name]
    with laboratory.case() as inputs:
        shutil.copytree(sound / kind, inputs / kind)
        change(inputs / kind)
        require_refusal(laboratory, "gallery", gallery_words(inputs / kind, sound), said)


def require_refusal(laboratory: Laboratory, command: str, words: list[object], said: str) -> None:
    outcome = laboratory.run(command, [str(word) for word in words])
    assert outcome.find_problems() == [], outcome.stderr[-2000:]
    lines = [line for line in outcome.stderr.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert outcome.status == 2, outcome.stderr[-2000:]
    assert said in lines[0]


# -- Data sets

RECORD = {"split": "train", "captions": ["a man"], "file_path": "a.jpg", "id": 1}


def annotation(*records: object, **changes: object):
    """An annotation of one record with changes, or of the given records."""
    return lambda folder: (folder / "reid_raw.json").write_text(json.dumps([*records] or [RECORD | changes]))


DATA = {
    "an annotation that is no JSON": (write("reid_raw.json", "[{]"), "reid_raw.json"),
    "an annotation of brackets": (write("reid_raw.json", nested(200_000)), "reid_raw.json"),
    "an empty annotation": (write("reid_raw.json", ""), "reid_raw.json"),
    "an annotation without records": (write("reid_raw.json", "[]"), "reid_raw.json"),
    "an object as an annotation": (write("reid_raw.json", "{}"), "reid_raw.json"),
    "an annotation that is no text": (write("reid_raw.json", b"\xff\xfe"), "reid_raw.json"),
    "no annotation": (lambda folder: (folder / "reid_raw.json").unlink(), "reid_raw.json"),
    "a number as a record": (annotation(3), "record 0"),
    "a record without captions": (annotation({key: RECORD[key] for key in ("split", "file_path", "id")}), "captions"),
    "no captions": (annotation(captions=[]), "captions"),
    "a caption of a megabyte": (annotation(captions=["a " * 2**19]), "characters, the limit is"),
    "an entity of 5,000 digits": (annotation(captions=["&#" + " " * 5000]), "caption"),
    "an annotation of 8 GiB": (sparse("reid_raw.json", 2**33), "bytes, the limit is"),
    "an empty caption": (annotation(captions=[" "]), "caption"),
    "a number as a caption": (annotation(captions=[4]), "caption"),
    "a text as captions": (annotation(captions="a man"), "captions"),
    "a text as an id": (annotation(id="one"), "id"),
    "an id that is not whole": (annotation(id=1.5), "id"),
    "a huge id": (annotation(id=10**30), "id"),
    "an unknown split": (annotation(split="dev"), "dev"),
    "a list as a split": (annotation(split=["train"]), "split"),
    "a path that leaves the folder": (annotation(file_path="../reid_raw.json"), "file_path"),
    "an absolute path": (annotation(file_path="/etc/hostname"), "file_path"),
    "a path with a NUL": (annotation(file_path="a\0.jpg"), "file_path"),
    "a path of 5,000 letters": (annotation(file_path="a" * 5000), "record 0: 'aaa"),
    "an empty path": (annotation(file_path=""), "file_path"),
    "a path with control characters": (annotation(file_path="\x1b[2J.jpg"), r"\x1b[2J.jpg"),
    "an image that is missing": (annotation(file_path="missing.jpg"), "missing.jpg"),
    "a folder as an image": (annotation(file_path="."), "is a folder"),
    "an image twice": (annotation(RECORD, RECORD), "a.jpg"),
    "a person in two splits": (
        lambda folder: (
            Image.new("RGB", (8, 8)).save(folder / "imgs" / "b.jpg"),
            annotation(RECORD, RECORD | {"split": "test", "file_path": "b.jpg"})(folder),
        ),
        "split",
    ),
    "a link out of the folder": (
        lambda folder: ((folder / "imgs" / "a.jpg").unlink(), (folder / "imgs" / "a.jpg").symlink_to("/etc/hostname")),
        "a.jpg",
    ),
    "an image of no bytes": (write("imgs/a.jpg", b""), "a.jpg"),
    "a text as an image": (write("imgs/a.jpg", "<svg onload=alert(1)>"), "a.jpg"),
    "a PostScript file as an image": (
        write("imgs/a.jpg", "%!PS-Adobe-3.0 EPSF-3.0\n"),
        "a.jpg",
    ),
    "an image of 600 MiB": (sparse("imgs/a.jpg", 600 * 2**20), "bytes, the limit is"),
    "a named pipe as an image": (
        lambda folder: ((folder / "imgs" / "a.jpg").unlink(), os.mkfifo(folder / "imgs" / "a.jpg")),
        "a.jpg",
    ),
}


@pytest.mark.parametrize("name", DATA)
def test_a_bad_data_set(name, laboratory):
    change, said = DATA[name]
    with laboratory.case() as inputs:
        (inputs / "set" / "imgs").mkdir(parents=True)
        Image.new("RGB", (8, 16)).save(inputs / "set" / "imgs" / "a.jpg")
        annotation()(inputs / "set")
        change(inputs / "set")
        require_refusal(laboratory, "describe", ["cuhk_pedes", "--data_dir", inputs / "set"], said)


# -- Checkpoints of the original code


class Evil:
    """Its pickle runs a program when it is loaded."""

    def __reduce__(self):
        return os.system, ("touch evil",)


def zip_bomb() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**26))
    return file.getvalue()


def saved(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


ORIGINALS = {
    "a pickle that runs a program": (lambda: pickle.dumps(Evil()), "plain tensors"),
    "a torch file that runs a program": (lambda: saved({"model": Evil()}), "plain tensors"),
    "an archive that unpacks to 64 MiB": (zip_bomb, "its content would take"),
    "a view of 4 TB": (lambda: saved({"visual.proj": torch.zeros(1).expand(10**12)}), "its content would take"),
    "a web page": (lambda: b"<!DOCTYPE html><html>", "is a web page"),
    "an empty file": (lambda: b"", "is empty"),
    "a list": (lambda: saved([torch.zeros(1)]), "holds a list"),
    "another model": (lambda: saved({"layer.weight": torch.zeros(1)}), "neither a CLIP"),
    "texts as weights": (lambda: saved({"visual.proj": "x"}), "is missing"),
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_a_bad_original_checkpoint(name, laboratory):
    make, said = ORIGINALS[name]
    with laboratory.case() as inputs:
        (inputs / "best.pth").write_bytes(make())
        require_refusal(laboratory, "convert", ["--checkpoint", inputs / "best.pth", "--output_dir", "OUT"], said)


# -- Recipes

RECIPES = {
    "a recipe that runs code": ("!!python/object/apply:os.system ['touch evil']", "is not YAML"),
    "a recipe that doubles 30 times": (
        "\n".join(["a0: &a0 [x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 30))]),
        "it has an alias",
    ),
    "a recipe of brackets": (nested(5000), "recipe.yaml"),
    "a list as a recipe": ("- max_steps: 1", "holds a list"),
    "an empty recipe": ("", "holds a NoneType"),
    "a tag that does not fit": ("seed: !!timestamp x", "is not YAML"),
    "an alias": ("seed: &a 1\nmax_steps: *a", "it has an alias"),
    "a number as an option": ("1: 2", "unknown option 1"),
    "a list instead of a choice": ("log_level: [x]", "log_level is ['x']"),
    "a number as losses": ("losses: 3", "losses"),
    "a list as a number": ("learning_rate: [1]", "learning_rate is [1]"),
    "a date as a seed": ("seed: 2026-01-01", "seed is"),
    "null as a number": ("num_train_epochs: null", "num_train_epochs is None"),
    "the number of an open file": ("accelerator_config: 2", "'2'"),
    "a package that is not there": ("deepspeed: x", "eepspeed"),
    "a schedule with wrong arguments": ("lr_scheduler_type: polynomial\nlr_scheduler_kwargs: {x: 1}", "do not fit"),
    "an evaluation of nothing": (
        "eval_on_start: true\neval_strategy: 'no'\nload_best_model_at_end: false",
        "eval_on_start needs a split",
    ),
    "an unknown option": ("max_stepz: 1", "unknown option max_stepz"),
    "a text as a number": ("learning_rate: fast", "learning_rate"),
    "an unknown loss": ("losses: {magic: 1}", "unknown magic"),
    "a negative loss": ("losses: {tal: -1}", "losses"),
    "a recipe that is no text": ("\x00\x01", "recipe.yaml"),
    "a rank of 10,000,000": ("lora_rank: 10000000", "the rank of LoRA is 10000000"),
    "prompts without room": ("num_prompt_tokens: 1000", "num_prompt_tokens is 1000"),
    "an image size that does not fit": ("image_size: [33, 16]", "image_size"),
    "an image size of one number": ("image_size: 32", "image_size is [32]"),
    "a split that is not there": ("eval_split: other", "other"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_bad_recipe(name, laboratory, sound):
    content, said = RECIPES[name]
    with laboratory.case() as inputs:
        (inputs / "recipe.yaml").write_text(content)
        words = [inputs / "recipe.yaml", "--dataset_name", "cuhk_pedes", "--data_dir", sound / "benchmark"]
        words += ["--init_from", sound / "backbone", "--max_steps", "1", "--disable_tqdm", "True"]
        require_refusal(laboratory, "train", [*words, "--output_dir", "OUT"], said)


# -- Options and folders; `{sound}` stands for the folder of the sound folders

SEARCH = "--model {sound}/merged --images {sound}/gallery --query man"
HEAT_MAP = "--model {sound}/merged --image {sound}/gallery/0.jpg --sentence man"
SCORE = "--model {sound}/merged --dataset cuhk_pedes --data_dir {sound}/benchmark"
TRAIN = "--dataset_name cuhk_pedes --data_dir {sound}/benchmark --init_from {sound}/backbone --output_dir"
OPTIONS = {
    "a query of two dashes": ("gallery", SEARCH.replace("--query man", "--query=--"), "expected one argument"),
    "a query that is no text": ("gallery", SEARCH.replace("man", "\ud800"), "is not valid"),
    "a phrase that is no text": ("heat_map", f"{HEAT_MAP} --phrase \ud800", "is not valid"),
    "no results": ("gallery", f"{SEARCH} --top_k 0", "--top_k is 0"),
    "no images": ("gallery", "--model {sound}/merged --images {sound}/original --query man", "contains no images"),
    "no batch": ("gallery", f"{SEARCH} --batch_size 0", "--batch_size"),
    "an output within the gallery": ("gallery", f"{SEARCH} --output {{sound}}/gallery/a.png", "inside the folder of"),
    "an output that is no picture": ("gallery", f"{SEARCH} --output found.exe", "does not end like a picture file"),
    "the image as the output": (
        "heat_map",
        f"{HEAT_MAP} --phrase man --output {{sound}}/gallery/0.jpg",
        "would be overwritten",
    ),
    "a phrase that is not there": ("heat_map", f"{HEAT_MAP} --phrase \x1b[2J", "is not in the sentence"),
    "the model as the output": ("evaluate", f"{SCORE} --output_dir {{sound}}/merged", "would be overwritten"),
    "a split of a pattern": ("evaluate", f"{SCORE} --split (a+)+$", "Unknown split"),
    "an earlier evaluation that is none": ("evaluate", f"{SCORE} --before {{sound}}/merged/config.json", "in percent"),
    "the backbone as the output": ("train", f"{TRAIN} {{sound}}/backbone", "would be overwritten"),
    "the data as the output": ("train", f"{TRAIN} {{sound}}/benchmark", "would be overwritten"),
    "the weights of others as the output": ("train", f"{TRAIN} {{sound}}/merged", "no training run wrote"),
    "to resume and to overwrite": (
        "train",
        f"{TRAIN} OUT --resume_from_checkpoint True --overwrite True",
        "contradict each other",
    ),
    "a folder of data to publish": ("publish", "{sound}/benchmark me/data --dry_run", "cannot be published"),
    "an adapter of a folder to publish": ("publish", "{sound}/adapter me/x --dry_run", "which nobody else has"),
    "a name that the Hub does not have": ("publish", "{sound}/merged ../../etc --dry_run", "Repo id must"),
    "public and private": ("publish", "{sound}/merged me/x --public --private", "not allowed with argument"),
    "offline": ("publish", "{sound}/merged me/x", "offline mode is set"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_bad_option(name, laboratory, sound):
    command, words, said = OPTIONS[name]
    with laboratory.case():
        require_refusal(laboratory, command, words.format(sound=sound).split(" "), said)


def test_the_table_has_more_than_a_hundred_rows():
    tables = (CONFIGURATIONS, WEIGHTS, ADAPTERS, DATA, ORIGINALS, RECIPES, OPTIONS)
    assert sum(map(len, tables)) >= 180
