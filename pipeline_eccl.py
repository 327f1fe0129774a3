"""The text-to-person-retrieval pipeline: it indexes images once, then finds people by sentences."""

import itertools
import numbers
import types
from collections.abc import Iterable, Iterator, Sized
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import Pipeline
from transformers.utils import logging

from .modeling_eccl import ECCLModel
from .processing_eccl import ECCLProcessor, clean_caption, list_images, read_image

logger = logging.get_logger(__name__)


class TextToPersonRetrievalPipeline(Pipeline):
    """Searches indexed images by sentences.

    ```python
    search = pipeline("text-to-person-retrieval", model=FOLDER_OR_HUB_ID, trust_remote_code=True)
    search.index("photos/", batch_size=64)
    search("a woman in a red coat with a black backpack", top_k=3)
    # [{"score": 0.41, "index": 17, "path": "photos/0017.jpg"}, ...]
    ```

    Args:
        model, processor: an `ECCLModel` and its `ECCLProcessor`.
        top_k (`int`, defaults to 10): number of images that the pipeline finds for a sentence.
        **kwargs: the arguments of any pipeline: `device`, `dtype`, `batch_size`, ...

    Attributes:
        skipped: for each image that [`index`] has skipped, a line with its name and the reason.

    Raises:
        ValueError: the weights of the model are incomplete or not finite (the message names the tensors), or the
            processor does not fit the model.
    """

    model: ECCLModel
    processor: ECCLProcessor

    # The pipeline loads the processor, and no other preprocessing class; transformers declares these flags as `None`.
    _load_processor = True  # type: ignore[assignment]
    _load_image_processor = False  # type: ignore[assignment]
    _load_feature_extractor = False  # type: ignore[assignment]
    _load_tokenizer = False  # type: ignore[assignment]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # Otherwise the wrong images would be found, without a word.
        self.model.require_whole_weights()
        self.processor.require_fit(self.model.config)
        self.image_embeds: torch.Tensor | None = None
        self.paths: list[str | None] = []
        self.positions: list[int] = []
        self.skipped: list[str] = []

    @torch.no_grad()
    def index(
        self, images: Any, batch_size: int = 64, progress: bool = True, on_bad_image: str = "error"
    ) -> "TextToPersonRetrievalPipeline":
        """Encodes images, each one once. They replace the images that were indexed before.

        Args:
            images: a folder (all images in it and its subfolders, in the order of their paths); or images in a list, a
                tuple, a column of a `datasets.Dataset`, a generator or anything else that can be iterated. An image is
                a path, a PIL image, or what `datasets` gives with `Image(decode=False)`: a dict with `bytes` and
                `path`. Or a `datasets.Dataset` with such an `image` column; if it also has a `file_path` column, this
                column gives the paths.
            batch_size: number of images in a batch.
            progress: shows a progress bar.
            on_bad_image: `error`, or `skip` to leave unreadable images out. A warning counts them, and `skipped` lists
                them.

        Returns:
            The pipeline itself.

        Raises:
            ValueError: there are no images, or an image cannot be read. The message names the image.
        """
        _require_count("batch_size", batch_size)
        if on_bad_image not in ("error", "skip"):
            raise ValueError(f"on_bad_image is {on_bad_image!r}, it must be error or skip")
        images = open_images(images)
        embeds: list[torch.Tensor] = []
        indexed: list[tuple[int, str | None]] = []
        skipped: list[str] = []

        def read(bar: Iterable[Any]) -> Iterator[tuple[Image.Image, int, str | None]]:
            for position, image in enumerate(bar):
                try:
                    picture, path = _read_image(image, position)
                except ValueError as error:
                    if on_bad_image == "error":
                        raise
                    skipped.append(f"image {position}: {error}")
                else:
                    yield picture, position, path

        size = len(images) if isinstance(images, Sized) else None
        with logging.tqdm(images, total=size, desc="indexing images", leave=False, disable=not progress) as bar:
            readable = read(bar)
            while batch := list(itertools.islice(readable, batch_size)):
                pixels = self.processor(images=[picture for picture, *_ in batch], return_tensors="pt")["pixel_values"]
                features = self.model.get_image_features(
                    pixels.to(self.device, self.model.dtype), pooled_only=True, return_dict=True
                ).pooler_output
                embeds.append(nn.functional.normalize(features.float(), dim=-1).cpu())
                indexed += [(position, path) for _, position, path in batch]
        if skipped:
            logger.warning(f"{len(skipped)} unreadable images are left out, the first: {skipped[0]}")
        if not embeds:
            raise ValueError("there are no images to index" + (f": {len(skipped)} cannot be read" if skipped else ""))
        self.image_embeds, self.skipped = torch.cat(embeds), skipped
        self.positions, self.paths = [position for position, _ in indexed], [path for _, path in indexed]
        return self

    # transformers declares this method and the four hooks below with other parameters, in a form for every pipeline.

    def __call__(  # type: ignore[override]
        self, sentences: str | Iterable[str], **kwargs: Any
    ) -> Any:
        """Finds the images that fit a sentence best.

        Args:
            sentences: one sentence, or several in a list, a tuple, a column of a `datasets.Dataset`, a generator or
                anything else that can be iterated.
            top_k: number of images to find for each sentence; all images if fewer are indexed.
            batch_size: number of sentences in a batch.

        Returns:
            For each sentence a list of dicts, the best image first; images with equal scores keep the order of the
            index. A dict has `score` (cosine similarity, -1 to 1), `index` (position among the images given) and
            `path` (`None` for an image without a path). If `sentences` is one string, the result is its list alone; if
            there are no sentences, the result is empty. For a generator, as with any pipeline, the result is an
            iterator that reads a sentence when its result is wanted.

        Raises:
            ValueError: nothing is indexed, a sentence is empty, or `top_k` is less than 1.
        """
        self._indexed_embeds()
        lazy = isinstance(sentences, (types.GeneratorType, torch.utils.data.Dataset))
        if isinstance(sentences, Iterable) and not isinstance(sentences, str) and not lazy:
            sentences = list(sentences)
            if not sentences:
                return []
        return super().__call__(sentences, **kwargs)

    def save_pretrained(self, save_directory: str | PathLike[str], **kwargs: Any) -> None:
        """Writes the model and the whole processor; transformers would leave out the processor."""
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)

    def _indexed_embeds(self) -> torch.Tensor:
        """The normalised features of the indexed images, `(images, projection_dim)`, on the CPU.

        Raises:
            ValueError: nothing is indexed.
        """
        if self.image_embeds is None:
            raise ValueError("nothing is indexed yet: call index(images) first")
        return self.image_embeds

    def _sanitize_parameters(self, top_k: int | None = None) -> tuple[dict, dict, dict]:  # type: ignore[override]
        if top_k is not None:
            _require_count("top_k", top_k)
        return {}, {}, {} if top_k is None else {"top_k": top_k}

    def preprocess(self, sentence: str) -> dict[str, torch.Tensor]:  # type: ignore[override]
        if not isinstance(sentence, str) or not clean_caption(sentence).strip():
            raise ValueError(f"a query must be a sentence, not {sentence!r}")
        inputs = dict(self.processor(text=[sentence], return_tensors="pt"))
        limit = self.processor.max_text_length
        if inputs["input_ids"].shape[1] >= limit and (length := self.processor.count_tokens(sentence)) > limit:
            logger.warning(f"the query has {length} tokens, only the first {limit} are read: {sentence[:60]!r} ...")
        return inputs

    def _forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:  # type: ignore[override]
        features = self.model.get_text_features(inputs["input_ids"], pooled_only=True, return_dict=True).pooler_output
        return {"text_embeds": nn.functional.normalize(features.float(), dim=-1)}

    def postprocess(self, outputs: dict[str, torch.Tensor], top_k: int = 10) -> list[dict]:  # type: ignore[override]
        scores = self._indexed_embeds() @ outputs["text_embeds"][0]
        best = torch.sort(scores, descending=True, stable=True).indices[:top_k].tolist()
        return [{"score": scores[row].item(), "index": self.positions[row], "path": self.paths[row]} for row in best]


