"""Draws a heat map that shows which parts of an image match a phrase of a sentence.

python -m eccl.eval.heat_map --model DIR --image person.jpg --sentence "a man in a red coat" --phrase "red coat" \\
    --output heat.png
"""

from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.command_line import CommandParser, add_shared_option, command, say, tell
from ..utils.files import complete_file, require_no_input, require_picture_path

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from ..modeling_eccl import ECCLModel
    from ..processing_eccl import ECCLProcessor

# Sizes of the sheet in pixels.
_HEIGHT, _GAP, _MIN_WIDTH = 480, 16, 420


def locate_phrase(sentence: str, phrase: str) -> tuple[str, int, int]:
    """Finds a phrase in a sentence; neither case nor spaces matter.

    Returns:
        The cleaned sentence, and the first character of the phrase in it and the first one after the phrase.

    Raises:
        ValueError: the phrase is empty, or is not in the sentence.
    """
    from ..processing_eccl import clean_caption

    clean_sentence, clean_phrase = (" ".join(clean_caption(text).split()) for text in (sentence, phrase))
    start = clean_sentence.find(clean_phrase) if clean_phrase else -1
    if start < 0:
        raise ValueError(f"the phrase {phrase!r} is not in the sentence {sentence!r}")
    return clean_sentence, start, start + len(clean_phrase)


def find_phrase(processor: "ECCLProcessor", sentence: str, phrase: str) -> tuple[list[int], list[int]]:
    """Finds the tokens of a phrase in its sentence.

    Returns:
        The token ids of the sentence, and the positions of the phrase's tokens among them.

    Raises:
        ValueError: as in [`locate_phrase`], or the phrase is cut off because the sentence is too long.
    """
    clean_sentence, start, stop = locate_phrase(sentence, phrase)
    encoded = processor.tokenizer(
        clean_sentence, truncation=True, max_length=processor.max_text_length, return_offsets_mapping=True
    )
    positions = [
        index
        for index, (first, last) in enumerate(encoded["offset_mapping"])
        if first < min(stop, last) and last > start
    ]
    if not positions:
        raise ValueError(
            f"the phrase {phrase!r} comes after the first {processor.max_text_length} tokens, which are all that the "
            "model reads: shorten the sentence"
        )
    return encoded["input_ids"], positions


def patch_scores(
    model: "ECCLModel", processor: "ECCLProcessor", image: "Image.Image", sentence: str, phrase: str
) -> "torch.Tensor":
    """Computes the cosine similarity of a phrase with each patch of an image.

    The phrase is the mean of its tokens' unit features. The features of tokens and patches are in the shared space,
    before pooling.

    Returns:
        `(rows, columns)` on the CPU, -1 to 1.

    Raises:
        ValueError: as in [`find_phrase`].
    """
    import torch

    from ..training.losses import unit_rows

    input_ids, positions = find_phrase(processor, sentence, phrase)
    with torch.no_grad():
        pixels = processor(images=image, return_tensors="pt")["pixel_values"].to(model.device)
        tokens = model.get_token_features(torch.tensor([input_ids], device=model.device))[0, positions]
        patches = model.get_patch_features(pixels)[0]
        return (unit_rows(patches) @ unit_rows(unit_rows(tokens).mean(dim=0))).cpu()


def draw_heat_map(image: "Image.Image", scores: "torch.Tensor", title: str) -> "Image.Image":
    """Draws an image twice: as it is, and under its scores, from blue (the lowest) to red (the highest).

    Args:
        image: any size and mode.
        scores: `(rows, columns)` of its patches.
        title: a text above both; the lowest and the highest score are added to it.
    """
    import numpy as np
    from PIL import Image, ImageDraw

    from ..processing_eccl import read_image
    from ..utils.lettering import set_text

    image = read_image(image)
    width = max(1, round(image.width * _HEIGHT / image.height))
    picture = image.resize((width, _HEIGHT))
    low, high = scores.min(), scores.max()
    level = ((scores - low) / (high - low).clamp(min=1e-12)).numpy()
    smooth = Image.fromarray((255 * level).astype(np.uint8)).resize((width, _HEIGHT), Image.Resampling.BICUBIC)
    level = np.asarray(smooth, dtype=np.float32)[..., None] / 255
    heat = level * np.array([255, 40, 0], np.float32) + (1 - level) * np.array([20, 40, 200], np.float32)
    mixed = Image.fromarray((0.45 * np.asarray(picture) + 0.55 * heat).astype(np.uint8))
    sheet_width = max(2 * width + 3 * _GAP, _MIN_WIDTH)
    heading = set_text(f"{title}  ({low:.2f} to {high:.2f})", sheet_width - 2 * _GAP, font_size=16)
    sheet = Image.new("RGB", (sheet_width, _HEIGHT + heading.height + 3 * _GAP), "white")
    heading.draw(ImageDraw.Draw(sheet), _GAP, _GAP)
    for index, part in enumerate((picture, mixed)):
        sheet.paste(part, (_GAP + index * (width + _GAP), heading.height + 2 * _GAP))
    return sheet


def make_parser() -> CommandParser:
    parser = CommandParser("python -m eccl.eval.heat_map", __doc__)
    add_shared_option(parser, "model")
    parser.add_argument("--image", required=True, help="picture of a person")
    parser.add_argument("--sentence", required=True, help="sentence that describes the person")
    parser.add_argument("--phrase", required=True, help="one or more words of the sentence, in the same order")
    add_shared_option(parser, "output", default="heat_map.png")
    return parser


@command
def main(arguments: list[str]) -> None:
    options = make_parser().parse_args(arguments)
    output, image_file = Path(options.output), Path(options.image)
    require_picture_path(output)
    require_no_input(output, {"--image": image_file, "--model": options.model}, "--output")
    if not image_file.is_file():
        raise FileNotFoundError(f"--image is {image_file}, but there is no such file")
    say(f"loading {options.model}")
    # Imported here, so that --help and a mistake in the arguments answer at once.
    from ..hub.loading import load_model
    from ..processing_eccl import read_image

    image = read_image(image_file)
    locate_phrase(options.sentence, options.phrase)
    model, processor = load_model(options.model)
    scores = patch_scores(model, processor, image, options.sentence, options.phrase)
    with complete_file(output) as unfinished:
        draw_heat_map(image, scores, options.phrase).save(unfinished)
    rows, columns = scores.shape
    row, column = divmod(int(scores.argmax()), columns)
    tell(f"best match for {options.phrase!r}: row {row}, column {column} of {rows} x {columns} patches, from 0")
    tell(f"written: {output}")


if __name__ == "__main__":
    main()
