"""The objective of a run: a weighted sum of named losses.

Each loss is a [`LossTerm`] in the table `LOSS_TERMS`. To add a loss, write one class and add one row to the table.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from .arguments import ECCLTrainingArguments
from .interaction import CaptionMasker, InteractionEncoder, MaskedPairs, MaskedStream
from .losses import (
    cross_modal_projection_matching_loss,
    identity_classification_loss,
    image_text_contrastive_loss,
    projection_classification_loss,
    similarity_distribution_matching_loss,
    triplet_alignment_loss,
)
from .memory import CrossModalMemory
from .pairs import CaptionPairs
from .streaming import StreamedPairs


@dataclass(frozen=True)
class PairBatch:
    """The pairs of one batch, those of all processes together, after encoding.

    Args:
        image_features, text_features: `(batch, dim)`, unnormalised, of any precision; row i of both belongs to pair i.
        logit_scale: the model's own factor on cosine similarities, a scalar.
        person_labels: `(batch,)`: the person of each pair, a label `0 .. num_persons - 1`.
        image_indices: `(batch,)`: the index of each pair's image in the training set.
        extra: what a loss added to the items of the training set, by name; `(batch, ...)`.
        image_tokens: `(batch, 1 + patches, dim)`: the class token and the patches of each image in the shared space;
            `None` unless a loss of the run has `needs_tokens`.
        masked_text_tokens: `(batch, length, dim)`: the tokens of each masked caption in the shared space, likewise.
            Prompts may take the last positions of the text.
    """

    image_features: torch.Tensor
    text_features: torch.Tensor
    logit_scale: torch.Tensor
    person_labels: torch.Tensor
    image_indices: torch.Tensor
    extra: Mapping[str, torch.Tensor] = field(default_factory=dict)
    image_tokens: torch.Tensor | None = None
    masked_text_tokens: torch.Tensor | None = None

    def detach(self) -> "PairBatch":
        """Returns the batch for the update of the losses: features without gradient, and no tokens."""
        return replace(self, image_tokens=None, masked_text_tokens=None)._with_features(torch.Tensor.detach)

    def float(self) -> "PairBatch":
        """Returns the batch in float32."""
        return replace(self._with_features(torch.Tensor.float), logit_scale=self.logit_scale.float())

    def _with_features(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "PairBatch":
        names = ("image_features", "text_features", "image_tokens", "masked_text_tokens")
        values = {name: getattr(self, name) for name in names}
        changed: dict[str, Any] = {name: change(value) for name, value in values.items() if value is not None}
        return replace(self, **changed)


@dataclass(frozen=True)
class EncodedTrainingSet:
    """The training set before the first step, each image and each caption encoded once.

    Args:
        image_features, text_features: `(pairs, dim)`, unnormalised; an image with two captions appears twice.
        person_labels, image_indices: `(pairs,)`, as in [`PairBatch`].
    """

    image_features: torch.Tensor
    text_features: torch.Tensor
    person_labels: torch.Tensor
    image_indices: torch.Tensor


class LossTerm(nn.Module):
    """One named loss of the objective, with its settings, its state and its parameters, if it has any.

    A subclass implements `forward`. Its buffers and parameters are saved in every checkpoint and restored on resume;
    its parameters are trained with `learning_rate`, times their factor in `learning_rate_factors`.

    Args:
        args: settings of the run.
        pairs: the training set.
        dim: width of the features.
    """

    # Whether the loss sends a gradient to the model's logit_scale, which is frozen otherwise.
    trains_logit_scale = False
    # Whether `start` needs the features of the training set: one pass over it before the first step.
    needs_start = False
    # Whether the loss must know all persons or images before the first step. A stream does not give them.
    needs_training_set = False
    # Whether the loss needs the tokens of a [`PairBatch`]. Its `wrap_pairs` then adds the masked captions to the items:
    # `masked_input_ids` `(length,)`, of the same length in all items.
    needs_tokens = False

    def __init__(self, args: ECCLTrainingArguments, pairs: CaptionPairs, dim: int):
        super().__init__()

    def forward(self, batch: PairBatch) -> dict[str, torch.Tensor]:
        """Computes the loss of a batch.

        Returns:
            The parts of the loss as float32 scalars, by the names that the log gives them after the name of the term:
            usually `{"loss": value}`. The term is their sum.
        """
        raise NotImplementedError

    def wrap_pairs(self, pairs: Dataset) -> Dataset:
        """Returns the training set with the tensors that the loss needs added to its items; by default unchanged."""
        return pairs

    def start(self, training_set: EncodedTrainingSet) -> None:
        """Fills the state before the first step; called only if `needs_start` is true, and not on resume."""

    def update(self, batch: PairBatch) -> dict[str, torch.Tensor]:
        """Changes the state after the backward pass of a step.

        Returns:
            Scalars to log, by the names that the log gives them after the name of the term.
        """
        return {}


class TripletAlignmentTerm(LossTerm):
    """TAL with `tal_temperature` and `tal_margin`: see [`~eccl.training.losses.triplet_alignment_loss`]."""

    def __init__(self, args: ECCLTrainingArguments, pairs: CaptionPairs, dim: int):
        super().__init__(args, pairs, dim)
        self.temperature, self.margin = args.tal_temperature, args.tal_margin

    def forward(self, batch: PairBatch) -> dict[str, torch.Tensor]:
        loss = triplet_alignment_loss(
            batch.image_features, batch.text_features, batch.person_labels, self.temperature, self.margin
        )
        return {"loss": loss}


class _MemoryTerm(LossTerm):
    """The correspondence losses of a [`~eccl.training.memory.CrossModalMemory`], which follows the training."""

    needs_start = needs_training_set = True
    memory: CrossModalMemory

    def rows_of(self, pairs: PairBatch | EncodedTrainingSet) -> torch.Tensor:
        """`(pairs,)`: the row of the memory that each pair belongs to."""
        raise NotImplementedError

    def forward(self, batch: PairBatch) -> dict[str, torch.Tensor]:
        image_to_text, text_to_image = self.memory(batch.image_features, batch.text_features, batch.person_labels)
        return {"loss_i2t": image_to_text, "loss_t2i": text_to_image}

    def start(self, training_set: EncodedTrainingSet) -> None:
        self.memory.fill(training_set.image_features, training_set.text_features, self.rows_of(training_set))

    def update(self, batch: PairBatch) -> dict[str, torch.Tensor]:
        image_drift, text_drift = self.memory.update(batch.image_features, batch.text_features, self.rows_of(batch))
        return {"drift_image": image_drift, "drift_text": text_drift}


class IdentityMemoryTerm(_MemoryTerm):
    """The identity memory: one row per person."""

    def __init__(self, args: ECCLTrainingArguments, pairs: CaptionPairs, dim: int):
        super().__init__(args, pairs, dim)
        self.memory = CrossModalMemory(
            torch.zeros(pairs.num_persons, dim),
            torch.zeros(pairs.num_persons, dim),
            torch.arange(pairs.num_persons),
            args.identity_memory_temperature,
            args.identity_memory_momentum,
        )

    def rows_of(self, pairs: PairBatch | EncodedTrainingSet) -> torch.Tensor:
        return pairs.person_labels


class InstanceMemoryTerm(_MemoryTerm):
    """The instance memory: one row per image."""

    def __init__(self, args: ECCLTrainingArguments, pairs: CaptionPairs, dim: int):
        super().__init__(args, pairs, dim)
        num_images = len(pairs.person_labels)
        self.memory = CrossModalMemory(
            torch.zeros(num_images, dim),
            torch.zeros(num_images, dim),
            pairs.person_labels,
            args.instance_memory_temperature,
            args.instance_memory_momentum,
            eps=1e-8,
        )

    def rows_of(self, pairs: PairBatch | EncodedTrainingSet) -> torch.Tensor:
        return pairs.image_indices


class ContrastiveTerm(LossTerm):
    """InfoNCE with `contrastive_temperature`, or at the model's own `logit_scale`, which a full tuning trains."""

    def __init__(self, args: ECCLTrainingArguments, pairs: CaptionPairs, dim: int):
        super().__init__(args, pairs, dim)
        self.temperature = args.contrastive_temperature
        self.trains_logit_scale = self.temperature is None

    def forward(self, batch: PairBatch) -> dict[str, torch.Tensor]:
        scale = batch.logit_scale if self.temperature is None else 1 / self.temperature
        return {"loss": image_text_contrastive_loss(batch.image_features, batch.text_features, scale)}


