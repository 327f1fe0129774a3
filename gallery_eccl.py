"""Searches a folder of person images with a sentence.

python -m eccl.gallery_eccl --model DIR --images FOLDER --query "a woman in a red coat" --output found.png
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftConfig
from PIL import Image, ImageDraw, ImageOps
from transformers import CLIPTokenizer, PreTrainedConfig
from transformers.utils.peft_utils import find_adapter_config_file

from .data_eccl import embed_captions, embed_images
from .lora_eccl import load_adapter, merge_lora
from .losses_eccl import unit_rows
from .modeling_eccl import ECCLModel
from .pipeline_eccl import IMAGE_SUFFIXES
from .processing_eccl import ECCLProcessor


@dataclass(frozen=True)
class Match:
    """One image found: its path and its cosine similarity with the sentence, -1 to 1."""

    path: Path
    score: float


class _ImageFiles(Sequence):
    def __init__(self, paths: list[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Image.Image]:
        try:
            with Image.open(self.paths[index]) as image:
                return {"image": ImageOps.exif_transpose(image).convert("RGB")}
        except OSError as error:
            raise ValueError(f"{self.paths[index]} cannot be read as an image: {error}") from error


class Gallery:
    """Images encoded once, searched with sentences.

    Args:
        model: encodes.
        processor: the model's.
        paths: the images.
        batch_size: images encoded at a time.

    Raises:
        ValueError: no images, or one that cannot be read; it is named.
    """

    def __init__(self, model: ECCLModel, processor: ECCLProcessor, paths: Sequence[Path], batch_size: int = 64):
        if not paths:
            raise ValueError("a gallery needs at least one image, found none")
        self.model, self.processor, self.paths = model, processor, list(paths)
        self.embeds = unit_rows(embed_images(model, processor, _ImageFiles(self.paths), batch_size))

    @classmethod
    def from_folder(cls, model: ECCLModel, processor: ECCLProcessor, folder: str | Path, **kwargs) -> "Gallery":
        """All images below a folder, in the order of their paths."""
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder")
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if not paths:
            raise ValueError(f"{folder} holds no image ({', '.join(IMAGE_SUFFIXES)})")
        return cls(model, processor, paths, **kwargs)

    def search(self, sentence: str, top_k: int = 10) -> list[Match]:
        """The `top_k` images that fit a sentence best, the best first; ties go to the earlier path."""
        if not sentence.strip():
            raise ValueError("the sentence is empty")
        query = unit_rows(embed_captions(self.model, self.processor, [sentence], progress=False))[0]
        scores = self.embeds @ query
        best = torch.sort(scores, descending=True, stable=True).indices[:top_k]
        return [Match(self.paths[index], float(scores[index])) for index in best.tolist()]


def draw_matches(
    rows: list[tuple[str, list[tuple[Path, bool | None]]]],
    height: int = 240,
    scores: list[list[float]] | None = None,
) -> Image.Image:
    """A picture of ranked results: a sentence, and under it its images from the best on.

    Args:
        rows: for each query its sentence and the images found, each with whether it is right (framed green), wrong
            (red), or unknown (no frame).
        height: of an image in the picture, in pixels.
        scores: for each query one number for each image, written below it.
    """
    width, gap, text_height, score_height = height // 3, 8, 52, 18 if scores else 0
    columns = max(len(found) for _, found in rows)
    row_height = height + text_height + score_height + gap
    sheet = Image.new("RGB", (gap + columns * (width + gap), len(rows) * row_height), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (sentence, found) in enumerate(rows):
        top = number * row_height
        _write(draw, sentence, (gap, top + 6), sheet.width - 2 * gap)
        for rank, (path, right) in enumerate(found):
            left = gap + rank * (width + gap)
            with Image.open(path) as image:
                sheet.paste(image.convert("RGB").resize((width, height)), (left, top + text_height))
            if right is not None:
                box = (left - 3, top + text_height - 3, left + width + 2, top + text_height + height + 2)
                draw.rectangle(box, outline=(20, 160, 60) if right else (210, 40, 40), width=4)
            if scores:
                draw.text((left, top + text_height + height + 4), f"{scores[number][rank]:.3f}", "black", font_size=13)
    return sheet


def _write(draw: ImageDraw.ImageDraw, text: str, position: tuple[int, int], width: int, size: int = 15) -> None:
    """Writes text over as many lines as it needs."""
    line, lines = "", []
    font_options = {"font_size": size, "fill": "black"}
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and draw.textlength(longer, font_size=size) > width:
            lines.append(line)
            longer = word
        line = longer
    draw.multiline_text(position, "\n".join([*lines, line]), **font_options)


def load_model(name: str, base: str | None = None) -> tuple[ECCLModel, ECCLProcessor]:
    """A model with its processor, in float32 and evaluation mode; on the GPU if there is one.

    This package's own classes read it: no code that came with the checkpoint runs.

    Args:
        name: folder or Hub id of a merged model, of an adapter, or of a plain CLIP, which gets person-shaped images.
        base: what an adapter was trained on, if it is not where the adapter says.
    """
    if find_adapter_config_file(name) is not None:
        model = merge_lora(load_adapter(name, base))
        tokenizer = CLIPTokenizer.from_pretrained(base or PeftConfig.from_pretrained(name).base_model_name_or_path)
        processor = ECCLProcessor.for_model(model.config, tokenizer)
    elif PreTrainedConfig.get_config_dict(name)[0].get("model_type") == "clip":
        model = ECCLModel.from_clip(name, num_prompt_tokens=0)
        processor = ECCLProcessor.for_model(model.config, CLIPTokenizer.from_pretrained(name))
    else:
        model = ECCLModel.from_pretrained(name, dtype=torch.float32)
        processor = ECCLProcessor.from_pretrained(name)
    if torch.cuda.is_available():
        model = model.cuda()
    return model.eval(), processor


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m eccl.gallery_eccl", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="folder or Hub id of a trained model")
    parser.add_argument("--images", required=True, help="folder with images, searched through all its subfolders")
    parser.add_argument("--query", required=True, help="a sentence")
    parser.add_argument("--top_k", type=int, default=10, help="how many images to find")
    parser.add_argument("--output", help="a PNG of what was found")
    options = parser.parse_args(arguments)
    try:
        gallery = Gallery.from_folder(*load_model(options.model), options.images)
        found = gallery.search(options.query, options.top_k)
    except ValueError as error:
        parser.error(str(error))
    print(f'"{options.query}" among {len(gallery.paths)} images:')
    for rank, match in enumerate(found, start=1):
        print(f"{rank:3}  {match.score:.3f}  {match.path}")
    if options.output:
        draw_matches([(options.query, [(match.path, None) for match in found])]).save(options.output)
        print(f"picture: {options.output}")


if __name__ == "__main__":
    main()
