"""A tokenizer of CLIP's kind for a model that is trained from scratch."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable

from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

_END_OF_WORD = "</w>"
_SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> CLIPTokenizer:
    """Trains a byte-level BPE tokenizer ("Neural Machine Translation of Rare Words with Subword Units", ACL 2016).

    The same captions always give the same tokenizer, in any order. transformers' `train_new_from_iterator` does not:
    the order of a hash table decides between pairs that are equally frequent. The processes of a launch would get
    different vocabularies.

    Args:
        captions: the captions of the training split.
        vocab_size: number of tokens: the 256 bytes within a word, the 256 bytes at its end, merges, and the start and
            end tokens. The vocabulary is smaller if the captions have fewer merges. It has at least 514 tokens, so that
            it represents every text.

    Returns:
        A tokenizer with the start and end tokens last in its vocabulary, as in CLIP's.
    """
    # CLIP takes an unknown token for the end token, so no byte may be unknown.
    letters = sorted(bytes_to_unicode().values())
    letters += [letter + _END_OF_WORD for letter in letters]
    num_merges = vocab_size - len(letters) - len(_SPECIAL_TOKENS)
    merges = _learn_merges(_count_words(captions), num_merges)
    tokens = [*letters, *dict.fromkeys(map("".join, merges)), *_SPECIAL_TOKENS]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    # transformers annotates lines of text, and takes pairs as well.
    return CLIPTokenizer(vocab=vocabulary, merges=merges)  # type: ignore[arg-type]


def _count_words(captions: Iterable[str]) -> Counter[tuple[str, ...]]:
    """Counts the words; a word is a tuple of bytes, each written as one character, and the last one is marked."""
    backend = CLIPTokenizer().backend_tokenizer
    counts: Counter[str] = Counter()
    for caption in captions:
        words = backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(caption))
        counts.update(word for word, _ in words)
    return Counter({(*word[:-1], word[-1] + _END_OF_WORD): count for word, count in counts.items()})


def _learn_merges(words: Counter[tuple[str, ...]], num_merges: int) -> list[tuple[str, str]]:
    """Merges the most frequent pair of neighbours, again and again; of equally frequent pairs, the first by name."""
    pieces = [(list(word), count) for word, count in sorted(words.items())]
    frequency: Counter[tuple[str, str]] = Counter()
    places = defaultdict(set)
    for index, (word, count) in enumerate(pieces):
        for pair in itertools.pairwise(word):
            frequency[pair] += count
            places[pair].add(index)
    merges: list[tuple[str, str]] = []
    while frequency and len(merges) < num_merges:
        best = min(frequency, key=lambda pair: (-frequency[pair], pair))
        merges.append(best)
        for index in places[best]:
            word, count = pieces[index]
            for pair in itertools.pairwise(word):
                frequency[pair] -= count
            _merge(word, best)
            for pair in itertools.pairwise(word):
                frequency[pair] += count
                places[pair].add(index)
        del places[best]
        frequency = +frequency  # only the pairs that are left
    return merges


def _merge(word: list[str], pair: tuple[str, str]) -> None:
    index = 0
    while index < len(word) - 1:
        if (word[index], word[index + 1]) == pair:
            word[index : index + 2] = ["".join(pair)]
        index += 1


__all__ = ["train_tokenizer"]
