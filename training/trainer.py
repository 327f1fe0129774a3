"""Training: the objective with its memories, and the `Trainer` that drives it."""

import copy
import logging
import math
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import datasets
import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import Trainer

from ..encoding_eccl import SplitEmbeddings, embed_split, leave_process_group
from ..eval.person_retrieval.person_retrieval import score_embeddings
from ..hub.adapter import merge_lora
from ..modeling_eccl import ECCLModel
from .arguments import ECCLTrainingArguments, epoch_factor
from .checkpoints import (
    CheckpointCallback,
    delete_older,
    last_complete_checkpoint,
    mark_complete,
    on_sigterm,
    what_is_missing,
)
from .monitor import StepMonitor
from .objective import ECCLObjective
from .pairs import CaptionPairs, PairCollator
from .samplers import IdentitySampler, PairSampler

_logger = logging.getLogger(__name__)
OBJECTIVE_FILE = "objective.safetensors"


class ECCLTrainer(Trainer):
    """Trains an [`ECCLModel`], plain or wrapped by [`~eccl.hub.adapter.attach_lora`], and keeps its memories.

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
        if not args.contrastive_weight:
            # No other loss reaches it, and DDP would wait for its gradient.
            model.logit_scale.requires_grad_(False)
        self.objective = ECCLObjective(
            args,
            model.config.projection_dim,
            train_dataset.num_persons,
            train_dataset.person_labels,
            num_attribute_values or [],
        ).to(self.args.device)
        if self.is_fsdp_enabled:
            self._prepare_to_shard(model)
        elif os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            _logger.warning("FSDP is for accelerators, there are none: every process trains a whole copy (DDP)")
        self._monitor = StepMonitor()
        self._written: list[_Written] = []
        self._rates: list[float] = []
        self._checkpoint_callback = CheckpointCallback(self.accelerator)
        self.add_callback(self._checkpoint_callback)
        # A sampler that cannot be is refused now, before the memories take a pass over the training set.
        self._get_train_sampler()

    def _prepare_to_shard(self, model: ECCLModel | PeftModel) -> None:
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise ValueError(f"fsdp_version is {plugin.fsdp_version}, ECCL trains with version 2")
        if plugin.cpu_ram_efficient_loading:
            raise ValueError("fsdp_cpu_ram_efficient_loading must be false: every process encodes before it is sharded")
        if self.args.attribute_weight:
            raise ValueError("attribute_weight does not go with FSDP, which takes no parameters outside the model")
        # fully_shard takes no scalar; its gradient is of the whole batch, and so the same in every process.
        plugin.ignored_modules = [nn.ParameterList([model.logit_scale])]
        # The layers that are called as such: token_embedding is used without the CLIPTextEmbeddings around it.
        if plugin.transformer_cls_names_to_wrap is None:
            plugin.transformer_cls_names_to_wrap = ["CLIPEncoderLayer"]
        # What the shards are put together in again; it has no memory of its own.
        memo = {id(own): nn.Parameter(own.detach().to("meta"), own.requires_grad) for own in model.parameters()}
        self._skeleton = copy.deepcopy(model, memo)

    def _get_train_sampler(self, train_dataset: CaptionPairs | None = None) -> PairSampler | IdentitySampler:
        pairs = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        # Batch i goes to process i modulo their number: so many in a row make one batch of the objective.
        batch_size = self.args.train_batch_size * self.args.world_size
        if self.args.sampler == "random":
            fills = self.args.world_size > 1 and not self.args.dataloader_drop_last
            return PairSampler(len(pairs), seed, batch_size if fills else 1)
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
            batch_size = self.args.train_batch_size * self.args.world_size
            whole = math.floor if self.args.dataloader_drop_last else math.ceil
            batches = whole(len(self._get_train_sampler()) / batch_size)
            steps_per_epoch = max(1, math.ceil(batches / self.args.gradient_accumulation_steps))
            num_epochs = math.ceil(num_training_steps / steps_per_epoch)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                self.optimizer if optimizer is None else optimizer,
                lambda step: epoch_factor(step // steps_per_epoch, num_epochs, self.args.warmup_epochs),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """As of `Trainer`; a signal to the whole run is not for the workers."""
        loader = super().get_train_dataloader()
        # accelerate's loader stands before torch's, which starts the workers.
        loader.base_dataloader.worker_init_fn = partial(_start_worker, loader.worker_init_fn)
        return loader

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Trains; the memories start from one pass over the training set, or from the checkpoint.

        Args:
            resume_from_checkpoint: a checkpoint, or `True` for the last whole one in `output_dir`; where there is none
                yet, training starts from the beginning, so that one command serves for every start.

        Raises:
            ValueError: the checkpoint that was named is not whole.
            FloatingPointError: the loss, or the gradient, is no longer a number.
            SystemExit: with 143, after SIGTERM, once a checkpoint is written.
        """
        checkpoint = self._choose_checkpoint(resume_from_checkpoint)
        with on_sigterm(self.accelerator.set_trigger):
            if checkpoint is None:
                self._start_memories()
            else:
                # That of the start was made then.
                self.args.eval_on_start = False
            return super().train(resume_from_checkpoint=checkpoint, **kwargs)

    def _choose_checkpoint(self, asked: str | bool | None) -> str | None:
        output_dir = Path(self.args.output_dir)
        report = _logger.warning if self.is_world_process_zero() else lambda _: None
        if not asked:
            if last_complete_checkpoint(output_dir, lambda _: None) is not None:
                report(f"{output_dir} holds checkpoints of another run, which a later resume may take for this one's")
            return None
        if asked is True:
            found = last_complete_checkpoint(output_dir, report)
            if found is None:
                report(f"{output_dir} has no complete checkpoint: training starts from the beginning")
            # One process decides, so that all start from the same.
            return broadcast_object_list([None if found is None else str(found)])[0]
        missing = what_is_missing(Path(asked))
        if missing is not None:
            raise ValueError(f"{asked} cannot be resumed from: {missing}")
        return str(asked)

    def _run_epoch(self, *args, **kwargs) -> None:
        # A run that was killed after its last checkpoint has no step left; transformers would take one more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        # Where several processes resume within an epoch, transformers does not find the sampler to tell it the epoch.
        sampler = kwargs["train_dataloader"]
        while hasattr(sampler, "batch_sampler"):
            sampler = sampler.batch_sampler
        sampler.sampler.set_epoch(kwargs["epoch"])
        self._monitor.start()
        super()._run_epoch(*args, **kwargs)

    def get_batch_samples(self, *args, **kwargs):
        """As of `Trainer`; a worker that dies is named as what it is, wherever its process notices it."""
        try:
            return super().get_batch_samples(*args, **kwargs)
        except (ConnectionError, EOFError) as error:
            if not self.args.dataloader_num_workers:
                raise
            raise RuntimeError("a DataLoader worker exited unexpectedly while it handed over a batch") from error

    def _start_memories(self) -> None:
        if not (self.args.identity_memory_weight or self.args.instance_memory_weight):
            return
        pairs, device = self.train_dataset, self.args.device
        if self.is_fsdp_enabled:
            # transformers leaves on the CPU what it is to shard.
            self.model.to(device)
        embeds = self._embed(pairs.rows)
        self.objective.start_memories(
            embeds.image_embeds.to(device),
            embeds.text_embeds.to(device),
            pairs.captions_per_row.to(device),
            pairs.person_labels.to(device),
        )

    def _embed(self, rows: datasets.Dataset) -> SplitEmbeddings:
        if isinstance(self.model, FSDPModule) and "get_image_features" not in vars(self.model):
            # Shards are gathered for these as they are for forward.
            for name in ("get_image_features", "get_text_features"):
                register_fsdp_forward_method(self.model, name)
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
        outputs = model(
            input_ids=inputs["input_ids"],
            pixel_values=inputs["pixel_values"],
            embed_chunk_size=self.args.embed_chunk_size,
        )
        names = ("person_labels", "rows", "attribute_labels")
        batch = {name: inputs[name] for name in names if name in inputs}
        image_features, text_features = outputs.image_embeds, outputs.text_embeds
        if self.args.world_size > 1:
            is_real = ~self.accelerator.gather(inputs["is_padding"])
            image_features, text_features = (
                _gather_features(self.accelerator, features)[is_real] for features in (image_features, text_features)
            )
            batch = {name: self.accelerator.gather(labels)[is_real] for name, labels in batch.items()}
        scale = self.accelerator.unwrap_model(model).logit_scale.exp()
        total, parts = self.objective(image_features, text_features, scale, batch)
        self._written.append(
            _Written(image_features.detach(), text_features.detach(), batch, inputs.get("file_paths", []))
        )
        if not total.isfinite():
            values = ", ".join(f"{name} {float(value):.4g}" for name, value in parts.items())
            self._stop(f"the loss is {float(total)} ({values})", self._written)
        self._monitor.add(parts)
        return (total, outputs) if return_outputs else total

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """A step of `Trainer`; after the last backward pass of an optimiser step, the update of the memories."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._update_memories()
        return loss

    def _update_memories(self) -> None:
        for image_features, text_features, batch, _ in self._written:
            for name, memory, rows in self.objective.memories(batch):
                image_drift, text_drift = memory.update(image_features, text_features, rows)
                self._monitor.add({f"{name}_drift_image": image_drift, f"{name}_drift_text": text_drift})
        self._monitor.count(sum(len(written.image_features) for written in self._written))
        self._last_written, self._written = self._written, []

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        # With a scaler, which float16 needs, steps of infinite gradients are left out and the scale lowered.
        if self.accelerator.scaler is None and not math.isfinite(norm):
            self._stop(f"the norm of the gradient is {float(norm)}", self._last_written)
        return norm

    def _determine_best_metric(self, *args, **kwargs) -> bool:
        # With save_strategy "best" this decides whether the checkpoint is written that SIGTERM asked for.
        return super()._determine_best_metric(*args, **kwargs) or self._checkpoint_callback.stopping

    def _stop(self, reason: str, written: list["_Written"]) -> None:
        """Every process comes here at once: they all have the loss, and the gradient, of the whole batch."""
        # What fills a batch has no path.
        own_paths = [path for batch in written for path in batch.file_paths if path is not None]
        raise FloatingPointError(
            f"step {self.state.global_step + 1}: {reason}. Training stops, and no checkpoint is made of this step. The "
            f"images of its batch: {', '.join(gather_object(own_paths))}"
        )

    def _get_learning_rate(self) -> float:
        # transformers asks between the steps of the optimiser and of the scheduler, for the log.
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        return super()._get_learning_rate()

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Adds what the steps since the last training log gave: see [`StepMonitor`]; and the rate of LoRA."""
        if "loss" in logs:
            logs |= self._monitor.report()
            if len(self._rates) > 1:
                lora, prompts = self._rates
                logs |= {"learning_rate": prompts, "lora_learning_rate": lora}
        super().log(logs, *args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Text-to-image retrieval on a split: every caption queries every image."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        metrics = score_embeddings(*(embeds.numpy() for embeds in self._embed(rows)))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._monitor.start()
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the model as anyone loads it, LoRA merged, with its processor; the trainer's own goes on training.

        Checkpoints, for which transformers calls this itself, hold what is trained, and the memories.
        """
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        if not _internal_call:
            model = self.whole_model()
            if self.args.should_save:
                model = merge_lora(copy.deepcopy(model)) if isinstance(model, PeftModel) else model
                model.save_pretrained(folder)
                self.processing_class.save_pretrained(folder)
            return
        super().save_model(output_dir, _internal_call)
        # transformers comes here with every process: one writes.
        state = {name: tensor.contiguous().cpu() for name, tensor in self.objective.state_dict().items()}
        if state and self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            safetensors.torch.save_file(state, folder / OBJECTIVE_FILE)

    def whole_model(self) -> ECCLModel | PeftModel | None:
        """The model that trains, in one piece.

        Every process must call this where the model is sharded (FSDP); then the first gets it, the others `None`.
        """
        if not self.is_fsdp_enabled:
            return self.model
        state = self.accelerator.get_state_dict(self.model)
        if not self.args.should_save:
            return None
        model = copy.deepcopy(self._skeleton)
        model.load_state_dict(state, assign=True)
        return model.eval()

    def _save_checkpoint(self, model: nn.Module, trial=None) -> None:
        """As `Trainer` does; the checkpoint is marked when it is whole, and only then are older ones deleted.

        Raises:
            OSError: it could not be written; the older ones are still there.
            SystemExit: SIGTERM asked for it.
        """
        checkpoint = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and checkpoint.exists():
            # What a run left that was killed while it wrote, or that went another way.
            shutil.rmtree(checkpoint)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                mark_complete(checkpoint)
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:
            if self.args.should_save:
                shutil.rmtree(checkpoint, ignore_errors=True)
            raise OSError(f"{checkpoint} could not be written, earlier checkpoints are still there: {error}") from error
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            delete_older(checkpoint, limit, self.state.best_model_checkpoint)
        if self._checkpoint_callback.stopping:
            if self.args.should_save:
                print(f"SIGTERM: stopped after step {self.state.global_step}; {checkpoint} holds it", flush=True)
            raise SystemExit(128 + signal.SIGTERM)
        self._monitor.start()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        state = self.objective.state_dict()
        if state:
            file = Path(resume_from_checkpoint) / OBJECTIVE_FILE
            self.objective.load_state_dict(safetensors.torch.load_file(file))


class _Written(NamedTuple):
    """What a batch of all processes leaves for the memories, and the images of this process's share of it."""

    image_features: torch.Tensor
    text_features: torch.Tensor
    batch: dict[str, torch.Tensor]
    file_paths: list[str | None]


def _start_worker(start: Callable[[int], None] | None, worker_id: int) -> None:
    leave_process_group(worker_id)
    if start is not None:
        start(worker_id)


def _gather_features(accelerator: Accelerator, features: torch.Tensor) -> torch.Tensor:
    """The features of all processes in the order of their ranks, this process's own with their gradient.

    All processes compute the one loss of the whole batch, so each knows the gradient of its own rows without asking the
    others. Gradients of weights are averaged over the processes afterwards, hence the factor.
    """
    rows = accelerator.gather(features.detach())
    if features.requires_grad:
        features.register_hook(lambda gradient: gradient * accelerator.num_processes)
    start = accelerator.process_index * len(features)
    return torch.cat([rows[:start], features, rows[start + len(features) :]])


__all__ = ["OBJECTIVE_FILE", "ECCLTrainer"]
