"""Hostile inputs: whatever a checkpoint, a data set, a recipe or a sentence holds, a command works or refuses it.

Each case changes a sound folder and runs a command on it in a process with limits (`fuzzing.py`). The command must
succeed or print one line about the mistake. It must not run long, take much memory, print a traceback or control
characters, change its inputs, or write outside its output folder.
"""

import json
import reprlib
import shutil
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzzing import Laboratory, Outcome
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from sound_folders import SIZE

pytestmark = pytest.mark.slow


def examples(count: int) -> settings:
    """The same cases in each run, and none that are made smaller: a case is one or two changes."""
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


# -- Changes of files


@dataclass(frozen=True)
class Raw:
    """A value that is written into JSON as it is; it need not be JSON."""

    text: str


class Text(str):
    """A text of any length, which a message quotes in part."""

    def __repr__(self) -> str:
        return f"{SHORT.repr(str(self))} ({len(self):,} characters)"


SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 120
SHORT.maxlevel = 4


@dataclass(frozen=True, repr=False)
class Change:
    """A change of one file.

    Args:
        file: its path in the folder.
        what: the name of a method, without its underscore.
        where: a number that chooses the place; for `set`, the keys that lead to a value of JSON, with dots between.
        value: the new value or the new bytes.
    """

    file: str
    what: str
    where: int | str = 0
    value: Any = None

    def __repr__(self) -> str:
        return f"{self.file}: {self.what} {self.where!r} {SHORT.repr(self.value)}"

    def apply(self, folder: Path) -> None:
        path = folder / self.file
        # A change before this one may have taken the file away, or made it something else than JSON.
        if path.is_file():
            getattr(self, f"_{self.what}")(path)

    def _remove(self, path: Path) -> None:
        path.unlink()

    def _folder(self, path: Path) -> None:
        path.unlink()
        path.mkdir()

    def _link(self, path: Path) -> None:
        path.unlink()
        path.symlink_to(self.value)

    def _write(self, path: Path) -> None:
        path.write_bytes(self.value)

    def _cut(self, path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: self.where % (len(content) + 1)])

    def _flip(self, path: Path) -> None:
        self._splice(path, len(self.value))

    def _insert(self, path: Path) -> None:
        self._splice(path, 0)

    def _splice(self, path: Path, length: int) -> None:
        content = path.read_bytes()
        # Half of the changes are in the first 400 bytes, where headers are.
        place = self.where // 2 % (len(content) if self.where % 2 else min(400, len(content) or 1)) if content else 0
        path.write_bytes(content[:place] + self.value + content[place + length :])

    def _set(self, path: Path) -> None:
        content = read_json(path)
        place, keys = content, self.where.split(".")
        for key in keys[:-1]:
            if not isinstance(place, dict):
                return
            place = place.setdefault(key, {})
        if isinstance(place, dict):
            place[keys[-1]] = self.value
            write_json(path, content)

    def _record(self, path: Path) -> None:
        """Sets keys of one record of an annotation file."""
        content = read_json(path)
        if isinstance(content, list) and len(content) > self.where and isinstance(content[self.where], dict):
            content[self.where] |= self.value
            write_json(path, content)

    def _replace(self, path: Path) -> None:
        self._change_somewhere(path, lambda parent, key: parent.__setitem__(key, self.value))

    def _delete(self, path: Path) -> None:
        self._change_somewhere(path, lambda parent, key: parent.__delitem__(key))

    def _rename(self, path: Path) -> None:
        def rename(parent: Any, key: Any) -> None:
            if isinstance(parent, dict):
                parent[self.value if isinstance(self.value, str) else "other"] = parent.pop(key)

        self._change_somewhere(path, rename)

    def _repeat(self, path: Path) -> None:
        """Writes an entry twice: the second one in an object, or the same one again in a list."""

        def repeat(parent: Any, key: Any) -> None:
            if isinstance(parent, list):
                parent.append(parent[key])
            else:
                parent[key] = Raw(f"{dump(parent[key])}, {json.dumps(key)}: {dump(self.value)}")

        self._change_somewhere(path, repeat)

    def _change_somewhere(self, path: Path, change) -> None:
        """Goes down from the top, to a child that `where` chooses, or stops at the one that it has reached."""
        content = {"top": read_json(path)}
        parent, key, number = content, "top", self.where
        while isinstance(parent[key], (dict, list)) and parent[key]:
            children = list(parent[key]) if isinstance(parent[key], dict) else range(len(parent[key]))
            number, choice = divmod(number, len(children) + 1)
            if choice == len(children):
                break
            parent, key = parent[key], children[choice]
        change(parent, key)
        write_json(path, content.get("top"))


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file, or the list of tensors of a safetensors file; `None` for something else."""
    try:
        content = path.read_bytes()
        return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")] if is_weights(path) else content)
    except (ValueError, RecursionError, OverflowError):
        return None


def write_json(path: Path, value: Any) -> None:
    text = dump(value).encode("utf-8", "surrogatepass")
    if is_weights(path):
        content = path.read_bytes()
        rest = content[8 + int.from_bytes(content[:8], "little") :]
        text = len(text).to_bytes(8, "little") + text + rest
    path.write_bytes(text)


def is_weights(path: Path) -> bool:
    return path.suffix == ".safetensors"


def dump(value: Any) -> str:
    """Returns JSON, with the texts of `Raw` as they are."""
    raw: list[str] = []

    def mark(value: Any) -> str:
        raw.append(value.text)
        return f"raw {len(raw) - 1} text"

    text = json.dumps(value, default=mark)
    for number, each in enumerate(raw):
        text = text.replace(f'"raw {number} text"', each)
    return text


# -- Values


def nest(depth: int) -> Raw:
    return Raw("[" * depth + "]" * depth)


TEXTS = [
    *(
        "",
        " ",
        "x",
        "None",
        "true",
        "/",
        ".",
        "..",
        "../../x",
        "/etc/passwd",
        "~",
        "a\0b",
        "\x1b[2J\x1b]0;x\x07",
        "\r\nx",
    ),
    *("\ud800", "\u202e\u2066", "\u0301" * 500, "x" * 100_000, "-1", "%s%n{0}", "$(id)", "é" * 300, "\U0010ffff"),
]
NUMBERS = [-1, 0, 1, 2, 7, 255, 10**7, 2**31, 2**31 - 1, 2**63, 10**30, -(2**63), 0.5, 1e308, 1e-320, float("nan")]
NUMBERS += [float("inf"), -float("inf"), Raw("1" * 5000), Raw("-0"), Raw("1e999")]
SHAPES = [[], {}, [[]], [None], {"": None}, [1, 2, 3], {"x": {"x": {}}}, [[[[0]]]], nest(50), nest(2000), nest(200_000)]
SHAPES += [["x"] * 1000, [0] * 100_000, Raw('{"a": 1, "a": 2}'), Raw("[1,"), Raw("\x00")]
VALUES = st.one_of(
    st.sampled_from([None, True, False]),
    st.sampled_from(TEXTS),
    st.sampled_from(NUMBERS),
    st.sampled_from(SHAPES),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.recursive(
        st.none() | st.booleans() | st.integers(-5, 5) | st.text(string.printable, max_size=5),
        lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=5), part, max_size=3),
        max_leaves=6,
    ),
)
PLACES = st.integers(0, 2**40)


def changes_of_json(files: Sequence[str]) -> st.SearchStrategy:
    names, what = (
        st.sampled_from(files),
        st.sampled_from(["replace", "replace", "replace", "delete", "rename", "repeat"]),
    )
    return st.builds(Change, names, what, PLACES, VALUES)


def changes_of_bytes(files: Sequence[str]) -> st.SearchStrategy:
    names = st.sampled_from(files)
    links = st.sampled_from(["missing", "/etc/hostname", "/", ".", "../../../x"])
    return st.one_of(
        st.builds(Change, names, st.just("flip"), PLACES, st.binary(min_size=1, max_size=3)),
        st.builds(Change, names, st.just("insert"), PLACES, st.binary(min_size=1, max_size=8)),
        st.builds(Change, names, st.just("cut"), PLACES),
        st.builds(Change, names, st.just("write"), st.just(0), st.binary(max_size=20)),
        st.builds(Change, names, st.sampled_from(["remove", "folder"])),
        st.builds(Change, names, st.just("link"), st.just(0), links),
    )


def changes_of_keys(file: str, keys: Sequence[str], pairs: Sequence[tuple[str, Any]] = ()) -> st.SearchStrategy:
    """Sets one of some keys to any value, or to a value that is hostile for this key."""
    free = st.builds(Change, st.just(file), st.just("set"), st.sampled_from(keys), VALUES)
    return (st.sampled_from([Change(file, "set", *pair) for pair in pairs]) | free) if pairs else free


def some(*kinds: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(st.one_of(*kinds), min_size=1, max_size=2)


# -- Cases


class CaseError(AssertionError):
    """A case with an outcome that must not be; `Outcome` is in it for programs that collect them."""

    def __init__(self, case: str, outcome: Outcome):
        lines = outcome.stderr.replace("\r", "\n").splitlines()[-8:]
        shown = "\n".join(f"  | {line[:300]!r}"[:320] for line in lines)
        super().__init__("\n".join([case, *(f"- {problem}" for problem in outcome.find_problems()), shown]))
        self.outcome = outcome


def check(laboratory: Laboratory, command: str, words: Sequence[object], case: str) -> Outcome:
    outcome = laboratory.run(command, [str(word) for word in words])
    if outcome.find_problems():
        raise CaseError(f"{command}: {case}", outcome)
    return outcome


def check_changed(
    laboratory: Laboratory, sound: Path, command: str, kind: str, changes: Sequence[Change], as_option: str = "model"
) -> Outcome:
    """Runs a command on a copy of a sound folder with some changes."""
    with laboratory.case() as inputs:
        # The folder of a data set is named after it.
        folder = inputs / kind
        shutil.copytree(sound / kind, folder)
        for change in changes:
            change.apply(folder)
        return check(laboratory, command, words_of(command, sound, **{as_option: folder}), f"{kind}, {list(changes)}")


def words_of(command: str, sound: Path, **given: object) -> list[object]:
    """The arguments of a command on sound inputs, or on the given ones."""
    values = {"model": sound / "merged", "data_dir": sound / "benchmark", "images": sound / "gallery"}
    values |= {
        "image": next((sound / "gallery").iterdir()),
        "text": "a man in a red coat",
        "phrase": "red coat",
    } | given
    data = ["--data_dir", values["data_dir"]]
    model = ["--model", values["model"]]
    if command == "gallery":
        return [*model, "--images", values["images"], f"--query={values['text']}", "--output", "OUT/found.png"]
    if command == "heat_map":
        sentence = [f"--sentence={values['text']}", f"--phrase={values['phrase']}"]
        return [*model, "--image", values["image"], *sentence, "--output", "OUT/heat.png"]
    if command == "evaluate":
        return [*model, "--dataset", "cuhk_pedes", *data, "--output_dir", "OUT"]
    if command == "describe":
        return ["cuhk_pedes", *data]
    if command == "publish":
        return [values["model"], "me/model", "--dry_run"]
    if command == "convert":
        height, width = SIZE if "clip" in str(given["checkpoint"]) else (96, 32)
        return ["--checkpoint", given["checkpoint"], "--output_dir", "OUT", "--image_size", height, width]
    backbone = given.get("model", sound / "backbone")
    recipe = [given["recipe"]] if "recipe" in given else []
    words = [*recipe, *data, "--output_dir", "OUT", "--init_from", backbone, "--max_steps", "1"]
    words += [] if recipe else ["--dataset_name", "cuhk_pedes", "--per_device_train_batch_size", "4"]
    words += ["--image_size", *SIZE, "--eval_strategy", "no", "--save_strategy", "no", "--disable_tqdm", "True"]
    return [*words, "--load_best_model_at_end", "False"]


@pytest.mark.parametrize("kind", ["backbone", "merged", "sharded", "clip", "adapter"])
@pytest.mark.parametrize("command", ["gallery", "heat_map", "evaluate", "publish", "train"])
def test_the_sound_folders_are_accepted(command, kind, laboratory, sound):
    """Without this, every case could be refused for another reason than its change."""
    outcome = check_changed(laboratory, sound, command, kind, [])
    refused = (command == "publish" and kind == "adapter") or (command == "train" and kind not in ("backbone", "clip"))
    assert outcome.status == (2 if refused else 0), outcome.stderr


@pytest.mark.parametrize("command", ["evaluate", "describe", "train"])
def test_the_sound_benchmark_is_accepted(command, laboratory, sound):
    assert check_changed(laboratory, sound, command, "benchmark", [], "data_dir").status == 0


@pytest.mark.parametrize("name", ["clip_openai.pt", "irra_pretrained.pth", "eccl_original.pth"])
def test_the_sound_original_checkpoints_are_accepted(name, laboratory, sound):
    with laboratory.case():
        words = words_of("convert", sound, checkpoint=sound / "original" / name)
        assert check(laboratory, "convert", words, name).status == 0


# -- Data sets

ANNOTATION = "reid_raw.json"
RECORD_KEYS = ["split", "captions", "file_path", "id", "img_path", "processed_tokens"]
CAPTIONS = [
    ["\x1b[2J a man"],
    ["a " * 500_000],
    ["\u202e man"],
    ["man \ud800"],
    ["&#0; man &#x110000; a"],
    ["a"] * 3000,
]
CAPTIONS += [["a man" + "\u0301" * 2000], ["<|endoftext|> man"], [["a man"]], "a man", ["\0 a man"], ["\ufdfa" * 5000]]
PATHS = [
    "../x.jpg",
    "/etc/hostname",
    "a\0b.jpg",
    "x" * 300 + ".jpg",
    "a/" * 3000,
    ".",
    "",
    "\x1b[2J.jpg",
    "\udcff.jpg",
    "\n",
]


@st.composite
def records(draw) -> Change:
    """Sets a key of one of the first records."""
    key = draw(st.sampled_from(RECORD_KEYS))
    special = {"captions": CAPTIONS, "file_path": PATHS, "split": ["val", "validation", "train\0"], "id": [-1, 2**31]}
    values = st.sampled_from(special[key]) | VALUES if key in special else VALUES
    return Change(ANNOTATION, "record", draw(st.integers(0, 15)), {key: draw(values)})


@examples(35)
@given(
    st.sampled_from(["describe", "evaluate", "evaluate", "train"]),
    some(records(), changes_of_json([ANNOTATION]), changes_of_bytes([ANNOTATION])),
)
def test_annotations(laboratory, sound, command, changes):
    check_changed(laboratory, sound, command, "benchmark", changes, "data_dir")


def image_names(sound: Path) -> list[str]:
    return sorted(str(path.relative_to(sound / "benchmark")) for path in (sound / "benchmark").rglob("*.jpg"))


@examples(20)
@given(
    st.sampled_from(["describe", "evaluate"]),
    some(
        changes_of_json(["synthetic.json"]),
        changes_of_bytes(["synthetic.json", "0", "1"]),
        changes_of_keys("synthetic.json", ["oracle_rank1", "oracle_rank1.test", "labels", "seed"]),
    ),
)
def test_other_files_of_a_data_set(laboratory, sound, command, changes):
    """The names `0` and `1` are those of the first two images."""
    names = image_names(sound)
    changes = [
        Change(names[int(each.file)] if each.file.isdigit() else each.file, each.what, each.where, each.value)
        for each in changes
    ]
    check_changed(laboratory, sound, command, "benchmark", changes, "data_dir")


# -- Checkpoints

ENCODER_KEYS = [
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "hidden_act"),
    *("max_position_embeddings", "image_size", "patch_size", "num_channels", "projection_dim", "layer_norm_eps"),
    *("attention_dropout", "dropout", "initializer_range", "initializer_factor", "eos_token_id", "bos_token_id"),
    *("pad_token_id", "dtype", "torch_dtype", "attn_implementation", "_attn_implementation", "model_type"),
    *("quantization_config", "output_attentions", "output_hidden_states", "return_dict", "use_return_dict"),
    *("chunk_size_feed_forward", "is_encoder_decoder", "id2label", "num_labels", "tie_word_embeddings"),
]
MODEL_KEYS = [
    *("text_config", "vision_config", "projection_dim", "num_prompt_tokens", "prompt_depth", "architectures"),
    *("logit_scale_init_value", "initializer_factor", "model_type", "transformers_version", "auto_map", "dtype"),
    *("custom_pipelines", "attn_implementation", "quantization_config", "torch_dtype", "return_dict", "name_or_path"),
    *("_name_or_path", "sub_configs", "sub_configs_defaults", "attribute_map", "base_model_tp_plan", "_commit_hash"),
    *("output_attentions", "output_hidden_states", "output_loading_info", "trust_remote_code", "device_map", "config"),
    *("__class__", "__init__", "to_dict", "encoder_configs", "input_size", "validate_architecture", "self", "name"),
    *("_attn_implementation_internal", "_experts_implementation", "tie_word_embeddings", "problem_type", "label2id"),
    *("transformers_weights", "fusion_config", "base_config_key", "keys_to_ignore_at_inference", "_auto_class"),
]
CONFIG_KEYS = MODEL_KEYS + [f"{encoder}_config.{key}" for encoder in ("text", "vision") for key in ENCODER_KEYS]
CONFIG_PAIRS = [
    *(("text_config.hidden_act", each) for each in ("relu", "gelu", "xielu", "softmax", "swish", "laplace", "linear")),
    *(
        ("vision_config.hidden_act", each)
        for each in ("gelu_10", "gelu_pytorch_tanh", "hardtanh", "prelu", "", ["gelu"])
    ),
    *(
        ("dtype", each)
        for each in ("float64", "int8", "bool", "float8_e4m3fn", "auto", "save", "nn", "__name__", "x.y")
    ),
    *(("text_config.dtype", each) for each in ("float64", "int32", "complex64", "Tensor", "load", "__class__")),
    *(("vision_config.dtype", each) for each in ("float16", "bfloat16", "float8_e5m2", "qint8", "torch.float32")),
    *(("attn_implementation", each) for each in ("eager", "sdpa", "flash_attention_2", "flex_attention", "me/kernel")),
    *(
        ("_attn_implementation", each)
        for each in ("paged|eager", "flash_attention_3", "me/kernel", {"text_config": "x"})
    ),
    *(("_attn_implementation_internal", each) for each in ("me/kernel", "eager", "flex_attention", 1)),
    *(("text_config._attn_implementation", each) for each in ("flex_attention", "flash_attention_2", "me/kernel:x")),
    *(("vision_config._attn_implementation_internal", each) for each in ("me/kernel", "flex_attention", "x")),
    *(("quantization_config", {"quant_method": each}) for each in ("bitsandbytes", "gptq", "fp8", "quanto", "torchao")),
    ("text_config.quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    ("auto_map", {"AutoModel": "evil.Model", "AutoConfig": "evil.Config", "AutoProcessor": "evil.Processor"}),
    ("auto_map", {"AutoConfig": "other/repository--evil.Config"}),
    ("auto_map", {"AutoModel": ["evil.A", None]}),
    ("auto_map", {"../../x": "../../x.y"}),
    ("custom_pipelines", {"text-to-person-retrieval": {"impl": "../evil.Pipeline", "pt": ["AutoModel"]}}),
    ("custom_pipelines", {"x": {}}),
    ("custom_pipelines", {"x": {"impl": 1}}),
    ("vision_config.image_size", [32, 16, 8]),
    ("vision_config.image_size", [32]),
    ("vision_config.image_size", [2**40, 2**40]),
    ("vision_config.image_size", [[32], [16]]),
    ("vision_config.image_size", {"height": 32, "width": 16}),
    ("vision_config.patch_size", [8, 8]),
    ("vision_config.image_size", ["32", "16"]),
    ("text_config.eos_token_id", [1, 2]),
    ("text_config.num_attention_heads", 3),
    ("text_config.id2label", {"x": "y"}),
    ("num_labels", 10**9),
    ("text_config.num_labels", 10**9),
    ("transformers_weights", "../backbone/model.safetensors"),
    ("transformers_weights", "/etc/hostname"),
    ("logit_scale_init_value", 1e39),
    ("vision_config.attention_dropout", 2.0),
]
LOADING = ["gallery", "gallery", "heat_map", "evaluate", "publish", "train"]


@examples(75)
@given(
    st.sampled_from(LOADING),
    st.sampled_from(["merged", "clip", "backbone"]),
    some(
        changes_of_keys("config.json", CONFIG_KEYS, CONFIG_PAIRS),
        changes_of_keys("config.json", CONFIG_KEYS, CONFIG_PAIRS),
        changes_of_json(["config.json"]),
        changes_of_bytes(["config.json"]),
    ),
)
def test_configurations(laboratory, sound, command, kind, changes):
    check_changed(laboratory, sound, command, kind, changes)


WEIGHTS = "model.safetensors"
LARGE_HEADERS = [bytes([255] * 8), (2**40).to_bytes(8, "little"), (10**8).to_bytes(8, "little"), bytes(8)]


@examples(25)
@given(
    st.sampled_from(LOADING),
    st.sampled_from(["merged", "clip", "backbone"]),
    some(
        changes_of_json([WEIGHTS]),
        changes_of_bytes([WEIGHTS]),
        st.builds(Change, st.just(WEIGHTS), st.just("flip"), st.just(0), st.sampled_from(LARGE_HEADERS)),
        changes_of_keys(WEIGHTS, ["__metadata__", "__metadata__.format", "logit_scale", "logit_scale.shape"]),
        changes_of_keys(WEIGHTS, ["logit_scale.dtype", "logit_scale.data_offsets", "x"]),
    ),
)
def test_weights(laboratory, sound, command, kind, changes):
    check_changed(laboratory, sound, command, kind, changes)


INDEX = "model.safetensors.index.json"
SHARDS = [
    "../merged/model.safetensors",
    "/etc/hostname",
    "..",
    ".",
    "",
    "config.json",
    "model.safetensors",
    "a\0b",
    None,
]
SHARDS += ["x" * 5000, ["model.safetensors"], 1, "\\x", "\x1b[2J", "\ud800", "modeling_eccl.py", INDEX, {}]


@examples(20)
@given(
    st.sampled_from(["gallery", "gallery", "publish", "evaluate"]),
    some(
        st.builds(Change, st.just(INDEX), st.just("set"), st.just("weight_map.logit_scale"), st.sampled_from(SHARDS)),
        changes_of_keys(INDEX, ["weight_map", "metadata", "metadata.total_size", "weight_map.x", "x"]),
        changes_of_json([INDEX]),
        changes_of_bytes([INDEX]),
    ),
)
def test_indexes_of_weights(laboratory, sound, command, changes):
    check_changed(laboratory, sound, command, "sharded", changes)


# -- Adapters

ADAPTER = "adapter_config.json"
ADAPTER_KEYS = [
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "modules_to_save", "rank_pattern"),
    *("alpha_pattern", "layers_to_transform", "layers_pattern", "bias", "fan_in_fan_out", "use_rslora", "use_dora"),
    *("init_lora_weights", "layer_replication", "megatron_config", "megatron_core", "loftq_config", "eva_config"),
    *("corda_config", "runtime_config", "trainable_token_indices", "target_parameters", "lora_bias", "use_qalora"),
    *(
        "task_type",
        "peft_type",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "peft_version",
    ),
    *("alora_invocation_tokens", "arrow_config", "ensure_weight_tying", "qalora_group_size", "unknown", "__class__"),
]
ADAPTER_PAIRS = [
    ("target_modules", "(a+)+$"),
    ("target_modules", r".*\.(q_proj|k_proj)"),
    ("target_modules", "all-linear"),
    ("target_modules", "["),
    ("rank_pattern", {"(a+)+$": 4}),
    ("rank_pattern", {"q_proj": 10**7}),
    ("alpha_pattern", {"(": 4}),
    ("r", 10**7),
    ("r", 10**400),
    ("r", True),
    ("r", 4.0),
    ("lora_alpha", 10**400),
    ("lora_alpha", 1e308),
    ("lora_dropout", 2.0),
    ("lora_dropout", -1),
    ("lora_dropout", "x"),
    *(("task_type", each) for each in ("FEATURE_EXTRACTION", "CAUSAL_LM", "x", 1, [])),
    *(("peft_type", each) for each in ("LORA", "IA3", "PROMPT_TUNING", "X", "lora", 1, None, [], "PeftType.LORA")),
    *(("layer_replication", each) for each in ([[0, 10**6]], [[0, 2], [0, 2]], "x")),
    *(("megatron_core", each) for each in ("os", "antigravity", "this", 1)),
    ("megatron_config", {"x": 1}),
    *(
        ("init_lora_weights", each)
        for each in ("pissa", "pissa_niter_100000", "olora", "eva", "loftq", "gaussian", "x")
    ),
    ("auto_mapping", {"base_model_class": "X", "parent_library": "antigravity"}),
    ("auto_mapping", {"base_model_class": [], "parent_library": "../x"}),
    *(
        ("base_model_name_or_path", each)
        for each in ("me/base", "/etc", "./x", "../../../..", "a\0b", "\x1b[2J", 1, [])
    ),
    *(("revision", each) for each in ("main", "../x", 1)),
    *(("peft_version", each) for each in ("99.0", "x", "1" * 5000, 1, None, "0.1@x")),
    ("modules_to_save", ["text_model"]),
    ("runtime_config", {"ephemeral_gpu_offload": True}),
    ("loftq_config", {"loftq_bits": 4}),
]
DIGESTS = ["base_weights_sha256", "base_weights_sha256.float16", "base_weights_sha256.bfloat16"]


@examples(55)
@given(
    st.sampled_from(["gallery", "gallery", "evaluate", "publish"]),
    some(
        changes_of_keys(ADAPTER, ADAPTER_KEYS, ADAPTER_PAIRS),
        changes_of_keys(ADAPTER, ADAPTER_KEYS, ADAPTER_PAIRS),
        changes_of_json([ADAPTER, "config.json", "adapter_model.safetensors"]),
        changes_of_bytes([ADAPTER, "config.json", "adapter_model.safetensors", "base_folder.txt"]),
        changes_of_keys("config.json", CONFIG_KEYS + DIGESTS, CONFIG_PAIRS),
    ),
)
def test_adapters(laboratory, sound, command, changes):
    check_changed(laboratory, sound, command, "adapter", changes)


# -- Processors

PROCESSOR_FILES = ["processor_config.json", "tokenizer.json", "tokenizer_config.json"]
PROCESSOR_KEYS = [
    *("max_text_length", "processor_class", "auto_map", "image_processor", "image_processor.size", "chat_template"),
    *("image_processor.size.height", "image_processor.size.width", "image_processor.image_mean", "tokenizer"),
    *("image_processor.image_std", "image_processor.rescale_factor", "image_processor.resample", "image_processor.x"),
    *("image_processor.do_resize", "image_processor.do_normalize", "image_processor.do_rescale", "audio_tokenizer"),
    *("image_processor.do_convert_rgb", "image_processor.do_center_crop", "image_processor.crop_size"),
    *("image_processor.image_processor_type", "image_processor.data_format", "image_processor.do_pad"),
    *("image_processor.input_data_format", "image_processor.return_tensors", "image_processor.device", "text_kwargs"),
    *("image_processor.disable_grouping", "image_processor.pad_size", "image_processor.auto_map", "__class__"),
]
TOKENIZER_KEYS = [
    *("model_max_length", "tokenizer_class", "unk_token", "eos_token", "bos_token", "pad_token", "auto_map"),
    *("added_tokens_decoder", "extra_special_tokens", "additional_special_tokens", "padding_side", "truncation_side"),
    *(
        "tokenizer_file",
        "vocab_file",
        "vocab",
        "merges",
        "chat_template",
        "clean_up_tokenization_spaces",
        "do_lower_case",
    ),
    *("split_special_tokens", "errors", "add_prefix_space", "backend", "is_local", "name_or_path", "processor_class"),
    *("model_input_names", "max_length", "stride", "truncation_strategy", "pad_to_multiple_of", "from_slow", "x"),
]
TOKENIZER_JSON_KEYS = [
    *("version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder"),
    *("model", "model.type", "model.vocab", "model.merges", "model.unk_token", "model.dropout", "model.fuse_unk"),
    *("model.continuing_subword_prefix", "model.end_of_word_suffix", "model.byte_fallback", "model.ignore_merges"),
]
PATTERN = {"type": "Split", "pattern": {"Regex": "(a|a?)+$"}, "behavior": "Isolated", "invert": False}
TOKENIZER_JSON_PAIRS = [
    ("normalizer", {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"}),
    ("normalizer", {"type": "Replace", "pattern": {"Regex": ""}, "content": "b" * 10_000}),
    ("normalizer", {"type": "Prepend", "prepend": "x" * 10**6}),
    ("normalizer", None),
    ("pre_tokenizer", PATTERN),
    ("pre_tokenizer", None),
    ("post_processor", None),
    ("truncation", {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 10}),
    ("padding", {"strategy": {"Fixed": 10**7}, "direction": "Right", "pad_id": 1, "pad_type_id": 0, "pad_token": "x"}),
    ("padding", {"strategy": {"Fixed": 10**10}, "direction": "Right", "pad_id": 1, "pad_type_id": 0, "pad_token": "x"}),
    ("model", {"type": "WordLevel", "vocab": {"a": 0, "x": 10**6}, "unk_token": "a"}),
    ("model", {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0}),
    ("model.dropout", 1.0),
    ("model.vocab", {"a": 0, "b": 2**32 - 1}),
    ("added_tokens", [{"id": 2**31, "content": "x", "special": True}]),
    ("added_tokens", [{"id": 0, "content": "", "special": False, "single_word": False, "lstrip": False, "rstrip": False,
                       "normalized": False}]),
]  # fmt: skip
TOKENIZER_PAIRS = [
    ("tokenizer_class", "evil.Tokenizer"),
    ("tokenizer_class", "LlamaTokenizer"),
    ("auto_map", {"AutoTokenizer": ["evil.Slow", "evil.Fast"]}),
    ("added_tokens_decoder", {"10000000": {"content": "x", "special": True}}),
    ("added_tokens_decoder", {"x": {"content": "x"}}),
    ("extra_special_tokens", {"x": "y"}),
    ("extra_special_tokens", ["man"]),
    ("eos_token", {"__type": "AddedToken", "content": "x" * 10_000}),
    ("unk_token", None),
    ("pad_token", None),
    ("vocab_file", "/etc/hostname"),
    ("tokenizer_file", "/etc/hostname"),
    ("model_max_length", -1),
    ("padding_side", "left"),
    ("chat_template", "{% for i in range(10**9) %}x{% endfor %}"),
]
PROCESSOR_PAIRS = [
    ("image_processor.size", {"height": 10**9, "width": 10**9}),
    ("image_processor.size", {"shortest_edge": 10**6}),
    ("image_processor.size", {"height": "32", "width": "16"}),
    ("image_processor.size", {"height": 32.0, "width": 16.0}),
    ("image_processor.image_std", [0, 0, 0]),
    ("image_processor.image_mean", [0.5] * 1000),
    ("image_processor.rescale_factor", 1e38),
    ("image_processor.do_pad", True),
    ("image_processor.do_center_crop", True),
    ("image_processor.crop_size", {"height": 10**6, "width": 10**6}),
    ("max_text_length", 10**9),
    ("max_text_length", 3),
    ("max_text_length", 5000),
    ("max_text_length", 73.5),
    ("auto_map", {"AutoProcessor": "evil.Processor"}),
    ("text_kwargs", {"padding": "max_length", "max_length": 10**9}),
]


@examples(60)
@given(
    st.sampled_from(["gallery", "heat_map", "evaluate"]),
    st.sampled_from(["merged", "merged", "clip"]),
    some(
        changes_of_json(PROCESSOR_FILES),
        changes_of_bytes(PROCESSOR_FILES),
        changes_of_keys("processor_config.json", PROCESSOR_KEYS, PROCESSOR_PAIRS),
        changes_of_keys("tokenizer_config.json", TOKENIZER_KEYS, TOKENIZER_PAIRS),
        changes_of_keys("tokenizer.json", TOKENIZER_JSON_KEYS, TOKENIZER_JSON_PAIRS),
    ),
)
def test_processors(laboratory, sound, command, kind, changes):
    check_changed(laboratory, sound, command, kind, changes)


# -- Checkpoints of the original code


@examples(20)
@given(st.sampled_from(["clip_openai.pt", "irra_pretrained.pth", "eccl_original.pth"]), st.data())
def test_original_checkpoints(laboratory, sound, name, data):
    changes = data.draw(some(changes_of_bytes([name])))
    with laboratory.case() as inputs:
        shutil.copy(sound / "original" / name, inputs)
        for change in changes:
            change.apply(inputs)
        check(laboratory, "convert", words_of("convert", sound, checkpoint=inputs / name), f"{changes}")


# -- Recipes

RECIPE = {"dataset_name": "cuhk_pedes", "per_device_train_batch_size": 4, "learning_rate": 0.001, "losses": ["tal=1"]}
# The options that say where to write, how long to train, or that start another program, are the user's own.
RECIPE_KEYS = [
    *("dataset_name", "on_bad_image", "eval_split", "num_prompt_tokens", "prompt_depth", "tune", "lora_rank"),
    *("lora_alpha", "attn_implementation", "scratch_config", "vocab_size", "save_dtype", "losses", "tal_temperature"),
    *("tal_margin", "identity_memory_temperature", "identity_memory_momentum", "instance_memory_temperature"),
    *("num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size", "learning_rate", "weight_decay"),
    *("lora_learning_rate", "warmup_epochs", "adam_epsilon", "adam_beta1", "max_grad_norm", "seed", "data_seed"),
    *("sampler", "pairs_per_person", "augment", "embed_chunk_size", "save_total_limit", "metric_for_best_model"),
    *("sdm_temperature", "interaction_depth", "mask_probability", "learning_rate_factors", "no_weight_decay"),
    *("logging_steps", "report_to", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio"),
    *("gradient_accumulation_steps", "gradient_checkpointing", "gradient_checkpointing_kwargs", "bf16", "fp16"),
    *("accelerator_config", "fsdp", "deepspeed", "optim", "optim_args", "label_names", "hub_model_id", "push_to_hub"),
    *("resume_from_checkpoint", "neftune_noise_alpha", "include_for_metrics", "average_tokens_across_devices"),
    *("dataloader_prefetch_factor", "dataloader_pin_memory", "group_by_length", "debug", "local_rank", "ddp_backend"),
    *("full_determinism", "torch_empty_cache_steps", "logging_first_step", "log_level", "public", "overwrite", "help"),
]
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
RECIPES = [
    BOMB,
    BOMB + "losses: *a11\n",
    "losses: &a [*a]\n",
    "losses: &a {tal: *a}\n",
    "scratch_config: &a {text_config: *a}\n",
    "losses: !!python/object/apply:os.system ['touch escaped']\n",
    "losses: !!python/name:os.system\n",
    "seed: !!binary x\n",
    "? [a, b]\n: 1\n",
    "? {a: b}\n: 1\n",
    "1: 2\n",
    "1: 2\nseed: 3\nx: 4\n",
    "null: 2\nx: 1\n",
    "2026-01-01: x\n",
    "seed: 2026-01-01\n",
    "seed: 2026-13-45\n",
    "seed: 1_000\nlearning_rate: 1:30\n",
    "seed: 1\nseed: 2\n",
    "<<: *missing\n",
    "<<: {seed: 3}\n",
    "<<: 3\n",
    "%YAML 9.9\n---\nseed: 1\n",
    "--- {}\n--- {}\n",
    "- a\n",
    "seed: " + "[" * 900 + "]" * 900 + "\n",
    "seed: " + "[" * 3000 + "]" * 3000 + "\n",
    "x: {" * 3000,
    "seed: " + "9" * 5000 + "\n",
    "seed: " + "1:" * 5000 + "1\n",
    "\tseed: 1\n",
    "seed: \x00\n",
    "\ufeffseed: 1\n",
    "seed: '\\ud800'\n",
    'seed: "\\ud800"\n',
    '"\\e[2J": 1\n',
    "x" * 1_000_000,
    "# " + "x" * 1_000_000,
    "losses: {tal: 1, sdm: .nan}\n",
    "losses: {1: 1}\n",
    "losses: {[1]: 1}\n",
    "losses: 3\n",
    "losses: null\n",
    "",
]
RECIPE_TEXTS = st.one_of(
    st.sampled_from([Text(text) for text in RECIPES]),
    st.text(max_size=60),
    st.dictionaries(
        st.sampled_from(RECIPE_KEYS), VALUES.filter(lambda each: not isinstance(each, Raw)), max_size=2
    ).map(lambda changes: yaml.dump(RECIPE | changes)),
)


@examples(60)
@given(RECIPE_TEXTS)
def test_recipes(laboratory, sound, text):
    with laboratory.case() as inputs:
        recipe = inputs / "recipe.yaml"
        recipe.write_bytes(text.encode("utf-8", "surrogatepass"))
        check(laboratory, "train", words_of("train", sound, recipe=recipe), repr(Text(text)))


# -- Sentences

SENTENCES = [
    *TEXTS,
    *("a" * 2**20, "a " * 2**19, "&" * 2**20, "&amp;" * 2**18, "&#" * 2**19, "\u00c2\u0080" * 2**18, "👩🏽‍🦰" * 2**15),
    *("\u0301" * 2**19, "\n" * 2**20, "ﷺ" * 2**18, "<|endoftext|>" * 1000, "<|startoftext|> a", "\ufeff", "!" * 2**20),
    *(
        "-",
        "--",
        "--help",
        "-h",
        "--output=/tmp/x.png",
        "@file",
        "a\u2028b",
        "&#0;",
        "&#xd800;",
        "&#1114112;",
        "&#x1b;[2J",
    ),
    *("'" * 5000, "a'" * 2**18, "1" * 2**19, "字" * 2**18, "\u0600" * 1000, "\u200f" * 1000, "\U000e0001" * 1000),
]
SENTENCES = [Text(text) for text in SENTENCES]


@examples(35)
@given(st.sampled_from(["gallery", "heat_map"]), st.sampled_from(SENTENCES) | st.text(max_size=200))
def test_sentences(laboratory, sound, command, text):
    with laboratory.case():
        words = [*words_of(command, sound, text=text, phrase=text[: len(text) // 2 + 1])]
        check(laboratory, command, words, repr(Text(text)))
