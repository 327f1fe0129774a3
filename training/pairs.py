"""From rows of a benchmark to batches: caption pairs and their collator."""

import random

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset

from ..processing_eccl import ECCLProcessor
from .augmentation import augment_image, drop_words, random_erase

# The index of what fills the last batch where several processes need batches of one size; no loss counts it.
PADDING = -1


class CaptionPairs(Dataset):
    """The (image, caption) pairs of a split: an image appears once for each of its captions, and is stored once.

    An item is drawn by `draw * len(self) + pair`, `draw` being the epoch for [`PairSampler`], so that its augmentation
    depends on the seed, the draw and the pair alone: not on which worker, process or resumed run makes it. The index
    [`PADDING`] gives an item that only fills a batch.

    Args:
        rows: a split of one of the builders.
        processor: gives the image size and the fill of erased rectangles.
        augment: off gives evaluation transforms.
        seed: of the augmentation.
        attribute_labels: for each row `(captions, attributes)` labels of what each caption mentions, and for the image
            itself in the last row; only for pre-training on the synthetic benchmark.

    Attributes:
        person_labels: `(rows,)`: labels `0 .. num_persons - 1` in the order of the annotation's ids.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        processor: ECCLProcessor,
        augment: bool = True,
        seed: int = 0,
        attribute_labels: list[torch.Tensor] | None = None,
    ):
        self.rows, self.processor, self.augment, self.seed = rows, processor, augment, seed
        self.attribute_labels = attribute_labels
        person_ids = np.asarray(rows["person_id"])
        self.num_persons = len(np.unique(person_ids))
        self.person_labels = torch.from_numpy(np.unique(person_ids, return_inverse=True)[1])
        self.captions_per_row = torch.tensor([len(captions) for captions in rows["captions"]])
        self.row_of_pair = torch.arange(len(rows)).repeat_interleave(self.captions_per_row)
        first_pair = self.captions_per_row.cumsum(0) - self.captions_per_row
        self.caption_of_pair = torch.arange(len(self.row_of_pair)) - first_pair[self.row_of_pair]

    def __len__(self) -> int:
        return len(self.row_of_pair)

    def __getitem__(self, index: int) -> dict:
        is_padding = index == PADDING
        draw, pair = divmod(0 if is_padding else int(index), len(self))
        row, caption_index = int(self.row_of_pair[pair]), int(self.caption_of_pair[pair])
        record = self.rows[row]
        caption = record["captions"][caption_index]
        item = {
            "row": row,
            "person_label": int(self.person_labels[row]),
            "file_path": None if is_padding else record["file_path"],
            "is_padding": is_padding,
        }
        image_processor = self.processor.image_processor
        if self.augment:
            rng = random.Random(f"{self.seed}/{draw}/{pair}")
            size = image_processor.size
            image = augment_image(record["image"], size["height"], size["width"], rng)
            pixels = image_processor(image, do_resize=False, return_tensors="pt")["pixel_values"][0]
            item["pixel_values"] = random_erase(pixels, image_processor.image_mean, rng)
            item["caption"] = drop_words(caption, rng)
        else:
            item["pixel_values"] = image_processor(record["image"], return_tensors="pt")["pixel_values"][0]
            item["caption"] = caption
        if self.attribute_labels is not None:
            labels = self.attribute_labels[row]
            item["attribute_labels"] = torch.stack([labels[-1], labels[caption_index]])
        return item


class PairCollator:
    """Makes a batch of pairs; captions are padded to the longest of the batch, no further.

    Returns:
        `pixel_values` `(batch, 3, height, width)`, `input_ids` and `attention_mask` `(batch, longest)`,
        `person_labels`, `rows` and `is_padding` `(batch,)`, `file_paths`, a list, and `attribute_labels`
        `(batch, 2, attributes)` (image, caption) if any.
    """

    def __init__(self, processor: ECCLProcessor):
        self.processor = processor

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        batch = dict(self.processor(text=[item["caption"] for item in items], return_tensors="pt"))
        batch["pixel_values"] = torch.stack([item["pixel_values"] for item in items])
        batch["person_labels"] = torch.tensor([item["person_label"] for item in items])
        batch["rows"] = torch.tensor([item["row"] for item in items])
        batch["is_padding"] = torch.tensor([item["is_padding"] for item in items])
        batch["file_paths"] = [item["file_path"] for item in items]
        if "attribute_labels" in items[0]:
            batch["attribute_labels"] = torch.stack([item["attribute_labels"] for item in items])
        return batch
