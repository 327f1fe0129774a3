"""Compares this project with the published code, and prints how closely each quantity agrees (`make fidelity`).

`python tests/programs/fidelity.py [FOLDER]` reads the reference values from FOLDER, by default from `tests/goldens/`.
FOLDER needs files with the same names; the models in it may have any shape. Without the folder `irra/` in it, the rows
of IRRA's training are left out. tests/test_fidelity.py makes the same comparison.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import contextlib
import io
import json
import math
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from golden_run import GoldenTrainer, run_golden_steps
from irra_run import IrraGoldens, groups_by_published_name, make_irra_trainer, publish
from PIL import Image, ImageOps
from safetensors.torch import load_file

from eccl.eval.person_retrieval.person_retrieval import score_embeddings
from eccl.hub.convert import convert_checkpoint
from eccl.modeling_eccl import ECCLModel
from eccl.processing_eccl import ECCLImageProcessor, ECCLProcessor
from eccl.training.arguments import ECCLTrainingArguments, epoch_factor
from eccl.training.losses import (
    cross_modal_projection_matching_loss,
    identity_classification_loss,
    image_text_contrastive_loss,
    similarity_distribution_matching_loss,
    triplet_alignment_loss,
)
from eccl.training.memory import CrossModalMemory
from helpers import GOLDENS, clip_tokenizer

VALUES, GRADIENTS, POINTS, EXACT = 1e-5, 1e-4, 1e-4, 0.0
# IRRA's steps amplify the rounding of float32: after six of them, the published features differ by 7e-5 from those of
# the same steps in float64.
AMPLIFIED = 2e-4


class Row(NamedTuple):
    """A row of the table: the quantity, the data, the largest difference, and the largest difference allowed."""

    quantity: str
    compared_on: str
    difference: float
    tolerance: float


def relative_difference(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest difference, divided by the largest entry of the reference. If that entry is 0, it is not divided.

    A NaN on either side gives an infinite difference, because `max` over several differences can lose a NaN.
    """
    if ours.shape != reference.shape:
        raise ValueError(f"this project's tensor is {tuple(ours.shape)}, the reference is {tuple(reference.shape)}")
    scale = reference.abs().max().item()
    difference = (ours.double() - reference.double()).abs().max().item() / (scale or 1.0)
    return difference if math.isfinite(difference) else math.inf


class Goldens:
    """The reference values in a folder; the published code computed them for a model of one shape."""

    def __init__(self, folder: Path = GOLDENS):
        self.folder = folder
        self.settings = json.loads((folder / "golden.json").read_text())
        self.shape = self.settings["config"]
        self.train = load_file(folder / "train.safetensors")
        self.losses = load_file(folder / "losses.safetensors")
        self.metrics = load_file(folder / "metrics.safetensors")

    def model(self, name: str) -> ECCLModel:
        """Loads a checkpoint file as a model. If the file has no prompts, the model gets the initial ones."""
        sizes = tuple(self.shape["img"]), self.shape["n_ctx"], self.shape["depth"], self.shape["alpha"]
        model = convert_checkpoint(self.folder / name, *sizes)
        if name.startswith("eccl_"):
            return model
        start = load_file(self.folder / "prompts_init.safetensors")
        deeper = range(self.shape["depth"] - 1)
        texts = [start["ctx"], *(start[f"compound_prompts_text.{index}"] for index in deeper)]
        maps = ["proj", *(f"compound_prompt_projections.{index}" for index in deeper)]
        state = {"text_prompts": torch.stack(texts)}
        for index, name in enumerate(maps):
            state |= {f"projections.{index}.{part}": start[f"{name}.{part}"] for part in ("weight", "bias")}
        model.prompt_learner.load_state_dict(state)
        return model