class SimilarityDistributionTerm(LossTerm):
    """SDM with `sdm_temperature` (IRRA, CVPR 2023)."""

    def __init__(self, args: ECCLTrainingArguments, pairs: CaptionPairs, dim: int):
        super().__init__(args, pairs, dim)
        self.logit_scale = 1 / args.sdm_temperature

    def forward(self, batch: PairBatch) -> dict[str, torch.Tensor]:
        features = batch.image_features, batch.text_features
        return {"loss": similarity_distribution_matching_loss(*features, batch.person_labels, self.logit_scale)}


class ProjectionMatchingTerm(LossTerm):
    """CMPM (ECCV 2018)."""

    def forward(self, batch: PairBatch) -> dict[str, torch.Tensor]:
        features = batch.image_features, batch.text_features
        return {"loss": cross_modal_projection_matching_loss(*features, batch.person_labels)}


class IdentityClassificationTerm(LossTerm):
    """Cross entropy over the persons of the training set, with one linear classifier for both modalities (IRRA)."""

    needs_training_set = True

    def __init__(self, args: ECCLTrainingArguments, pairs: CaptionPairs, dim: int):
        super().__init__(args, pairs, dim)
        self.classifier = nn.Linear(dim, pairs.num_persons)
        # As in IRRA's code.
        nn.init.normal_(self.classifier.weight, std=0.001)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, batch: PairBatch) -> dict[str, torch.Tensor]:
        image_logits, text_logits = self.classifier(batch.image_features), self.classifier(batch.text_features)
        return {"loss": identity_classification_loss(image_logits, text_logits, batch.person_labels)}


