"""The settings of a training run, and the published schedule."""

import math
from dataclasses import dataclass, field
from datetime import timedelta

import torch
from accelerate import PartialState
from transformers import TrainingArguments


@dataclass
class ECCLTrainingArguments(TrainingArguments):
    """transformers' training arguments with ECCL's own, the published recipe being the default.

    The learning rate is stepped per epoch (see [`epoch_factor`]) unless `lr_scheduler_type` is set; the optimiser is
    Adam with L2 decay, or AdamW with `decoupled_weight_decay`.
    """

    output_dir: str | None = field(default="eccl-output", metadata={"help": "Checkpoints and the final model."})
    learning_rate: float = field(
        default=1e-3, metadata={"help": "Of prompts and maps; of everything with --tune full."}
    )
    lora_learning_rate: float = field(default=1e-4, metadata={"help": "Of the LoRA matrices."})
    weight_decay: float = field(default=4e-5, metadata={"help": "L2 decay of all that trains."})
    decoupled_weight_decay: bool = field(default=False, metadata={"help": "AdamW's decay in place of L2."})
    adam_epsilon: float = field(default=1e-3, metadata={"help": "Adam's eps; the published code's value."})
    num_train_epochs: float = field(default=60, metadata={"help": "Passes over all pairs."})
    warmup_epochs: int = field(default=5, metadata={"help": "Epochs over which the rate rises from a tenth."})
    per_device_train_batch_size: int = field(default=128, metadata={"help": "Pairs per step and process."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "0 clips nothing, as published."})

    tune: str = field(default="lora", metadata={"help": "lora: prompts and LoRA; full: every parameter."})
    lora_rank: int = field(default=4, metadata={"help": "Rank of the updates."})
    lora_alpha: int = field(default=4, metadata={"help": "The updates are scaled by alpha / rank."})
    sampler: str = field(
        default="random",
        metadata={
            "help": "random: every pair once an epoch; identity: pairs_per_person pairs of each person of a batch."
        },
    )
    pairs_per_person: int = field(
        default=2, metadata={"help": "With --sampler identity; divides the batch of all processes."}
    )
    embed_chunk_size: int | None = field(
        default=None,
        metadata={
            "help": "Encode so many pairs at a time, and again in the backward pass: a whole batch in the memory of so "
            "many, with the same gradients."
        },
    )
    augment: bool = field(default=True, metadata={"help": "The published augmentation of images and captions."})
    eval_split: str | None = field(default=None, metadata={"help": "val by default, test where there is no val."})

    tal_weight: float = field(default=1.0, metadata={"help": "Of the triplet alignment loss."})
    tal_temperature: float = field(default=0.02, metadata={"help": "Positive."})
    tal_margin: float = field(default=0.2, metadata={"help": "At least 0."})
    identity_memory_weight: float = field(default=1.0, metadata={"help": "0 does without the memory."})
    identity_memory_temperature: float = field(default=0.03, metadata={"help": "Positive."})
    identity_memory_momentum: float = field(default=0.1, metadata={"help": "Share of the old row that stays."})
    instance_memory_weight: float = field(default=0.1, metadata={"help": "0 does without the memory."})
    instance_memory_temperature: float = field(default=0.015, metadata={"help": "Positive."})
    instance_memory_momentum: float = field(default=0.1, metadata={"help": "Share of the old row that stays."})
    contrastive_weight: float = field(default=0.0, metadata={"help": "Of InfoNCE at the model's own logit_scale."})
    attribute_weight: float = field(
        default=0.0, metadata={"help": "Of attribute prediction, for pre-training on the synthetic benchmark."}
    )

    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to write a checkpoint."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints kept beside the best."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Keep the best epoch, not the last."})
    metric_for_best_model: str | None = field(default="rank1", metadata={"help": "rank1, mAP, ..."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off: the trainer needs them all."})

    def __post_init__(self):
        # transformers takes bf16 without an accelerator only if the CPU is asked for.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.use_cpu:
            # transformers gives ddp_timeout to accelerators alone; the group of processes that is there stays.
            PartialState(cpu=True, backend=self.ddp_backend, timeout=timedelta(seconds=self.ddp_timeout))
        super().__post_init__()
        if self.tune not in ("lora", "full"):
            raise ValueError(f"tune is {self.tune!r}, it must be lora or full")
        if self.sampler not in ("random", "identity"):
            raise ValueError(f"sampler is {self.sampler!r}, it must be random or identity")
        global_batch = self.train_batch_size * self.world_size
        if self.sampler == "identity" and (self.pairs_per_person < 1 or global_batch % self.pairs_per_person):
            raise ValueError(
                f"pairs_per_person is {self.pairs_per_person}, it must divide the {global_batch} pairs of a batch "
                "(per_device_train_batch_size times processes)"
            )
        if self.embed_chunk_size is not None and self.embed_chunk_size < 1:
            raise ValueError(f"embed_chunk_size is {self.embed_chunk_size}, it must be at least 1")
        weights = ("tal", "identity_memory", "instance_memory", "contrastive", "attribute")
        for name in weights:
            if getattr(self, f"{name}_weight") < 0:
                raise ValueError(f"{name}_weight is {getattr(self, f'{name}_weight')}, it must not be negative")
        if not any(getattr(self, f"{name}_weight") for name in weights):
            raise ValueError("all loss weights are 0: there is nothing to train")
        for name in ("tal", "identity_memory", "instance_memory"):
            if getattr(self, f"{name}_temperature") <= 0:
                raise ValueError(f"{name}_temperature is {getattr(self, f'{name}_temperature')}, it must be positive")
        if self.optim != TrainingArguments.optim and self.optim != TrainingArguments.default_optim:
            raise ValueError(f"optim is {self.optim!r}: ECCL trains with Adam, or AdamW with --decoupled_weight_decay")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must be False: the trainer needs every column of a batch")
        unused = ("label_smoothing_factor", "optim_args", "optim_target_modules", "train_sampling_strategy")
        unused += ("lr_scheduler_kwargs",) if self.epoch_schedule else ()
        for name in unused:
            if getattr(self, name) not in (getattr(TrainingArguments, name, None), None, {}):
                raise ValueError(f"{name} is {getattr(self, name)!r}: it would do nothing here")
        if self.fp16 and self.use_cpu:
            raise ValueError("fp16 needs an accelerator: on a CPU, leave it out or take bf16")
        if self.bf16_full_eval or self.fp16_full_eval:
            raise ValueError("bf16_full_eval and fp16_full_eval must be False: evaluation is in float32")
        if self.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size must be False: the loss is of the whole batch; embed_chunk_size makes it fit"
            )
        if self.enable_jit_checkpoint:
            raise ValueError("enable_jit_checkpoint must be False: SIGTERM writes a checkpoint without it")
        if self.accelerator_config.split_batches or self.accelerator_config.dispatch_batches:
            raise ValueError("split_batches and dispatch_batches must be off: each process makes its share of a batch")
        if self.epoch_schedule and self.warmup_steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps}, but the rate is stepped per epoch: set warmup_epochs, "
                "or another lr_scheduler_type"
            )

    @property
    def epoch_schedule(self) -> bool:
        """Whether the published per-epoch schedule holds: any scheduler but transformers' default turns it off."""
        return self.lr_scheduler_type == "linear"


def epoch_factor(epoch: int, num_epochs: int, warmup_epochs: int = 5) -> float:
    """The factor on both learning rates: `0.1 + 0.9 e / w` for e < w, then `0.5 (1 + cos(pi (e - w) / (E - w)))`.

    Args:
        epoch: from 0.
        num_epochs: `E`.
        warmup_epochs: `w`.
    """
    if epoch < warmup_epochs:
        return 0.1 + 0.9 * epoch / warmup_epochs
    if num_epochs <= warmup_epochs:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup_epochs) / (num_epochs - warmup_epochs)))


__all__ = ["ECCLTrainingArguments", "epoch_factor"]
