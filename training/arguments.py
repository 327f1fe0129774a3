"""The settings of a training run, and the published schedule of the learning rates."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
from accelerate import PartialState
from transformers import TrainingArguments

from .augmentation import WORD_DROP_PROBABILITY

_logger = logging.getLogger(__name__)


@dataclass
class ECCLTrainingArguments(TrainingArguments):
    """The arguments of transformers' `TrainingArguments` and those of ECCL; the defaults are the published recipe.

    The learning rates are stepped per epoch (see [`epoch_factor`]) unless `lr_scheduler_type` is set. The optimiser is
    Adam with L2 weight decay, or AdamW with `decoupled_weight_decay`.
    """

    output_dir: str = field(default="eccl-output", metadata={"help": "Folder for the checkpoints and the final model."})
    tune: Literal["lora", "prompts", "full"] = field(
        default="lora",
        metadata={
            "help": "lora: train the prompts and LoRA (LoRA alone with --num_prompt_tokens 0); prompts: train the "
            "prompts alone; full: train every parameter of a model without prompts."
        },
    )
    lora_rank: int = field(default=4, metadata={"help": "Rank of the LoRA matrices."})
    lora_alpha: int = field(default=4, metadata={"help": "LoRA updates are scaled by alpha / rank."})
    base_dtype: Literal["float32", "bfloat16"] = field(
        default="float32",
        metadata={
            "help": "Dtype of the frozen weights in the layers with LoRA, in memory and in matrix products. bfloat16 "
            "halves their memory; what is trained, and the objective, stay in float32. The final model has float32 "
            "weights."
        },
    )

    losses: list[str] = field(
        default_factory=lambda: ["tal=1", "identity_memory=1", "instance_memory=0.1"],
        metadata={
            "help": "Losses with their weights, for example: --losses tal=1 identity_memory=0.5. Known losses: "
            "tal, identity_memory, instance_memory, contrastive, sdm, cmpm, identity_classification, "
            "projection_classification, masked_language_modelling, and attribute (synthetic benchmark "
            "only)."
        },
    )
    tal_temperature: float = field(
        default=0.02, metadata={"help": "Temperature of the triplet alignment loss; must be positive."}
    )
    tal_margin: float = field(default=0.2, metadata={"help": "Margin of the triplet alignment loss; at least 0."})
    identity_memory_temperature: float = field(
        default=0.03, metadata={"help": "Temperature of the identity memory; must be positive."}
    )
    identity_memory_momentum: float = field(
        default=0.1, metadata={"help": "Fraction of the old row that an update of the identity memory keeps, 0 to 1."}
    )
    instance_memory_temperature: float = field(
        default=0.015, metadata={"help": "Temperature of the instance memory; must be positive."}
    )
    instance_memory_momentum: float = field(
        default=0.1, metadata={"help": "Fraction of the old row that an update of the instance memory keeps, 0 to 1."}
    )
    memory_start: Literal["evaluation", "augmented"] = field(
        default="evaluation",
        metadata={
            "help": "Pairs that the memories start from. evaluation: images and captions as in evaluation; augmented: "
            "each training pair as its first draw augments it."
        },
    )
    contrastive_temperature: float | None = field(
        default=None,
        metadata={
            "help": "Temperature of the contrastive loss; must be positive (default: that of the model, which is "
            "trained with --tune full)."
        },
    )
    sdm_temperature: float = field(default=0.02, metadata={"help": "Temperature of the sdm loss; must be positive."})
    interaction_depth: int = field(
        default=4,
        metadata={"help": "Number of transformer blocks with which masked_language_modelling predicts words."},
    )
    mask_probability: float = field(
        default=0.15,
        metadata={"help": "Probability with which masked_language_modelling masks a word; more than 0, at most 1."},
    )

    num_train_epochs: float = field(default=60, metadata={"help": "Number of passes over all training pairs."})
    per_device_train_batch_size: int = field(
        default=128, metadata={"help": "Number of training pairs per step in each process."}
    )
    learning_rate: float = field(
        default=1e-3,
        metadata={"help": "Learning rate of the prompts and their projections; of everything with --tune full."},
    )
    lora_learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of the LoRA matrices."})
    learning_rate_factors: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Factors on the learning rate of the parameters whose names contain a text, for example: "
            "--learning_rate_factors cross=5 bias=2. If several texts fit a name, the last one counts."
        },
    )
    warmup_epochs: int = field(
        default=5,
        metadata={"help": "Number of epochs in which the learning rates rise from a tenth to their full value."},
    )
    weight_decay: float = field(default=4e-5, metadata={"help": "L2 weight decay of everything that is trained."})
    no_weight_decay: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Parameters whose names contain one of these texts get no weight decay, for example: "
            "--no_weight_decay bias."
        },
    )
    decoupled_weight_decay: bool = field(
        default=False, metadata={"help": "Use AdamW's decoupled weight decay instead of L2."}
    )
    adam_epsilon: float = field(default=1e-3, metadata={"help": "Epsilon of Adam; the published code uses 1e-3."})
    max_grad_norm: float = field(
        default=0.0, metadata={"help": "Largest norm of the gradient; 0, as published, does not clip it."}
    )
    embed_chunk_size: int | None = field(
        default=None,
        metadata={
            "help": "Encode this many captions and images at a time and recompute them in the backward pass, so that "
            "only one chunk's activations are in memory. The gradients are the same."
        },
    )
    augment: bool = field(
        default=True,
        metadata={"help": "Apply the published augmentation of images and captions (--no_augment: do not)."},
    )
    word_drop_probability: float = field(
        default=WORD_DROP_PROBABILITY,
        metadata={"help": "Probability with which the augmentation drops each word of a caption, 0 to 1."},
    )
    sampler: Literal["random", "identity"] = field(
        default="random",
        metadata={
            "help": "random: each pair once per epoch; identity: each batch holds --pairs_per_person pairs of each of "
            "its persons."
        },
    )
    pairs_per_person: int = field(
        default=2,
        metadata={"help": "Pairs of each person in a batch with --sampler identity; must divide the global batch."},
    )

    eval_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on (default: val; test if there is no val)."}
    )
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps, or epoch."})
    save_strategy: str = field(
        default="epoch", metadata={"help": "When to write a checkpoint: no, steps, epoch, or best."}
    )
    save_total_limit: int | None = field(
        default=1, metadata={"help": "Number of checkpoints to keep in addition to the best one."}
    )
    load_best_model_at_end: bool = field(
        default=True, metadata={"help": "Use the best epoch for the final model, not the last one."}
    )
    metric_for_best_model: str | None = field(
        default="rank1",
        metadata={"help": "Metric that decides which epoch is best: rank1, rank5, rank10, mAP, or mINP."},
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "True: continue from the last complete checkpoint in --output_dir, or start from the beginning if "
            "there is none; a folder: continue from this checkpoint."
        },
    )
    allow_changed_run: bool = field(
        default=False,
        metadata={
            "help": "Resume although the data, the base, the batch size, the number of processes, the seed or the "
            "sampler differ from those of the checkpoint, for example on a smaller cluster."
        },
    )
    overwrite: bool = field(
        default=False,
        metadata={
            "help": "Replace the finished run, or the checkpoints, in --output_dir; other files are never removed."
        },
    )
    push_to_hub: bool = field(
        default=False,
        metadata={
            "help": "Publish the final model once, at the end, as --hub_model_id; it is private unless --public."
        },
    )
    public: bool = field(default=False, metadata={"help": "With --push_to_hub: let everybody read the model."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay False: the trainer needs every column of a batch."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Search for parameters without a gradient in each step; no recipe needs it."}
    )

    def __post_init__(self) -> None:
        # transformers accepts bf16 without an accelerator only if the CPU is asked for.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.use_cpu:
            # transformers applies ddp_timeout only to accelerators; a process group that exists already is kept.
            PartialState(cpu=True, backend=self.ddp_backend, timeout=timedelta(seconds=self.ddp_timeout))
        if str(self.eval_strategy) in ("no", "IntervalStrategy.NO"):
            # Without an evaluation there is no best checkpoint.
            self.load_best_model_at_end = False
        super().__post_init__()
        self._check_objective()
        self._check_optimisation()
        self._check_batches()
        self._check_precision()
        self._refuse_arguments_without_effect()

    def _check_objective(self) -> None:
        if self.tune not in ("lora", "prompts", "full"):
            raise ValueError(f"tune is {self.tune!r}, it must be lora, prompts or full")
        if self.base_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"base_dtype is {self.base_dtype!r}, it must be float32 or bfloat16")
        if self.base_dtype != "float32" and self.tune != "lora":
            reason = "no weight is frozen" if self.tune == "full" else "no layer has LoRA"
            raise ValueError(f"base_dtype is {self.base_dtype}, but with tune {self.tune} {reason}: leave it out")
        # Imported here: the table's module needs this one.
        from .objective import LOSS_TERMS

        if unknown := sorted(self.loss_weights.keys() - LOSS_TERMS.keys()):
            raise ValueError(f"losses: unknown {', '.join(unknown)}; the known losses are {', '.join(LOSS_TERMS)}")
        if not any(self.loss_weights.values()):
            raise ValueError("losses: all weights are 0, so there is nothing to train")
        # A function that makes a loss has no such attributes.
        used = {name: LOSS_TERMS[name] for name, weight in self.loss_weights.items() if weight}
        tokens = [name for name, term in used.items() if getattr(term, "needs_tokens", False)]
        if self.embed_chunk_size is not None and tokens:
            raise ValueError(
                f"embed_chunk_size is {self.embed_chunk_size}, but {', '.join(tokens)} needs the tokens of the whole "
                "batch at once: leave embed_chunk_size out"
            )
        for name in ("tal", "identity_memory", "instance_memory", "sdm"):
            # Written so that NaN is refused, too.
            if not getattr(self, f"{name}_temperature") > 0:
                raise ValueError(f"{name}_temperature is {getattr(self, f'{name}_temperature')}, it must be positive")
        for name in ("identity_memory_momentum", "instance_memory_momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be between 0 and 1")
        if not self.tal_margin >= 0:
            raise ValueError(f"tal_margin is {self.tal_margin}, it must be at least 0")
        if self.contrastive_temperature is not None and not self.contrastive_temperature > 0:
            raise ValueError(f"contrastive_temperature is {self.contrastive_temperature}, it must be positive")
        if self.memory_start not in ("evaluation", "augmented"):
            raise ValueError(f"memory_start is {self.memory_start!r}, it must be evaluation or augmented")
        if self.memory_start == "augmented" and not self.augment:
            raise ValueError("memory_start is augmented, but augment is False: leave one of them out")
        if self.memory_start == "augmented" and not any(getattr(term, "needs_start", False) for term in used.values()):
            raise ValueError("memory_start is augmented, but no loss has a memory: leave it out")
        if not 0 <= self.word_drop_probability <= 1:
            raise ValueError(f"word_drop_probability is {self.word_drop_probability}, it must be between 0 and 1")
        if not self.augment and self.word_drop_probability != WORD_DROP_PROBABILITY:
            raise ValueError(
                f"word_drop_probability is {self.word_drop_probability}, but augment is False: leave one of them out"
            )
        if self.interaction_depth < 1:
            raise ValueError(f"interaction_depth is {self.interaction_depth}, it must be at least 1")
        if not 0 < self.mask_probability <= 1:
            raise ValueError(f"mask_probability is {self.mask_probability}, it must be more than 0 and at most 1")

    def _check_optimisation(self) -> None:
        for name in ("lora_rank", "lora_alpha", "per_device_train_batch_size", "per_device_eval_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be at least 1")
        for name in ("learning_rate", "lora_learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} is {value}, it must be a number, at least 0")
        if "" in self.rate_factors:
            raise ValueError("learning_rate_factors: an entry has no text before its factor, it must be text=factor")
        texts: Any = self.no_weight_decay
        if not (isinstance(texts, (list, tuple)) and all(isinstance(text, str) and text for text in texts)):
            raise ValueError(f"no_weight_decay is {texts!r}, it must be a list of texts that are parts of names")
        if self.warmup_epochs < 0:
            raise ValueError(f"warmup_epochs is {self.warmup_epochs}, it must be at least 0")
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(f"max_steps is {self.max_steps}, it must be at least 1, or -1 for --num_train_epochs")
        if self.max_steps > 0:
            return
        if not (self.num_train_epochs > 0 and math.isfinite(self.num_train_epochs)):
            raise ValueError(f"num_train_epochs is {self.num_train_epochs}, it must be more than 0")
        if self.epoch_schedule and self.warmup_epochs > self.num_train_epochs:
            _logger.warning(
                f"warmup_epochs is {self.warmup_epochs}, and the run has {self.num_train_epochs:g} epochs: the "
                "learning rates never reach their full value"
            )

    def _check_batches(self) -> None:
        if self.sampler not in ("random", "identity"):
            raise ValueError(f"sampler is {self.sampler!r}, it must be random or identity")
        global_batch = self.train_batch_size * self.world_size
        if self.sampler == "identity" and (self.pairs_per_person < 1 or global_batch % self.pairs_per_person):
            raise ValueError(
                f"pairs_per_person is {self.pairs_per_person}, it must divide the {global_batch} pairs of a batch "
                "(per_device_train_batch_size times the number of processes)"
            )
        if self.embed_chunk_size is not None and self.embed_chunk_size < 1:
            raise ValueError(f"embed_chunk_size is {self.embed_chunk_size}, it must be at least 1")
        if self.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size must be False: the loss depends on the whole batch; to save memory, set "
                "embed_chunk_size"
            )
        # transformers has made a configuration object of it by now, whatever was given.
        accelerator_config: Any = self.accelerator_config
        if accelerator_config.split_batches or accelerator_config.dispatch_batches:
            raise ValueError("split_batches and dispatch_batches must be off: each process makes its part of a batch")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must be False: the trainer needs every column of a batch")

    def _check_precision(self) -> None:
        if self.fp16 and self.use_cpu:
            raise ValueError("fp16 needs an accelerator: on a CPU, leave it out or use bf16")
        if self.bf16_full_eval or self.fp16_full_eval:
            raise ValueError("bf16_full_eval and fp16_full_eval must be False: evaluation is in float32")

    def _refuse_arguments_without_effect(self) -> None:
        if self.optim not in (TrainingArguments.optim, TrainingArguments.default_optim):
            raise ValueError(f"optim is {self.optim!r}: ECCL trains with Adam, or AdamW with --decoupled_weight_decay")
        names = ["label_smoothing_factor", "optim_args", "optim_target_modules", "train_sampling_strategy"]
        names += ["lr_scheduler_kwargs"] if self.epoch_schedule else []
        for name in names:
            if getattr(self, name) not in (getattr(TrainingArguments, name, None), None, {}):
                raise ValueError(f"{name} is {getattr(self, name)!r}: it would do nothing here, leave it out")
        if self.public and not self.push_to_hub:
            raise ValueError("public only applies to push_to_hub, which is not set")
        if self.hub_private_repo is False:
            raise ValueError("hub_private_repo is False: to publish a public model, set public")
        if self.enable_jit_checkpoint:
            raise ValueError("enable_jit_checkpoint must be False: this trainer already writes a checkpoint on SIGTERM")
        if self.epoch_schedule and self.warmup_steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps}, but the learning rates are stepped per epoch: set "
                "warmup_epochs, or another lr_scheduler_type"
            )

    @property
    def loss_weights(self) -> dict[str, float]:
        """The weight of each loss by name. `losses` may be a list of `name=weight`, or a mapping as in a recipe.

        Raises:
            ValueError: an entry is not `name=weight`, is given twice, or its weight is negative or not a number.
        """
        return _read_numbers("losses", "weight", self.losses, "tal=1")

    @property
    def rate_factors(self) -> dict[str, float]:
        """The factor on the learning rate for each part of a parameter's name, in the given order.

        `learning_rate_factors` may be a list of `text=factor`, or a mapping as in a recipe.

        Raises:
            ValueError: as for `loss_weights`.
        """
        return _read_numbers("learning_rate_factors", "factor", self.learning_rate_factors, "bias=2")

    @property
    def resume(self) -> str | bool | None:
        """`resume_from_checkpoint`: a folder, or `True` for the last checkpoint; on a command line all are texts."""
        given = self.resume_from_checkpoint
        return {"true": True, "false": None}.get(str(given).lower(), given)

    @property
    def epoch_schedule(self) -> bool:
        """Whether the published per-epoch schedule is used; setting another `lr_scheduler_type` turns it off."""
        return self.lr_scheduler_type == "linear"


def _read_numbers(option: str, kind: str, given: Any, example: str) -> dict[str, float]:
    """Reads the numbers of an option by name: a list of `name=number`, or a mapping."""
    entries = given.items() if isinstance(given, Mapping) else [str(entry).partition("=")[::2] for entry in given]
    numbers: dict[str, float] = {}
    for name, text in entries:
        try:
            number = float(text)
        except (TypeError, ValueError):
            number = math.nan
        if not 0 <= number < math.inf:
            raise ValueError(
                f"{option}: the {kind} of {name!r} is {text!r}, it must be a number of at least 0 ({example})"
            )
        if name in numbers:
            raise ValueError(f"{option}: {name!r} is given twice")
        numbers[name] = number
    return numbers


def epoch_factor(epoch: int, num_epochs: int, warmup_epochs: int = 5) -> float:
    """Returns the factor on both learning rates in an epoch.

    It is `0.1 + 0.9 e / w` in the warm-up epochs `e < w`, then `0.5 (1 + cos(pi (e - w) / (E - w)))`.

    Args:
        epoch: `e`, counted from 0.
        num_epochs: `E`.
        warmup_epochs: `w`.
    """
    if epoch < warmup_epochs:
        return 0.1 + 0.9 * epoch / warmup_epochs
    if num_epochs <= warmup_epochs:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup_epochs) / (num_epochs - warmup_epochs)))


__all__ = ["ECCLTrainingArguments", "epoch_factor"]
