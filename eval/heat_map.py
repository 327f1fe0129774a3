"""Draws a heat map that shows which parts of an image match a phrase of a sentence.

python -m eccl.eval.heat_map --model DIR --image person.jpg --sentence "a man in a red coat" --phrase "red coat" \\
    --output heat.png
"""

import re
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
# "t-shirt" is one word.
_PUNCTUATION = re.compile(r"[^\w-]")


def locate_phrase(sentence: str, phrase: str) -> tuple[str, int, int]:
    """Finds a phrase in a sentence; neither case nor spaces matter.

    It finds whole words first: "man" is not found in "woman" if the sentence also has the word "man".

    Returns:
        The cleaned sentence, and the first character of the phrase in it and the first one after the phrase.

    Raises:
        ValueError: the phrase is empty, or is not in the sentence.
    """
    from ..processing_eccl import clean_caption

    clean_sentence, clean_phrase = (" ".join(clean_caption(text).split()) for text in (sentence, phrase))
    # Spaces around both let `find` see whole words only.
    words_of_sentence, words_of_phrase = (f" {_PUNCTUATION.sub(' ', text)} " for text in (clean_sentence, clean_phrase))
    start = words_of_sentence.find(words_of_phrase)
    if start < 0 or not clean_sentence.startswith(clean_phrase, start):
        start = clean_sentence.find(clean_phrase)
    if start < 0 or not clean_phrase:
        raise ValueError(f"the phrase {phrase!r} is not in the sentence {sentence!r}")
    return clean_sentence, start, start + len(clean_phrase)


def patch_scores(
    model: "ECCLModel", processor: "ECCLProcessor", image: "Image.Image", sentence: str, phrase: str
) -> "torch.Tensor":
    """Computes how much each patch of an image makes the image fit a phrase of a sentence.

    The scores are the sum of the maps of the phrase's words, see [`~eccl.search.explanation.explain`]. A part of a word
    gives the map of the word.

    Returns:
        `(rows, columns)` on the CPU. 0: the patch does not matter; below 0: it makes the image fit worse. 1 is the
        largest absolute value that a single word of the sentence has, so the sum can lie outside -1 to 1.

    Raises:
        ValueError: as in [`locate_phrase`], or the sentence has more tokens than the model reads.
    """
    import torch

    from ..search.explanation import explain

    clean_sentence, start, stop = locate_phrase(sentence, phrase)
    first, last = (clean_sentence.count(" ", 0, end) for end in (start, stop))
    return torch.from_numpy(explain(model, processor, image, sentence).of(range(first, last + 1)))


def draw_heat_map(image: "Image.Image", scores: "torch.Tensor", title: str) -> "Image.Image":
    """Draws an image twice: as it is, and under its scores, orange above 0 and blue below 0.

    Args:
        image: any size and mode.
        scores: `(rows, columns)` of its patches; values beyond -1 and 1 are drawn like -1 and 1.
        title: a text above both; the lowest and the highest score are added to it.
    """
    from PIL import Image, ImageDraw

    from ..processing_eccl import read_image
    from ..search.explanation import draw_explanation
    from ..utils.lettering import set_text

    image = read_image(image)
    explained = draw_explanation(image, scores.numpy(), _HEIGHT)
    picture, width = image.resize(explained.size), explained.width
    sheet_width = max(2 * width + 3 * _GAP, _MIN_WIDTH)
    heading = set_text(f"{title}  ({scores.min():.2f} to {scores.max():.2f})", sheet_width - 2 * _GAP, font_size=16)
    sheet = Image.new("RGB", (sheet_width, _HEIGHT + heading.height + 3 * _GAP), "white")
    heading.draw(ImageDraw.Draw(sheet), _GAP, _GAP)
    for index, part in enumerate((picture, explained)):
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
