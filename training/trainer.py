"""`ECCLTrainer`: transformers' `Trainer` with the objective of ECCL."""

import copy
import functools
import logging
import math
import os
import shutil
import signal
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import safetensors
import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput
from transformers.utils import SAFE_WEIGHTS_NAME

from ..encoding_eccl import SplitEmbeddings, embed_split, leave_process_group
from ..eval.person_retrieval.person_retrieval import score_embeddings
from ..hub.adapter import merge_lora
from ..modeling_eccl import ECCLModel, naming_checkpoint_errors, require_tensors, share_weights
from .arguments import ECCLTrainingArguments, epoch_factor
from .checkpoints import (
    CheckpointCallback,
    delete_older_checkpoints,
    find_incompleteness,
    find_last_complete_checkpoint,
    mark_complete,
    on_interrupt,
    on_sigterm,
)
from .fingerprint import describe_run, digest_split, find_changes, read_run_id, write_run
from .monitor import StepMonitor
from .objective import ECCLObjective, EncodedTrainingSet, PairBatch
from .pairs import CaptionPairs, PairCollator
from .parameter_groups import ParameterKind, describe_groups, find_base_rates, group_parameters
from .samplers import IdentitySampler, PairSampler
from .streaming import StreamedPairs

_logger = logging.getLogger(__name__)
OBJECTIVE_FILE = "objective.safetensors"
# The tensors of a batch that are not labels for the losses.
_NOT_LABELS = {"input_ids", "attention_mask", "pixel_values", "is_padding", "masked_input_ids"}


class EncodedBatch(NamedTuple):
    """A global batch after its forward pass; the losses update their state with it after the backward pass.

    Args:
        pairs: the pairs of all processes, their features without gradient.
        file_paths: the images that this process encoded; `None` for padding.
    """

    pairs: PairBatch
    file_paths: list[str | None]