class ProjectionClassificationTerm(LossTerm):
    """CMPC over the persons of the training set (ECCV 2018)."""

    needs_training_set = True

    def __init__(self, args: ECCLTrainingArguments, pairs: CaptionPairs, dim: int):
        super().__init__(args, pairs, dim)
        self.weight = nn.Parameter(torch.empty(dim, pairs.num_persons))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, batch: PairBatch) -> dict[str, torch.Tensor]:
        features = batch.image_features, batch.text_features
        return {"loss": projection_classification_loss(*features, self.weight, batch.person_labels)}


class MaskedLanguageModellingTerm(LossTerm, InteractionEncoder):
    """Cross entropy of the masked words, predicted from the caption and the image (IRRA, CVPR 2023, section 3.2).

    It is an [`~eccl.training.interaction.InteractionEncoder`], so that its parameters have the published names.

    Args:
        args: `interaction_depth` and `mask_probability`.
        pairs: its processor makes the masked captions.
        dim: width of the features.

    Raises:
        ValueError: the vocabulary is not of CLIP's kind, or the width is not that of whole attention heads.
    """

    needs_tokens = True

    def __init__(self, args: ECCLTrainingArguments, pairs: CaptionPairs | StreamedPairs, dim: int):
        masker = CaptionMasker(pairs.make_pixels.processor, args.mask_probability)
        InteractionEncoder.__init__(self, dim, args.interaction_depth, masker.vocab_size)
        self.masker = masker

    def wrap_pairs(self, pairs: Dataset) -> Dataset:
        """Returns the training set with a masked caption in each item."""
        return (MaskedStream if isinstance(pairs, IterableDataset) else MaskedPairs)(pairs, self.masker)

    def forward(self, batch: PairBatch) -> dict[str, torch.Tensor]:
        assert batch.image_tokens is not None and batch.masked_text_tokens is not None  # because of `needs_tokens`
        # With prompts, some tokens at the end of a text can be missing.
        labels = batch.extra["masked_labels"][:, : batch.masked_text_tokens.shape[1]]
        is_masked = labels != 0
        scores = self.score_words(batch.masked_text_tokens, batch.image_tokens, is_masked)
        total = nn.functional.cross_entropy(scores, labels[is_masked], reduction="sum")
        # A batch whose captions have no word to mask gives 0, not NaN.
        return {"loss": total / is_masked.sum().clamp(min=1)}


