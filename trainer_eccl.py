"""Training: the arguments, the objective with its memories, and the `Trainer` that drives both."""

import copy
import math
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import safetensors.torch
import torch
from peft import PeftModel
from torch import nn
from torch.distributed.nn.functional import all_gather
from transformers import Trainer, TrainingArguments

from .data_eccl import CaptionPairs, IdentitySampler, PairCollator, PairSampler, SplitEmbeddings, embed_split
from .eval.person_retrieval.person_retrieval import score_embeddings
from .lora_eccl import merge_lora
from .losses_eccl import attribute_classification_loss, image_text_contrastive_loss, triplet_alignment_loss
from .memory_eccl import CrossModalMemory
from .modeling_eccl import ECCLModel

OBJECTIVE_FILE = "objective.safetensors"
_INSTANCE_EPS = 1e-8


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


class ECCLObjective(nn.Module):
    """The losses of a run with all their state: the two memories, and the attribute heads of pre-training.

    Args:
        args: weights, temperatures, margin, momenta.
        dim: width of the features.
        num_persons: rows of the identity memory.
        row_person_labels: `(rows,)`: whose each training image is.
        num_attribute_values: values of each attribute; empty without `attribute_weight`.
    """

    def __init__(
        self,
        args: ECCLTrainingArguments,
        dim: int,
        num_persons: int,
        row_person_labels: torch.Tensor,
        num_attribute_values: list[int],
    ):
        super().__init__()
        self.weights = {
            name: getattr(args, f"{name}_weight")
            for name in ("tal", "identity_memory", "instance_memory", "contrastive", "attribute")
        }
        self.tal_temperature, self.tal_margin = args.tal_temperature, args.tal_margin
        self.num_attribute_values = num_attribute_values
        self.identity_memory = self.instance_memory = self.attribute_head = None
        if self.weights["identity_memory"]:
            self.identity_memory = CrossModalMemory(
                torch.zeros(num_persons, dim),
                torch.zeros(num_persons, dim),
                torch.arange(num_persons),
                args.identity_memory_temperature,
                args.identity_memory_momentum,
            )
        if self.weights["instance_memory"]:
            self.instance_memory = CrossModalMemory(
                torch.zeros(len(row_person_labels), dim),
                torch.zeros(len(row_person_labels), dim),
                row_person_labels,
                args.instance_memory_temperature,
                args.instance_memory_momentum,
                eps=_INSTANCE_EPS,
            )
        if self.weights["attribute"]:
            self.attribute_head = nn.Linear(dim, sum(num_attribute_values))

    def memories(self, batch: dict[str, torch.Tensor]) -> list[tuple[str, CrossModalMemory, torch.Tensor]]:
        """Each memory in use with its name and the row of each item of the batch."""
        both = (
            ("identity_memory", self.identity_memory, batch["person_labels"]),
            ("instance_memory", self.instance_memory, batch["rows"]),
        )
        return [entry for entry in both if entry[1] is not None]

    def forward(
        self, image_features: torch.Tensor, text_features: torch.Tensor, logit_scale: torch.Tensor, batch: dict
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The weighted total, and each part unweighted by name.

        Args:
            image_features, text_features: `(batch, dim)`, unnormalised.
            logit_scale: the factor of InfoNCE.
            batch: `person_labels`, `rows`, and `attribute_labels` where they are used.
        """
        parts: dict[str, torch.Tensor] = {}
        total = image_features.new_zeros((), dtype=torch.float32)
        if self.weights["tal"]:
            parts["tal_loss"] = triplet_alignment_loss(
                image_features, text_features, batch["person_labels"], self.tal_temperature, self.tal_margin
            )
            total = total + self.weights["tal"] * parts["tal_loss"]
        for name, memory, _ in self.memories(batch):
            image_to_text, text_to_image = memory(image_features, text_features, batch["person_labels"])
            parts[f"{name}_loss_i2t"], parts[f"{name}_loss_t2i"] = image_to_text, text_to_image
            total = total + self.weights[name] * (image_to_text + text_to_image)
        if self.weights["contrastive"]:
            parts["contrastive_loss"] = image_text_contrastive_loss(image_features, text_features, logit_scale)
            total = total + self.weights["contrastive"] * parts["contrastive_loss"]
        if self.attribute_head is not None:
            for index, (name, features) in enumerate((("image", image_features), ("text", text_features))):
                parts[f"attribute_loss_{name}"] = attribute_classification_loss(
                    self.attribute_head(features.float()),
                    batch["attribute_labels"][:, index],
                    self.num_attribute_values,
                )
                total = total + self.weights["attribute"] * parts[f"attribute_loss_{name}"]
        return total, parts

    def start_memories(
        self,
        image_features: torch.Tensor,
        text_features: torch.Tensor,
        captions_per_row: torch.Tensor,
        row_person_labels: torch.Tensor,
    ) -> None:
        """Fills the memories from one pass over the training set: an image counts once for each of its captions.

        Args:
            image_features: `(images, dim)`, each training image once, unnormalised.
            text_features: `(captions, dim)`, each caption once, in the order of the images.
            captions_per_row: `(images,)`.
            row_person_labels: `(images,)`.
        """
        rows = torch.arange(len(image_features), device=image_features.device)
        row_of_caption = rows.repeat_interleave(captions_per_row)
        for memory, target in ((self.identity_memory, row_person_labels), (self.instance_memory, rows)):
            if memory is not None:
                memory.fill(image_features[row_of_caption], text_features, target[row_of_caption])


class ECCLTrainer(Trainer):
    """Trains an [`ECCLModel`], plain or wrapped by [`~eccl.lora_eccl.attach_lora`], and keeps its memories.

    Args:
        model: what trains is what requires a gradient.
        args: see [`ECCLTrainingArguments`].
        train_dataset: pairs of the training split.
        eval_dataset: a split as `load_dataset` gives it; every caption queries every image.
        num_attribute_values: values of each attribute, where `attribute_weight` is set.
        **kwargs: as for `Trainer`; `processing_class` is the [`ECCLProcessor`].
    """

    # The losses are sums and means over the whole batch already.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: ECCLModel | PeftModel,
        args: ECCLTrainingArguments,
        train_dataset: CaptionPairs,
        eval_dataset: datasets.Dataset | None = None,
        num_attribute_values: list[int] | None = None,
        **kwargs,
    ):
        processor = kwargs["processing_class"]
        kwargs.setdefault("data_collator", PairCollator(processor))
        super().__init__(model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        self.objective = ECCLObjective(
            args,
            model.config.projection_dim,
            train_dataset.num_persons,
            train_dataset.person_labels,
            num_attribute_values or [],
        ).to(self.args.device)
        self._part_sums: dict[str, torch.Tensor] = {}
        self._part_count = 0
        # A sampler that cannot be is refused now, before the memories take a pass over the training set.
        self._get_train_sampler()

    def _get_train_sampler(self, train_dataset: CaptionPairs | None = None) -> PairSampler | IdentitySampler:
        pairs = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if self.args.sampler == "random":
            return PairSampler(len(pairs), seed)
        # Batch i goes to process i modulo their number: so many in a row make one batch of the objective.
        batch_size = self.args.train_batch_size * self.args.world_size
        persons_per_batch = batch_size // self.args.pairs_per_person
        if persons_per_batch > pairs.num_persons:
            raise ValueError(
                f"a batch of {batch_size} pairs with pairs_per_person {self.args.pairs_per_person} needs "
                f"{persons_per_batch} persons, the training split has {pairs.num_persons}: lower "
                "per_device_train_batch_size or raise pairs_per_person"
            )
        return IdentitySampler(
            pairs.person_labels[pairs.row_of_pair], persons_per_batch, self.args.pairs_per_person, seed
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Adam over two groups, LoRA matrices and all else that trains, each with its own rate."""
        if self.optimizer is None:
            named = list((self.model if model is None else model).named_parameters())
            named += list(self.objective.named_parameters())
            trainable = [(name, parameter) for name, parameter in named if parameter.requires_grad]
            groups = [
                {
                    "params": [parameter for name, parameter in trainable if ("lora_" in name) == is_lora],
                    "lr": self.args.lora_learning_rate if is_lora else self.args.learning_rate,
                }
                for is_lora in (True, False)
            ]
            kind = torch.optim.AdamW if self.args.decoupled_weight_decay else torch.optim.Adam
            self.optimizer = kind(
                [group for group in groups if group["params"]],
                lr=self.args.learning_rate,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
                weight_decay=self.args.weight_decay,
            )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The per-epoch schedule, or transformers' own where `lr_scheduler_type` names one."""
        if not self.args.epoch_schedule:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            pairs = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
            round_up = math.floor if self.args.dataloader_drop_last else math.ceil
            steps_per_epoch = max(1, round_up(len(self._get_train_sampler()) / pairs))
            num_epochs = math.ceil(num_training_steps / steps_per_epoch)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                self.optimizer if optimizer is None else optimizer,
                lambda step: epoch_factor(step // steps_per_epoch, num_epochs, self.args.warmup_epochs),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Trains; the memories start from one pass over the training set, or from the checkpoint."""
        if not resume_from_checkpoint:
            self._start_memories()
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _start_memories(self) -> None:
        if not (self.args.identity_memory_weight or self.args.instance_memory_weight):
            return
        pairs = self.train_dataset
        embeds = self._embed(pairs.rows)
        device = self.args.device
        self.objective.start_memories(
            embeds.image_embeds.to(device),
            embeds.text_embeds.to(device),
            pairs.captions_per_row.to(device),
            pairs.person_labels.to(device),
        )

    def _embed(self, rows: datasets.Dataset) -> SplitEmbeddings:
        return embed_split(
            self.model,
            self.processing_class,
            rows,
            self.args.eval_batch_size,
            self.args.dataloader_num_workers,
            progress=not self.args.disable_tqdm and self.is_world_process_zero(),
            share=True,
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The objective over the batches of all processes together."""
        outputs = model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])
        batch = {name: inputs[name] for name in ("person_labels", "rows", "attribute_labels") if name in inputs}
        image_features, text_features = outputs.image_embeds, outputs.text_embeds
        if self.args.world_size > 1:
            image_features, text_features = _gather_features(image_features), _gather_features(text_features)
            batch = {name: self.accelerator.gather(labels) for name, labels in batch.items()}
        scale = self.accelerator.unwrap_model(model).logit_scale.exp()
        total, parts = self.objective(image_features.float(), text_features.float(), scale, batch)
        if model.training:
            self._count_parts(parts)
            self._written = (image_features.detach(), text_features.detach(), batch)
        return (total, outputs) if return_outputs else total

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """A step of `Trainer`, and after its backward pass the update of the memories."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        image_features, text_features, batch = self._written
        for _, memory, rows in self.objective.memories(batch):
            memory.update(image_features, text_features, rows)
        return loss

    def _count_parts(self, parts: dict[str, torch.Tensor]) -> None:
        for name, value in parts.items():
            self._part_sums[name] = self._part_sums.get(name, 0.0) + value.detach()
        self._part_count += 1

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Adds the mean of each loss part since the last training log, and the rate of LoRA."""
        if "loss" in logs and self._part_count:
            logs |= {name: float(total) / self._part_count for name, total in self._part_sums.items()}
            if len(self.optimizer.param_groups) > 1:
                lora, prompts = (group["lr"] for group in self.optimizer.param_groups)
                logs |= {"learning_rate": prompts, "lora_learning_rate": lora}
            self._part_sums, self._part_count = {}, 0
        super().log(logs, *args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Text-to-image retrieval on a split: every caption queries every image."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        metrics = score_embeddings(*(embeds.numpy() for embeds in self._embed(rows)))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the model as anyone loads it, LoRA merged, with its processor; the trainer's own goes on training.

        Checkpoints, for which transformers calls this itself, hold what is trained, and the memories.
        """
        if _internal_call or not isinstance(self.model, PeftModel):
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            folder = self.args.output_dir if output_dir is None else output_dir
            merge_lora(copy.deepcopy(self.model)).save_pretrained(folder)
            self.processing_class.save_pretrained(folder)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        # transformers calls this on every process: one writes.
        if not self.args.should_save:
            return
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        state = {name: tensor.contiguous().cpu() for name, tensor in self.objective.state_dict().items()}
        if state:
            safetensors.torch.save_file(state, folder / OBJECTIVE_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        state = self.objective.state_dict()
        if state:
            file = Path(resume_from_checkpoint) / OBJECTIVE_FILE
            self.objective.load_state_dict(safetensors.torch.load_file(file, device=str(self.args.device)))


def _gather_features(features: torch.Tensor) -> torch.Tensor:
    """The features of all ranks in rank order; the gradient of each rank's rows comes back from all of them."""
    return torch.cat(all_gather(features.contiguous()))


__all__ = ["ECCLObjective", "ECCLTrainer", "ECCLTrainingArguments", "epoch_factor"]
