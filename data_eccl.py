"""From rows of a benchmark to batches: caption pairs, augmentation, the collator, the sampler, and plain encoding."""

import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm
from transformers import CLIPTokenizer

from .processing_eccl import ECCLProcessor

# The published run pads by 10 pixels where images are 384 high; other sizes pad in proportion.
_PADDING_SHARE = 10 / 384
_FLIP_PROBABILITY = 0.5
_ERASE_PROBABILITY = 0.5
_ERASE_AREA = (0.02, 0.4)
_ERASE_RATIO = (0.3, 3.3)
_DROP_WORD_PROBABILITY = 0.1

# The index of what fills the last batch where several processes need batches of one size; no loss counts it.
PADDING = -1

_CLIP_TOKENIZER = Path(__file__).parent / "assets" / "clip-tokenizer"


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's own tokenizer, which ships with this package."""
    return CLIPTokenizer.from_pretrained(_CLIP_TOKENIZER)


def augment_image(image: Image.Image, height: int, width: int, rng: random.Random) -> Image.Image:
    """Resizes to `height` x `width` (Pillow bilinear), flips, pads with black and crops at random.

    Args:
        image: any size, any mode.
        height, width: of the result, in pixels.
        rng: the only source of chance.

    Returns:
        An RGB image.
    """
    image = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    if rng.random() < _FLIP_PROBABILITY:
        image = ImageOps.mirror(image)
    padding = round(height * _PADDING_SHARE)
    left, top = rng.randint(0, 2 * padding), rng.randint(0, 2 * padding)
    return ImageOps.expand(image, padding).crop((left, top, left + width, top + height))


def random_erase(pixels: torch.Tensor, fill: Sequence[float], rng: random.Random) -> torch.Tensor:
    """Overwrites a random rectangle of a normalised image (Random Erasing, AAAI 2020).

    Args:
        pixels: `(channels, height, width)`, changed in place.
        fill: a value for each channel.
        rng: the only source of chance: whether (p 0.5), the area (0.02 to 0.4 of the image), the ratio height / width
            (0.3 to 3.3) and the place.

    Returns:
        `pixels`.
    """
    if rng.random() >= _ERASE_PROBABILITY:
        return pixels
    height, width = pixels.shape[-2:]
    # A rectangle that does not fit is drawn anew, a hundred times at the most, as in the published augmentation.
    for _ in range(100):
        area, ratio = rng.uniform(*_ERASE_AREA) * height * width, rng.uniform(*_ERASE_RATIO)
        erased_height, erased_width = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if erased_height < height and erased_width < width:
            top, left = rng.randint(0, height - erased_height), rng.randint(0, width - erased_width)
            pixels[:, top : top + erased_height, left : left + erased_width] = torch.tensor(fill)[:, None, None]
            break
    return pixels


def drop_words(caption: str, rng: random.Random) -> str:
    """Drops each word with probability 0.1; a caption never loses all of them."""
    words = caption.split()
    return " ".join(word for word in words if rng.random() >= _DROP_WORD_PROBABILITY) or caption


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


class PairSampler(Sampler[int]):
    """All pairs in a random order, drawn by seed and epoch alone: the same on every rank and after a resume.

    Args:
        num_pairs: `len` of the [`CaptionPairs`].
        seed: of the order.
        multiple_of: [`PADDING`] at the end fills the epoch up to a multiple of it.
    """

    def __init__(self, num_pairs: int, seed: int = 0, multiple_of: int = 1):
        self.num_pairs, self.seed, self.multiple_of, self.epoch = num_pairs, seed, multiple_of, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.num_pairs // self.multiple_of) * self.multiple_of

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.num_pairs, generator=generator) + self.epoch * self.num_pairs
        return iter(order.tolist() + [PADDING] * (len(self) - self.num_pairs))


