"""Repeats the training steps of IRRA's published code with `ECCLTrainer`, on the same batches and masked captions."""

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from golden_run import GoldenPairs, GoldenSampler
from safetensors.torch import load_file

from eccl.hub import original_checkpoints
from eccl.hub.convert import convert_checkpoint
from eccl.training.arguments import ECCLTrainingArguments
from eccl.training.trainer import ECCLTrainer

# The columns of the published log, without the total.
LOSS_NAMES = ("sdm_loss", "identity_classification_loss", "masked_language_modelling_loss")
HEADS = ("identity_classification.", "masked_language_modelling.")


class IrraGoldens:
    """The reference values in a folder; the published code computed them for a model of one shape."""

    def __init__(self, folder: Path):
        self.settings = json.loads((folder / "golden.json").read_text())
        self.shape = self.settings["config"]
        self.start = load_file(folder / "start.safetensors")
        self.train = load_file(folder / "train.safetensors")


class _Vocabulary:
    """Of a tokenizer, only what the loss reads: the golden captions are token ids."""

    def __init__(self, shape: dict):
        self.size, self.bos_token_id, self.eos_token_id = shape["vocab"], shape["sot"], shape["eot"]

    def __len__(self) -> int:
        return self.size


class IrraPairs(GoldenPairs):
    """The golden pairs, each with its masked caption."""

    def __init__(self, goldens: IrraGoldens):
        values = goldens.train
        images = {"pid_of_image": values["person_labels"], "image_of_caption": torch.arange(len(values["images"]))}
        super().__init__(values | images, len(values["batches"]))
        self.num_persons = goldens.shape["classes"]
        self.make_pixels = SimpleNamespace(processor=SimpleNamespace(tokenizer=_Vocabulary(goldens.shape)))

    def __getitem__(self, caption: int) -> dict[str, torch.Tensor]:
        masked = {"masked_input_ids": "mlm_ids", "masked_labels": "mlm_labels"}
        return super().__getitem__(caption) | {name: self.values[theirs][caption] for name, theirs in masked.items()}


class IrraTrainer(ECCLTrainer):
    """Draws the golden batches, and records the losses, and the scores and the gradients of the first step.

    Everything else is as in `ECCLTrainer`.
    """

    def __init__(self, model, args, train_dataset, **kwargs):
        super().__init__(model, args, train_dataset, **kwargs)
        # The golden captions are masked already.
        self.train_dataset = train_dataset
        self.losses, self.scores, self.first_gradients = [], [], {}
        term = self.objective.masked_language_modelling
        score_words = term.score_words
        term.score_words = lambda *tokens: self.scores.append(score_words(*tokens)) or self.scores[-1]

    def make_sampler(self):
        return GoldenSampler(self.pairs.values["batches"], self.pairs.steps_per_epoch)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        parts = self._monitor.report()
        self.losses.append([parts[name] for name in LOSS_NAMES] + [loss.item()])
        if not self.first_gradients:
            self.first_gradients = {name: value.grad.clone() for name, value in self.named_parameters().items()}
        return loss

    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        return dict(self._trained_parameters(self.model))


def published_name(name: str) -> tuple[str, int | None]:
    """The name that the published code gives a parameter, and its part of it: 0, 1, 2 of queries, keys and values."""
    for prefix in HEADS:
        if name.startswith(prefix):
            return name.removeprefix(prefix), None
    if (layer := original_checkpoints._LAYER.fullmatch(name)) is None:
        return f"base_model.{original_checkpoints._NAMES[name]}", None
    encoder, index, module, kind = layer.groups()
    projections = original_checkpoints._INPUT_PROJECTIONS
    part = projections.index(module) if module in projections else None
    in_layer = "attn.in_proj_" if part is not None else original_checkpoints._LAYER_NAMES[module]
    return f"base_model.{original_checkpoints._LAYER_PREFIXES[encoder]}{index}.{in_layer}{kind}", part


def publish(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gives tensors of this project's parameters the names and the shapes of the published code."""
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        published, part = published_name(name)
        tensor = tensor.T if name in original_checkpoints._TRANSPOSED else tensor
        parts.setdefault(published, {})[part or 0] = tensor
    return {name: torch.cat([own[part] for part in sorted(own)]) for name, own in parts.items()}


def groups_by_published_name(trainer: IrraTrainer) -> dict[str, tuple[float, float]]:
    """The learning rate and the weight decay of each parameter, by the published name."""
    names = {id(parameter): name for name, parameter in trainer.named_parameters().items()}
    return {
        published_name(names[id(parameter)])[0]: (group["lr"], group["weight_decay"])
        for group in trainer.optimizer.param_groups
        for parameter in group["params"]
    }


def make_irra_trainer(goldens: IrraGoldens, output_dir: str) -> IrraTrainer:
    """Makes a trainer with the golden weights of the encoders and of the heads."""
    shape, size = goldens.shape, tuple(goldens.shape["img"])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "start.pth"
        torch.save({"model": goldens.start}, file)
        model = convert_checkpoint(file, image_size=size, num_prompt_tokens=0)
    args = ECCLTrainingArguments(
        output_dir=output_dir,
        tune="full",
        losses=["sdm=1", "identity_classification=1", "masked_language_modelling=1"],
        sdm_temperature=shape["temperature"],
        interaction_depth=shape["cmt_depth"],
        max_steps=len(goldens.train["batches"]),
        lr_scheduler_type="constant",
        per_device_train_batch_size=goldens.train["batches"].shape[1],
        learning_rate=shape["lr"],
        learning_rate_factors={
            "cross": shape["lr_factor"],
            "bias": shape["bias_lr_factor"],
            "classifier": shape["lr_factor"],
            "mlm_head": shape["lr_factor"],
        },
        weight_decay=shape["weight_decay"],
        no_weight_decay=["bias"],
        adam_beta1=shape["betas"][0],
        adam_beta2=shape["betas"][1],
        adam_epsilon=shape["adam_eps"],
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        disable_tqdm=True,
        report_to=[],
    )
    trainer = IrraTrainer(
        model,
        args,
        train_dataset=IrraPairs(goldens),
        data_collator=lambda items: {name: torch.stack([item[name] for item in items]) for name in items[0]},
        processing_class=None,
    )
    heads = {name: goldens.start[published_name(name)[0]] for name in trainer.objective.state_dict()}
    trainer.objective.load_state_dict(heads)
    return trainer
