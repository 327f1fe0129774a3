"""The `attribute` loss, for pre-training on the synthetic benchmark: only there, the attributes are known."""

import json
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn
from torch.utils.data import Dataset

from ...training.arguments import ECCLTrainingArguments
from ...training.losses import attribute_classification_loss
from ...training.objective import LossTerm, PairBatch
from ...training.pairs import CaptionPairs, PairDraw
from ..base import image_paths
from .generator import LABELS_FILE


class AttributeTerm(LossTerm):
    """Predicts each attribute of the person (colours, garments, bags, ...) from the image and from the caption.

    One linear layer predicts from both modalities. From a caption only the attributes that it mentions are predicted.
    """

    def __init__(self, args: ECCLTrainingArguments, pairs: CaptionPairs, dim: int):
        super().__init__(args, pairs, dim)
        self.labels, self.num_values = read_attribute_labels(pairs.dataset)
        self.caption_of_pair = pairs.caption_of_pair.tolist()
        self.head = nn.Linear(dim, sum(self.num_values))

    def wrap_pairs(self, pairs: Dataset) -> Dataset:
        return _AttributePairs(pairs, self.labels, self.caption_of_pair)

    def forward(self, batch: PairBatch) -> dict[str, torch.Tensor]:
        labels = batch.extra["attribute_labels"]
        return {
            "loss_image": attribute_classification_loss(self.head(batch.image_features), labels[:, 0], self.num_values),
            "loss_text": attribute_classification_loss(self.head(batch.text_features), labels[:, 1], self.num_values),
        }


class _AttributePairs(Dataset):
    """Training pairs whose items have `attribute_labels` `(2, attributes)`: of the image, and of the caption."""

    def __init__(self, pairs: Any, labels: list[torch.Tensor], caption_of_pair: list[int]):
        self.pairs, self.labels, self.caption_of_pair = pairs, labels, caption_of_pair

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, drawn: int | PairDraw) -> dict[str, Any]:
        item = self.pairs[drawn]
        pair = drawn.pair if isinstance(drawn, PairDraw) else drawn
        labels = self.labels[item["image_index"]]
        return item | {"attribute_labels": torch.stack([labels[-1], labels[self.caption_of_pair[pair]]])}


def read_attribute_labels(dataset: datasets.Dataset) -> tuple[list[torch.Tensor], list[int]]:
    """Reads what the synthetic benchmark knows of each image of a split.

    Args:
        dataset: a split of a synthetic benchmark.

    Returns:
        For each image `(captions + 1, attributes)` class labels: one row per caption, with -100 for each attribute that
        the caption does not mention, and last the row of the image; and the number of values of each attribute. A wrong
        caption (see `SyntheticBenchmark.caption_noise`) counts as one that mentions nothing: its row is all -100.

    Raises:
        FileNotFoundError: the benchmark is not a synthetic one.
        ValueError: the file of the labels is damaged, or is another benchmark's.
    """
    first_image = Path(image_paths(dataset.select([0]))[0] or "")
    # The image's path is <benchmark>/imgs/<file_path>. The images of a Parquet file have no such path.
    parents, depth = first_image.parents, len(Path(dataset[0]["file_path"]).parts)
    file = (parents[depth] if len(parents) > depth else Path()) / LABELS_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing: the attribute loss needs it, and only the synthetic benchmark has it"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        names = list(content["attributes"])
        labels = []
        for person_id, path in zip(dataset["person_id"], dataset["file_path"], strict=True):
            shown = torch.tensor(content["people"][str(person_id)])
            mentions = [[name in mentioned for name in names] for mentioned in map(set, content["mentioned"][path])]
            labels.append(torch.cat([shown.where(torch.tensor(mentions), -100), shown[None]]))
        return labels, [len(values) for values in content["attributes"].values()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, RuntimeError) as error:
        raise ValueError(f"{file} does not have the labels of this benchmark: {error!r}") from error


__all__ = ["AttributeTerm", "read_attribute_labels"]