class IdentitySampler(Sampler[int]):
    """Batches of N persons with K pairs each, drawn by seed and epoch alone: the same on every rank and after a resume.

    Every person comes up equally often, all of them before one comes again, and no batch has a person twice. A person
    goes through its own pairs in a random order before one is repeated; one with fewer than K pairs repeats them within
    the batch, differently augmented. Indices are those of [`CaptionPairs`].

    Args:
        person_labels: `(pairs,)`: the person of each pair, labels `0 .. persons - 1`.
        persons_per_batch: N, of the batch over all processes; no more than there are persons.
        pairs_per_person: K.
        seed: of the order.

    Raises:
        ValueError: N or K out of range.
    """

    def __init__(self, person_labels: torch.Tensor, persons_per_batch: int, pairs_per_person: int, seed: int = 0):
        counts = torch.bincount(person_labels)
        if not 1 <= persons_per_batch <= len(counts):
            raise ValueError(
                f"persons_per_batch is {persons_per_batch}, it must be between 1 and the {len(counts)} persons"
            )
        if pairs_per_person < 1:
            raise ValueError(f"pairs_per_person is {pairs_per_person}, it must be at least 1")
        self.persons_per_batch, self.pairs_per_person, self.seed, self.epoch = (
            persons_per_batch,
            pairs_per_person,
            seed,
            0,
        )
        self.pairs_of_person = person_labels.argsort(stable=True).split(counts.tolist())
        self.num_pairs = len(person_labels)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        """As many whole batches as it takes to draw no fewer items than there are pairs."""
        batch_size = self.persons_per_batch * self.pairs_per_person
        return -(-self.num_pairs // batch_size) * batch_size

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self.seed}/{self.epoch}")
        waiting: list[int] = []
        stacks: list[list[int]] = [[] for _ in self.pairs_of_person]
        times_drawn = [0] * self.num_pairs
        for _ in range(len(self) // (self.persons_per_batch * self.pairs_per_person)):
            batch: list[int] = []
            while len(batch) < self.persons_per_batch:
                if not waiting:
                    waiting = rng.sample(range(len(stacks)), len(stacks))
                    # Who is in this batch already waits longest: persons are taken from the end.
                    waiting.sort(key=lambda person: person not in batch)
                batch.append(waiting.pop())
            for person in batch:
                stack, own = stacks[person], self.pairs_of_person[person].tolist()
                in_batch: Counter[int] = Counter()
                for _ in range(self.pairs_per_person):
                    if not stack:
                        # What this batch has already comes last.
                        stack.extend(sorted(rng.sample(own, len(own)), key=lambda pair: -in_batch[pair]))
                    pair = stack.pop()
                    # Each draw of a pair, in this epoch or another, is augmented by chance of its own.
                    yield (self.epoch * len(self) + times_drawn[pair]) * self.num_pairs + pair
                    times_drawn[pair] += 1
                    in_batch[pair] += 1


def leave_process_group(worker_id: int) -> None:
    """For workers of a `DataLoader`: SIGTERM to a group of processes is for the one that they work for to answer.

    They end when it asks them to, or is gone.
    """
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)


class _EvaluationImages(Dataset):
    def __init__(self, rows: datasets.Dataset, processor: ECCLProcessor):
        self.rows, self.processor = rows, processor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.processor.image_processor(self.rows[index]["image"], return_tensors="pt")["pixel_values"][0]


@torch.no_grad()
def embed_images(
    model: nn.Module,
    processor: ECCLProcessor,
    rows: datasets.Dataset,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: bool = True,
    share: bool = False,
) -> torch.Tensor:
    """Encodes each image of a split once, with evaluation transforms.

    Args:
        model: an [`ECCLModel`], or peft's wrapping of one; put into evaluation mode while it works.
        rows: anything with a length and rows that have an `image`.
        share: the processes of a launch share the work, and all get all; every one of them must call this.

    Returns:
        `(rows, projection_dim)` on the CPU, float32, unnormalised.
    """
    batches = [range(start, min(start + batch_size, len(rows))) for start in range(0, len(rows), batch_size)]
    loader = DataLoader(
        _EvaluationImages(rows, processor),
        batch_sampler=_own_batches(batches, share),
        num_workers=num_workers,
        worker_init_fn=leave_process_group,
    )
    with _evaluating(model):
        features = [
            model.get_image_features(pixels.to(model.device)).float().cpu()
            for pixels in tqdm(loader, desc="encoding images", leave=False, disable=not progress)
        ]
    return torch.cat(_all_batches(features, len(batches), share))


