"""Shows why a picture matches a sentence: for each word, the parts of the picture that make it fit.

The feature of an image is a sum: in each layer, the attention of the class token adds a vector for each patch. So the
cosine similarity of an image with a sentence is also a sum over the patches, plus a rest that belongs to no patch
("Interpreting CLIP's Image Representation via Text-Based Decomposition", Gandelsman et al., ICLR 2024). A word is
explained with the difference between the features of the sentence with this word and without it. One pass of the image
encoder serves all words.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers.models.clip.modeling_clip import CLIPAttention

from ..encoding_eccl import embed_captions
from ..modeling_eccl import ECCLModel
from ..processing_eccl import ECCLProcessor, clean_caption, read_image

# In pixels.
_LARGEST_HEIGHT = 4_096
# RGB. Orange and blue differ for all readers, also for those who confuse red with green.
_FOR, _AGAINST = (255, 96, 0), (0, 90, 255)
# The share of the picture's colour that stays, so that the colours of clothes are not taken for those of the map, and
# the share of the map's colour where its value is 1 or -1. With an exponent below 1, weak parts can still be seen.
_SATURATION, _OPACITY, _EXPONENT = 0.4, 0.72, 0.75


@dataclass(frozen=True)
class Explanation:
    """The maps of a sentence on one picture, over the rows and columns of the image encoder's patches.

    A value above 0 says that the patch makes the picture fit the word better, a value below 0 that it makes it fit
    worse. The values are parts of the cosine similarity, divided by the largest absolute value of all words: they lie
    between -1 and 1, and a word that does not matter is pale in comparison with the others. Compare words of one
    explanation, not of two.

    Attributes:
        words: the words of the cleaned sentence, with their punctuation.
        scores: `(words, rows, columns)`, float32, -1 to 1: the map of each word.
        overall: `(rows, columns)`, float32, -1 to 1: the map of the whole sentence, divided by its own largest absolute
            value.
    """

    words: list[str]
    scores: np.ndarray
    overall: np.ndarray

    def of(self, indices: Sequence[int]) -> np.ndarray:
        """Adds the maps of several words, for example of "red" and "coat".

        Args:
            indices: positions in `words`, from 0.

        Returns:
            `(rows, columns)`, in the unit of `scores`; it may lie outside -1 to 1.

        Raises:
            ValueError: there are no indices, or there is no such word.
        """
        last = len(self.words) - 1
        if not len(indices) or not all(0 <= index <= last for index in indices):
            raise ValueError(f"indices is {list(indices)}, it must be one or more numbers from 0 to {last}")
        return self.scores[sorted(set(indices))].sum(axis=0)


@torch.no_grad()
def explain(
    model: ECCLModel, processor: ECCLProcessor, image: str | PathLike[str] | Image.Image, sentence: str
) -> Explanation:
    """Computes which parts of a picture make it match each word of a sentence.

    It takes one pass of the image encoder, and one pass of the text encoder over the sentence and its copies that each
    lack one word. Several threads may call it with the same model.

    Args:
        model: in evaluation mode; neither its mode nor its gradients change.
        processor: the processor of the model.
        image: a path or a PIL image.
        sentence: describes a person.

    Raises:
        ValueError: the sentence has no words, or more tokens than the model reads; or the image cannot be read.
    """
    words = clean_caption(sentence).split()
    if not words:
        raise ValueError(f"the sentence is {sentence!r}, it must have at least one word")
    text = " ".join(words)
    tokens, limit = processor.count_tokens(text), processor.max_text_length
    if tokens > limit:
        raise ValueError(
            f"the sentence has {tokens:,} tokens, start and end included, but the model reads {limit}: shorten it"
        )
    shortened = [" ".join(words[:index] + words[index + 1 :]) for index in range(len(words))]
    features = nn.functional.normalize(embed_captions(model, processor, [text, *shortened], progress=False), dim=-1)
    pixels = processor(images=read_image(image), return_tensors="pt")["pixel_values"]
    contributions = _patch_contributions(model, pixels.to(model.device, model.dtype)).cpu()
    rows, columns = model.config.grid_size
    scores = ((features[0] - features[1:]) @ contributions.T).reshape(len(words), rows, columns)
    overall = (contributions @ features[0]).reshape(rows, columns)
    return Explanation(words, _scale(scores), _scale(overall))


def _patch_contributions(model: ECCLModel, pixels: torch.Tensor) -> torch.Tensor:
    """The vector that each patch adds to the unit feature of its image.

    Args:
        pixels: `(1, channels, height, width)`.

    Returns:
        `(patches, projection_dim)`, float32. The rest of the feature comes from the class token itself, the prompts,
        the MLPs and the biases.
    """
    output = model.get_image_features(pixels, output_hidden_states=True, return_dict=True)
    encoder, rows_and_columns = model.vision_model, model.config.grid_size
    length = 1 + rows_and_columns[0] * rows_and_columns[1]
    prompts = [] if model.prompt_learner is None else model.prompt_learner("vision")
    total = torch.zeros_like(output.last_hidden_state[0, 1:], dtype=torch.float32)
    for index, layer in enumerate(encoder.encoder.layers):
        hidden = output.hidden_states[index][0]
        if 1 <= index < len(prompts):
            # Each prompted layer replaces the prompts of the layer before.
            hidden = torch.cat([hidden[:length], prompts[index].to(hidden.dtype)])
        total += _attention_parts(layer.self_attn, layer.layer_norm1(hidden))[1:length]
    # The layer norm divides by the deviation of the whole vector; with this number fixed, it is linear.
    norm, final = encoder.post_layernorm, output.last_hidden_state[0, 0].float()
    centred = total - total.mean(dim=-1, keepdim=True)
    scaled = centred * (final.var(unbiased=False) + norm.eps).rsqrt() * norm.weight.float()
    return scaled @ model.visual_projection.weight.float().T / output.pooler_output[0].float().norm()


def _attention_parts(attention: CLIPAttention, hidden: torch.Tensor) -> torch.Tensor:
    """The vector that each token adds to the class token in one attention layer, without the bias.

    Args:
        attention: the layer.
        hidden: `(tokens, width)`, its input.

    Returns:
        `(tokens, width)`, float32.
    """
    heads = attention.num_heads
    query = attention.q_proj(hidden[0]).float().unflatten(-1, (heads, -1))
    keys, values = (
        project(hidden).float().unflatten(-1, (heads, -1)) for project in (attention.k_proj, attention.v_proj)
    )
    weights = (torch.einsum("hd,nhd->nh", query, keys) * attention.scale).softmax(dim=0)
    return (weights[..., None] * values).flatten(1) @ attention.out_proj.weight.float().T


def _scale(scores: torch.Tensor) -> np.ndarray:
    return (scores / scores.abs().max().clamp(min=1e-12)).float().numpy()


def draw_explanation(image: str | PathLike[str] | Image.Image, scores: np.ndarray, height: int = 480) -> Image.Image:
    """Draws a picture under a map: orange parts speak for the word, blue parts against it.

    The picture is paler than the original, so that the colours of clothes are not taken for those of the map.

    Args:
        image: a path or a PIL image.
        scores: `(rows, columns)`, a map of an [`Explanation`]; values beyond -1 and 1 are drawn like -1 and 1.
        height: of the result, in pixels, 1 to 4,096.

    Returns:
        An RGB image with the proportions of `image`.

    Raises:
        ValueError: the map has another shape or values that are not finite, the height is out of its range, or the
            image cannot be read.
    """
    if scores.ndim != 2 or not scores.size or not np.isfinite(scores).all():
        raise ValueError(f"scores has the shape {scores.shape}, it must be (rows, columns) of finite numbers")
    if not 1 <= height <= _LARGEST_HEIGHT:
        raise ValueError(f"height is {height}, it must be between 1 and {_LARGEST_HEIGHT:,}")
    image = read_image(image)
    size = max(1, round(image.width * height / image.height)), height
    picture = np.asarray(image.resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
    grey = picture @ np.array([0.299, 0.587, 0.114], np.float32)
    pale = grey[..., None] + _SATURATION * (picture - grey[..., None])
    map_image = Image.fromarray(scores.clip(-1, 1).astype(np.float32))
    # Bicubic interpolation overshoots.
    level = np.asarray(map_image.resize(size, Image.Resampling.BICUBIC))[..., None].clip(-1, 1)
    colour = np.where(level > 0, np.array(_FOR, np.float32), np.array(_AGAINST, np.float32))
    opacity = _OPACITY * np.abs(level) ** _EXPONENT
    return Image.fromarray((pale * (1 - opacity) + colour * opacity).clip(0, 255).astype(np.uint8))


__all__ = ["Explanation", "draw_explanation", "explain"]