def _make_attribute_term(args: ECCLTrainingArguments, pairs: CaptionPairs, dim: int) -> LossTerm:
    # Imported only here: no other run needs the synthetic generator.
    from ..dataset_scripts.synthetic.attribute_loss import AttributeTerm

    return AttributeTerm(args, pairs, dim)


# Every loss that `losses` of a recipe, or `--losses`, can name. A row makes the term from (args, pairs, dim).
LOSS_TERMS: dict[str, Callable[[ECCLTrainingArguments, Any, int], LossTerm]] = {
    "tal": TripletAlignmentTerm,
    "identity_memory": IdentityMemoryTerm,
    "instance_memory": InstanceMemoryTerm,
    "contrastive": ContrastiveTerm,
    "sdm": SimilarityDistributionTerm,
    "cmpm": ProjectionMatchingTerm,
    "identity_classification": IdentityClassificationTerm,
    "projection_classification": ProjectionClassificationTerm,
    "masked_language_modelling": MaskedLanguageModellingTerm,
    "attribute": _make_attribute_term,
}


class ECCLObjective(nn.Module):
    """The weighted sum of the losses that a run has chosen, with all their state.

    Args:
        args: `loss_weights` names the losses; the rest are their settings.
        pairs: the training set.
        dim: width of the features.

    Raises:
        ValueError: a loss needs more than a stream gives.
    """

    def __init__(self, args: ECCLTrainingArguments, pairs: CaptionPairs | StreamedPairs, dim: int):
        super().__init__()
        self.weights = {name: weight for name, weight in args.loss_weights.items() if weight}
        if isinstance(pairs, StreamedPairs):
            needing = [name for name in self.weights if getattr(LOSS_TERMS[name], "needs_training_set", True)]
            if needing:
                raise ValueError(
                    f"losses: {', '.join(needing)} must know all persons and images before the first step, and a "
                    "stream does not give them: leave it out, for example --losses tal=1"
                )
        # Each term has its own name as attribute, so that a checkpoint's tensors are named after the losses.
        for name in self.weights:
            self.add_module(name, LOSS_TERMS[name](args, pairs, dim))

    def terms(self) -> dict[str, LossTerm]:
        """The losses of the run by name."""
        return {name: term for name, term in self.named_children() if isinstance(term, LossTerm)}

    def wrap_pairs(self, pairs: Dataset) -> Dataset:
        """Returns the training set with what the losses add to its items."""
        for term in self.terms().values():
            pairs = term.wrap_pairs(pairs)
        return pairs

    def forward(self, batch: PairBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Computes the weighted total, and each part without its weight by the name it has in the log.

        The computation is in float32, under autocast too.
        """
        batch = batch.float()
        parts: dict[str, torch.Tensor] = {}
        total = torch.zeros((), device=batch.image_features.device)
        with torch.autocast(batch.image_features.device.type, enabled=False):
            for name, term in self.terms().items():
                values = term(batch)
                total = total + self.weights[name] * sum(values.values())
                parts |= {f"{name}_{part}": value for part, value in values.items()}
        return total, parts

    def start(self, training_set: EncodedTrainingSet) -> None:
        """Fills the state of the losses before the first step."""
        for term in self.terms().values():
            term.start(training_set)

    def update(self, batch: PairBatch) -> dict[str, torch.Tensor]:
        """Changes the state of the losses after the backward pass of a step; returns scalars to log."""
        logged: dict[str, torch.Tensor] = {}
        for name, term in self.terms().items():
            logged |= {f"{name}_{part}": value for part, value in term.update(batch).items()}
        return logged


__all__ = ["LOSS_TERMS", "ECCLObjective", "EncodedTrainingSet", "LossTerm", "PairBatch"]
