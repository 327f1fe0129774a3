"""What several test modules need."""

import gzip
from functools import cache
from pathlib import Path

from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from eccl.configuration_eccl import ECCLConfig

GOLDENS = Path(__file__).parent / "goldens"
ROOT = Path(__file__).parent.parent


def tiny_config(**changes) -> ECCLConfig:
    """Two layers of 32 and 48, 4 x 2 patches: milliseconds a batch."""
    values = {
        "text_config": {
            "vocab_size": 60,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "bos_token_id": 58,
            "eos_token_id": 59,
            "pad_token_id": 59,
        },
        "vision_config": {
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "image_size": [32, 16],
            "patch_size": 8,
        },
        "projection_dim": 24,
        "num_prompt_tokens": 3,
        "prompt_depth": 2,
    }
    return ECCLConfig(**(values | changes))


@cache
def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer, from the vocabulary file of its published code."""
    lines = gzip.decompress((GOLDENS / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode("utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    letters = list(bytes_to_unicode().values())
    words = letters + [f"{letter}</w>" for letter in letters] + ["".join(merge) for merge in merges]
    vocabulary = {word: index for index, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges)
