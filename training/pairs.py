"""Training pairs: the (image, caption) pairs of a split, and the collator that makes batches of them."""

import functools
import random
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from PIL import Image
from torch.utils.data import Dataset, default_collate

from ..processing_eccl import ECCLProcessor, read_image
from .augmentation import WORD_DROP_PROBABILITY, augment_image, drop_words, random_erase


class PairDraw(NamedTuple):
    """One draw of a pair by a sampler.

    Args:
        pair: index of the pair.
        draw: how often the pair was drawn before, over all epochs; each draw is augmented differently.
        is_padding: whether the item only fills the last batch up to its size; no loss counts it.
    """

    pair: int
    draw: int = 0
    is_padding: bool = False


class CaptionPairs(Dataset):
    """The (image, caption) pairs of a split: each caption gives one pair, and an image is stored once.

    The augmentation of an item depends only on the seed, the pair and the draw. It does not depend on which worker or
    process makes the item, nor on whether the run was resumed.

    Args:
        dataset: a split with the columns `image`, `person_id`, `captions` (a list of texts) and `file_path`.
        processor: gives the size of the images and the colour of erased rectangles.
        augment: apply the published augmentation; `False` applies the transforms of evaluation.
        seed: seed of the augmentation.
        word_drop_probability: how likely the augmentation drops each word of a caption, 0 to 1.

    Attributes:
        person_labels: `(images,)`: the person of each image as a label `0 .. num_persons - 1`, in the order of the
            annotation's person ids.
        captions_per_image: `(images,)`: number of captions.
        image_of_pair, caption_of_pair: `(pairs,)`: index of the image, and of the caption among that image's captions.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        processor: ECCLProcessor,
        augment: bool = True,
        seed: int = 0,
        word_drop_probability: float = WORD_DROP_PROBABILITY,
    ):
        self.dataset, self.augment, self.seed = dataset, augment, seed
        self.word_drop_probability = word_drop_probability
        self.make_pixels = PixelMaker(processor, augment)
        # As Arrow columns: a list of millions of rows would take minutes.
        columns = dataset.select_columns(["person_id", "captions"]).with_format("arrow")[:]
        persons, labels = np.unique(columns["person_id"].to_numpy(), return_inverse=True)
        self.num_persons = len(persons)
        self.person_labels = torch.from_numpy(labels)
        captions_per_image = pc.list_value_length(columns["captions"]).to_numpy()
        self.captions_per_image = torch.from_numpy(captions_per_image.astype(np.int64))
        self.image_of_pair = torch.arange(len(dataset)).repeat_interleave(self.captions_per_image)
        first_pair = self.captions_per_image.cumsum(0) - self.captions_per_image
        self.caption_of_pair = torch.arange(len(self.image_of_pair)) - first_pair[self.image_of_pair]

    def __len__(self) -> int:
        return len(self.image_of_pair)

    def __getitem__(self, drawn: int | PairDraw) -> dict[str, Any]:
        """Makes one item; the index of a pair alone means its first draw.

        A loss that adds something random to an item seeds it with the item's `seed`, a text that depends only on the
        seed, the pair and the draw.
        """
        drawn = drawn if isinstance(drawn, PairDraw) else PairDraw(int(drawn))
        image_index = int(self.image_of_pair[drawn.pair])
        record = self.dataset[image_index]
        caption = record["captions"][int(self.caption_of_pair[drawn.pair])]
        seed = f"{self.seed}/{drawn.draw}/{drawn.pair}"
        rng = random.Random(seed)
        return {
            "pixel_values": self.make_pixels(record["image"], rng),
            "caption": drop_words(caption, rng, self.word_drop_probability) if self.augment else caption,
            "image_index": image_index,
            "person_label": int(self.person_labels[image_index]),
            "file_path": None if drawn.is_padding else record["file_path"],
            "is_padding": drawn.is_padding,
            "seed": seed,
        }


class PixelMaker:
    """Makes the pixel values of training images.

    A pixel has one of 256 values. So the processor normalises each value of each channel once, and training looks the
    results up: the pixel values are exactly the processor's, and take a fifth of the time.

    Args:
        processor: gives the size, the mean and the deviation.
        augment: apply the published augmentation; `False` applies the transforms of evaluation.
    """

    def __init__(self, processor: ECCLProcessor, augment: bool):
        self.processor, self.augment = processor, augment

    @functools.cached_property
    def table(self) -> np.ndarray:
        """`(channels, 256)`: what the processor makes of each value."""
        every_value = Image.fromarray(np.arange(256, dtype=np.uint8)[:, None]).convert("RGB")
        normalised = self.processor.image_processor(
            every_value, do_resize=False, do_center_crop=False, return_tensors="np"
        )
        return normalised["pixel_values"][0, :, :, 0]

    def __call__(self, image: Any, rng: random.Random) -> torch.Tensor:
        """Makes the pixel values of an image, `(channels, height, width)`.

        Args:
            image: as `read_image` takes it.
            rng: gives the augmentation.
        """
        image_processor = self.processor.image_processor
        if not self.augment:
            return image_processor(read_image(image), return_tensors="pt")["pixel_values"][0]
        height, width = image_processor.size["height"], image_processor.size["width"]
        values = np.asarray(augment_image(image, height, width, rng))
        pixels = np.empty((len(self.table), height, width), self.table.dtype)
        for channel, results in enumerate(self.table):
            # Without a mode, numpy would fill a copy first, in case an index is out of range.
            np.take(results, values[..., channel], out=pixels[channel], mode="clip")
        return random_erase(torch.from_numpy(pixels), image_processor.image_mean, rng)


class PairCollator:
    """Makes a batch of the items of [`CaptionPairs`]; captions are padded to the longest caption of the batch.

    Returns:
        `pixel_values` `(batch, 3, height, width)`, `input_ids` and `attention_mask` `(batch, longest)`,
        `person_labels`, `image_indices` and `is_padding` `(batch,)`, and `file_paths`, a list. Any other tensor of the
        items (a loss may add some, see [`~eccl.training.objective.LossTerm.wrap_pairs`]) is stacked under its name.
    """

    def __init__(self, processor: ECCLProcessor):
        self.processor = processor

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        batch = dict(self.processor(text=[item["caption"] for item in items], return_tensors="pt"))
        batch["person_labels"] = torch.tensor([item["person_label"] for item in items])
        batch["image_indices"] = torch.tensor([item["image_index"] for item in items])
        batch["is_padding"] = torch.tensor([item["is_padding"] for item in items])
        batch["file_paths"] = [item["file_path"] for item in items]
        for name in (name for name, value in items[0].items() if isinstance(value, torch.Tensor)):
            # In a worker, this stacks in shared memory, so that the batch is not copied again on its way out.
            batch[name] = default_collate([item[name] for item in items])
        return batch


__all__ = ["CaptionPairs", "PairCollator", "PairDraw", "PixelMaker"]
