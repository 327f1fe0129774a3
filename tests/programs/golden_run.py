"""Repeats twelve training steps of the published code with `ECCLTrainer`, on the same batches."""

import torch
from torch.utils.data import Dataset, Sampler

from eccl.hub.convert import convert_checkpoint
from eccl.training.arguments import ECCLTrainingArguments
from eccl.training.trainer import ECCLTrainer

# The columns of the published log, without the total.
LOSS_NAMES = (
    "tal_loss",
    "identity_memory_loss_i2t",
    "identity_memory_loss_t2i",
    "instance_memory_loss_i2t",
    "instance_memory_loss_t2i",
)


class GoldenPairs(Dataset):
    """The golden pairs of a caption and its image; the index of a pair is the index of its caption."""

    def __init__(self, values: dict[str, torch.Tensor], steps_per_epoch: int):
        self.values, self.steps_per_epoch = values, steps_per_epoch
        self.person_labels = values["pid_of_image"]
        self.num_persons = int(self.person_labels.max()) + 1
        self.image_of_pair = values["image_of_caption"]

    def __len__(self) -> int:
        return self.values["batches"].shape[1] * self.steps_per_epoch

    def __getitem__(self, caption: int) -> dict[str, torch.Tensor]:
        image = int(self.values["image_of_caption"][caption])
        return {
            "input_ids": self.values["input_ids"][caption],
            "pixel_values": self.values["images"][image],
            "person_labels": self.person_labels[image],
            "image_indices": torch.tensor(image),
        }


class GoldenSampler(Sampler):
    """Draws the golden batches of an epoch in their order."""

    def __init__(self, batches: torch.Tensor, steps_per_epoch: int):
        self.batches, self.steps_per_epoch, self.epoch = batches, steps_per_epoch, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps_per_epoch * self.batches.shape[1]

    def __iter__(self):
        start = self.steps_per_epoch * self.epoch
        return iter(self.batches[start : start + self.steps_per_epoch].flatten().tolist())


class GoldenTrainer(ECCLTrainer):
    """Draws the golden batches, and records losses, learning rates, memories and the first gradients.

    Everything else is as in `ECCLTrainer`.
    """

    def make_sampler(self):
        return GoldenSampler(self.pairs.values["batches"], self.pairs.steps_per_epoch)

    def start_objective(self):
        # The golden inputs are tensors, but the method of `ECCLTrainer` encodes images and captions.
        values = self.pairs.values
        with torch.no_grad():
            images = self.model.get_image_features(values["images"]).pooler_output
            texts = self.model.get_text_features(values["input_ids"]).pooler_output
        self.objective.start(self._encode_training_set(images, texts))
        self.memories = [self._copy_memories()]
        self.losses, self.rates, self.first_gradients = [], [], None

    def training_step(self, model, *args, **kwargs):
        self.rates.append([group["lr"] for group in self.optimizer.param_groups])
        loss = super().training_step(model, *args, **kwargs)
        parts = self._monitor.report()
        self.losses.append([parts[name] for name in LOSS_NAMES] + [loss.item()])
        self.memories.append(self._copy_memories())
        if self.first_gradients is None:
            named = model.named_parameters()
            self.first_gradients = {name: tensor.grad.clone() for name, tensor in named if tensor.requires_grad}
        return loss

    def _copy_memories(self) -> dict[str, torch.Tensor]:
        state = self.objective.state_dict().items()
        return {name.replace(".memory.", "."): tensor.clone() for name, tensor in state}


def run_golden_steps(goldens, golden: dict, values: dict[str, torch.Tensor], output_dir: str) -> GoldenTrainer:
    """Trains from `eccl_start.pth` with the settings of `golden.json`; returns the trainer with its records."""
    shape = golden["config"]
    model = convert_checkpoint(
        goldens / "eccl_start.pth", image_size=tuple(shape["img"]), lora_alpha=shape["alpha"], merge_lora=False
    )
    args = ECCLTrainingArguments(
        output_dir=output_dir,
        num_train_epochs=shape["epochs"],
        warmup_epochs=golden["warmup_epochs_in_train"],
        per_device_train_batch_size=shape["B"],
        losses={"tal": 1, "identity_memory": shape["lam1"], "instance_memory": shape["lam2"]},
        identity_memory_temperature=shape["temp"],
        instance_memory_temperature=shape["ti"],
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        disable_tqdm=True,
        report_to=[],
    )
    trainer = GoldenTrainer(
        model,
        args,
        train_dataset=GoldenPairs(values, shape["spe"]),
        data_collator=lambda items: {name: torch.stack([item[name] for item in items]) for name in items[0]},
        processing_class=None,
    )
    trainer.train()
    return trainer
