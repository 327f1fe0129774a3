"""Encodes images, captions or a whole split into features, in one process or in all processes of a launch."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar, cast

import datasets
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from .modeling_eccl import ECCLModel
from .processing_eccl import ECCLProcessor, read_image

Value = TypeVar("Value")
# The tokenizer also returns the place and the mask of each token: several kilobytes for a caption.
_TOKENISED_AT_A_TIME = 10_000


def leave_process_group(worker_id: int) -> None:
    """Moves a worker of a `DataLoader` to a new process group; pass it as `worker_init_fn`.

    A SIGTERM to the launcher's group then reaches only the training process, which stops its workers itself. A worker
    also ends when the training process has died.
    """
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)


class _EvaluationImages(Dataset):
    """The images of a data set as pixel values, `(channels, height, width)` each, with evaluation transforms."""

    def __init__(self, dataset: datasets.Dataset, processor: ECCLProcessor):
        if isinstance(dataset, datasets.Dataset):
            # It would decode the images itself, and would not name a file that it cannot read.
            dataset = dataset.cast_column("image", datasets.Image(decode=False))
        self.dataset, self.processor = dataset, processor

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> torch.Tensor:
        image = read_image(self.dataset[index]["image"])
        return self.processor.image_processor(image, return_tensors="pt")["pixel_values"][0]


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
    """Encodes each image of a data set once, with evaluation transforms.

    Args:
        model: an [`ECCLModel`], or the peft model that wraps one. It is in evaluation mode during the call.
        processor: the processor of the model.
        dataset: a data set, or any sequence of dicts, with the image under `"image"`.
        batch_size: number of images in a batch.
        num_workers: number of processes that read images; 0 reads them in this process.
        progress: shows a progress bar.
        across_processes: divides the batches among the processes of a launch; each process receives the features of
            all images. Every process must make the call.

    Returns:
        `(images, projection_dim)` in the order of the data set, on the CPU, float32, not normalised.

    Raises:
        ValueError: the data set is empty, or an image cannot be read.
    """
    if not len(dataset):
        raise ValueError("there are no images to encode: the data set is empty")
    indices = list(range(len(dataset)))
    batches = _split_into_batches(indices, batch_size)
    loader = DataLoader(
        _EvaluationImages(dataset, processor),
        batch_sampler=_batches_of_this_process(batches, across_processes),
        num_workers=num_workers,
        worker_init_fn=leave_process_group,
    )
    with _evaluation_mode(model) as encoder:
        features = [
            encoder.get_image_features(pixels.to(encoder.device), pooled_only=True, return_dict=True)
            .pooler_output.float()
            .cpu()
            for pixels in tqdm(loader, desc="encoding images", leave=False, disable=not progress)
        ]
    return torch.cat(_gather_batches(features, len(batches), across_processes))


@torch.no_grad()
def embed_captions(
    model: nn.Module,
    processor: ECCLProcessor,
    captions: Sequence[str],
    batch_size: int | None = None,
    progress: bool = True,
    across_processes: bool = False,
) -> torch.Tensor:
    """Encodes each caption once. A batch holds captions with almost the same number of tokens, which saves padding.

    Args:
        model, processor, progress, across_processes: see [`embed_images`].
        captions: the captions.
        batch_size: number of captions in a batch; by default 32 on a CPU, where a large batch takes longer, and 256
            elsewhere.

    Returns:
        `(captions, projection_dim)` in the order of `captions`, on the CPU, float32, not normalised.

    Raises:
        ValueError: there are no captions.
    """
    if not len(captions):
        raise ValueError("there are no captions to encode: the list is empty")
    tokens = _tokenise(processor, captions)
    order = sorted(range(len(tokens)), key=lambda index: len(tokens[index]))
    batch_features = []
    with _evaluation_mode(model) as encoder:
        # The C library keeps memory of up to 32 MiB for the next layer. It gets larger activations anew from the system
        # in each layer, which takes up to a fifth of the time.
        batch_size = batch_size or (32 if encoder.device.type == "cpu" else 256)
        batches = _split_into_batches(order, batch_size)
        local_batches = _batches_of_this_process(batches, across_processes)
        for batch in tqdm(local_batches, desc="encoding captions", leave=False, disable=not progress):
            input_ids = pad_sequence(
                [tokens[index] for index in batch], batch_first=True, padding_value=processor.tokenizer.pad_token_id
            ).to(encoder.device, torch.long)
            features = encoder.get_text_features(input_ids, pooled_only=True, return_dict=True).pooler_output
            batch_features.append(features.float().cpu())
    by_length = torch.cat(_gather_batches(batch_features, len(batches), across_processes))
    features = torch.empty_like(by_length)
    features[torch.tensor(order)] = by_length
    return features


def _tokenise(processor: ECCLProcessor, captions: Sequence[str]) -> list[torch.Tensor]:
    """Returns the token ids of each caption, `(tokens,)` each; as 32-bit numbers, to keep those of millions."""
    tokens: list[torch.Tensor] = []
    for start in range(0, len(captions), _TOKENISED_AT_A_TIME):
        some = list(captions[start : start + _TOKENISED_AT_A_TIME])
        tokens += [torch.tensor(ids, dtype=torch.int32) for ids in processor(text=some, padding=False)["input_ids"]]
    return tokens


def _split_into_batches(indices: list[int], batch_size: int) -> list[list[int]]:
    return [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]


def rank_and_world_size() -> tuple[int, int]:
    """Returns the rank of this process and the number of processes of the launch; outside a launch 0 and 1."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def gather_objects(value: Value) -> list[Value]:
    """Gives every process of a launch the values of all, in the order of their ranks. Every process must call it."""
    _, world_size = rank_and_world_size()
    return [value] if world_size == 1 else _all_gather(value, world_size)


