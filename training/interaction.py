"""Masked language modelling with an interaction encoder, as in IRRA (CVPR 2023, section 3.2): its parts.

Some words of a caption are masked, and a small transformer predicts them from the rest of the caption and from the
image. The loss is `MaskedLanguageModellingTerm` in `objective.py`.
"""

import random
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from ..modeling_eccl import ECCLQuickGELU
from ..processing_eccl import ECCLProcessor
from .pairs import PairDraw

# The published code pads captions with this token. As a label, it marks the places that are not to be predicted.
_PADDING = 0
# The published code takes the last word token of CLIP's vocabulary for the mask; the start and the end token follow it.
_TOKENS_FROM_MASK = 3
_HEAD_WIDTH = 64


def mask_tokens(
    input_ids: Sequence[int], rng: random.Random, vocab_size: int, probability: float = 0.15
) -> tuple[list[int], list[int]]:
    """Masks some words of a caption (IRRA, CVPR 2023, section 3.2, after BERT, NAACL 2019, section 3.1).

    Each word token is chosen with `probability`. A chosen token becomes the mask token (80 %) or a random word token
    (10 %), or stays (10 %). If no token is chosen, the first word becomes the mask token.

    Args:
        input_ids: the token ids of the caption, with its start and end tokens; with or without padding.
        rng: gives the random numbers.
        vocab_size: size of a vocabulary of CLIP's kind. Its last three tokens are the mask token (in CLIP's own
            vocabulary the last merge, which gets this new use), the start token and the end token.
        probability: 0 to 1.

    Returns:
        The masked ids, and the labels: the original id at each chosen place, and 0 elsewhere. The start, end and mask
        tokens and token 0, which is the padding of the published code, are never chosen.
    """
    mask = vocab_size - _TOKENS_FROM_MASK
    masked, labels = list(input_ids), [_PADDING] * len(input_ids)
    places = [place for place, token in enumerate(input_ids) if _PADDING < token < mask]
    for place in places:
        # One number decides both whether a token is chosen and what it becomes, so each token draws the same amount.
        share = rng.random() / probability if probability else 1.0
        if share >= 1:
            continue
        labels[place] = input_ids[place]
        if share < 0.8:
            masked[place] = mask
        elif share < 0.9:
            masked[place] = rng.randint(1, mask - 1)
    if places and not any(labels):
        labels[places[0]], masked[places[0]] = input_ids[places[0]], mask
    return masked, labels


