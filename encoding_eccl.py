"""Encoding: images, captions or a whole split in, features out, over one or many processes."""

import os
from collections.abc import Sequence
from typing import NamedTuple

import datasets
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from .processing_eccl import ECCLProcessor


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
    dataset: datasets.Dataset,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: bool = True,
    across_processes: bool = False,
) -> torch.Tensor:
    """Encodes each image of a split once, with evaluation transforms.

    Args:
        model: an [`ECCLModel`], or peft's wrapping of one; put into evaluation mode while it works.
        dataset: anything with a length and items that have an `image`.
        across_processes: the processes of a launch share the work, and all get all; every one of them must call this.

    Returns:
        `(images, projection_dim)` on the CPU, float32, unnormalised.
    """
    batches = [range(start, min(start + batch_size, len(dataset))) for start in range(0, len(dataset), batch_size)]
    loader = DataLoader(
        _EvaluationImages(dataset, processor),
        batch_sampler=_own_batches(batches, across_processes),
        num_workers=num_workers,
        worker_init_fn=leave_process_group,
    )
    with _evaluating(model):
        features = [
            model.get_image_features(pixels.to(model.device)).float().cpu()
            for pixels in tqdm(loader, desc="encoding images", leave=False, disable=not progress)
        ]
    return torch.cat(_all_batches(features, len(batches), across_processes))


@torch.no_grad()
def embed_captions(
    model: nn.Module,
    processor: ECCLProcessor,
    captions: Sequence[str],
    batch_size: int = 256,
    progress: bool = True,
    across_processes: bool = False,
) -> torch.Tensor:
    """Encodes captions, those of like length together; `across_processes` as in [`embed_images`].

    Returns:
        `(captions, projection_dim)` in the order given, on the CPU, float32, unnormalised.
    """
    order = sorted(range(len(captions)), key=lambda index: len(captions[index]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    features = []
    with _evaluating(model):
        own = _own_batches(batches, across_processes)
        for batch in tqdm(own, desc="encoding captions", leave=False, disable=not progress):
            chosen = [captions[index] for index in batch]
            input_ids = processor(text=chosen, return_tensors="pt")["input_ids"].to(model.device)
            features.append(model.get_text_features(input_ids).float().cpu())
    features = torch.cat(_all_batches(features, len(batches), across_processes))
    result = torch.empty_like(features)
    result[torch.tensor(order)] = features
    return result


def _world(across_processes: bool) -> tuple[int, int]:
    """This process's rank and how many there are, where they share the work."""
    if not across_processes or not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _own_batches(batches: list[Sequence[int]], across_processes: bool) -> list[Sequence[int]]:
    """What this process encodes. Batches are the same for any number of processes, and so are their features."""
    rank, world_size = _world(across_processes)
    # As many for each process, where need be the last one again: a sharded model is gathered by all of them at once.
    filling = [batches[-1]] * (-len(batches) % world_size)
    return [*batches, *filling][rank::world_size]


def _all_batches(features: list[torch.Tensor], count: int, across_processes: bool) -> list[torch.Tensor]:
    """The features of all batches in order, of which each process has every n-th."""
    _, world_size = _world(across_processes)
    if world_size == 1:
        return features
    gathered: list = [None] * world_size
    torch.distributed.all_gather_object(gathered, features)
    return [gathered[index % world_size][index // world_size] for index in range(count)]


class SplitEmbeddings(NamedTuple):
    """A split encoded: every caption as a query, every image as the gallery; on the CPU, unnormalised.

    Args:
        text_embeds: `(captions, dim)`, in the order of the dataset.
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
    dataset: datasets.Dataset,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: bool = True,
    across_processes: bool = False,
) -> SplitEmbeddings:
    """Encodes each image and each caption of a split once; the arguments are those of [`embed_images`]."""
    captions = dataset["captions"]
    person_ids = torch.tensor(dataset["person_id"])
    return SplitEmbeddings(
        embed_captions(
            model,
            processor,
            [caption for own in captions for caption in own],
            progress=progress,
            across_processes=across_processes,
        ),
        person_ids.repeat_interleave(torch.tensor([len(own) for own in captions])),
        embed_images(model, processor, dataset, batch_size, num_workers, progress, across_processes),
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
