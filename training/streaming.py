"""Training pairs from a stream: nothing is known of the training set but the row that is read."""

import hashlib
import logging
import random
from collections.abc import Iterator
from typing import Any

import datasets
import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import IterableDataset

from ..processing_eccl import ECCLProcessor
from .augmentation import WORD_DROP_PROBABILITY, drop_words
from .pairs import PixelMaker

_logger = logging.getLogger(__name__)
# Rows. A stream is shuffled within a buffer, and by files.
SHUFFLE_BUFFER = 1_000
_OPEN_FILES = 4
# Images that are left out and named.
_NAMED = 10


class StreamedPairs(IterableDataset):
    """Pairs of a stream, without end: after the last row, the stream starts again in another order.

    In each pass, every row is drawn once, with one of its captions; the next pass takes the next caption. The order
    and the augmentation depend on the seed, the pass, the number of processes and the number of workers.

    Args:
        rows: a stream with the columns `image` (not decoded), `person_id`, `captions` (a list) and `file_path`.
        name: name of the data set, for messages and for the record of the run.
        processor: gives the size of the images and the colour of erased rectangles.
        augment: apply the published augmentation.
        seed: seed of the order and of the augmentation.
        skip_bad_images: leave unreadable images out, with a warning for each of the first ten, and with their number.
        word_drop_probability: how likely the augmentation drops each word of a caption, 0 to 1.
    """

    def __init__(
        self,
        rows: datasets.IterableDataset,
        name: str,
        processor: ECCLProcessor,
        augment: bool = True,
        seed: int = 0,
        skip_bad_images: bool = False,
        word_drop_probability: float = WORD_DROP_PROBABILITY,
    ):
        self.rows, self.name, self.augment, self.seed = rows, name, augment, seed
        self.make_pixels = PixelMaker(processor, augment)
        self.skip_bad_images = skip_bad_images
        self.word_drop_probability = word_drop_probability

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rank, world_size = 0, 1
        if torch.distributed.is_initialized():
            rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        own = split_dataset_by_node(self.rows, rank, world_size)
        # Each open Parquet file takes memory.
        own = own.shuffle(seed=self.seed, buffer_size=SHUFFLE_BUFFER, max_buffer_input_shards=_OPEN_FILES)
        epoch, found = 0, True
        while found:
            # A worker without rows, for example one of more workers than files, ends.
            found, left_out = False, 0
            own.set_epoch(epoch)
            for row in own:
                try:
                    item = self._make_item(row, epoch)
                except ValueError as error:
                    if not self.skip_bad_images:
                        raise ValueError(f"{self.name}, {row['file_path']}: {error}") from error
                    left_out += 1
                    if epoch == 0 and left_out <= _NAMED:
                        _logger.warning(f"{self.name}, {row['file_path']}: left out, {error}")
                    continue
                found = True
                yield item
            if left_out and not found:
                raise ValueError(f"{self.name}: no image can be read, {left_out:,} are left out")
            if epoch == 0 and left_out > _NAMED:
                _logger.warning(f"{self.name}: {left_out:,} images are left out in the first pass")
            epoch += 1

    def _make_item(self, row: dict[str, Any], epoch: int) -> dict[str, Any]:
        captions, key = row["captions"], str(row["file_path"])
        start = _digest(key)
        seed = f"{self.seed}/{epoch}/{start}"
        rng = random.Random(seed)
        caption = captions[(start + epoch) % len(captions)]
        return {
            "pixel_values": self.make_pixels(row["image"], rng),
            "caption": drop_words(caption, rng, self.word_drop_probability) if self.augment else caption,
            "image_index": start,
            "person_label": _digest(f"person {row['person_id']}"),
            "file_path": key,
            "is_padding": False,
            "seed": seed,
        }


def _digest(text: str) -> int:
    """Returns a number of 63 bits: labels of a stream only have to tell its persons, and its images, apart."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:8]) >> 1


__all__ = ["SHUFFLE_BUFFER", "StreamedPairs"]