class CaptionMasker:
    """Adds a masked caption to the items of a training set.

    Args:
        processor: makes the token ids.
        probability: see [`mask_tokens`].

    Raises:
        ValueError: the tokenizer's vocabulary does not end with the start and the end token, as CLIP's does.
    """

    def __init__(self, processor: ECCLProcessor, probability: float):
        self.processor, self.probability = processor, probability
        tokenizer: PreTrainedTokenizerBase = processor.tokenizer
        self.vocab_size = len(tokenizer)
        ends = tokenizer.bos_token_id, tokenizer.eos_token_id
        if ends != (self.vocab_size - 2, self.vocab_size - 1):
            raise ValueError(
                f"the tokenizer's start and end tokens are {ends[0]} and {ends[1]}; masked_language_modelling needs a "
                f"vocabulary that ends with them, as CLIP's does: {self.vocab_size - 2} and {self.vocab_size - 1}"
            )

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Returns the item with `masked_input_ids` and `masked_labels`, `(longest caption of the model,)`, int64.

        They depend only on the caption and on the item's `seed`. Both are padded with 0 to the full length, because
        every position takes part in the interaction encoder.
        """
        input_ids = self.processor(text=item["caption"])["input_ids"]
        rng = random.Random(f"{item['seed']}/mask")
        masked, labels = mask_tokens(input_ids, rng, self.vocab_size, self.probability)
        padding = [_PADDING] * (self.processor.max_text_length - len(input_ids))
        return item | {
            "masked_input_ids": torch.tensor(masked + padding),
            "masked_labels": torch.tensor(labels + padding),
        }


class MaskedPairs(Dataset):
    """A training set whose items have a masked caption, see [`CaptionMasker`]."""

    def __init__(self, pairs: Any, masker: CaptionMasker):
        self.pairs, self.masker = pairs, masker

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, drawn: int | PairDraw) -> dict[str, Any]:
        return self.masker(self.pairs[drawn])


class MaskedStream(IterableDataset):
    """A stream whose items have a masked caption, see [`CaptionMasker`]."""

    def __init__(self, pairs: Any, masker: CaptionMasker):
        self.pairs, self.masker = pairs, masker

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self.masker, self.pairs)


class InteractionEncoder(nn.Module):
    """Predicts the masked words of captions from their other words and from the images (IRRA, CVPR 2023, section 3.2).

    The tokens of a caption attend to the tokens of its image, without a residual connection; `depth` transformer blocks
    follow, in which every position of the text sees every other, padding included. The parameters have the names of the
    published checkpoints, and start as in the published code.

    Args:
        dim: width of the tokens.
        depth: number of blocks.
        vocab_size: number of words to choose from.

    Raises:
        ValueError: the attention heads, one for each 64 of `dim`, cannot share `dim`.
    """

    def __init__(self, dim: int, depth: int, vocab_size: int):
        super().__init__()
        # Narrower models, such as those of tests, get one head.
        heads = max(1, dim // _HEAD_WIDTH)
        if dim % heads:
            raise ValueError(
                f"projection_dim is {dim}, masked_language_modelling needs a multiple of {heads} for its {heads} "
                f"attention heads: choose a multiple of {_HEAD_WIDTH}"
            )
        self.ln_pre_t, self.ln_pre_i, self.ln_post = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.cross_attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.cross_modal_transformer = _Blocks(dim, depth, heads)
        self.mlm_head = nn.Sequential(
            OrderedDict(
                dense=nn.Linear(dim, dim), gelu=ECCLQuickGELU(), ln=nn.LayerNorm(dim), fc=nn.Linear(dim, vocab_size)
            )
        )
        self._reset_parameters(dim, depth)

    def _reset_parameters(self, dim: int, depth: int) -> None:
        """Draws the weights as the published code does; those not named here start as torch starts them."""
        inner, narrow = dim**-0.5, dim**-0.5 * (2 * depth) ** -0.5
        wide = (2 * dim) ** -0.5
        deviations = {"in_proj_weight": inner, "out_proj.weight": narrow, "c_proj.weight": narrow, "c_fc.weight": wide}
        deviations |= {"dense.weight": wide, "mlm_head.fc.weight": narrow}
        for name, parameter in self.named_parameters():
            for ending, deviation in deviations.items():
                if name.endswith(ending):
                    nn.init.normal_(parameter, std=deviation)

    def score_words(
        self, text_tokens: torch.Tensor, image_tokens: torch.Tensor, is_masked: torch.Tensor
    ) -> torch.Tensor:
        """Scores every word of the vocabulary for each masked place.

        Args:
            text_tokens: `(batch, length, dim)`, features of the masked captions.
            image_tokens: `(batch, 1 + patches, dim)`, features of their images.
            is_masked: `(batch, length)`, bool: the places to predict.

        Returns:
            `(masked places, vocab_size)`, in the order of the rows.
        """
        keys = self.ln_pre_i(image_tokens)
        tokens, _ = self.cross_attn(self.ln_pre_t(text_tokens), keys, keys, need_weights=False)
        tokens = self.ln_post(self.cross_modal_transformer(tokens))
        # The scores of all places would take 1 GB for 256 captions of 20 tokens: only those that count are computed.
        return self.mlm_head(tokens[is_masked])


class _Blocks(nn.Module):
    """A stack of transformer blocks."""

    def __init__(self, dim: int, depth: int, heads: int):
        super().__init__()
        self.resblocks = nn.Sequential(*(_Block(dim, heads) for _ in range(depth)))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.resblocks(tokens)


class _Block(nn.Module):
    """A pre-norm transformer block with CLIP's activation, without a mask."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(dim, 4 * dim), gelu=ECCLQuickGELU(), c_proj=nn.Linear(4 * dim, dim))
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        normed = self.ln_1(tokens)
        tokens = tokens + self.attn(normed, normed, normed, need_weights=False)[0]
        return tokens + self.mlp(self.ln_2(tokens))


__all__ = ["CaptionMasker", "InteractionEncoder", "MaskedPairs", "MaskedStream", "mask_tokens"]