def _all_gather(value: Value, world_size: int) -> list[Value]:
    gathered = [value] * world_size
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def _rank_and_world_size(across_processes: bool) -> tuple[int, int]:
    """The rank of this process and the number of processes that divide the work."""
    return rank_and_world_size() if across_processes else (0, 1)


def _batches_of_this_process(batches: list[list[int]], across_processes: bool) -> list[list[int]]:
    """The batches that this process encodes: every n-th of the list, for n processes.

    The batches themselves do not depend on the number of processes, and so the features do not depend on it either.
    """
    rank, world_size = _rank_and_world_size(across_processes)
    # Each process gets the same number of batches, if necessary with copies of the last one: all processes must take
    # part each time that the weights of a sharded model are gathered.
    filling = [batches[-1]] * (-len(batches) % world_size)
    return [*batches, *filling][rank::world_size]


def _gather_batches(features: list[torch.Tensor], num_batches: int, across_processes: bool) -> list[torch.Tensor]:
    """The features of all batches in their order, gathered from all processes; undoes `_batches_of_this_process`."""
    _, world_size = _rank_and_world_size(across_processes)
    if world_size == 1:
        return features
    gathered = _all_gather(features, world_size)
    return [gathered[index % world_size][index // world_size] for index in range(num_batches)]


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[ECCLModel]:
    """Puts a model into evaluation mode; at the end, also after an error, it returns to the mode that it had."""
    was_training = model.training
    model.eval()
    try:
        # A peft model is no ECCLModel, but passes attributes and calls on to the ECCLModel that it wraps.
        yield cast(ECCLModel, model)
    finally:
        model.train(was_training)


class SplitEmbeddings(NamedTuple):
    """The features of a split: each caption is a query, each image is in the gallery. On the CPU, not normalised.

    Args:
        text_embeds: `(captions, dim)`, in the order of the data set.
        query_person_ids: `(captions,)`.
        image_embeds: `(images, dim)`, in the order of the data set.
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
    """Encodes each image and each caption of a split once.

    Args:
        model, processor, batch_size, num_workers, progress, across_processes: see [`embed_images`].
        dataset: a split with the columns `image`, `captions` (a list of strings for each image) and `person_id`.

    Raises:
        ValueError: the split is empty, or an image cannot be read.
    """
    captions_of_images = dataset["captions"]
    person_ids = torch.tensor(dataset["person_id"])
    captions = [caption for captions_of_image in captions_of_images for caption in captions_of_image]
    captions_per_image = torch.tensor([len(captions_of_image) for captions_of_image in captions_of_images])
    return SplitEmbeddings(
        text_embeds=embed_captions(model, processor, captions, progress=progress, across_processes=across_processes),
        query_person_ids=person_ids.repeat_interleave(captions_per_image),
        image_embeds=embed_images(model, processor, dataset, batch_size, num_workers, progress, across_processes),
        gallery_person_ids=person_ids,
    )
