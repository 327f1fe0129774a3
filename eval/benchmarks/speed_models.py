"""The models and the data of the speed benchmark, and their arithmetic.

The baseline is transformers' own `CLIPModel` with the same weights and the same grid of patches, and LoRA of the same
rank on the same modules.
"""

import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

from ...configuration_eccl import ECCLConfig
from ...dataset_scripts.synthetic.captions import DOMAINS, make_caption
from ...dataset_scripts.synthetic.people import sample_person
from ...hub.adapter import TARGET_MODULES, attach_lora
from ...modeling_eccl import ECCLModel
from ...training.losses import triplet_alignment_loss

CLIP_WITH_LORA = "CLIP + LoRA"

# Tokens of a drawn caption, with its start and end tokens.
_SHORTEST, LONGEST = 18, 45
_LORA_RANK = 4


def _make_config(
    widths: tuple[int, int], layers: tuple[int, int], heads: tuple[int, int], image: dict[str, Any], **changes: Any
) -> ECCLConfig:
    """Makes a configuration from the sizes of the text encoder and of the image encoder."""
    text, vision = (
        {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": number,
            "num_attention_heads": head_count,
        }
        for width, number, head_count in zip(widths, layers, heads, strict=True)
    )
    return ECCLConfig(text_config=text, vision_config=vision | image, **changes)


# `small` has the sizes of the backbone in assets/. All have the vocabulary of CLIP.
MODELS: dict[str, Callable[[], ECCLConfig]] = {
    "vit-b16": ECCLConfig,
    "small": lambda: _make_config(
        (160, 256), (3, 5), (5, 8), {"image_size": [192, 64], "patch_size": 16}, projection_dim=160, prompt_depth=3
    ),
    "tiny": lambda: _make_config(
        (16, 24), (2, 2), (2, 2), {"image_size": [32, 16], "patch_size": 8}, projection_dim=16, prompt_depth=2
    ),
}


@dataclass(frozen=True)
class Settings:
    """The settings of a run.

    Attributes:
        model: a name in `MODELS`.
        device: where to measure.
        batch_size: number of pairs, or images, in a batch.
        rounds: number of measurements of each case.
        threads: number of threads of torch on the CPU.
        batch_sizes: the batch sizes of the sweep.
    """

    model: str
    device: torch.device
    batch_size: int
    rounds: int
    threads: int
    batch_sizes: tuple[int, ...] = ()

    @property
    def config(self) -> ECCLConfig:
        """A new configuration of the model."""
        return MODELS[self.model]()


# -- Arithmetic


def encoder_flops(encoder: CLIPTextConfig | CLIPVisionConfig, tokens: int) -> int:
    """Computes the floating point operations of the layers of an encoder for one sequence.

    A layer has four projections of attention and two of the MLP: `2 * tokens * (4 * width^2 + 2 * width * inner)`. Its
    two products of attention, `Q K^T` and with `V`, take `4 * tokens^2 * width`, also under a causal mask. A
    multiplication and an addition count as two. Norms, activations and the softmax are left out, and so is LoRA.
    """
    width, inner = encoder.hidden_size, encoder.intermediate_size
    layer = 2 * tokens * (4 * width * width + 2 * width * inner) + 4 * tokens * tokens * width
    return encoder.num_hidden_layers * layer


def image_flops(config: ECCLConfig) -> int:
    """Computes the operations for the feature of one image: patches, all layers with the prompts, projection."""
    vision, patches = config.encoder_configs[1], image_tokens(config) - 1 - config.num_prompt_tokens
    embedding = 2 * patches * vision.num_channels * config.patch_side**2 * vision.hidden_size
    return embedding + encoder_flops(vision, image_tokens(config)) + 2 * vision.hidden_size * config.projection_dim


def text_flops(config: ECCLConfig, tokens: int) -> int:
    """Computes the operations for the feature of one caption with this many tokens, the prompts included."""
    text = config.encoder_configs[0]
    return encoder_flops(text, tokens) + 2 * text.hidden_size * config.projection_dim


def image_tokens(config: ECCLConfig) -> int:
    """Returns the number of tokens of an image: class token, patches and prompts."""
    rows, columns = config.grid_size
    return 1 + rows * columns + config.num_prompt_tokens


def pair_flops(config: ECCLConfig) -> int:
    """Computes the operations of a forward pass for an image and the longest caption of a drawn batch."""
    return image_flops(config) + text_flops(config, LONGEST + config.num_prompt_tokens)


# -- Models and data


class _PersonEmbeddings(CLIPVisionEmbeddings):
    """CLIP's own embeddings and forward pass, with a table of positions for a grid that is not square."""

    def __init__(self, config: CLIPVisionConfig, num_patches: int):
        super().__init__(config)
        self.position_embedding = nn.Embedding(1 + num_patches, self.embed_dim)
        self.position_ids = nn.Buffer(torch.arange(1 + num_patches).expand((1, -1)), persistent=False)

    def interpolate_pos_encoding(self, embeddings: torch.Tensor, height: int, width: int) -> torch.Tensor:
        # CLIP would resize a square table at each step.
        return self.position_embedding(self.position_ids)

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        # With this argument, CLIP does not ask for a square image.
        return super().forward(pixel_values, interpolate_pos_encoding=True)