def _require_count(name: str, value: Any) -> None:
    if not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name} is {value!r}, it must be a whole number, at least 1")


def open_images(images: Any) -> Iterable[Any]:
    """Lists the images of a folder, and makes a data set, or a column of one, give its images undecoded.

    Raises:
        ValueError: `images` is neither a folder nor anything that can be iterated.
    """
    images = _leave_undecoded(list_images(images) if isinstance(images, (str, Path)) else images)
    if not isinstance(images, Iterable):
        raise ValueError(f"images is of type {type(images).__name__}, it must be a folder or a list of images")
    return images


def _leave_undecoded(images: Any) -> Any:
    """Makes a data set, or a column of one, give its images undecoded; anything else is returned as it is.

    A data set would decode them itself, and would not name a file that it cannot read.
    """
    is_column = hasattr(images, "column_name") and hasattr(images, "source")
    dataset, name = (images.source, images.column_name) if is_column else (images, "image")
    feature: Any = (dataset.features or {}).get(name) if hasattr(dataset, "cast_column") else None
    if not getattr(feature, "decode", False):
        return images
    dataset = dataset.cast_column(name, type(feature)(decode=False))
    return dataset[name] if is_column else dataset


def _read_image(image: Any, index: int) -> tuple[Image.Image, str | None]:
    """Reads one of the images to index as upright RGB, and finds its path."""
    path = None
    if isinstance(image, dict) and "image" in image:
        image, path = image["image"], image.get("file_path")
    if isinstance(image, dict):
        if not {"bytes", "path"} <= image.keys():
            raise ValueError(f"record {index} has no field 'image', it has only {', '.join(image)}")
        return read_image(image), path or image["path"]
    if isinstance(image, (str, Path)):
        path = path or str(image)
    elif not isinstance(image, Image.Image):
        raise ValueError(f"image {index} is of type {type(image).__name__}, it must be a path or a PIL image")
    return read_image(image), path or getattr(image, "filename", None) or None


__all__ = ["TextToPersonRetrievalPipeline", "open_images"]
