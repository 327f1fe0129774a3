"""Which parts of an image a word or phrase of a sentence answers to, as a heat map.

python -m eccl.eval.heat_map --model DIR --image person.jpg --sentence "a man in a red coat" --phrase "red coat" \\
    --output heat.png
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..hub.loading import load_model
from ..modeling_eccl import ECCLModel
from ..processing_eccl import ECCLProcessor, clean_caption, read_image
from ..training.losses import unit_rows

_HEIGHT, _GAP, _TEXT_HEIGHT = 480, 16, 30


def find_phrase(processor: ECCLProcessor, sentence: str, phrase: str) -> tuple[list[int], list[int]]:
    """The token ids of a sentence, and the positions of the tokens that a phrase of it is made of.

    Raises:
        ValueError: the phrase is empty, or is not in the sentence, or is past the tokens that the model takes.
    """
    clean_sentence, clean_phrase = (" ".join(clean_caption(text).split()) for text in (sentence, phrase))
    start = clean_sentence.find(clean_phrase) if clean_phrase else -1
    if start < 0:
        raise ValueError(f"{phrase!r} is not in the sentence {sentence!r}")
    encoded = processor.tokenizer(
        clean_sentence, truncation=True, max_length=processor.max_text_length, return_offsets_mapping=True
    )
    stop = start + len(clean_phrase)
    places = [
        index
        for index, (first, last) in enumerate(encoded["offset_mapping"])
        if first < min(stop, last) and last > start
    ]
    if not places:
        raise ValueError(f"{phrase!r} is past the {processor.max_text_length} tokens that the model takes")
    return encoded["input_ids"], places


@torch.no_grad()
def patch_scores(
    model: ECCLModel, processor: ECCLProcessor, image: Image.Image, sentence: str, phrase: str
) -> torch.Tensor:
    """Cosine similarity of a phrase, the mean of its tokens' features, with each patch of an image.

    Both are taken before pooling, in the space that images and captions share.

    Returns:
        `(rows, columns)` on the CPU, -1 to 1.
    """
    input_ids, places = find_phrase(processor, sentence, phrase)
    pixels = processor(images=image, return_tensors="pt")["pixel_values"].to(model.device)
    tokens = model.get_token_features(torch.tensor([input_ids], device=model.device))[0, places]
    patches = model.get_patch_features(pixels)[0]
    return (unit_rows(patches) @ unit_rows(unit_rows(tokens).mean(dim=0))).cpu()


def draw_heat_map(image: Image.Image, scores: torch.Tensor, title: str) -> Image.Image:
    """The image, and beside it the image under its scores, from blue (its lowest) to red (its highest)."""
    width = max(1, round(image.width * _HEIGHT / image.height))
    picture = image.convert("RGB").resize((width, _HEIGHT))
    low, high = scores.min(), scores.max()
    level = ((scores - low) / (high - low).clamp(min=1e-12)).numpy()
    smooth = Image.fromarray((255 * level).astype(np.uint8)).resize((width, _HEIGHT), Image.Resampling.BICUBIC)
    level = np.asarray(smooth, dtype=np.float32)[..., None] / 255
    heat = level * np.array([255, 40, 0], np.float32) + (1 - level) * np.array([20, 40, 200], np.float32)
    mixed = Image.fromarray((0.45 * np.asarray(picture) + 0.55 * heat).astype(np.uint8))
    sheet_width = max(2 * width + 3 * _GAP, 420)
    sheet = Image.new("RGB", (sheet_width, _HEIGHT + _TEXT_HEIGHT + 2 * _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, _GAP // 2), f"{title}  ({low:.2f} to {high:.2f})", "black", font_size=16)
    for index, part in enumerate((picture, mixed)):
        sheet.paste(part, (_GAP + index * (width + _GAP), _TEXT_HEIGHT + _GAP))
    return sheet


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m eccl.eval.heat_map", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="folder or Hub id of a model")
    parser.add_argument("--image", required=True)
    parser.add_argument("--sentence", required=True)
    parser.add_argument("--phrase", required=True, help="words of the sentence, as they stand in it")
    parser.add_argument("--output", default="heat_map.png", help="the picture to write")
    options = parser.parse_args(arguments)
    try:
        image = read_image(options.image)
        scores = patch_scores(*load_model(options.model), image, options.sentence, options.phrase)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    draw_heat_map(image, scores, options.phrase).save(options.output)
    row, column = divmod(int(scores.argmax()), scores.shape[1])
    print(f"{options.phrase!r} answers most to row {row}, column {column} of {tuple(scores.shape)} patches")
    print(f"written: {Path(options.output)}")


if __name__ == "__main__":
    main()
