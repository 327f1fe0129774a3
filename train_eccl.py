"""Trains ECCL: `accelerate launch train_eccl.py RECIPE.yaml --flag value ...`; flags override the recipe."""

import json
import platform
import sys
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
import transformers
import yaml
from peft import PeftModel
from transformers import CLIPTokenizer, HfArgumentParser, set_seed

import eccl.dataset_scripts
from eccl.configuration_eccl import ECCLConfig
from eccl.dataset_scripts.annotations import SplitSize, size_differences
from eccl.dataset_scripts.base import canonical_split
from eccl.dataset_scripts.synthetic import LABELS_FILE
from eccl.eval.reports import published_rows
from eccl.hub.adapter import attach_lora, count_parameters, merge_lora, save_adapter
from eccl.hub.model_card import METRICS, Facts, Result, make_model_card
from eccl.hub.publish import publish
from eccl.modeling_eccl import ECCLModel
from eccl.processing_eccl import ECCLProcessor
from eccl.training.arguments import ECCLTrainingArguments
from eccl.training.pairs import CaptionPairs
from eccl.training.trainer import ECCLTrainer

_METHODS = {
    "lora": "A CLIP for images of people with deep coupled prompts and LoRA, trained with a triplet alignment loss and "
    "two cross-modal memories (ECCL).",
    "full": "A CLIP for images of people, every parameter of it trained.",
}
_LOSSES = ("tal_weight", "identity_memory_weight", "instance_memory_weight", "contrastive_weight", "attribute_weight")
_SETTINGS = {
    "lora": ("learning_rate", "lora_learning_rate", "lora_rank", "lora_alpha", "weight_decay", "augment", *_LOSSES),
    "full": ("learning_rate", "weight_decay", "augment", *_LOSSES),
}


@dataclass
class DataArguments:
    """Which benchmark, and where it lies."""

    dataset_name: str | None = field(
        default=None, metadata={"help": f"One of {', '.join(eccl.dataset_scripts.BENCHMARKS)}."}
    )
    data_dir: str | None = field(default=None, metadata={"help": "The benchmark's folder, or the one that holds it."})
    on_bad_image: str = field(default="error", metadata={"help": "error, or skip: leave unreadable images out."})


@dataclass
class ModelArguments:
    """What training starts from: a trained CLIP, or nothing."""

    init_from: str | None = field(
        default=None,
        metadata={"help": "A CLIP by Hub id or folder, or an ECCL model without prompts. Without it: from scratch."},
    )
    image_size: list[int] | None = field(
        default=None,
        metadata={"help": "Height and width; by default an ECCL backbone's own, else 384 128.", "nargs": 2},
    )
    attn_implementation: str = field(
        default="sdpa", metadata={"help": "sdpa or eager; on a CPU eager trains faster where sequences are short."}
    )
    num_prompt_tokens: int = field(default=4, metadata={"help": "Prompt tokens a layer; 0 with --tune full."})
    prompt_depth: int = field(default=12, metadata={"help": "Layers with prompts of their own."})
    scratch_config: dict | str | None = field(
        default=None, metadata={"help": "Values of ECCLConfig (as JSON) for a model from scratch."}
    )
    save_dtype: str = field(
        default="float32", metadata={"help": "Of the final model's weights: float32, bfloat16 or float16."}
    )
    vocab_size: int = field(default=1000, metadata={"help": "Of the tokenizer that a model from scratch gets."})

    def __post_init__(self):
        if self.save_dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"save_dtype is {self.save_dtype!r}, it must be float32, bfloat16 or float16")
        if self.attn_implementation not in ("sdpa", "eager"):
            raise ValueError(f"attn_implementation is {self.attn_implementation!r}, it must be sdpa or eager")


def parse_arguments(arguments: list[str]) -> tuple[DataArguments, ModelArguments, ECCLTrainingArguments]:
    """Reads the recipe, if the first argument is one, then the flags over it.

    Raises:
        ValueError: a recipe that is no mapping, or has a key that is no argument.
    """
    parser = HfArgumentParser((DataArguments, ModelArguments, ECCLTrainingArguments), description=__doc__)
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        recipe, arguments = Path(arguments[0]), arguments[1:]
        values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"{recipe} holds a {type(values).__name__}, it must map arguments to values")
        known = {action.dest for action in parser._actions}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"{recipe}: {', '.join(unknown)}: no such argument; see train_eccl.py --help")
        parser.set_defaults(**values)
    return parser.parse_args_into_dataclasses(arguments)


