"""Measures whether the map of a phrase shows the part of the picture that the phrase describes.

python -m eccl.eval.benchmarks.explanation --model DIR

It draws persons of the synthetic benchmark, of both domains in turn, with one caption each. A part of a person is where
the picture changes when this part alone gets another colour. Its phrase is the name of the part in the caption, with
the colour, pattern or style in front of it; a part is left out if the caption calls it by another name.
"""

import random
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ...utils.command_line import CommandParser, add_shared_option, at_least, command, say, tell

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from ...dataset_scripts.synthetic.people import Person
    from ...modeling_eccl import ECCLModel
    from ...processing_eccl import ECCLProcessor

# For each part, its colours in an `Appearance`.
PARTS = {
    "hair": ("hair",),
    "hat": ("hat",),
    "upper": ("upper", "upper_accent"),
    "lower": ("lower", "lower_accent"),
    "shoes": ("shoes",),
    "bag": ("bag",),
}
# A patch shows a part if it covers at least this share of the patch.
_COVERED = 0.1
# How much a pixel changes from black to white, 0 to 255: less is a shadow or the noise of the camera.
_CHANGED = 60
# The shares of the patches that are blurred for "deletion".
_DELETED = (1 / 24, 1 / 12, 1 / 6, 1 / 4)


class Part(NamedTuple):
    """A part of a person: its phrase, the place of the phrase in the text, and `(rows, columns)` bool: its patches."""

    name: str
    phrase: str
    start: int
    stop: int
    region: "np.ndarray"


class Sample(NamedTuple):
    """A picture, its cleaned caption, and the parts that the caption names."""

    image: "Image.Image"
    text: str
    parts: list[Part]


class Result(NamedTuple):
    """The figures of one map.

    Attributes:
        name: the part.
        hit: whether the best patch of the map lies in the region ("pointing game").
        inside: the share of the map's positive scores that lies in the region ("mass inside").
        drop: the loss of cosine similarity with the phrase when the best patches are blurred ("deletion").
    """

    name: str
    hit: bool
    inside: float
    drop: float


Method = Callable[["ECCLModel", "ECCLProcessor", Sample], list["np.ndarray"]]
"""Computes a map, `(rows, columns)`, for each part of a sample."""


def find_phrase(person: "Person", name: str, text: str) -> tuple[int, int] | None:
    """Finds a part of a person in a caption; returns the first character and the one after the last."""
    noun, before = person[name], [person[f"{name}_colour"], person.get(f"{name}_pattern")]
    if noun in ("short", "long"):
        noun, before = "hair", [noun, *before]
    optional = "".join(f"(?:{word} )?" for word in before if word)
    found = re.search(rf"(?<![\w-]){optional}{noun}(?![\w-])", text)
    return found.span() if found else None


def draw_sample(number: int, seed: int, grid_size: tuple[int, int]) -> Sample:
    """Draws a person, a caption, and the true regions of the parts on a grid of `(rows, columns)` patches."""
    import numpy as np
    from PIL import Image

    from ...dataset_scripts.synthetic.appearance import sample_appearance
    from ...dataset_scripts.synthetic.captions import DOMAINS, make_caption
    from ...dataset_scripts.synthetic.drawing import draw_person
    from ...dataset_scripts.synthetic.people import sample_person
    from ...processing_eccl import clean_caption

    rng, domain = random.Random(f"explanation/{seed}/{number}"), DOMAINS[number % len(DOMAINS)]
    person = sample_person(rng)
    look = sample_appearance(person, domain, rng)
    text = " ".join(clean_caption(make_caption(person, domain, rng)[0]).split())
    state = rng.getstate()

    def photograph(**colours: Any) -> Image.Image:
        rng.setstate(state)
        return draw_person(person, replace(look, **colours), domain, rng)

    parts = []
    for name, colours in PARTS.items():
        span = None if person[name] == "none" else find_phrase(person, name, text)
        if span is None:
            continue
        dark, light = (
            np.asarray(photograph(**dict.fromkeys(colours, 3 * (value,))), dtype=np.float32) for value in (0, 255)
        )
        changed = Image.fromarray((np.abs(light - dark).max(axis=-1) > _CHANGED).astype(np.float32))
        region = np.asarray(changed.resize(grid_size[::-1], Image.Resampling.BOX)) >= _COVERED
        if region.any():
            parts.append(Part(name, text[slice(*span)], *span, region))
    return Sample(photograph(), text, parts)


def score_randomly(model: "ECCLModel", processor: "ECCLProcessor", sample: Sample) -> list["np.ndarray"]:
    """Gives every patch a random score."""
    import numpy as np

    generator = np.random.default_rng(list(sample.text.encode()))
    return [generator.random(model.config.grid_size) for _ in sample.parts]


