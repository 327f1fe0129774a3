"""The text-to-person-retrieval pipeline: index images once, then find people with sentences."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from transformers import Pipeline
from transformers.utils import logging

from .processing_eccl import list_images, read_image


class TextToPersonRetrievalPipeline(Pipeline):
    """Searches indexed images with sentences.

    ```python
    search = pipeline("text-to-person-retrieval", model=FOLDER_OR_HUB_ID, trust_remote_code=True)
    search.index("photos/", batch_size=64)
    search("a woman in a red coat with a black backpack", top_k=3)
    # [{"score": 0.41, "index": 17, "path": "photos/0017.jpg"}, ...]
    ```

    Args:
        model, processor: an `ECCLModel` and its `ECCLProcessor`.
        top_k (`int`, defaults to 10): how many images a sentence finds.
        **kwargs: as any pipeline takes them: `device`, `dtype`, `batch_size`, ...
    """

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.image_embeds: torch.Tensor | None = None
        self.paths: list[str | None] = []

    @torch.no_grad()
    def index(self, images, batch_size: int = 64, progress: bool = True) -> "TextToPersonRetrievalPipeline":
        """Encodes images, each once, in place of those that were indexed before.

        Args:
            images: a folder (all images below it, in the order of their paths), a list of paths or PIL images, or a
                `datasets.Dataset` with an `image` column; its `file_path`, if it has one, becomes the path.
            batch_size: images encoded at a time.
            progress: shows a bar.

        Returns:
            The pipeline itself.

        Raises:
            ValueError: no images, or one that cannot be read; it is named.
        """
        if isinstance(images, (str, Path)):
            images = list_images(images)
        if not len(images):
            raise ValueError("there are no images to index")
        embeds, paths = [], []
        starts = range(0, len(images), batch_size)
        for start in logging.tqdm(starts, desc="indexing images", leave=False, disable=not progress):
            batch = list(_read(images, range(start, min(start + batch_size, len(images)))))
            pixels = self.processor(images=[image for image, _ in batch], return_tensors="pt")["pixel_values"]
            features = self.model.get_image_features(pixels.to(self.device, self.model.dtype))
            embeds.append(nn.functional.normalize(features.float(), dim=-1).cpu())
            paths += [path for _, path in batch]
        self.image_embeds, self.paths = torch.cat(embeds), paths
        return self

    def __call__(self, sentences: str | Iterable[str], **kwargs) -> list[dict] | list[list[dict]]:
        """Finds images.

        Args:
            sentences: one, or several.
            top_k: how many images each finds; all where there are fewer.
            batch_size: sentences encoded at a time.

        Returns:
            For each sentence a list of dicts, the best first, ties in the order of the index: `score` (cosine, -1 to
            1), `index` (of the image, in the order indexed) and `path` (`None` for an image without one). For one
            sentence its list alone.

        Raises:
            ValueError: nothing is indexed, or a sentence is empty.
        """
        if self.image_embeds is None:
            raise ValueError("nothing is indexed yet: call index(images) first")
        return super().__call__(sentences, **kwargs)

    def _sanitize_parameters(self, top_k: int | None = None) -> tuple[dict, dict, dict]:
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k is {top_k}, it must be at least 1")
        return {}, {}, {} if top_k is None else {"top_k": top_k}

    def preprocess(self, sentence: str) -> dict[str, torch.Tensor]:
        if not isinstance(sentence, str) or not sentence.strip():
            raise ValueError(f"a query is a sentence, not {sentence!r}")
        return dict(self.processor(text=[sentence], return_tensors="pt"))

    def _forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        features = self.model.get_text_features(inputs["input_ids"])
        return {"text_embeds": nn.functional.normalize(features.float(), dim=-1)}

    def postprocess(self, outputs: dict[str, torch.Tensor], top_k: int = 10) -> list[dict]:
        scores = self.image_embeds @ outputs["text_embeds"][0]
        best = torch.sort(scores, descending=True, stable=True).indices[:top_k].tolist()
        return [{"score": scores[index].item(), "index": index, "path": self.paths[index]} for index in best]


def _read(images, indices: Iterable[int]) -> Iterator[tuple[Image.Image, str | None]]:
    """Images as RGB, upright by their EXIF tag where they are files, with their paths."""
    for index in indices:
        entry, path = images[index], None
        if isinstance(entry, dict):
            if "image" not in entry:
                raise ValueError(f"row {index} has no image, only {', '.join(entry)}")
            entry, path = entry["image"], entry.get("file_path")
        if isinstance(entry, (str, Path)):
            path = str(entry)
        elif not isinstance(entry, Image.Image):
            raise ValueError(f"image {index} is a {type(entry).__name__}, it must be a path or a PIL image")
        yield read_image(entry), path or getattr(entry, "filename", None) or None


__all__ = ["TextToPersonRetrievalPipeline"]
