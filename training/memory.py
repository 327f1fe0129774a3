"""The cross-modal memories: moving averages of the image and text features of every person, or every image."""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .losses import unit_rows


class CrossModalMemory(nn.Module):
    """Unit image and text vectors: one row per person (identity memory) or one row per image (instance memory).

    The rows are buffers: they are part of `state_dict`, and no gradient reaches them. The published code calls the two
    memories `ClusterMemory` and `InstanceMemory`.

    Args:
        image_rows, text_rows: `(rows, dim)`; they are copied and normalised.
        row_person_ids: `(rows,)`: the person that each row belongs to, a label `0 .. persons - 1`.
        temperature: must be positive; the published run uses 0.03 (identity) and 0.015 (instance).
        momentum: fraction of the old row that an update keeps, 0 to 1.
        eps: added to the probability before the logarithm (1e-8 for the instance memory).

    Raises:
        ValueError: the shapes do not agree, or the temperature or the momentum is out of range.
    """

    image_rows: torch.Tensor
    text_rows: torch.Tensor
    row_person_ids: torch.Tensor

    def __init__(
        self,
        image_rows: torch.Tensor,
        text_rows: torch.Tensor,
        row_person_ids: torch.Tensor,
        temperature: float,
        momentum: float,
        eps: float = 0.0,
    ):
        super().__init__()
        if image_rows.shape != text_rows.shape or len(row_person_ids) != len(image_rows):
            raise ValueError(
                f"image_rows are {tuple(image_rows.shape)}, text_rows {tuple(text_rows.shape)} and there are "
                f"{len(row_person_ids)} row_person_ids: the number of rows must be the same in all three"
            )
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}, it must be positive")
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum is {momentum}, it must be between 0 and 1")
        self.temperature, self.momentum, self.eps = temperature, momentum, eps
        # Copies, because updates write the rows in place.
        self.register_buffer("image_rows", unit_rows(image_rows).clone())
        self.register_buffer("text_rows", unit_rows(text_rows).clone())
        self.register_buffer("row_person_ids", row_person_ids.clone())

    def forward(
        self, image_features: torch.Tensor, text_features: torch.Tensor, person_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes the correspondence losses `-log(p + eps)`; `p` is the softmax mass of the rows of the item's person.

        With one row per person and `eps` 0, this is the cross entropy with that row.

        Args:
            image_features, text_features: `(batch, dim)`, unnormalised.
            person_ids: `(batch,)`.

        Returns:
            `loss_image_to_text` (images against text rows) and `loss_text_to_image`, each the mean over the batch.

        Raises:
            ValueError: a person has no row.
        """
        # Only the rows of the batch's persons, a few hundred, are compared with each item.
        own_rows = torch.isin(self.row_person_ids, person_ids).nonzero()[:, 0]
        same_person = self.row_person_ids[own_rows][:, None] == person_ids[None, :]
        has_row = same_person.any(dim=0)
        if not has_row.all():
            raise ValueError(f"person {int(person_ids[~has_row][0])} has no row in the memory")
        with torch.autocast(image_features.device.type, enabled=False):
            image_queries, text_queries = (
                unit_rows(features) / self.temperature for features in (image_features, text_features)
            )
            return (
                _CorrespondenceLoss.apply(image_queries, self.text_rows, own_rows, same_person, self.eps),
                _CorrespondenceLoss.apply(text_queries, self.image_rows, own_rows, same_person, self.eps),
            )

    @torch.no_grad()
    def update(
        self, image_features: torch.Tensor, text_features: torch.Tensor, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the items of a batch into their rows, as if one item came after the other.

        `row = m * row + (1 - m) * normalize(feature)`, normalised again. Image features write image rows, text features
        write text rows. If two items of the batch have the same row, the second sees the write of the first: round k
        writes the k-th item of each row, all rows at once.

        Args:
            image_features, text_features: `(batch, dim)`, unnormalised.
            rows: `(batch,)`: the row of each item.

        Returns:
            The drift of the image rows and of the text rows: the mean of `1 - cos(before, after)` over the rows
            written, 0 to 2; 0 if the batch is empty.
        """
        features = torch.stack([unit_rows(image_features), unit_rows(text_features)])
        written_rows = rows.unique()
        before = [memory[written_rows] for memory in (self.image_rows, self.text_rows)]
        for items in _rounds(rows):
            targets = rows[items]
            for memory, written in ((self.image_rows, features[0]), (self.text_rows, features[1])):
                mixed = self.momentum * memory[targets] + (1 - self.momentum) * written[items]
                memory[targets] = nn.functional.normalize(mixed, dim=-1)
        image_drift, text_drift = (
            (1 - (old * memory[written_rows]).sum(dim=1)).sum() / max(1, len(written_rows))
            for old, memory in zip(before, (self.image_rows, self.text_rows), strict=True)
        )
        return image_drift, text_drift

    @torch.no_grad()
    def fill(self, image_features: torch.Tensor, text_features: torch.Tensor, rows: torch.Tensor) -> None:
        """Sets every row to the mean of its items' unnormalised features, normalised.

        Args:
            image_features, text_features: `(items, dim)`, unnormalised; each item is an (image, caption) pair.
            rows: `(items,)`: the row of each item; every row needs at least one item.

        Raises:
            ValueError: a row has no item, or an item has no row.
        """
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(self.image_rows):
            raise ValueError(
                f"rows range from {int(rows.min())} to {int(rows.max())}, the memory has {len(self.image_rows)} rows"
            )
        counts = torch.bincount(rows, minlength=len(self.image_rows))
        if not counts.all():
            raise ValueError(
                f"row {int((counts == 0).nonzero()[0])} of the memory has no item: each row needs at least one"
            )
        for memory, features in ((self.image_rows, image_features), (self.text_rows, text_features)):
            sums = torch.zeros_like(memory).index_add_(0, rows, features.to(memory.dtype))
            memory.copy_(unit_rows(sums / counts[:, None]))

    def extra_repr(self) -> str:
        rows, dim = self.image_rows.shape
        return f"rows={rows}, dim={dim}, temperature={self.temperature}, momentum={self.momentum}, eps={self.eps}"


class _CorrespondenceLoss(torch.autograd.Function):
    """The mean of `-log(p + eps)` over queries; `p` is the softmax mass of the rows of the query's person.

    The loss and its gradient are computed together, in one buffer of `rows x queries`: autograd would keep four, and
    its passes over them would take a fifth of the time of the matrix products.

    Args of `apply`:
        queries: `(queries, dim)`, float32, divided by the temperature.
        rows: `(rows, dim)`, float32; they get no gradient.
        own_rows: the indices of the rows of all persons that are queried.
        same_person: `(own rows, queries)`: whether the row shows the person of the query.
        eps: added to `p`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: torch.Tensor,
        rows: torch.Tensor,
        own_rows: torch.Tensor,
        same_person: torch.Tensor,
        eps: float,
    ) -> torch.Tensor:
        # On a CPU, the product in this order is faster than its transpose.
        logits = rows @ queries.T
        own_logits = logits[own_rows].masked_fill_(~same_person, -torch.inf)
        log_own = own_logits.logsumexp(dim=0)
        highest = logits.amax(dim=0)
        weights = logits.sub_(highest).exp_()
        total = weights.sum(dim=0)
        log_mass = log_own - highest - total.log()
        # Without eps, p may be too small for float32; its logarithm is not.
        losses, factor = -log_mass, torch.ones_like(log_mass)
        if eps:
            mass = log_mass.exp()
            losses, factor = -(mass + eps).log(), mass / (mass + eps)
        if ctx.needs_input_grad[0]:
            # By a logit: p / (p + eps) times (softmax over all rows - softmax over the own rows).
            weights[own_rows] -= total * (own_logits - log_own).exp_()
            ctx.save_for_backward((weights.T @ rows).mul_((factor / total / len(queries))[:, None]))
        return losses.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: torch.Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return loss_gradient * gradient, None, None, None, None


def _rounds(rows: torch.Tensor) -> list[torch.Tensor]:
    """Groups the item indices so that round k holds the k-th item of each row."""
    order = rows.argsort(stable=True)
    sorted_rows = rows[order]
    position = torch.arange(len(rows), device=rows.device)
    starts = torch.ones_like(sorted_rows, dtype=torch.bool)
    starts[1:] = sorted_rows[1:] != sorted_rows[:-1]
    occurrence = position - torch.where(starts, position, 0).cummax(dim=0).values
    return [order[occurrence == round_] for round_ in range(int(occurrence.max()) + 1)] if len(rows) else []
