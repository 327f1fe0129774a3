"""Trains ECCL: recipes, and options that override them.

accelerate launch train_eccl.py RECIPE --data_dir DIR --init_from CLIP --output_dir DIR
"""

import argparse
import contextlib
import itertools
import json
import os
import platform
import reprlib
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

from eccl.utils.command_line import HelpFormatter, command, end_at_once, end_launched_process, say, tell
from eccl.utils.shipped import TRAINING_HELP, find_recipe

# The imports below take seconds, those of transformers' own options alone twice as long as torch and transformers.
if __name__ == "__main__":
    signal.signal(signal.SIGINT, end_at_once)
    if sys.argv[1:] in (["--help"], ["-h"]):
        for line in TRAINING_HELP.read_text(encoding="utf-8").splitlines():
            tell(line)
        sys.exit()
    say("train_eccl: loading torch and transformers")

import datasets
import torch
import transformers
from peft import PeftModel
from transformers import HfArgumentParser, set_seed

from eccl.configuration_eccl import ECCLConfig, checkpoint_kind, require_sound_config
from eccl.dataset_scripts.base import published_differences
from eccl.dataset_scripts.sources import DataSource, Splits, choose_splits, find_benchmark
from eccl.eval.reports import published_rows
from eccl.hub.adapter import ECCLPeftModel, attach_lora, count_parameters, merge_lora, save_adapter, train_prompts
from eccl.hub.model_card import METRICS, Facts, Result, make_model_card
from eccl.hub.publish import publish, require_publishable
from eccl.hub.run_folder import TRAINING_LOG, RunFolder, claim_run_folder
from eccl.modeling_eccl import ECCLModel, naming_checkpoint_errors
from eccl.processing_eccl import ECCLProcessor, load_tokenizer
from eccl.training.arguments import ECCLTrainingArguments
from eccl.training.checkpoints import find_incompleteness, find_last_complete_checkpoint
from eccl.training.pairs import CaptionPairs
from eccl.training.streaming import StreamedPairs
from eccl.training.trainer import ECCLTrainer
from eccl.training.vocabulary import train_tokenizer
from eccl.utils.files import require_no_input
from eccl.utils.recipes import read_recipe
from eccl.utils.text import plain_markdown

_ECCL = (
    "A CLIP for images of people with deep coupled prompts and LoRA, trained with a triplet alignment loss and two "
    "cross-modal memories (ECCL)."
)
_METHODS = {
    "lora": "A CLIP for images of people with deep coupled prompts and LoRA.",
    "lora alone": "A CLIP for images of people with LoRA.",
    "prompts": "A CLIP for images of people with deep coupled prompts; the prompts were trained.",
    "full": "A CLIP for images of people; every parameter was trained.",
}
_SETTINGS = {
    "lora": ("learning_rate", "lora_learning_rate", "lora_rank", "lora_alpha", "base_dtype", "weight_decay", "augment"),
    "prompts": ("learning_rate", "weight_decay", "augment"),
    "full": ("learning_rate", "weight_decay", "augment"),
}
# The published run prompts all 12 layers of ViT-B/16.
_PROMPT_DEPTH = 12
_IMAGE_SIZE = (384, 128)
# The options that `--help` shows, by group; `--help_all` shows the others, those of transformers, too.
_HELP_GROUPS = {
    "data": (
        *("dataset_name", "data_dir", "dataset_config", "revision", "columns", "train_split", "eval_split"),
        *("eval_fraction", "on_bad_image", "on_bad_caption", "fix_paths", "follow_links"),
        *("streaming",),
        *("output_dir", "dataloader_num_workers"),
    ),
    "model": (
        *("init_from", "image_size", "num_prompt_tokens", "prompt_depth", "tune", "lora_rank", "lora_alpha"),
        *("base_dtype", "attn_implementation", "scratch_config", "vocab_size", "save_dtype"),
    ),
    "losses": (
        *("losses", "tal_temperature", "tal_margin", "identity_memory_temperature", "identity_memory_momentum"),
        *("instance_memory_temperature", "instance_memory_momentum", "memory_start", "contrastive_temperature"),
        *("sdm_temperature", "interaction_depth", "mask_probability"),
    ),
    "optimisation": (
        *("num_train_epochs", "max_steps", "per_device_train_batch_size", "learning_rate", "lora_learning_rate"),
        *("learning_rate_factors", "warmup_epochs", "weight_decay", "no_weight_decay", "decoupled_weight_decay"),
        *("adam_epsilon", "max_grad_norm", "bf16", "seed"),
        *("sampler", "pairs_per_person", "augment", "word_drop_probability", "embed_chunk_size"),
    ),
    "evaluation and checkpoints": (
        *("eval_strategy", "save_strategy", "save_total_limit", "load_best_model_at_end", "metric_for_best_model"),
        *("resume_from_checkpoint", "allow_changed_run", "overwrite", "logging_steps", "report_to"),
    ),
    "publishing": ("push_to_hub", "hub_model_id", "public"),
}


