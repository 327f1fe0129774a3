"""Finds doubtful captions, images and persons in a data set that passes all checks."""

import hashlib
import importlib.util
import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import datasets
import numpy as np
from PIL import Image

from .base import undecoded_images
from .image_checks import map_images
from .messages import shorten
from .persons import person_column

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_EXAMPLES = 3
_SMALLEST_SIDE = 32
# Two images look alike if at most this many of the 64 bits of their perceptual hashes differ.
_NEAR_BITS = 4
# If 4 of 64 bits differ, at least one of 5 groups of bits is the same.
_GROUPS = [(13 * index, min(13, 64 - 13 * index)) for index in range(5)]
_MARKUP = re.compile(
    r"</?[a-z!][^<>]*>|&(#\d+|#x[0-9a-f]+|[a-z]{2,8});|https?://|www\.|```|[{}]|\w\([^()]*\);|\\[nrt]\b|\[/?[a-z]+\]",
    re.IGNORECASE,
)
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Finding:
    """Something doubtful.

    Attributes:
        name: a short name for programs.
        title: what was found, in words.
        count: number of captions, images or persons.
        examples: up to three of them.
    """

    name: str
    title: str
    count: int
    examples: list[str]


class ImageFacts(NamedTuple):
    """One image: its stored size and mode, a digest of its bytes, and its perceptual hash (`None`: not computed)."""

    width: int
    height: int
    mode: str
    digest: bytes
    hash: int | None


def read_image_facts(dataset: datasets.Dataset) -> list[ImageFacts]:
    """Reads and decodes every image of a split once, in the order of its rows.

    The perceptual hash needs the package `imagehash`; without it, it is left out.
    """
    # Imported here: the module needs transformers, which takes seconds.
    from ..processing_eccl import read_image

    has_imagehash = importlib.util.find_spec("imagehash") is not None

    def read(image: Mapping[str, Any]) -> ImageFacts:
        content = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
        with Image.open(io.BytesIO(content)) as opened:
            size, mode = opened.size, opened.mode
        code = None
        if has_imagehash:
            import imagehash

            bits = imagehash.phash(read_image(io.BytesIO(content))).hash.flatten()
            code = int(np.packbits(bits).view(">u8")[0])
        return ImageFacts(*size, mode, hashlib.sha256(content).digest(), code)

    return list(map_images(read, undecoded_images(dataset)["image"], "images"))


def find_doubtful_captions(
    splits: Mapping[str, datasets.Dataset], tokenizer: "PreTrainedTokenizerBase", limit: int
) -> list[Finding]:
    """Looks at all captions.

    Args:
        splits: splits with the columns `person_id` and `captions`.
        tokenizer: the tokenizer of the model.
        limit: maximum length in tokens; longer captions are truncated.
    """
    from ..processing_eccl import clean_caption

    captions: list[str] = []
    persons: list[int] = []
    for dataset in splits.values():
        for person, given in zip(person_column(dataset).tolist(), dataset["captions"], strict=True):
            captions += given
            persons += [person] * len(given)
    cleaned = [clean_caption(caption) for caption in captions]
    persons_of: defaultdict[str, set[int]] = defaultdict(set)
    counts: Counter[str] = Counter()
    for caption, person in zip(cleaned, persons, strict=True):
        words = " ".join(caption.split())
        persons_of[words].add(person)
        counts[words] += 1
    shared = {caption: persons for caption, persons in persons_of.items() if len(persons) > 1}
    lengths = [len(ids) for ids in tokenizer(cleaned)["input_ids"]]
    unknown = _find_unknown_letters("".join(set().union(*cleaned)), tokenizer)
    with_unknown = [caption for caption, clean in zip(captions, cleaned, strict=True) if unknown & set(clean)]
    letters = f" ({' '.join(sorted(unknown)[:10])})" if unknown else ""
    return [
        Finding(
            "same_caption_for_several_persons",
            "captions that describe several persons",
            sum(counts[caption] for caption in shared),
            [f"{shorten(caption)}: {len(persons)} persons" for caption, persons in list(shared.items())[:_EXAMPLES]],
        ),
        _about("one_word_captions", "captions of one word", [c for c in captions if len(_WORD.findall(c)) < 2]),
        _about(
            "captions_longer_than_the_model_reads",
            f"captions longer than {limit} tokens, which are truncated",
            [caption for caption, length in zip(captions, lengths, strict=True) if length > limit],
        ),
        _about("code_or_markup", "captions with code or markup", [c for c in captions if _MARKUP.search(c)]),
        _about("unknown_letters", f"captions with letters that the tokenizer lacks{letters}", with_unknown),
    ]


def _about(name: str, title: str, captions: Sequence[str]) -> Finding:
    return Finding(name, title, len(captions), [shorten(caption) for caption in captions[:_EXAMPLES]])


def _find_unknown_letters(letters: str, tokenizer: "PreTrainedTokenizerBase") -> set[str]:
    """Returns the letters that the tokenizer replaces by its unknown token, or leaves out."""
    unknown = set()
    for letter in letters:
        ids = [] if letter.isspace() else tokenizer(letter, add_special_tokens=False)["input_ids"]
        if not letter.isspace() and (not ids or tokenizer.unk_token_id in ids):
            unknown.add(letter)
    return unknown


