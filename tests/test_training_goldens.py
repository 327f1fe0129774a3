"""Twelve training steps of the published code, run again by `ECCLTrainer` on the same batches."""

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset

from eccl.convert_eccl import convert_checkpoint
from eccl.lora_eccl import attach_lora
from eccl.trainer_eccl import ECCLTrainer, ECCLTrainingArguments
from helpers import GOLDENS

PARTS = (
    "tal_loss",
    "identity_memory_loss_i2t",
    "identity_memory_loss_t2i",
    "instance_memory_loss_i2t",
    "instance_memory_loss_t2i",
)


class GoldenPairs(Dataset):
    """The golden captions with their images; an item is drawn by its caption's row."""

    def __init__(self, values):
        self.values = values
        self.person_labels = values["pid_of_image"]
        self.num_persons = int(self.person_labels.max()) + 1
        self.captions_per_row = torch.bincount(values["image_of_caption"])

    def __len__(self):
        return self.values["batches"].shape[1] * 3

    def __getitem__(self, caption):
        image = int(self.values["image_of_caption"][caption])
        return {
            "input_ids": self.values["input_ids"][caption],
            "pixel_values": self.values["images"][image],
            "person_labels": self.person_labels[image],
            "rows": torch.tensor(image),
        }


class GoldenTrainer(ECCLTrainer):
    """Draws the golden batches in their order and keeps what each step said; all else is the trainer's own."""

    def _get_train_sampler(self, train_dataset=None):
        return _GoldenSampler(self.train_dataset.values["batches"])

    def _start_memories(self):
        values = self.train_dataset.values
        with torch.no_grad():
            images = self.model.get_image_features(values["images"])
            texts = self.model.get_text_features(values["input_ids"])
        pairs = self.train_dataset
        self.objective.start_memories(images, texts, pairs.captions_per_row, pairs.person_labels)
        self.started = {name: tensor.clone() for name, tensor in self.objective.state_dict().items()}
        self.steps, self.rates = [], []

    def training_step(self, *args, **kwargs):
        self.rates.append([group["lr"] for group in self.optimizer.param_groups])
        loss = super().training_step(*args, **kwargs)
        self.steps.append([self._part_sums[name].item() for name in PARTS] + [loss.item()])
        self._part_sums, self._part_count = {}, 0
        return loss


class _GoldenSampler(torch.utils.data.Sampler):
    def __init__(self, batches):
        self.batches, self.epoch = batches, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 3 * self.batches.shape[1]

    def __iter__(self):
        return iter(self.batches[3 * self.epoch : 3 * self.epoch + 3].flatten().tolist())


def relative_error(ours, reference):
    return ((ours - reference).abs().max() / reference.abs().max()).item()


@pytest.fixture(scope="module")
def trained(train_goldens, golden, tmp_path_factory):
    shape = golden["config"]
    model = attach_lora(convert_checkpoint(GOLDENS / "eccl_start.pth", image_size=tuple(shape["img"])))
    copy_lora(model, load_file(GOLDENS / "lora_init.safetensors"))
    args = ECCLTrainingArguments(
        output_dir=str(tmp_path_factory.mktemp("golden")),
        num_train_epochs=shape["epochs"],
        warmup_epochs=golden["warmup_epochs_in_train"],
        per_device_train_batch_size=shape["B"],
        identity_memory_weight=shape["lam1"],
        instance_memory_weight=shape["lam2"],
        identity_memory_temperature=shape["temp"],
        instance_memory_temperature=shape["ti"],
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        disable_tqdm=True,
    )
    trainer = GoldenTrainer(
        model,
        args,
        train_dataset=GoldenPairs(train_goldens),
        data_collator=lambda items: {name: torch.stack([item[name] for item in items]) for name in items[0]},
        processing_class=None,
    )
    trainer.train()
    return trainer


LORA_NAMES = {
    "attn.lora_{}_q": "self_attn.q_proj",
    "attn.lora_{}_k": "self_attn.k_proj",
    "attn.lora_{}_v": "self_attn.v_proj",
    "attn.lora_{}_o": "self_attn.out_proj",
    "mlp.c_fc.lora_{}": "mlp.fc1",
    "mlp.c_proj.lora_{}": "mlp.fc2",
}


def copy_lora(model, original):
    """Puts the published start of the LoRA matrices into peft's."""
    parameters, used = dict(model.named_parameters()), set()
    for encoder, ours in (("image_encoder", "vision_model"), ("text_encoder", "text_model")):
        for layer in range(3):
            for pattern, module in LORA_NAMES.items():
                for matrix in "AB":
                    source = f"{encoder}.transformer.resblocks.{layer}.{pattern.format(matrix)}"
                    target = f"base_model.model.{ours}.encoder.layers.{layer}.{module}.lora_{matrix}.default.weight"
                    with torch.no_grad():
                        parameters[target].copy_(original[source])
                    used.add(source)
    assert used == set(original)


def test_the_memories_start_alike(trained, train_goldens):
    for ours, reference in match_memories(trained.started, train_goldens, "memory_init"):
        assert relative_error(ours, reference) < 1e-5


def test_losses_of_twelve_steps(trained, train_goldens, golden):
    reference = train_goldens["loss_log"].double()
    # The published log holds the memories' losses with their weights on.
    identity, instance = golden["config"]["lam1"], golden["config"]["lam2"]
    weights = torch.tensor([1, identity, identity, instance, instance, 1], dtype=torch.float64)
    ours = torch.tensor(trained.steps, dtype=torch.float64) * weights
    assert ours.shape == reference.shape == (12, 6)
    for column in range(6):
        assert relative_error(ours[:, column], reference[:, column]) < 1e-5


def test_learning_rates_of_twelve_steps(trained, train_goldens):
    torch.testing.assert_close(
        torch.tensor(trained.rates, dtype=torch.float64), train_goldens["lr_log"].double(), rtol=1e-7, atol=0
    )


def test_memories_and_features_at_the_end(trained, train_goldens):
    for ours, reference in match_memories(trained.objective.state_dict(), train_goldens, "memory_final"):
        assert relative_error(ours, reference) < 1e-5
    model = trained.model.eval()
    with torch.no_grad():
        images = model.get_image_features(train_goldens["images"])
        texts = model.get_text_features(train_goldens["input_ids"])
    assert relative_error(images, train_goldens["trained.image_features"]) < 1e-5
    assert relative_error(texts, train_goldens["trained.text_features"]) < 1e-5


def match_memories(state, goldens, prefix):
    for kind in ("identity", "instance"):
        for modality in ("image", "text"):
            yield state[f"{kind}_memory.{modality}_rows"], goldens[f"{prefix}.{kind}_{modality}"]
