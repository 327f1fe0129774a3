import itertools
import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from eccl.training.vocabulary import _learn_merges, train_tokenizer

CAPTIONS = ["The man wears a red coat.", "A woman's coat is blue; she carries 2 bags.", "a red bag, a blue coät"]


def brute_force(words, num_merges):
    """Learns merges by counting all pairs anew for each merge."""
    merges = []
    pieces = {word: list(word) for word in words}
    for _ in range(num_merges):
        pairs = Counter()
        for word, piece in pieces.items():
            for pair in itertools.pairwise(piece):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = sorted(pairs, key=lambda pair: (-pairs[pair], pair))[0]
        merges.append(best)
        for piece in pieces.values():
            joined, index = [], 0
            while index < len(piece):
                both = tuple(piece[index : index + 2]) == best
                joined.append("".join(best) if both else piece[index])
                index += 2 if both else 1
            piece[:] = joined
    return merges


@settings(deadline=None)
@given(
    st.dictionaries(st.text("ab", min_size=1, max_size=9).map(tuple), st.integers(1, 9), max_size=6),
    st.integers(0, 12),
)
def test_merges_are_those_of_a_brute_force_search(words, num_merges):
    assert _learn_merges(Counter(words), num_merges) == brute_force(words, num_merges)


def test_the_order_of_the_captions_changes_nothing():
    words = [f"{first}{second}" for first in "abcdefgh" for second in "ijklmnop"]
    shuffled = random.Random(0).sample(words, len(words))
    first, second = (train_tokenizer(captions, 560) for captions in (words, shuffled))
    assert len(first) == 560 and first.get_vocab() == second.get_vocab()
    assert first(words)["input_ids"] == second(words)["input_ids"]


def test_the_tokenizer_is_one_of_clip(tmp_path):
    tokenizer = train_tokenizer(CAPTIONS, 2000)
    size = len(tokenizer)
    # As many merges as transformers makes, which knows only the last letters of these captions, and the same tokens.
    library = CLIPTokenizer().train_new_from_iterator(CAPTIONS, vocab_size=2000)
    last_letters = {token for token in library.get_vocab() if len(token.removesuffix("</w>")) == 1 and token[1:]}
    assert size - 514 == len(library) - 258 - len(last_letters)
    for caption in CAPTIONS:
        assert tokenizer.tokenize(caption) == library.tokenize(caption)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (size - 2, size - 1, size - 1)
    ids = tokenizer("a Woman's  coät, 2 bags")["input_ids"]
    assert ids[0] == size - 2 and ids[-1] == size - 1 and max(ids[1:-1]) < size - 2
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "awoman'scoät,2bags"
    tokenizer.save_pretrained(tmp_path)
    assert CLIPTokenizer.from_pretrained(tmp_path)("a red bag")["input_ids"] == tokenizer("a red bag")["input_ids"]


def test_a_small_vocabulary_has_all_bytes_and_no_merge():
    tokenizer = train_tokenizer(CAPTIONS, 50)
    assert len(tokenizer.tokenize("coat")) == 4 and len(tokenizer) == 514