class ECCLTrainer(Trainer):
    """Trains an [`ECCLModel`], plain or with LoRA from [`~eccl.hub.adapter.attach_lora`].

    Args:
        model: its parameters that require a gradient are trained.
        args: see [`ECCLTrainingArguments`]; the trainer works on a copy.
        train_dataset: the pairs of the training split, or of a stream.
        eval_dataset: a split as `load_dataset` gives it; every caption queries every image.
        **kwargs: as for `Trainer`; `processing_class` is the [`ECCLProcessor`].
    """

    # The losses are sums and means over the whole batch already.
    loss_is_scaled_for_ga = False
    # Narrower than in `Trainer`, where each of them may be missing.
    args: ECCLTrainingArguments
    model: Any
    processing_class: Any
    train_dataset: Any
    pairs: Any
    # `None` for a stream.
    sampler: Any
    objective: ECCLObjective
    # Each checkpoint carries it. A resumed run keeps it.
    run_id: str = ""

    def __init__(
        self,
        model: ECCLModel | PeftModel,
        args: ECCLTrainingArguments,
        train_dataset: CaptionPairs | StreamedPairs,
        eval_dataset: datasets.Dataset | None = None,
        **kwargs: Any,
    ):
        args = copy.copy(args)
        # The trainer deletes old checkpoints itself, once the new one is complete.
        self._save_total_limit, args.save_total_limit = args.save_total_limit, None
        self._eval_on_start = args.eval_on_start
        if args.eval_on_start and eval_dataset is None:
            raise ValueError("eval_on_start needs a split to evaluate on, and there is none (eval_strategy is no)")
        self.pairs = train_dataset
        self.objective = ECCLObjective(args, train_dataset, model.config.projection_dim)
        if isinstance(train_dataset, StreamedPairs):
            _check_stream(args)
        kwargs.setdefault("data_collator", PairCollator(kwargs["processing_class"]))
        super().__init__(
            model, args, train_dataset=self.objective.wrap_pairs(train_dataset), eval_dataset=eval_dataset, **kwargs
        )
        self.objective.to(self.args.device)
        if not any(term.trains_logit_scale for term in self.objective.terms().values()):
            # DDP would wait for its gradient.
            model.logit_scale.requires_grad_(False)
        self._encoded_batches: list[EncodedBatch] = []
        self._needs_tokens = any(term.needs_tokens for term in self.objective.terms().values())
        # What the groups of the optimiser have in common, and the base rates at the last step.
        self._kinds: list[ParameterKind] = []
        self._rates: list[float] = []
        self._monitor = StepMonitor()
        # With FSDP: the model without its weights, in which the shards are put together again.
        self._skeleton: ECCLModel | PeftModel | None = None
        # The signal that asked this process for a stop.
        self.stop_signal: signal.Signals | None = None
        self._checkpoint_callback = CheckpointCallback(self.accelerator)
        self.add_callback(self._checkpoint_callback)
        self.add_callback(_LoopCallback(self._start_epoch, self.objective))
        if self.is_fsdp_enabled:
            self._prepare_to_shard(model)
        elif os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            _logger.warning("FSDP needs accelerators and there are none: every process trains a whole copy (DDP)")
        # Impossible settings of the sampler, and rates for parameters that do not exist, are an error here, before the
        # pass over the training set for the memories.
        self.sampler = self.make_sampler()
        group_parameters(self._trained_parameters(self.model), self.args)

    def _prepare_to_shard(self, model: ECCLModel | PeftModel) -> None:
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise ValueError(f"fsdp_version is {plugin.fsdp_version}, ECCL trains with version 2")
        if plugin.cpu_ram_efficient_loading:
            raise ValueError(
                "fsdp_cpu_ram_efficient_loading must be false: every process needs the weights before they are sharded"
            )
        if len(dtypes := {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}) > 1:
            raise ValueError(
                f"FSDP shards only models whose parameters have one dtype, this one has {', '.join(sorted(dtypes))}: "
                "leave out base_dtype, or train without FSDP"
            )
        trained = [name for name, term in self.objective.terms().items() if any(True for _ in term.parameters())]
        if trained:
            raise ValueError(f"losses with parameters do not work with FSDP: leave out {', '.join(trained)}")
        # fully_shard accepts no scalar. The gradient of this one is the same in every process.
        plugin.ignored_modules = [nn.ParameterList([model.logit_scale])]
        # Only layers that are called as such: token_embedding is used without the CLIPTextEmbeddings around it.
        if plugin.transformer_cls_names_to_wrap is None:
            plugin.transformer_cls_names_to_wrap = ["CLIPEncoderLayer"]
        memo: dict[int, Any] = {
            id(value): nn.Parameter(value.detach().to("meta"), value.requires_grad) for value in model.parameters()
        }
        self._skeleton = copy.deepcopy(model, memo)

    def make_sampler(self) -> PairSampler | IdentitySampler | None:
        """Makes the sampler of the training pairs; a stream has its own order, and no sampler.

        Raises:
            ValueError: a batch needs more persons than the training split has, or more pairs and incomplete batches are
                dropped.
        """
        if isinstance(self.pairs, StreamedPairs):
            return None
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        # Batch i goes to process i modulo the number of processes: this many items in a row are one global batch.
        batch_size = self.args.train_batch_size * self.args.world_size
        if self.args.dataloader_drop_last and len(self.pairs) < batch_size:
            raise ValueError(
                f"dataloader_drop_last drops every batch: the training split has {len(self.pairs)} pairs, a batch has "
                f"{batch_size}; lower per_device_train_batch_size"
            )
        if self.args.sampler == "random":
            fills = self.args.world_size > 1 and not self.args.dataloader_drop_last
            return PairSampler(len(self.pairs), seed, batch_size if fills else 1)
        persons_per_batch = batch_size // self.args.pairs_per_person
        if persons_per_batch > self.pairs.num_persons:
            raise ValueError(
                f"a batch of {batch_size} pairs with pairs_per_person {self.args.pairs_per_person} needs "
                f"{persons_per_batch} persons, the training split has {self.pairs.num_persons}: lower "
                "per_device_train_batch_size or raise pairs_per_person"
            )
        person_of_pair = self.pairs.person_labels[self.pairs.image_of_pair]
        return IdentitySampler(person_of_pair, persons_per_batch, self.args.pairs_per_person, seed)

    def get_train_dataloader(self) -> DataLoader:
        """Makes the loader of the training pairs; a SIGTERM to the whole run does not reach its workers."""
        loader = DataLoader(
            self.train_dataset,
            batch_size=self.args.train_batch_size,
            sampler=self.sampler,
            collate_fn=self.data_collator,
            drop_last=self.args.dataloader_drop_last,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
            in_order=self.args.dataloader_in_order,
            worker_init_fn=leave_process_group,
        )
        # Each process reads its own part of a stream, so there is nothing to divide.
        return loader if self.sampler is None else self.accelerator.prepare(loader)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Makes Adam over two groups: the LoRA matrices, and everything else that is trained.

        `learning_rate_factors` and `no_weight_decay` divide them further, see [`group_parameters`].
        """
        if self.optimizer is None:
            trained = self._trained_parameters(self.model if model is None else model)
            groups = group_parameters(trained, self.args)
            self._kinds = list(groups)
            adam = torch.optim.AdamW if self.args.decoupled_weight_decay else torch.optim.Adam
            self.optimizer = adam(
                describe_groups(groups, self.args),
                lr=self.args.learning_rate,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
                weight_decay=self.args.weight_decay,
            )
        return self.optimizer

    def _trained_parameters(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """The trained parameters of the model and of the losses, by name."""
        named = [*model.named_parameters(), *self.objective.named_parameters()]
        return [(name, parameter) for name, parameter in named if parameter.requires_grad]

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Makes the per-epoch schedule (`epoch_factor` in arguments.py), or the one that `lr_scheduler_type` names."""
        if not self.args.epoch_schedule:
            try:
                return super().create_scheduler(num_training_steps, optimizer)
            except TypeError as error:
                raise ValueError(
                    f"lr_scheduler_kwargs {self.args.lr_scheduler_kwargs} do not fit lr_scheduler_type "
                    f"{self.args.lr_scheduler_type}: {error}"
                ) from error
        stepped: Any = self.optimizer if optimizer is None else optimizer
        if self.lr_scheduler is None:
            batch_size = self.args.train_batch_size * self.args.world_size
            round_batches = math.floor if self.args.dataloader_drop_last else math.ceil
            batches = round_batches(len(self.sampler) / batch_size)
            steps_per_epoch = max(1, math.ceil(batches / self.args.gradient_accumulation_steps))
            num_epochs = math.ceil(num_training_steps / steps_per_epoch)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                stepped,
                lambda step: epoch_factor(step // steps_per_epoch, num_epochs, self.args.warmup_epochs),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Trains; the losses start from one pass over the training set, or from the checkpoint.

        Args:
            resume_from_checkpoint: a checkpoint, or `True` for the last complete one in `output_dir`. If there is none
                yet, training starts from the beginning, so that one command serves for every start.

        Raises:
            ValueError: the checkpoint is not complete, or was written with other losses, or, unless
                `allow_changed_run` is set, with other data, another base or other batches.
            FloatingPointError: the loss or the gradient is NaN or infinite.
            RuntimeError: a DataLoader worker has died; or another run has written to the same `output_dir`.
            SystemExit: with status 143 after SIGTERM, or 130 after Ctrl-C, once a checkpoint is written.
        """
        checkpoint = self._choose_checkpoint(resume_from_checkpoint)
        self.run_id = self._choose_run_id(checkpoint)
        # A resumed run does not repeat the evaluation at the start.
        self.args.eval_on_start = self._eval_on_start and checkpoint is None
        with on_sigterm(self._terminate), on_interrupt(self._interrupt):
            if checkpoint is None:
                self.start_objective()
            else:
                self._check_run(Path(checkpoint))
                self._check_weights(Path(checkpoint))
                self._load_objective(Path(checkpoint))
            try:
                output = super().train(checkpoint, trial, ignore_keys_for_eval)
            except RuntimeError as error:
                if _is_death_of_a_worker(error):
                    raise RuntimeError(_WORKER_DIED) from error
                raise
            self._check_best_checkpoint()
            return output

    def _terminate(self) -> None:
        self.stop_signal = signal.SIGTERM
        self.accelerator.set_trigger()

    def _interrupt(self) -> None:
        self.stop_signal = signal.SIGINT
        if self.is_local_process_zero():
            # In a handler of a signal, `print` can fail.
            os.write(2, b"Ctrl-C: stopping after this step, with a checkpoint; a second Ctrl-C stops at once\n")
        self.accelerator.set_trigger()

    def _choose_run_id(self, checkpoint: str | None) -> str:
        """Returns the id of the run that is continued, or else a new one; all processes get the same."""
        known = None if checkpoint is None else read_run_id(Path(checkpoint))
        return broadcast_object_list([known or uuid.uuid4().hex])[0]

    def _check_best_checkpoint(self) -> None:
        """Refuses the best checkpoint, which was just loaded, if it is another run's."""
        best = self.state.best_model_checkpoint
        if not (self.args.load_best_model_at_end and best and Path(best).is_dir()):
            return
        # Earlier versions wrote no id.
        if read_run_id(Path(best)) not in (None, self.run_id):
            raise RuntimeError(
                f"{best}, the best checkpoint, was written by another run: two runs have used {self.args.output_dir} "
                "at the same time. Nothing more is written; train again, each run in a folder of its own"
            )

    def _choose_checkpoint(self, asked: str | bool | None) -> str | None:
        output_dir = Path(self.args.output_dir)
        report = _logger.warning if self.is_world_process_zero() else lambda _: None
        if not asked:
            if find_last_complete_checkpoint(output_dir, lambda _: None) is not None:
                report(f"{output_dir} holds checkpoints of another run: a later resume may take them for this run's")
            return None
        if asked is True:
            found = find_last_complete_checkpoint(output_dir, report)
            if found is None:
                report(f"{output_dir} has no complete checkpoint: training starts from the beginning")
            # One process decides, so that all start from the same checkpoint.
            return broadcast_object_list([None if found is None else str(found)])[0]
        problem = find_incompleteness(Path(asked))
        if problem is not None:
            raise ValueError(f"{asked} cannot be resumed from: {problem}")
        return str(asked)

    @functools.cached_property
    def _run(self) -> dict[str, Any]:
        pairs = self.pairs
        data = pairs.name if isinstance(pairs, StreamedPairs) else digest_split(pairs.dataset)
        return describe_run(self.args, data, self.model)

    def _check_run(self, checkpoint: Path) -> None:
        """Says where the run continues, and refuses a checkpoint of another run."""
        report = _logger.warning if self.is_world_process_zero() else lambda _: None
        if changes := find_changes(checkpoint, self._run):
            if not self.args.allow_changed_run:
                raise ValueError(
                    f"{checkpoint} was written by another run: {'; '.join(changes)}. Resume with the same data, base "
                    "and batches, or give --allow_changed_run if you mean it"
                )
            report(f"{checkpoint} was written by another run, which is allowed: {'; '.join(changes)}")
            self.model.checks_base = False
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        report(f"resuming from {checkpoint}: after step {state.global_step}, epoch {state.epoch or 0:g}")
        if state.global_step >= state.max_steps:
            report(
                f"that run was finished after {state.max_steps} steps: unless it is made longer, nothing is trained, "
                "and the final model is made again. A longer run from the start would have other learning rates"
            )

    def _check_weights(self, checkpoint: Path) -> None:
        """Refuses a checkpoint of a whole model that lacks a tensor, or has another one; transformers only warns.

        [`~eccl.hub.adapter.ECCLPeftModel.load_adapter`] checks an adapter.
        """
        file = checkpoint / SAFE_WEIGHTS_NAME
        if not file.is_file():
            return
        with naming_checkpoint_errors(str(file)), safetensors.safe_open(file, "pt") as weights:
            require_tensors(str(file), weights.keys(), self.model.state_dict())

    def _load_objective(self, checkpoint: Path) -> None:
        file = checkpoint / OBJECTIVE_FILE
        state = safetensors.torch.load_file(file) if file.is_file() else {}
        expected = self.objective.state_dict()
        if state.keys() != expected.keys():
            raise ValueError(
                f"{file} has the tensors {', '.join(sorted(state)) or 'of no loss'}, this run's losses need "
                f"{', '.join(sorted(expected)) or 'none'}: resume with the losses and the version that wrote it"
            )
        self.objective.load_state_dict(state)

    def start_objective(self) -> None:
        """Fills the state of the losses from one pass over the training set, if one of them needs it."""
        if not any(term.needs_start for term in self.objective.terms().values()):
            return
        if self.is_fsdp_enabled:
            # transformers leaves a model that it will shard on the CPU.
            self.model.to(self.args.device)
        if self.args.memory_start == "augmented":
            self.objective.start(self._encode_augmented_pairs())
            return
        embeds = self._embed(self.pairs.dataset)
        self.objective.start(self._encode_training_set(embeds.image_embeds, embeds.text_embeds))

    @torch.no_grad()
    def _encode_augmented_pairs(self) -> EncodedTrainingSet:
        """Encodes each training pair as its first draw augments it; every process encodes all pairs."""
        image_features, text_features = [], []
        loader = DataLoader(
            self.pairs,
            batch_size=self.args.eval_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            worker_init_fn=leave_process_group,
        )
        for batch in loader:
            inputs = {name: batch[name].to(self.args.device) for name in ("input_ids", "pixel_values")}
            outputs = self.model(**inputs, pooled_only=True)
            image_features.append(outputs.image_embeds.float())
            text_features.append(outputs.text_embeds.float())
        return self._make_training_set(torch.cat(image_features), torch.cat(text_features))

    def _encode_training_set(self, image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> EncodedTrainingSet:
        """Pairs the features of each training image `(images, dim)` with those of its captions `(pairs, dim)`."""
        return self._make_training_set(image_embeds[self.pairs.image_of_pair.to(image_embeds.device)], text_embeds)

    def _make_training_set(self, image_features: torch.Tensor, text_features: torch.Tensor) -> EncodedTrainingSet:
        """Adds the persons and the images to the features of all pairs, each `(pairs, dim)`."""
        image_of_pair, device = self.pairs.image_of_pair, self.args.device
        return EncodedTrainingSet(
            image_features.to(device),
            text_features.to(device),
            self.pairs.person_labels[image_of_pair].to(device),
            image_of_pair.to(device),
        )

    def _embed(self, dataset: datasets.Dataset) -> SplitEmbeddings:
        model: nn.Module = self.model
        if isinstance(model, FSDPModule) and "get_image_features" not in vars(model):
            # Shards are gathered for these methods as they are for forward.
            for name in ("get_image_features", "get_text_features"):
                register_fsdp_forward_method(model, name)
        return embed_split(
            model,
            self.processing_class,
            dataset,
            self.args.eval_batch_size,
            self.args.dataloader_num_workers,
            progress=not self.args.disable_tqdm and self.is_world_process_zero(),
            across_processes=True,
        )

    def _start_epoch(self) -> None:
        # transformers does not reach the sampler if several processes resume within an epoch.
        if self.sampler is not None:
            self.sampler.set_epoch(int(self.state.epoch or 0))
        self._monitor.start()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """Returns the next batches as `Trainer` does, and none if the checkpoint already holds the last step."""
        if self.state.global_step >= self.state.max_steps:
            # transformers would take one step more.
            self.control.should_training_stop = True
            return [], None
        try:
            return super().get_batch_samples(*args, **kwargs)
        except (ConnectionError, EOFError, RuntimeError) as error:
            # A worker that dies while it hands over a batch cuts the connection through which the tensors are sent;
            # Python then reports a message that lacks its file descriptors ("0 items of ancdata").
            is_cut = not isinstance(error, RuntimeError) or "ancdata" in str(error)
            if self.args.dataloader_num_workers and is_cut:
                raise RuntimeError(_WORKER_DIED) from error
            raise

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Computes the objective over the batches of all processes together."""
        input_ids, count = inputs["input_ids"], len(inputs["input_ids"])
        if self._needs_tokens:
            # One call of the model: DDP expects no second one. What follows the end of a caption does not matter.
            masked = inputs["masked_input_ids"]
            padded = nn.functional.pad(input_ids, (0, masked.shape[1] - input_ids.shape[1]))
            input_ids = torch.cat([padded, masked])
        outputs = model(
            input_ids=input_ids,
            pixel_values=inputs["pixel_values"],
            embed_chunk_size=self.args.embed_chunk_size,
            pooled_only=not self._needs_tokens,
        )
        features = {"image_features": outputs.image_embeds, "text_features": outputs.text_embeds[:count]}
        if self._needs_tokens:
            whole = self.accelerator.unwrap_model(model)
            patches = whole.vision_model.post_layernorm(outputs.vision_model_output.last_hidden_state)
            features["image_tokens"] = whole.visual_projection(patches)
            words = outputs.text_model_output.last_hidden_state[count:]
            features["masked_text_tokens"] = whole.text_projection(words)
        pairs = self._gather_pairs(model, inputs, features)
        total, parts = self.objective(pairs)
        self._encoded_batches.append(EncodedBatch(pairs.detach(), inputs.get("file_paths", [])))
        if not total.isfinite():
            values = ", ".join(f"{name} {float(value.detach()):.4g}" for name, value in parts.items())
            self._stop(f"the loss is {float(total.detach())} ({values})")
        self._monitor.add(parts)
        return (total, outputs) if return_outputs else total

    def _gather_pairs(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        features: dict[str, torch.Tensor],
    ) -> PairBatch:
        """Joins the pairs of all processes, without padding; `features` are those of a [`PairBatch`] by name."""
        labels = {
            name: value for name, value in inputs.items() if isinstance(value, torch.Tensor) and name not in _NOT_LABELS
        }
        if self.args.world_size > 1:
            is_real = ~self.accelerator.gather(inputs["is_padding"])
            features = {name: _gather_features(self.accelerator, each)[is_real] for name, each in features.items()}
            labels = {name: self.accelerator.gather(value)[is_real] for name, value in labels.items()}
        logit_scale = self.accelerator.unwrap_model(model).logit_scale.exp()
        own = {"person_labels": labels.pop("person_labels"), "image_indices": labels.pop("image_indices")}
        return PairBatch(**features, logit_scale=logit_scale, **own, extra=labels)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Takes a step as `Trainer` does; the losses update their state after the last backward pass of the step."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._check_gradient(model)
            if self.optimizer is not None:
                # The scheduler steps before transformers logs: these are the rates that this step is taken with.
                rates = [group["lr"] for group in self.optimizer.param_groups]
                # An optimiser that was given to the trainer has its own groups.
                self._rates = find_base_rates(self._kinds, rates) if self._kinds else rates
            for batch in self._encoded_batches:
                self._monitor.add(self.objective.update(batch.pairs))
            self._monitor.finish_step(sum(len(batch.pairs.image_features) for batch in self._encoded_batches))
            self._encoded_batches = []
        return loss

    def _check_gradient(self, model: nn.Module) -> None:
        if self.accelerator.scaler is not None:
            # The scaler of float16 skips a step whose gradient is infinite, and lowers the scale.
            return
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        value = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if not math.isfinite(value):
            self._stop(f"the norm of the gradient is {value}")

    def _stop(self, reason: str) -> None:
        """Ends the run. All processes arrive here together, since the loss and the gradient are the same in all."""
        paths = [path for batch in self._encoded_batches for path in batch.file_paths if path is not None]
        raise FloatingPointError(
            f"step {self.state.global_step + 1}: {reason}. Training stops, and this step is in no checkpoint. The "
            f"images of its batch: {', '.join(gather_object(paths))}"
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the means of the steps since the last training log (see [`StepMonitor`]) and both learning rates."""
        if "loss" in logs:
            logs |= self._monitor.report()
            if len(self._rates) > 1:
                logs |= {"learning_rate": self._rates[1], "lora_learning_rate": self._rates[0]}
            elif self._rates:
                is_lora = self._kinds and all(kind.is_lora for kind in self._kinds)
                # transformers has written the rate of the first group as `learning_rate`.
                logs.pop("learning_rate", None)
                logs |= {"lora_learning_rate" if is_lora else "learning_rate": self._rates[0]}
        super().log(logs, *args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Scores text-to-image retrieval on a split: every caption queries every image."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        embeds = self._embed(dataset)
        scores = score_embeddings(
            embeds.text_embeds.numpy(),
            embeds.query_person_ids.numpy(),
            embeds.image_embeds.numpy(),
            embeds.gallery_person_ids.numpy(),
        )
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._monitor.start()
        return metrics

    def evaluate_result(self) -> dict[str, float]:
        """Returns the figures of the model that the training has ended with, by the names of [`evaluate`].

        They are computed, unless the last step was evaluated and the model is still that of the last step.
        """
        evaluations = [entry for entry in self.state.log_history if "eval_rank1" in entry]
        if self.args.load_best_model_at_end or not evaluations or evaluations[-1]["step"] != self.state.global_step:
            return self.evaluate()
        return {name: value for name, value in evaluations[-1].items() if name != "step"}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the model with LoRA merged, and its processor, as `from_pretrained` loads them.

        The trainer's own model keeps its LoRA and can be trained further. transformers calls this method for
        checkpoints, too: they hold the trained parameters and the state of the losses.
        """
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        if not _internal_call:
            model = self.whole_model()
            if model is not None and self.args.should_save:
                merged = merge_lora(copy.deepcopy(model)) if isinstance(model, PeftModel) else model
                merged.save_pretrained(folder)
                self.processing_class.save_pretrained(folder)
            return
        super().save_model(output_dir, _internal_call)
        # transformers calls this in every process: one of them writes.
        state = {name: tensor.contiguous().cpu() for name, tensor in self.objective.state_dict().items()}
        if state and self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            safetensors.torch.save_file(state, folder / OBJECTIVE_FILE)
        if self.args.should_save and folder.is_dir():
            write_run(folder, self._run, self.run_id)
            share_weights(folder)

    def whole_model(self) -> ECCLModel | PeftModel | None:
        """Returns the model that is trained, in one piece.

        If the model is sharded (FSDP), every process must call this; the first process gets the model, the others
        `None`.
        """
        if self._skeleton is None:
            return self.model
        state = self.accelerator.get_state_dict(self.model)
        if not self.args.should_save:
            return None
        model = copy.deepcopy(self._skeleton)
        model.load_state_dict(state, assign=True)
        return model.eval()

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Writes a checkpoint as `Trainer` does, marks it as complete, and only then deletes older ones.

        Raises:
            OSError: the checkpoint could not be written; the older ones are still there.
            SystemExit: after SIGTERM or Ctrl-C.
        """
        checkpoint = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and checkpoint.exists():
            # Left over from a run that was killed mid-write, or that was resumed from an earlier step.
            shutil.rmtree(checkpoint)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                mark_complete(checkpoint)
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:
            if self.args.should_save:
                shutil.rmtree(checkpoint, ignore_errors=True)
            if _is_death_of_a_worker(error):
                raise
            raise OSError(f"{checkpoint} could not be written, earlier checkpoints are still there: {error}") from error
        if self.args.should_save:
            delete_older_checkpoints(checkpoint, self._save_total_limit, self.state.best_model_checkpoint)
        if self._checkpoint_callback.stopping:
            if self.args.should_save:
                reason = "Ctrl-C" if self.stop_signal == signal.SIGINT else "SIGTERM"
                print(f"{reason}: stopped after step {self.state.global_step}, saved in {checkpoint}", flush=True)
            raise SystemExit(128 + (self.stop_signal or signal.SIGTERM))
        self._monitor.start()

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # With save_strategy "best" this decides whether the checkpoint that a signal asked for is written.
        return super()._determine_best_metric(metrics, trial) or self._checkpoint_callback.stopping


class _LoopCallback(TrainerCallback):
    """Adds what the objective needs to transformers' training loop.

    Args:
        start_epoch: called at the beginning of each epoch.
        objective: its gradients are cleared after each step of the optimiser; transformers clears only the model's.
    """

    def __init__(self, start_epoch: Callable[[], None], objective: ECCLObjective):
        self._start_epoch, self._objective, self._first_step = start_epoch, objective, 0

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._first_step = state.global_step
        self._start_epoch()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._objective.zero_grad()

    def on_epoch_end(self, args, state, control, **kwargs):
        if state.global_step == self._first_step:
            # A run that is resumed after its last step: the evaluation was made before, or was not due.
            control.should_log = control.should_evaluate = control.should_save = False


def _check_stream(args: ECCLTrainingArguments) -> None:
    """Refuses arguments that need the length of the training set."""
    if args.max_steps < 1:
        raise ValueError("a stream has no end: give max_steps")
    if args.sampler != "random":
        raise ValueError(f"sampler is {args.sampler!r}, but a stream is read in its own order: leave it out")
    if args.epoch_schedule:
        raise ValueError(
            "the published learning rates are stepped per epoch, and a stream has no epochs: give another "
            "lr_scheduler_type, for example cosine"
        )
    if args.eval_strategy != "no":
        raise ValueError("a stream has no split to evaluate on: give --eval_strategy no, and score with eccl-evaluate")


_WORKER_DIED = (
    "a DataLoader worker exited unexpectedly: it was killed, or the machine ran out of memory. Resume from the last "
    "complete checkpoint, with fewer --dataloader_num_workers if memory was short"
)


def _is_death_of_a_worker(error: BaseException) -> bool:
    """Whether an error is torch's own report of a dead worker: from the loader, or from its signal handler anywhere."""
    return isinstance(error, RuntimeError) and "DataLoader worker" in str(error)


def _gather_features(accelerator: Accelerator, features: torch.Tensor) -> torch.Tensor:
    """Joins the features of all processes in the order of their ranks; only this process's features have a gradient.

    Every process computes the same loss of the whole batch, so it knows the gradient of its features without asking
    the others. DDP averages the gradients of the weights over the processes afterwards, hence the factor.
    """
    gathered = accelerator.gather(features.detach())
    if features.requires_grad:
        features.register_hook(lambda gradient: gradient * accelerator.num_processes)
    start = accelerator.process_index * len(features)
    return torch.cat([gathered[:start], features, gathered[start + len(features) :]])


__all__ = ["OBJECTIVE_FILE", "ECCLTrainer"]