def make_clip(config: ECCLConfig) -> CLIPModel:
    """Makes transformers' CLIP with the sizes, the image grid and the weights of an ECCL model without prompts."""
    text, vision = (encoder.to_dict() for encoder in config.encoder_configs)
    # The size must be one number. The embeddings that depend on it are replaced.
    vision["image_size"] = config.patch_side
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=config.projection_dim))
    rows, columns = config.grid_size
    clip.vision_model.embeddings = _PersonEmbeddings(clip.vision_model.config, rows * columns)
    state = make_plain(config).state_dict()
    clip.load_state_dict({name: value for name, value in state.items() if not name.startswith("prompt_learner.")})
    return clip.eval()


def make_plain(config: ECCLConfig) -> ECCLModel:
    """Makes an ECCL model as it is after training, without LoRA; the same call gives the same weights."""
    torch.manual_seed(0)
    return ECCLModel(config).eval()


def make_ours(config: ECCLConfig, base: str = "float32", attention: str = "sdpa") -> nn.Module:
    """Makes an ECCL model as it is trained: LoRA and prompts.

    Args:
        config: its shape.
        base: the dtype of the frozen weights, `float32` or `bfloat16`.
        attention: the attention implementation.
    """
    model = make_plain(config)
    model.set_attn_implementation(attention)
    return attach_lora(model, _LORA_RANK, _LORA_RANK, getattr(torch, base)).train()


def make_clip_with_lora(config: ECCLConfig, attention: str = "sdpa") -> nn.Module:
    """Makes the baseline as it is trained: LoRA of the same rank on the same modules."""
    clip = make_clip(config)
    clip.set_attn_implementation(attention)
    settings = LoraConfig(r=_LORA_RANK, lora_alpha=_LORA_RANK, lora_dropout=0.0, target_modules=TARGET_MODULES)
    with warnings.catch_warnings():
        # peft uses a name that transformers has deprecated.
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(clip, settings).train()


class Batch(NamedTuple):
    """A batch of pairs: pixels, and captions that are cut to the longest (ours) and padded to the limit (CLIP's)."""

    pixels: torch.Tensor
    our_ids: torch.Tensor
    clip_ids: torch.Tensor


def draw_batch(config: ECCLConfig, size: int, device: torch.device) -> Batch:
    """Draws a batch with captions of 18 to 45 tokens, evenly spread; the last one has 45."""
    text = config.encoder_configs[0]
    generator = torch.Generator().manual_seed(0)
    height, width = config.input_size
    pixels = torch.randn(size, 3, height, width, generator=generator)
    ids = torch.randint(1, 40_000, (size, text.max_position_embeddings), generator=generator)
    ids[:, 0] = text.vocab_size - 2
    for row, length in zip(ids, torch.linspace(LONGEST, _SHORTEST, size).long().flip(0).tolist(), strict=True):
        row[length - 1 :] = text.vocab_size - 1
    return Batch(pixels.to(device), ids[:, :LONGEST].to(device), ids.to(device))


def draw_captions(count: int) -> list[str]:
    """Draws sentences of the synthetic benchmark: 9 to 47 tokens, 26 on average."""
    rng = random.Random(0)
    return [make_caption(sample_person(rng), DOMAINS[number % len(DOMAINS)], rng)[0] for number in range(count)]


# -- What is computed


def our_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Computes TAL for a batch in which each pair is another person."""
    output = model(input_ids=batch.our_ids, pixel_values=batch.pixels, pooled_only=True)
    person_ids = torch.arange(len(batch.pixels), device=batch.pixels.device)
    return triplet_alignment_loss(output.image_embeds, output.text_embeds, person_ids)


def clip_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Computes InfoNCE, the contrastive loss of transformers' CLIP."""
    return model(input_ids=batch.clip_ids, pixel_values=batch.pixels, return_loss=True).loss


def encode_images(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Computes the image features of either model."""
    extra = {"pooled_only": True} if isinstance(model, ECCLModel) else {}
    with torch.inference_mode():
        return model.get_image_features(pixels, **extra).pooler_output  # type: ignore[operator]


def encode_texts(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Computes the text features of either model."""
    extra = {"pooled_only": True} if isinstance(model, ECCLModel) else {}
    with torch.inference_mode():
        return model.get_text_features(input_ids, **extra).pooler_output  # type: ignore[operator]


__all__ = [
    "CLIP_WITH_LORA",
    "LONGEST",
    "MODELS",
    "Batch",
    "Settings",
    "clip_loss",
    "draw_batch",
    "draw_captions",
    "encode_images",
    "encode_texts",
    "encoder_flops",
    "image_flops",
    "image_tokens",
    "make_clip",
    "make_clip_with_lora",
    "make_ours",
    "make_plain",
    "our_loss",
    "pair_flops",
    "text_flops",
]