@dataclass
class DataArguments:
    """The data set, where it is, and how it is read."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Data set: cuhk_pedes, icfg_pedes, rstpreid, synthetic_pedes, person_pairs, a file, a folder, a "
            "format such as parquet or imagefolder, or a data set of the Hub."
        },
    )
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of a benchmark, or the folder that contains it; folder of a format or of images."},
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the data set, if it has several."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a data set of the Hub."})
    columns: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Columns that are not named as usual, for example: --columns image=img person_id=pid "
            "captions=text file_path=name."
        },
    )
    train_split: str | None = field(
        default=None, metadata={"help": "Split to train on (default: train, or the only split)."}
    )
    eval_fraction: float | None = field(
        default=None,
        metadata={
            "help": "Part of the persons of the training split that is cut off to evaluate on (default: 0.1 for a data "
            "set with one split)."
        },
    )
    on_bad_image: Literal["error", "skip"] = field(
        default="error",
        metadata={
            "help": "error: refuse a data set with unreadable images; skip: leave these images out and name them."
        },
    )
    on_bad_caption: Literal["error", "skip"] = field(
        default="error",
        metadata={
            "help": "error: refuse a data set with captions without a word or of more than 20,000 characters; skip: "
            "leave these captions out and name them."
        },
    )
    fix_paths: bool = field(
        default=False,
        metadata={
            "help": "Read the image that a path means although it is written otherwise: backslashes, imgs/ at its "
            "start, blanks around it, another case of letters, another Unicode form."
        },
    )
    follow_links: bool = field(
        default=False, metadata={"help": "Allow images that are links to files outside the data set."}
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the training split as a stream, row by row, without preparing it first; needs --max_steps, "
            "--lr_scheduler_type, --eval_strategy no, and losses without memories."
        },
    )

    def make_source(self) -> DataSource:
        """Makes the data source of these options.

        Raises:
            ValueError: there is no name, or the columns are no mapping.
        """
        if not self.dataset_name:
            raise ValueError("dataset_name is missing: name a data set, for example --dataset_name cuhk_pedes")
        return DataSource.of_options(self, self.dataset_name, self.data_dir, "dataset_name")


@dataclass
class ModelArguments:
    """The model that training starts from: a trained CLIP, or random weights."""

    init_from: str | None = field(
        default=None,
        metadata={"help": "Hub id or folder of a CLIP, or of an ECCL model without prompts (default: random weights)."},
    )
    image_size: list[int] | None = field(
        default=None,
        metadata={"help": "Height and width of the images (default: those of an ECCL backbone, else 384 128)."},
    )
    attn_implementation: Literal["sdpa", "eager"] = field(
        default="sdpa", metadata={"help": "Implementation of attention; on a CPU, eager is faster for short sequences."}
    )
    num_prompt_tokens: int = field(
        default=4, metadata={"help": "Number of prompt tokens per layer; --tune full uses none."}
    )
    prompt_depth: int | None = field(
        default=None,
        metadata={
            "help": "Number of layers, counted from the first, that get their own prompts (default: all layers of the "
            "shallower encoder, at most 12)."
        },
    )
    scratch_config: dict | str | None = field(
        default=None, metadata={"help": "Values of ECCLConfig as JSON, for a model with random weights."}
    )
    save_dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Precision of the final model's weights."}
    )
    vocab_size: int = field(
        default=1000,
        metadata={"help": "Vocabulary size of the tokenizer that is made for a model with random weights."},
    )

    def __post_init__(self) -> None:
        size = self.image_size
        if size is not None and not (
            isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) for n in size)
        ):
            raise ValueError(f"image_size is {size}, it must be two whole numbers: height and width in pixels")


def make_parser() -> HfArgumentParser:
    """Makes the parser of all options."""
    # On a CPU the training process itself keeps two cores busy: on two cores, a worker made it slower.
    cores, processes = os.cpu_count() or 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    dataclasses: Any = (DataArguments, ModelArguments, ECCLTrainingArguments)
    parser = HfArgumentParser(
        dataclasses,
        prog="train_eccl.py",
        usage="accelerate launch train_eccl.py [RECIPE ...] [--option value ...]",
        description="RECIPE is a YAML file, or the name of one of this package (eccl_rstpreid, baselines/tal). A later "
        "recipe overrides an earlier one, and options override all recipes.",
        allow_abbrev=False,
        add_help=False,
    )
    parser.set_defaults(dataloader_num_workers=min(8, max(0, cores // processes - 2)))
    general = parser.add_argument_group("general")
    general.add_argument("--help", "-h", action="store_true", help="show the options of this project and exit")
    general.add_argument("--help_all", action="store_true", help="show all options, transformers' too, and exit")
    # transformers has a --debug too, with a value (underflow_overflow); alone, it is this project's.
    helps = {
        "debug": "after an error, show the traceback instead of one line (with a value: transformers' debug mode)",
        "dataloader_num_workers": "Number of worker processes that make training pairs, for each training process "
        "(default: its cores minus 2, at most 8).",
    }
    for action in parser._actions:
        action.help = helps.get(action.dest, action.help)
    # argparse would print its usage, too, and exit by itself.
    parser.error = _refuse  # type: ignore[method-assign]
    return parser


def _refuse(message: str) -> NoReturn:
    raise ValueError(f"{message} (train_eccl.py --help lists the options)")


def format_help(parser: argparse.ArgumentParser, everything: bool) -> str:
    """Formats the help of the parser: this project's options in groups, then all others if `everything` is true."""
    formatter = HelpFormatter(parser.prog, max_help_position=30, width=110)
    formatter.add_usage(parser.usage, [], [])
    formatter.add_text(parser.description)
    # Of `--name`, `--name-with-dashes` and `--no_name`, the help shows the first.
    actions: dict[str, argparse.Action] = {}
    for action in parser._actions:
        action.option_strings = action.option_strings[:1]
        if isinstance(action.default, list):
            action.default = " ".join(map(str, action.default))
        actions.setdefault(action.dest, action)
    groups = {**_HELP_GROUPS, "general": ("help", "help_all", "debug")}
    if everything:
        shown = {name for names in groups.values() for name in names}
        groups["options of transformers"] = tuple(name for name in actions if name not in shown)
    for title, names in groups.items():
        formatter.start_section(title)
        formatter.add_arguments([actions[name] for name in names])
        formatter.end_section()
    return formatter.format_help()