def load_splits(
    data: DataArguments, eval_split: str | None, evaluated: bool
) -> tuple[datasets.Dataset, datasets.Dataset | None, str | None]:
    """The training split, the split to evaluate on and its name: `val` by default, `test` where there is no val.

    Without evaluation the last two are `None`.

    Raises:
        ValueError: no such benchmark or split.
    """
    if data.dataset_name not in eccl.dataset_scripts.BENCHMARKS:
        raise ValueError(
            f"dataset_name is {data.dataset_name!r}, it must be one of {', '.join(eccl.dataset_scripts.BENCHMARKS)}"
        )
    splits = datasets.load_dataset(data.dataset_name, data_dir=data.data_dir, on_bad_image=data.on_bad_image)
    eval_split = (canonical_split(eval_split) or ("val" if "val" in splits else "test")) if evaluated else None
    for split in ("train", eval_split):
        if split is not None and split not in splits:
            raise ValueError(f"{data.dataset_name} in {data.data_dir} has no {split} split, only {', '.join(splits)}")
    return splits["train"], splits[eval_split] if evaluated else None, eval_split


def build_model(arguments: ModelArguments, tune: str, train: datasets.Dataset) -> tuple[ECCLModel, ECCLProcessor]:
    """A model with its processor: on a trained CLIP, or from scratch with a tokenizer made from the captions."""
    if arguments.init_from is None:
        model, processor = _from_scratch(arguments, train)
    else:
        model, processor = _from_backbone(arguments, tune)
    model.set_attn_implementation(arguments.attn_implementation)
    return model, processor


def _from_backbone(arguments: ModelArguments, tune: str) -> tuple[ECCLModel, ECCLProcessor]:
    source = arguments.init_from
    config = transformers.PreTrainedConfig.get_config_dict(source)[0]
    image_size = arguments.image_size
    if image_size is None:
        is_eccl = config.get("model_type") == ECCLConfig.model_type
        image_size = config["vision_config"]["image_size"] if is_eccl else (384, 128)
    num_prompt_tokens = arguments.num_prompt_tokens if tune == "lora" else 0
    model = ECCLModel.from_clip(source, tuple(image_size), num_prompt_tokens, arguments.prompt_depth)
    return model, ECCLProcessor.for_model(model.config, CLIPTokenizer.from_pretrained(source))


def _from_scratch(arguments: ModelArguments, train: datasets.Dataset) -> tuple[ECCLModel, ECCLProcessor]:
    captions = (caption for own in train["captions"] for caption in own)
    tokenizer = CLIPTokenizer().train_new_from_iterator(captions, vocab_size=arguments.vocab_size)
    values = arguments.scratch_config or {}
    values = json.loads(values) if isinstance(values, str) else dict(values)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    values["text_config"] = {"vocab_size": len(tokenizer), **special, **values.get("text_config", {})}
    model = ECCLModel(ECCLConfig(**values, num_prompt_tokens=0))
    return model, ECCLProcessor.for_model(model.config, tokenizer)


def read_attribute_labels(data_dir: str, rows: datasets.Dataset) -> tuple[list[torch.Tensor], list[int]]:
    """What the synthetic benchmark knows of each training image, for `--attribute_weight`.

    Returns:
        For each row `(captions + 1, attributes)` class labels: what each caption mentions (-100 elsewhere), and last
        what the image shows; and how many values each attribute has.

    Raises:
        FileNotFoundError: another benchmark than the synthetic one.
    """
    file = Path(data_dir) / LABELS_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: attribute_weight is for the synthetic benchmark, which has it")
    known = json.loads(file.read_text(encoding="utf-8"))
    names = list(known["attributes"])
    labels = []
    for person_id, path in zip(rows["person_id"], rows["file_path"], strict=True):
        shown = torch.tensor(known["people"][str(person_id)])
        mentioned = torch.tensor([[name in said for name in names] for said in map(set, known["mentioned"][path])])
        labels.append(torch.cat([shown.where(mentioned, -100), shown[None]]))
    return labels, [len(values) for values in known["attributes"].values()]