def compare_patches(model: "ECCLModel", processor: "ECCLProcessor", sample: Sample) -> list["np.ndarray"]:
    """Compares the features of the patches, before pooling, with the mean feature of the phrase's tokens."""
    import torch

    from ...training.losses import unit_rows

    encoded = processor.tokenizer(sample.text, return_offsets_mapping=True)
    with torch.no_grad():
        pixels = processor(images=sample.image, return_tensors="pt")["pixel_values"].to(model.device)
        patches = unit_rows(model.get_patch_features(pixels)[0])
        tokens = unit_rows(model.get_token_features(torch.tensor([encoded["input_ids"]], device=model.device))[0])
    maps = []
    for part in sample.parts:
        # The start and end tokens have the offsets (0, 0).
        positions = [
            index
            for index, (first, stop) in enumerate(encoded["offset_mapping"])
            if first < min(part.stop, stop) and stop > part.start
        ]
        maps.append((patches @ unit_rows(tokens[positions].mean(dim=0))).cpu().numpy())
    return maps


def explain_words(model: "ECCLModel", processor: "ECCLProcessor", sample: Sample) -> list["np.ndarray"]:
    """Adds the maps of the phrase's words, see `explain`."""
    from ...search.explanation import explain

    explanation = explain(model, processor, sample.image, sample.text)
    return [
        explanation.of(range(sample.text.count(" ", 0, part.start), sample.text.count(" ", 0, part.stop) + 1))
        for part in sample.parts
    ]


METHODS: dict[str, Method] = {"random": score_randomly, "cosine": compare_patches, "explain": explain_words}


def measure_drop(
    model: "ECCLModel", processor: "ECCLProcessor", image: "Image.Image", phrase: str, scores: "np.ndarray"
) -> float:
    """Blurs the best patches of a map; returns the mean loss of cosine similarity with the phrase."""
    import numpy as np
    from PIL import Image, ImageFilter

    from ...encoding_eccl import embed_captions, embed_images
    from ...training.losses import unit_rows

    blurred = image.filter(ImageFilter.BoxBlur(image.width / 2))
    order, images = np.argsort(-scores, axis=None), [image]
    for share in _DELETED:
        mask = np.zeros(scores.shape, dtype=np.uint8)
        mask.flat[order[: max(1, round(share * scores.size))]] = 255
        images.append(
            Image.composite(blurred, image, Image.fromarray(mask).resize(image.size, Image.Resampling.NEAREST))
        )
    rows = [{"image": each} for each in images]
    features = unit_rows(embed_images(model, processor, rows, progress=False))
    similarities = features @ unit_rows(embed_captions(model, processor, [phrase], progress=False))[0]
    return float(similarities[0] - similarities[1:].mean())


def measure(
    model: "ECCLModel", processor: "ECCLProcessor", samples: Sequence[Sample], method: Method
) -> tuple[list[Result], list[float]]:
    """Compares the maps of a method with the true regions; also returns the seconds that each picture took."""
    results, seconds = [], []
    for sample in samples:
        start = time.perf_counter()
        maps = method(model, processor, sample)
        seconds.append(time.perf_counter() - start)
        for part, scores in zip(sample.parts, maps, strict=True):
            hit = bool(part.region.flat[scores.argmax()])
            positive = scores.clip(min=0)
            inside = float(positive[part.region].sum() / max(positive.sum(), 1e-12))
            drop = measure_drop(model, processor, sample.image, part.phrase, scores)
            results.append(Result(part.name, hit, inside, drop))
    return results, seconds


def format_row(name: str, results: Sequence[Result], seconds: Sequence[float], parts: Sequence[str]) -> str:
    """Makes a row of the table: the means of all maps, the median time, and the pointing game of each part."""
    hits, inside, drops = (statistics.fmean(column) for column in list(zip(*results, strict=True))[1:])
    by_part = [statistics.fmean(result.hit for result in results if result.name == part) for part in parts]
    return (
        f"| {name} | {len(results):,} | {hits:.2f} | {inside:.2f} | {drops:.3f} "
        f"| {1_000 * statistics.median(seconds):.0f} | {' | '.join(f'{rate:.2f}' for rate in by_part)} |"
    )


def make_parser() -> CommandParser:
    parser = CommandParser("python -m eccl.eval.benchmarks.explanation", __doc__)
    add_shared_option(parser, "model")
    parser.add_argument("--images", type=at_least(1), default=100, help="number of pictures to draw")
    add_shared_option(parser, "seed")
    return parser


@command
def main(arguments: list[str]) -> None:
    options = make_parser().parse_args(arguments)
    say(f"loading {options.model}")
    # Imported here, so that --help and a mistake in the arguments answer at once.
    from ...hub.loading import load_model

    model, processor = load_model(options.model)
    drawn = [draw_sample(number, options.seed, model.config.grid_size) for number in range(options.images)]
    limit = processor.max_text_length
    samples = [sample for sample in drawn if sample.parts and processor.count_tokens(sample.text) <= limit]
    if not samples:
        raise ValueError(
            f"--images is {options.images}, but no caption of these pictures names a part within {limit} tokens: draw "
            "more"
        )
    names = [part.name for sample in samples for part in sample.parts]
    parts = [part for part in PARTS if part in names]
    of_parts = " | ".join(f"{part} ({names.count(part)})" for part in parts)
    tell(f"| method | pairs | pointing game | mass inside | deletion | ms per explanation | {of_parts} |")
    tell(f"|---|{'--:|' * (5 + len(parts))}")
    for name, method in METHODS.items():
        tell(format_row(name, *measure(model, processor, samples, method), parts))


if __name__ == "__main__":
    main()