def parse_arguments(arguments: list[str]) -> tuple[DataArguments, ModelArguments, ECCLTrainingArguments]:
    """Reads the recipes, which the first arguments name, and then the options, which override them.

    Raises:
        ValueError: a recipe is not a mapping, or has a key that is not an option; or an option is wrong.
        FileNotFoundError: there is no such recipe.
    """
    parser = make_parser()
    recipes = name_recipes(arguments)
    arguments = arguments[len(recipes) :]
    for recipe in map(find_recipe, recipes):
        parser.set_defaults(**_read_recipe(recipe, parser))
    if {"--help", "-h", "--help_all"} & set(arguments):
        print(format_help(parser, "--help_all" in arguments))
        sys.exit()
    followers = [*arguments, "--"][1:]
    arguments = [
        word
        for word, follower in zip(arguments, followers, strict=True)
        if word != "--debug" or not follower.startswith("--")
    ]
    data, model, args, *_ = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    return data, model, args


def name_recipes(arguments: list[str]) -> list[str]:
    """Returns the names of the recipes: the arguments before the first option."""
    return list(itertools.takewhile(lambda word: not word.startswith("-"), arguments))


def _read_recipe(recipe: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Reads a recipe, and converts its values as argparse converts those of the command line.

    Raises:
        ValueError: see [`parse_arguments`].
    """
    values = read_recipe(recipe)
    actions = {action.dest: action for action in parser._actions}
    unknown = sorted(str(name) for name in values if name not in actions)
    if unknown:
        raise ValueError(f"{recipe}: unknown option {', '.join(unknown)}; train_eccl.py --help_all lists the options")
    words: list[str] = []
    for name, value in values.items():
        choices = actions[name].choices
        if choices is not None and value not in list(choices):
            shown = reprlib.repr(value)
            raise ValueError(f"{recipe}: {name} is {shown}, it must be one of {', '.join(map(str, choices))}")
        words += _to_words(recipe, actions[name], value)
    try:
        converted = vars(parser.parse_args(words))
    except ValueError as error:
        raise ValueError(f"{recipe}: {error}") from error
    return {name: converted[name] for name in values}


def _to_words(recipe: Path, action: argparse.Action, value: Any) -> list[str]:
    """Writes a value of a recipe as words of a command line."""
    option = f"--{action.dest}"
    if value is None and action.default is None:
        return []
    if isinstance(value, dict) and action.nargs in ("+", "*"):
        value = [f"{name}={weight}" for name, weight in value.items()]
    if isinstance(value, list) and action.nargs in ("+", "*"):
        return [option, *map(str, value)]
    if isinstance(value, dict):
        with contextlib.suppress(TypeError, RecursionError):  # A value that JSON does not have.
            return [f"{option}={json.dumps(value)}"]
    if isinstance(value, (bool, int, float, str)) and value != "--":
        return [f"{option}={value}"]
    raise ValueError(f"{recipe}: {action.dest} is {reprlib.repr(value)}, which this option cannot be")


def build_model(
    arguments: ModelArguments, tune: str, train: datasets.Dataset | None
) -> tuple[ECCLModel, ECCLProcessor]:
    """Builds a model and its processor: from a trained CLIP, or with random weights and a tokenizer of the captions.

    Args:
        arguments: the options.
        tune: `lora`, `prompts` or `full`.
        train: the training split; `None` if it is a stream.

    Raises:
        ValueError: a stream needs a trained CLIP, and so does a part that is trained alone; or the checkpoint or the
            options are wrong.
    """
    if arguments.init_from is None:
        if train is not None and tune != "full":
            raise ValueError(
                f"init_from is missing: with tune {tune}, the weights of a trained CLIP are frozen; for a model with "
                "random weights give --tune full"
            )
        if train is None:
            raise ValueError("streaming needs init_from: a tokenizer cannot be made from a stream")
        model, processor = _build_from_scratch(arguments, train)
    else:
        model, processor = _build_from_backbone(arguments, tune)
    # transformers warns that it finds no models of the encoders' configurations; the layers read them nevertheless.
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    model.set_attn_implementation(arguments.attn_implementation)
    transformers.logging.set_verbosity(verbosity)
    return model, processor


def _build_from_backbone(arguments: ModelArguments, tune: str) -> tuple[ECCLModel, ECCLProcessor]:
    source = str(arguments.init_from)
    with naming_checkpoint_errors(source):
        # `from_clip` refuses an adapter, which is of the third kind.
        config_class: Any = ECCLConfig if checkpoint_kind(source) == "eccl" else transformers.CLIPConfig
        config = config_class.from_pretrained(source)
        require_sound_config(config)
    if arguments.image_size is not None:
        height, width = arguments.image_size
    else:
        height, width = config.input_size if isinstance(config, ECCLConfig) else _IMAGE_SIZE
    prompt_depth = arguments.prompt_depth
    if prompt_depth is None:
        layers = (encoder.num_hidden_layers for encoder in (config.text_config, config.vision_config))
        prompt_depth = min(_PROMPT_DEPTH, *layers)
    num_prompt_tokens = 0 if tune == "full" else arguments.num_prompt_tokens
    model = ECCLModel.from_clip(source, (height, width), num_prompt_tokens, prompt_depth)
    return model, ECCLProcessor.for_model(model.config, load_tokenizer(source))


def _build_from_scratch(arguments: ModelArguments, train: datasets.Dataset) -> tuple[ECCLModel, ECCLProcessor]:
    captions = (caption for captions in train["captions"] for caption in captions)
    tokenizer = train_tokenizer(captions, arguments.vocab_size)
    given = arguments.scratch_config or {}
    try:
        values: dict[str, Any] = dict(json.loads(given) if isinstance(given, str) else given)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"scratch_config is not a JSON object: {error}") from error
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    values["text_config"] = {"vocab_size": len(tokenizer), **special, **values.get("text_config", {})}
    model = ECCLModel(ECCLConfig(**values, num_prompt_tokens=0))
    return model, ECCLProcessor.for_model(model.config, tokenizer)


@command
def main(arguments: list[str]) -> None:
    data, model_arguments, args = parse_arguments(arguments)
    # The result is published once, at the end; transformers would push the adapter of each checkpoint.
    push, args.push_to_hub = args.push_to_hub, False
    if push and not args.hub_model_id:
        raise ValueError("push_to_hub needs hub_model_id: the name to publish under")
    with claim_output(data, model_arguments, args) as folder:
        if push and folder is not None:
            require_publishable(str(args.hub_model_id), "model", args.public)
        stop_signal = train(data, model_arguments, args, folder, name_recipes(arguments))
        if stop_signal is not None:
            say("asked to stop in the last step: the run is finished, and nothing is published")
            sys.exit(128 + stop_signal)
        if push and folder is not None:
            tell(f"published: {publish(args.output_dir, str(args.hub_model_id), args.public)}")


@contextlib.contextmanager
def claim_output(
    data: DataArguments, model_arguments: ModelArguments, args: ECCLTrainingArguments
) -> Iterator[RunFolder | None]:
    """Locks the output folder for this run, in the main process; yields `None` in the others.

    Raises:
        ValueError: the folder is one that the run reads, or the options contradict each other.
        OSError: the folder has files of something else, or a finished run; or another run is writing to it.
    """
    if args.process_index:
        yield None
        return
    output_dir = Path(args.output_dir)
    inputs = {"--init_from": model_arguments.init_from, "--data_dir": data.data_dir}
    if (path := data.make_source().path) is not None:
        inputs["--dataset_name"] = str(path)
    resume = args.resume
    if isinstance(resume, str):
        if (problem := find_incompleteness(Path(resume))) is not None:
            raise ValueError(f"{resume} cannot be resumed from: {problem}")
        places = {Path(resume).absolute().parent.resolve(), Path(resume).resolve().parent}
        if output_dir.resolve() not in places:
            inputs["--resume_from_checkpoint"] = resume
            resume = None
    if resume and args.overwrite:
        raise ValueError("overwrite and resume_from_checkpoint contradict each other: leave one of them out")
    require_no_input(output_dir, inputs)
    has_checkpoints = find_last_complete_checkpoint(output_dir, lambda _: None) is not None
    with claim_run_folder(output_dir, has_checkpoints, bool(resume), args.overwrite) as folder:
        yield folder


def train(
    data: DataArguments,
    model_arguments: ModelArguments,
    args: ECCLTrainingArguments,
    folder: RunFolder | None,
    recipes: list[str],
) -> signal.Signals | None:
    """Trains, and writes the final model with its card.

    Args:
        data, model_arguments, args: the options.
        folder: the claimed output folder; `None` in every process but the main one.
        recipes: the names of the recipes, for the card.

    Returns:
        The signal that asked for a stop too late to stop the training; `None` if there was none.
    """
    set_seed(args.seed)
    source = data.make_source()
    evaluated = args.eval_strategy != "no"
    splits = None
    pairs: CaptionPairs | StreamedPairs
    split = data.train_split or "train"
    with args.main_process_first(desc="reading the data set"):
        if data.streaming:
            if data.eval_fraction is not None:
                raise ValueError(f"eval_fraction is {data.eval_fraction}, but a stream cannot be cut: leave it out")
            rows = source.stream(split)
        else:
            splits = choose_splits(source, data.train_split, args.eval_split, data.eval_fraction, args.seed, evaluated)
    model, processor = build_model(model_arguments, args.tune, None if splits is None else splits.train)
    if splits is None:
        skips = data.on_bad_image == "skip"
        name, drop = f"{source}, split {split}", args.word_drop_probability
        pairs = StreamedPairs(rows, name, processor, args.augment, args.seed, skips, drop)
    else:
        pairs = CaptionPairs(splits.train, processor, args.augment, args.seed, args.word_drop_probability)
    evaluation = splits.evaluation if splits is not None else None
    trained_model: ECCLModel | ECCLPeftModel = model
    if args.tune == "lora":
        trained_model = attach_lora(model, args.lora_rank, args.lora_alpha, getattr(torch, args.base_dtype))
    elif args.tune == "prompts":
        trained_model = train_prompts(model)
    trainer = ECCLTrainer(trained_model, args, train_dataset=pairs, eval_dataset=evaluation, processing_class=processor)
    if folder is not None:
        print_summary(source, splits, pairs, trained_model)
        if number := sum(parameter.numel() for parameter in trainer.objective.parameters()):
            tell(f"{number:,} parameters of the losses are trained, too")
        # Before the loggers, which make their files at the same moment.
        trainer.callback_handler.callbacks.insert(0, _StartCallback(folder))
    duration = trainer.train(resume_from_checkpoint=args.resume).metrics["train_runtime"]
    if data.streaming and trainer.stop_signal is None and trainer.state.global_step < args.max_steps:
        steps = trainer.state.global_step
        raise ValueError(
            f"{source}: the stream ended after {steps} of {args.max_steps} steps: it has no rows to train on"
        )
    metrics = trainer.evaluate_result() if evaluation is not None else None
    whole_model = trainer.whole_model()
    if whole_model is not None and folder is not None:
        facts = gather_facts(describe_data(source, splits, pairs), model_arguments, args, duration)
        digests = getattr(trained_model, "base_digests", None) or {}
        facts.base_digest = digests.get("float16")
        if recipes:
            facts.settings = {"recipe": ", ".join(Path(recipe).stem for recipe in recipes), **facts.settings}
        if splits is not None and evaluation is not None and metrics is not None:
            add_result(facts, source, args, splits, evaluation, metrics)
        with folder.finishing():
            save_result(whole_model, processor, folder.path, model_arguments, facts)
            log = json.dumps({"log_history": trainer.state.log_history}, indent=1)
            (folder.path / TRAINING_LOG).write_text(f"{log}\n", encoding="utf-8")
        tell(f"the model is in {args.output_dir}")
    trainer.accelerator.end_training()
    return trainer.stop_signal


class _StartCallback(transformers.TrainerCallback):
    """Starts the output folder right before the first step: a mistake that is found earlier loses nothing."""

    def __init__(self, folder: RunFolder):
        self._folder = folder

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._folder.start()


def print_summary(
    source: DataSource, splits: Splits | None, pairs: CaptionPairs | StreamedPairs, model: ECCLModel | PeftModel
) -> None:
    """Prints the sizes of the data and the number of trained parameters."""
    if isinstance(pairs, StreamedPairs):
        tell(f"training on a stream: {pairs.name}")
    elif splits is not None:
        sizes = f"{pairs.num_persons} persons, {len(splits.train)} images, {len(pairs)} pairs"
        tell(f"training on {source.name} {splits.train_split}: {sizes}")
    if splits is not None and splits.evaluation is not None:
        cut = f" ({splits.cut})" if splits.cut else ""
        tell(f"evaluating on {source.name} {splits.eval_split}{cut}: {len(splits.evaluation)} images")
    trained, total = count_parameters(model)
    tell(f"{trained:,} of the {total:,} parameters are trained ({100 * trained / total:.2f}%)")


def describe_data(source: DataSource, splits: Splits | None, pairs: CaptionPairs | StreamedPairs) -> str:
    """Describes the training set for the model card."""
    title = plain_markdown(source.title)
    if splits is None or isinstance(pairs, StreamedPairs):
        return f"{title}, read as a stream"
    sizes = f"{pairs.num_persons:,} ids, {len(pairs.dataset):,} images, {len(pairs):,} captions"
    return f"{title} {splits.train_split}: {sizes}"


def describe_method(model_arguments: ModelArguments, args: ECCLTrainingArguments) -> str:
    """Describes what was trained, for the model card; the card lists the losses."""
    losses = {name for name, weight in args.loss_weights.items() if weight}
    if args.tune != "lora":
        return _METHODS[args.tune]
    if not model_arguments.num_prompt_tokens:
        return _METHODS["lora alone"]
    return _ECCL if losses == {"tal", "identity_memory", "instance_memory"} else _METHODS["lora"]


def gather_facts(dataset: str, model_arguments: ModelArguments, args: ECCLTrainingArguments, duration: float) -> Facts:
    """Gathers what the model card says of a run; the results come with [`add_result`].

    Args:
        dataset: the training set, from [`describe_data`].
        model_arguments, args: the options.
        duration: duration of the training in seconds.
    """
    settings = {
        "epochs": args.num_train_epochs if args.max_steps < 0 else f"{args.max_steps} steps",
        "pairs a step": args.train_batch_size * args.world_size * args.gradient_accumulation_steps,
        "seed": args.seed,
        "losses": ", ".join(f"{name} {weight:g}" for name, weight in args.loss_weights.items() if weight),
        **{name: getattr(args, name) for name in _SETTINGS[args.tune]},
    }
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    return Facts(
        args.hub_model_id or Path(args.output_dir).resolve().name,
        model_arguments.init_from,
        describe_method(model_arguments, args),
        dataset,
        settings,
        duration,
        f"{args.world_size} x {accelerator}, {platform.system()} {platform.machine()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
    )


def add_result(
    facts: Facts,
    source: DataSource,
    args: ECCLTrainingArguments,
    splits: Splits,
    evaluation: datasets.Dataset,
    metrics: dict[str, float],
) -> None:
    """Adds the figures of the final evaluation, and how the epoch was selected, to the facts of a run."""
    eval_split = str(splits.eval_split)
    layout = splits.data.layout
    facts.results.append(
        Result(
            model=facts.name,
            dataset=source.title,
            data_dir=Path(source.location).resolve().name if source.location else "",
            split=eval_split,
            direction="text_to_image",
            reranked=False,
            queries=sum(len(captions) for captions in evaluation["captions"]),
            gallery=len(evaluation),
            metrics={metric: metrics[f"eval_{metric}"] for metric in METRICS},
            differs=published_differences(layout, eval_split, evaluation) if layout else [],
            benchmark=source.name if layout else find_benchmark(eval_split, evaluation) or "",
        )
    )
    if args.load_best_model_at_end:
        best = str(args.metric_for_best_model).removeprefix("eval_")
        cut = f" ({splits.cut})" if splits.cut else ""
        facts.selection = f"the evaluation with the best {best} on {eval_split}{cut}, the split that is scored below"


def save_result(
    model: ECCLModel | PeftModel,
    processor: ECCLProcessor,
    output_dir: Path,
    arguments: ModelArguments,
    facts: Facts,
) -> None:
    """Writes the model with LoRA merged, its processor and its card; `adapter/` gets the trained parameters alone."""
    names = {result.published for result in facts.results}
    published = {name: published_rows(name) for name in names}
    if isinstance(model, PeftModel):
        save_adapter(model, output_dir / "adapter", arguments.init_from)
        card = make_model_card(replace(facts, is_adapter=True), published)
        (output_dir / "adapter" / "README.md").write_text(card, "utf-8", "backslashreplace")
        model = merge_lora(model)
    model.to(getattr(torch, arguments.save_dtype)).save_pretrained(output_dir)
    processor.save_pretrained(output_dir)
    (output_dir / "README.md").write_text(make_model_card(facts, published), "utf-8", "backslashreplace")


if __name__ == "__main__":
    main()
    end_launched_process()