def main(arguments: list[str]) -> None:
    data, model_arguments, args = parse_arguments(arguments)
    # The result is published once, whole; transformers would push each checkpoint of the adapter.
    push, args.push_to_hub = args.push_to_hub, False
    if push and not args.hub_model_id:
        raise ValueError("push_to_hub needs hub_model_id: the name to publish under")
    set_seed(args.seed)
    with args.main_process_first(desc="reading the data set"):
        train, evaluation, eval_split = load_splits(data, args.eval_split, args.eval_strategy != "no")
    model, processor = build_model(model_arguments, args.tune, train)
    attribute_labels, num_attribute_values = None, None
    if args.attribute_weight:
        attribute_labels, num_attribute_values = read_attribute_labels(data.data_dir, train)
    pairs = CaptionPairs(train, processor, args.augment, args.seed, attribute_labels)
    if args.tune == "lora":
        model = attach_lora(model, args.lora_rank, args.lora_alpha)
    trainer = ECCLTrainer(
        model,
        args,
        train_dataset=pairs,
        eval_dataset=evaluation,
        num_attribute_values=num_attribute_values,
        processing_class=processor,
    )
    if trainer.is_world_process_zero():
        trainable, total = count_parameters(model)
        sizes = f"{pairs.num_persons} persons, {len(train)} images, {len(pairs)} pairs"
        print(f"training on {data.dataset_name} train: {sizes}")
        if evaluation is not None:
            print(f"scored on {data.dataset_name} {eval_split}: {len(evaluation)} images")
        print(f"{trainable:,} of {total:,} parameters train ({100 * trainable / total:.2f}%)")
    # On a command line, True means the last checkpoint in output_dir.
    resume = {"true": True, "false": None}.get(str(args.resume_from_checkpoint).lower(), args.resume_from_checkpoint)
    duration = trainer.train(resume_from_checkpoint=resume).metrics["train_runtime"]
    metrics = trainer.evaluate() if evaluation is not None else None
    model = trainer.whole_model()
    if trainer.is_world_process_zero():
        facts = gather_facts(data, model_arguments, args, pairs, evaluation, eval_split, metrics, duration)
        if arguments and arguments[0].endswith((".yaml", ".yml")):
            facts.settings = {"recipe": Path(arguments[0]).name, **facts.settings}
        save_result(model, processor, Path(args.output_dir), model_arguments, facts)
        print(f"the model is in {args.output_dir}")
        if push:
            print(f"published: {publish(args.output_dir, args.hub_model_id, bool(args.hub_private_repo))}")
    trainer.accelerator.end_training()


def gather_facts(
    data: DataArguments,
    model_arguments: ModelArguments,
    args: ECCLTrainingArguments,
    pairs: CaptionPairs,
    evaluation: datasets.Dataset | None,
    eval_split: str | None,
    metrics: dict[str, float] | None,
    duration: float,
) -> Facts:
    """What the card of this run's result says."""
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    settings = {
        "epochs": args.num_train_epochs if args.max_steps < 0 else f"{args.max_steps} steps",
        "pairs a step": args.train_batch_size * args.world_size * args.gradient_accumulation_steps,
        "seed": args.seed,
        **{field: getattr(args, field) for field in _SETTINGS[args.tune]},
    }
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    facts = Facts(
        name,
        model_arguments.init_from,
        _METHODS[args.tune],
        f"{data.dataset_name} train: {SplitSize(pairs.num_persons, len(pairs.rows), len(pairs))}",
        settings,
        duration,
        f"{args.world_size} x {accelerator}, {platform.system()} {platform.machine()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
    )
    if metrics is None:
        return facts
    size = SplitSize.of(evaluation["person_id"], evaluation["captions"])
    published = datasets.load_dataset_builder(data.dataset_name, data_dir=data.data_dir).config.layout.published_sizes
    theirs = {eval_split: published[eval_split]} if eval_split in published else {}
    figures = {metric: metrics[f"eval_{metric}"] for metric in METRICS}
    differs = size_differences({eval_split: size}, theirs)
    facts.results.append(
        Result(name, data.dataset_name, data.data_dir, eval_split, "text_to_image", False, size.captions, size.images,
               figures, differs)
    )  # fmt: skip
    if args.load_best_model_at_end:
        best = args.metric_for_best_model.removeprefix("eval_")
        facts.selection = f"the evaluation with the best {best} on {eval_split}, the split that is scored below"
    return facts


def save_result(
    model: ECCLModel | PeftModel,
    processor: ECCLProcessor,
    output_dir: Path,
    arguments: ModelArguments,
    facts: Facts,
) -> None:
    """Writes the model as anyone loads it, prompts in, LoRA merged, with its card; `adapter/` is what was trained."""
    card = make_model_card(facts, {result.dataset: published_rows(result.dataset) for result in facts.results})
    if isinstance(model, PeftModel):
        save_adapter(model, output_dir / "adapter", arguments.init_from)
        (output_dir / "adapter" / "README.md").write_text(card, encoding="utf-8")
        model = merge_lora(model)
    model.to(getattr(torch, arguments.save_dtype)).save_pretrained(output_dir)
    processor.save_pretrained(output_dir)
    (output_dir / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
