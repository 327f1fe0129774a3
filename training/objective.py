"""The objective of a run: a weighted sum of losses."""

import torch
from torch import nn

from .arguments import ECCLTrainingArguments
from .losses import attribute_classification_loss, image_text_contrastive_loss, triplet_alignment_loss
from .memory import CrossModalMemory

_INSTANCE_EPS = 1e-8


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
        """The weighted total, and each part unweighted by name, in float32 also under autocast.

        Args:
            image_features, text_features: `(batch, dim)`, unnormalised, of any precision.
            logit_scale: the factor of InfoNCE.
            batch: `person_labels`, `rows`, and `attribute_labels` where they are used.
        """
        with torch.autocast(image_features.device.type, enabled=False):
            return self._losses(image_features.float(), text_features.float(), logit_scale.float(), batch)

    def _losses(
        self, image_features: torch.Tensor, text_features: torch.Tensor, logit_scale: torch.Tensor, batch: dict
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        parts: dict[str, torch.Tensor] = {}
        total = image_features.new_zeros(())
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
                    self.attribute_head(features),
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