def find_doubtful_images(
    splits: Mapping[str, datasets.Dataset], facts: Mapping[str, Sequence[ImageFacts]]
) -> list[Finding]:
    """Compares all images, those of different splits, too.

    Args:
        splits: splits with the columns `person_id` and `file_path`.
        facts: the images of each split, from [`read_image_facts`].

    Returns:
        The findings; without perceptual hashes, the finding about images that look alike is left out.
    """
    images = [fact for split in splits for fact in facts[split]]
    names = [f"{split} {path}" for split, dataset in splits.items() for path in dataset["file_path"]]
    persons = np.concatenate([person_column(dataset) for dataset in splits.values()]).tolist()
    same = _group(fact.digest for fact in images)
    copies = sum(len(group) - 1 for group in same)
    small = [index for index, fact in enumerate(images) if min(fact.width, fact.height) < _SMALLEST_SIDE]
    findings = [
        Finding(
            "same_bytes",
            "images that are copies of another one (the same bytes)",
            copies,
            [_name_pair(names, persons, group[0], group[1]) for group in same[:_EXAMPLES]],
        ),
        Finding(
            "small_images",
            f"images with a side below {_SMALLEST_SIDE} pixels",
            len(small),
            [f"{names[index]}: {images[index].width} x {images[index].height}" for index in small[:_EXAMPLES]],
        ),
    ]
    if any(fact.hash is None for fact in images):
        return findings
    pairs = [(a, b) for a, b in _find_near(images) if images[a].digest != images[b].digest]
    others = [(a, b) for a, b in pairs if persons[a] != persons[b]]
    for name, title, found in (
        ("near_duplicates", "images that look like another one (perceptual hash)", pairs),
        (
            "near_duplicates_of_different_persons",
            "images that look like one of another person (perceptual hash)",
            others,
        ),
    ):
        examples = [_name_pair(names, persons, a, b) for a, b in found[:_EXAMPLES]]
        findings.append(Finding(name, title, len({index for pair in found for index in pair}), examples))
    return findings


def _group(keys: Iterator[Any]) -> list[list[int]]:
    """Returns the indices of equal keys, for each key that occurs more than once."""
    groups: defaultdict[Any, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        groups[key].append(index)
    return [group for group in groups.values() if len(group) > 1]


def _name_pair(names: Sequence[str], persons: Sequence[int], first: int, second: int) -> str:
    persons_of = (
        f"person {persons[first]}"
        if persons[first] == persons[second]
        else f"persons {persons[first]} and {persons[second]}"
    )
    return f"{names[first]} and {names[second]} ({persons_of})"


def _find_near(images: Sequence[ImageFacts]) -> list[tuple[int, int]]:
    """Returns pairs of images with near hashes; of images with the same hash, each is paired with the first one."""
    members: defaultdict[int, list[int]] = defaultdict(list)
    for index, fact in enumerate(images):
        members[int(fact.hash or 0)].append(index)
    pairs = {(group[0], other) for group in members.values() for other in group[1:]}
    for start, width in _GROUPS:
        buckets: defaultdict[int, list[int]] = defaultdict(list)
        for code in members:
            buckets[(code >> start) & ((1 << width) - 1)].append(code)
        for codes in buckets.values():
            array = np.array(codes, dtype=np.uint64)
            for row, code in enumerate(array[:-1]):
                near = np.bitwise_count(array[row + 1 :] ^ code) <= _NEAR_BITS
                for other in array[row + 1 :][near].tolist():
                    first, second = sorted((members[int(code)][0], members[other][0]))
                    pairs.add((first, second))
    return sorted(pairs)


def find_doubtful_persons(splits: Mapping[str, datasets.Dataset]) -> list[Finding]:
    """Looks for persons with one image, and for persons in several splits."""
    images_of = {split: Counter(person_column(dataset).tolist()) for split, dataset in splits.items()}
    single = [f"{split} person {each}" for split, found in images_of.items() for each, n in found.items() if n == 1]
    shared = {
        f"person {person} in {first} and {second}": person
        for first, second in combinations(images_of, 2)
        for person in images_of[first].keys() & images_of[second].keys()
    }
    return [
        Finding("persons_with_one_image", "persons with one image", len(single), single[:_EXAMPLES]),
        Finding(
            "persons_in_several_splits",
            "persons in several splits, on whom a model must not be scored",
            len(set(shared.values())),
            list(shared)[:_EXAMPLES],
        ),
    ]


def to_json(report: Mapping[str, Any]) -> str:
    """Writes a report as JSON that can be put into an HTML page: `<`, `>` and `&` are escaped."""
    text = json.dumps(report, indent=1, default=asdict)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e") + "\n"


__all__ = [
    "Finding",
    "ImageFacts",
    "find_doubtful_captions",
    "find_doubtful_images",
    "find_doubtful_persons",
    "read_image_facts",
    "to_json",
]