def _classification(image: torch.Tensor, text: torch.Tensor, case: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = (features @ case["classifier_weight"].T + case["classifier_bias"] for features in (image, text))
    return identity_classification_loss(*logits, case["pids"])


OBJECTIVES: dict[str, Callable] = {
    "tal": lambda image, text, case: triplet_alignment_loss(image, text, case["pids"]),
    "tal_tau05": lambda image, text, case: triplet_alignment_loss(image, text, case["pids"], 0.05, 0.1),
    "sdm": lambda image, text, case: similarity_distribution_matching_loss(image, text, case["pids"]),
    "sdm_image_ids": lambda image, text, case: similarity_distribution_matching_loss(
        image, text, case["pids"], image_ids=case["image_ids"]
    ),
    "itc": lambda image, text, case: image_text_contrastive_loss(image, text),
    "cmpm": lambda image, text, case: cross_modal_projection_matching_loss(image, text, case["pids"]),
    "id": _classification,
}
# Temperature, momentum and eps of each memory in losses.safetensors.
MEMORIES = {"identity_memory": (0.03, 0.1, 0.0), "instance_memory": (0.015, 0.2, 1e-8)}


def _cases(goldens: Goldens) -> Iterator[dict[str, torch.Tensor]]:
    for case in ("0", "1", "2"):
        prefix = f"{case}."
        yield {name.removeprefix(prefix): value for name, value in goldens.losses.items() if name.startswith(prefix)}


def check_objectives(goldens: Goldens) -> Iterator[Row]:
    for name, objective in OBJECTIVES.items():
        values, gradients = [], []
        for case in _cases(goldens):
            features = [case[f"{kind}_features"].clone().requires_grad_() for kind in ("image", "text")]
            loss = objective(*features, case)
            values.append(relative_difference(loss.detach()[None], case[f"{name}.loss"]))
            for ours, reference in zip(torch.autograd.grad(loss, features), ("image", "text"), strict=True):
                reference = case[f"{name}.grad_{reference}"]
                # If a batch has one person only, the published gradient of TAL is NaN; this project gives 0.
                only_one_person = name.startswith("tal") and case["pids"].unique().numel() == 1
                reference = torch.zeros_like(reference) if only_one_person else reference
                gradients.append(relative_difference(ours, reference))
        yield Row(f"loss {name}", "3 batches", max(values), VALUES)
        yield Row(f"loss {name}, gradients", "3 batches, images and texts", max(gradients), GRADIENTS)


def check_memories(goldens: Goldens) -> Iterator[Row]:
    for kind, (temperature, momentum, eps) in MEMORIES.items():
        values, gradients, rows_after = [], [], []
        for case in _cases(goldens):
            rows, written = case[f"{kind}.rows"], case[f"{kind}.target_rows"]
            person_of_row = case.get(f"{kind}.row_pids", torch.arange(len(rows)))
            memory = CrossModalMemory(rows, rows, person_of_row, temperature, momentum, eps)
            query = case["image_features"].clone().requires_grad_()
            loss, _ = memory(query, case["text_features"], person_of_row[written])
            values.append(relative_difference(loss.detach()[None], case[f"{kind}.loss"]))
            gradients.append(relative_difference(torch.autograd.grad(loss, query)[0], case[f"{kind}.grad_query"]))
            memory.update(case["image_features"], case["text_features"], written)
            rows_after.append(relative_difference(memory.text_rows, case[f"{kind}.rows_after"]))
        name = kind.replace("_", " ")
        yield Row(f"{name}, loss", "3 batches", max(values), VALUES)
        yield Row(f"{name}, gradient", "3 batches", max(gradients), GRADIENTS)
        yield Row(f"{name}, rows after an update", "3 batches, rows written up to 12 times", max(rows_after), VALUES)


# Each checkpoint file, and the prefix of its features in train.safetensors.
FILES = {
    "clip_openai.pt": "clip_init",
    "irra_pretrained.pth": "irra_init",
    "eccl_start.pth": "clip_init",
    "eccl_original.pth": "trained",
}


def check_features(goldens: Goldens) -> Iterator[Row]:
    values = goldens.train
    for name, reference in FILES.items():
        model = goldens.model(name)
        for attention in ("sdpa", "eager"):
            model.set_attn_implementation(attention)
            images, texts = _image_features(model, values["images"]), _text_features(model, values["input_ids"])
            for kind, ours in (("image", images), ("text", texts)):
                difference = relative_difference(ours, values[f"{reference}.{kind}_features"])
                yield Row(f"{kind} features, {attention}", name, difference, VALUES)
        reference = values[f"{reference}.text_features"]
        end = model.config.text_config.eos_token_id
        lengths = (values["input_ids"] == end).int().argmax(dim=1) + 1
        cut = torch.cat([_text_features(model, ids[None, :n]) for ids, n in zip(values["input_ids"], lengths)])  # noqa: B905
        yield Row("text features, padding cut", name, relative_difference(cut, reference), VALUES)
        backwards = _text_features(model, values["input_ids"].flip(0)).flip(0)
        yield Row("text features, batch reversed", name, relative_difference(backwards, reference), VALUES)


@torch.no_grad()
def _image_features(model: ECCLModel, pixels: torch.Tensor) -> torch.Tensor:
    return model.get_image_features(pixels).pooler_output


@torch.no_grad()
def _text_features(model: ECCLModel, input_ids: torch.Tensor) -> torch.Tensor:
    return model.get_text_features(input_ids).pooler_output


def check_unmerging(goldens: Goldens) -> Iterator[Row]:
    """The trained file without its LoRA product must equal the CLIP from which the training started."""
    image_size, alpha = tuple(goldens.shape["img"]), goldens.shape["alpha"]
    trained = convert_checkpoint(goldens.folder / "eccl_original.pth", image_size, lora_alpha=alpha, merge_lora=False)
    ours = {name.replace(".base_layer.", "."): tensor for name, tensor in trained.get_base_model().state_dict().items()}
    start = convert_checkpoint(goldens.folder / "clip_openai.pt", image_size, num_prompt_tokens=0).state_dict()
    difference = max(relative_difference(ours[name], tensor) for name, tensor in start.items())
    yield Row("weights without LoRA", "eccl_original.pth against clip_openai.pt", difference, VALUES)


# The name of a LoRA matrix in the published code, and the layer that it changes in this project.
ORIGINAL_LAYERS = {
    "attn.lora_{}_q": "self_attn.q_proj",
    "attn.lora_{}_k": "self_attn.k_proj",
    "attn.lora_{}_v": "self_attn.v_proj",
    "attn.lora_{}_o": "self_attn.out_proj",
    "mlp.c_fc.lora_{}": "mlp.fc1",
    "mlp.c_proj.lora_{}": "mlp.fc2",
}


def _gradient_names(shape: dict) -> Iterator[tuple[str, str, str]]:
    """Yields the kind, the published name and this project's name of each LoRA matrix and each prompt map."""
    for ours, encoder, layers in (("vision", "image", shape["vl"]), ("text", "text", shape["tl"])):
        for layer in range(layers):
            for pattern, module in ORIGINAL_LAYERS.items():
                for letter in "AB":
                    original = f"{encoder}_encoder.transformer.resblocks.{layer}.{pattern.format(letter)}"
                    name = f"{ours}_model.encoder.layers.{layer}.{module}.lora_{letter}.default.weight"
                    yield f"LoRA {letter}", original, f"base_model.model.{name}"
    for layer in range(shape["depth"]):
        original = "proj" if layer == 0 else f"compound_prompt_projections.{layer - 1}"
        for part in ("weight", "bias"):
            name = f"prompt_learner.modules_to_save.default.projections.{layer}.{part}"
            yield "prompt maps", f"prompt_learner.{original}.{part}", f"base_model.model.{name}"


def check_training(goldens: Goldens) -> Iterator[Row]:
    # The trainer prints logs, which do not belong to the table.
    with tempfile.TemporaryDirectory() as output_dir, contextlib.redirect_stdout(io.StringIO()):
        trainer = run_golden_steps(goldens.folder, goldens.settings, goldens.train, output_dir)
    yield from _compare_first_gradients(goldens, trainer)
    yield from _compare_logs(goldens, trainer)
    yield from _compare_memories(goldens, trainer)
    model, values = trainer.model.eval(), goldens.train
    for kind, ours in (
        ("image", _image_features(model, values["images"])),
        ("text", _text_features(model, values["input_ids"])),
    ):
        difference = relative_difference(ours, values[f"trained.{kind}_features"])
        yield Row(f"training, {kind} features at the end", f"{len(trainer.losses)} steps", difference, VALUES)


def _compare_first_gradients(goldens: Goldens, trainer: GoldenTrainer) -> Iterator[Row]:
    values, shape = goldens.train, goldens.shape
    gradients, worst, seen = trainer.first_gradients, {}, set()
    prompts = gradients["base_model.model.prompt_learner.modules_to_save.default.text_prompts"]
    original = ["ctx", *(f"compound_prompts_text.{layer}" for layer in range(shape["depth"] - 1))]
    for ours, name in zip(prompts, original, strict=True):
        reference = values[f"grad0.prompt_learner.{name}"]
        worst["prompts"] = max(worst.get("prompts", 0.0), relative_difference(ours, reference))
        seen.add(f"grad0.prompt_learner.{name}")
    for kind, name, ours in _gradient_names(shape):
        difference = relative_difference(gradients[ours], values[f"grad0.{name}"])
        worst[kind] = max(worst.get(kind, 0.0), difference)
        seen.add(f"grad0.{name}")
    if seen != {name for name in values if name.startswith("grad0.")}:
        raise ValueError("train.safetensors has gradients (grad0.*) of other tensors than this model")
    for kind, difference in worst.items():
        yield Row(f"gradients of step 0, {kind}", f"{shape['vl']} + {shape['tl']} layers", difference, GRADIENTS)


def _compare_logs(goldens: Goldens, trainer: GoldenTrainer) -> Iterator[Row]:
    """Compares the losses and the learning rates of all steps."""
    # In the published log, the losses of the memories are multiplied by their weights.
    identity, instance = goldens.shape["lam1"], goldens.shape["lam2"]
    weights = torch.tensor([1, identity, identity, instance, instance, 1], dtype=torch.float64)
    losses = torch.tensor(trainer.losses, dtype=torch.float64) * weights
    steps = f"{len(losses)} steps"
    for column, name in enumerate(goldens.settings["loss_columns"]):
        difference = relative_difference(losses[:, column], goldens.train["loss_log"][:, column])
        yield Row(f"training, {name}", steps, difference, VALUES)
    # Both are doubles; only the order of two multiplications differs.
    rates = torch.tensor(trainer.rates, dtype=torch.float64)
    yield Row("training, learning rates", steps, relative_difference(rates, goldens.train["lr_log"]), 1e-12)


def _compare_memories(goldens: Goldens, trainer: GoldenTrainer) -> Iterator[Row]:
    for name, step in (("init", 0), ("after_step1", 1), ("after_step2", 2), ("final", -1)):
        difference = max(
            relative_difference(
                trainer.memories[step][f"{kind}_memory.{modality}_rows"],
                goldens.train[f"memory_{name}.{kind}_{modality}"],
            )
            for kind in ("identity", "instance")
            for modality in ("image", "text")
        )
        yield Row(f"training, memories {name.replace('_', ' ')}", "4 banks", difference, VALUES)


def check_irra(goldens: Goldens) -> Iterator[Row]:
    """Training with IRRA's three losses, its parameter groups and the published masked captions."""
    if not (goldens.folder / "irra").is_dir():
        return
    irra = IrraGoldens(goldens.folder / "irra")
    values = irra.train
    with tempfile.TemporaryDirectory() as output_dir, contextlib.redirect_stdout(io.StringIO()):
        trainer = make_irra_trainer(irra, output_dir)
        start = list(_compare_irra_features(trainer.model.eval(), values, "", "at the start", VALUES))
        trainer.train()
    steps = f"{len(trainer.losses)} steps"
    scores = trainer.scores[0].detach()
    yield from start
    difference = relative_difference(scores, values["mlm_scores_batch0"])
    yield Row("IRRA, scores of the masked words", f"{len(scores)} words", difference, VALUES)
    gradients = publish(trainer.first_gradients)
    references = {name.removeprefix("grad0."): value for name, value in values.items() if name.startswith("grad0.")}
    for kind, is_encoder in (("encoders", True), ("heads", False)):
        own = [name for name in references if name.startswith("base_model.") == is_encoder]
        worst = max(relative_difference(gradients[name], references[name]) for name in own)
        yield Row(f"IRRA, gradients of step 0, {kind}", f"{len(own)} tensors", worst, GRADIENTS)
    losses = torch.tensor(trainer.losses, dtype=torch.float64)
    for column, name in enumerate(irra.shape["loss_log_columns"]):
        difference = relative_difference(losses[:, column], values["loss_log"][:, column])
        yield Row(f"IRRA, training, {name}", steps, difference, VALUES)
    yield from _compare_irra_features(trainer.model.eval(), values, "_after", f"after {steps}", AMPLIFIED)
    published = {
        name: tuple(float(number) for number in group.split()[1::2])
        for group, names in irra.settings["parameter_groups"].items()
        for name in names
    }
    ours = groups_by_published_name(trainer)
    wrong = len(published.keys() ^ ours.keys())
    wrong += sum(
        relative_difference(torch.tensor(ours[name]), torch.tensor(group)) > VALUES
        for name, group in published.items()
        if name in ours
    )
    yield Row("IRRA, parameters with another rate or decay", f"{len(published)} parameters", wrong, EXACT)


def _compare_irra_features(
    model: ECCLModel, values: dict[str, torch.Tensor], ending: str, moment: str, tolerance: float
) -> Iterator[Row]:
    for kind, ours in (
        ("image", _image_features(model, values["images"])),
        ("text", _text_features(model, values["input_ids"])),
    ):
        difference = relative_difference(ours, values[f"{kind}_features{ending}"])
        yield Row(f"IRRA, {kind} features", moment, difference, tolerance)


def check_schedule(goldens: Goldens) -> Iterator[Row]:
    args = {field.name: field.default for field in ECCLTrainingArguments.__dataclass_fields__.values()}
    epochs = goldens.settings["schedule_60_epochs"]
    factors = [epoch_factor(epoch, len(epochs), args["warmup_epochs"]) for epoch in range(len(epochs))]
    ours = torch.tensor(
        [[args["learning_rate"] * f, args["lora_learning_rate"] * f] for f in factors], dtype=torch.float64
    )
    reference = torch.tensor(epochs, dtype=torch.float64)
    yield Row("published schedule", f"{len(epochs)} epochs, 2 rates", relative_difference(ours, reference), 1e-12)


def check_metrics(goldens: Goldens) -> Iterator[Row]:
    values, references = goldens.metrics, goldens.settings["metrics"]
    for direction, query, gallery in (("t2i", "query", "gallery"), ("i2t", "gallery", "query")):
        worst = 0.0
        for case in sorted({name.split(".")[0] for name in references}):
            query_ids, gallery_ids = values[f"{case}.{query}_pids"].numpy(), values[f"{case}.{gallery}_pids"].numpy()
            # The published code ignores a query if no gallery image shows its person; in this project it is an error.
            answerable = np.isin(query_ids, gallery_ids)
            ours = score_embeddings(
                values[f"{case}.{query}_embeds"].numpy()[answerable],
                query_ids[answerable],
                values[f"{case}.{gallery}_embeds"].numpy(),
                gallery_ids,
            )
            for name, reference in references[f"{case}.{direction}"].items():
                worst = max(worst, abs(ours[name] - reference))
        what = "text to image" if direction == "t2i" else "image to text"
        yield Row(f"metrics, {what}", "3 galleries, in points", worst, POINTS)


def check_tokens(goldens: Goldens) -> Iterator[Row]:
    reference = json.loads((goldens.folder / "tokenizer.json").read_text(encoding="utf-8"))
    processor = ECCLProcessor(ECCLImageProcessor(), clip_tokenizer(), max_text_length=reference["max_length"])
    wrong = sum(
        processor(text=caption)["input_ids"] != ids
        for caption, ids in zip(reference["captions"], reference["ids"], strict=True)
    )
    yield Row("token ids, captions that differ", f"{len(reference['ids'])} captions", wrong, EXACT)


def sample_images() -> Iterator[tuple[str, Image.Image]]:
    """Yields images of noise with their descriptions: one of each 8-bit kind, in several sizes.

    Grey values of 16 bits are not among them: the published code makes all of them above 255 white.
    """
    generator = np.random.default_rng(0)
    for width, height in ((37, 91), (1, 1), (128, 384), (501, 333), (3, 700)):
        noise = generator.integers(0, 256, (height, width, 4), dtype=np.uint8)
        rgb = Image.fromarray(noise[..., :3])
        yield f"RGB {width} x {height}", rgb
        yield f"RGBA {width} x {height}", Image.fromarray(noise)
        for mode in ("L", "P", "CMYK", "1", "LA", "YCbCr"):
            yield f"{mode} {width} x {height}", rgb.convert(mode)
        with io.BytesIO() as file:
            exif = rgb.getexif()
            exif[0x0112] = 6
            rgb.save(file, "JPEG", exif=exif)
            rotated = Image.open(io.BytesIO(file.getvalue()))
        yield f"EXIF-rotated JPEG {width} x {height}", rotated


def check_pixels(goldens: Goldens) -> Iterator[Row]:
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    height, width = goldens.shape["img"]
    processor, wrong, count = ECCLImageProcessor(size={"height": height, "width": width}), 0, 0
    for _, image in sample_images():
        ours = processor(image, return_tensors="pt")["pixel_values"][0]
        resized = np.array(
            ImageOps.exif_transpose(image).convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
        )
        plain = (torch.from_numpy(resized).permute(2, 0, 1).float() / 255 - mean) / std
        wrong, count = wrong + (ours.shape != plain.shape or bool((ours != plain).any())), count + 1
    yield Row("pixels, images with a different bit", f"{count} images of 9 kinds", wrong, EXACT)


CHECKS: tuple[Callable[[Goldens], Iterator[Row]], ...] = (
    check_objectives,
    check_memories,
    check_features,
    check_unmerging,
    check_training,
    check_irra,
    check_schedule,
    check_metrics,
    check_tokens,
    check_pixels,
)


def main(arguments: list[str]) -> None:
    transformers.logging.set_verbosity_error()
    # peft uses a name that transformers has deprecated.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    rows = [row for check in CHECKS for row in check(Goldens(Path(arguments[0]) if arguments else GOLDENS))]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    print(f"| {'quantity':{widths[0]}} | {'compared on':{widths[1]}} | worst   | allowed |")
    print(f"|-{'-' * widths[0]}-|-{'-' * widths[1]}-|--------:|--------:|")
    for quantity, compared_on, difference, tolerance in rows:
        outside = "" if difference <= tolerance else "  OUTSIDE"
        print(f"| {quantity:{widths[0]}} | {compared_on:{widths[1]}} | {difference:7.1e} | {tolerance:7.1e} |{outside}")
    outside = sum(row.difference > row.tolerance for row in rows)
    print(f"{len(rows) - outside} of {len(rows)} quantities agree; differences are relative to the largest entry")
    sys.exit(1 if outside else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