@torch.no_grad()
def embed_captions(
    model: nn.Module,
    processor: ECCLProcessor,
    captions: Sequence[str],
    batch_size: int = 256,
    progress: bool = True,
    share: bool = False,
) -> torch.Tensor:
    """Encodes captions, those of like length together; `share` as in [`embed_images`].

    Returns:
        `(captions, projection_dim)` in the order given, on the CPU, float32, unnormalised.
    """
    order = sorted(range(len(captions)), key=lambda index: len(captions[index]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    features = []
    with _evaluating(model):
        own = _own_batches(batches, share)
        for batch in tqdm(own, desc="encoding captions", leave=False, disable=not progress):
            chosen = [captions[index] for index in batch]
            input_ids = processor(text=chosen, return_tensors="pt")["input_ids"].to(model.device)
            features.append(model.get_text_features(input_ids).float().cpu())
    features = torch.cat(_all_batches(features, len(batches), share))
    result = torch.empty_like(features)
    result[torch.tensor(order)] = features
    return result


def _world(share: bool) -> tuple[int, int]:
    """This process's rank and how many there are, where they share the work."""
    if not share or not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _own_batches(batches: list[Sequence[int]], share: bool) -> list[Sequence[int]]:
    """What this process encodes. Batches are the same for any number of processes, and so are their features."""
    rank, world_size = _world(share)
    # As many for each process, where need be the last one again: a sharded model is gathered by all of them at once.
    filling = [batches[-1]] * (-len(batches) % world_size)
    return [*batches, *filling][rank::world_size]


def _all_batches(features: list[torch.Tensor], count: int, share: bool) -> list[torch.Tensor]:
    """The features of all batches in order, of which each process has every n-th."""
    _, world_size = _world(share)
    if world_size == 1:
        return features
    gathered: list = [None] * world_size
    torch.distributed.all_gather_object(gathered, features)
    return [gathered[index % world_size][index // world_size] for index in range(count)]


class SplitEmbeddings(NamedTuple):
    """A split encoded: every caption as a query, every image as the gallery; on the CPU, unnormalised.

    Args:
        text_embeds: `(captions, dim)`, in the order of the rows.
        query_person_ids: `(captions,)`.
        image_embeds: `(images, dim)`.
        gallery_person_ids: `(images,)`.
    """

    text_embeds: torch.Tensor
    query_person_ids: torch.Tensor
    image_embeds: torch.Tensor
    gallery_person_ids: torch.Tensor


def embed_split(
    model: nn.Module,
    processor: ECCLProcessor,
    rows: datasets.Dataset,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: bool = True,
    share: bool = False,
) -> SplitEmbeddings:
    """Encodes each image and each caption of a split once; the arguments are those of [`embed_images`]."""
    captions = rows["captions"]
    person_ids = torch.tensor(rows["person_id"])
    return SplitEmbeddings(
        embed_captions(
            model, processor, [caption for own in captions for caption in own], progress=progress, share=share
        ),
        person_ids.repeat_interleave(torch.tensor([len(own) for own in captions])),
        embed_images(model, processor, rows, batch_size, num_workers, progress, share),
        person_ids,
    )


class _evaluating:
    """Evaluation mode for a while: what was training before goes on training."""

    def __init__(self, model: nn.Module):
        self.model, self.was_training = model, model.training

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *exception) -> None:
        self.model.train(self.was_training)
