"""Reads checkpoints of the original code in three formats: OpenAI's CLIP, IRRA and MLLM4Text-ReID, and ECCL.

All three use the parameter names of OpenAI's CLIP ("OpenAI's names"), with different prefixes. ECCL's files also hold
prompts and LoRA matrices.
"""

import logging
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CLIPTextConfig, CLIPVisionConfig

from ..configuration_eccl import ECCLConfig
from ..modeling_eccl import ECCLModel, resize_position_grid

logger = logging.getLogger(__name__)
# Bytes that a small file may unpack to: torch compresses the code in its archives.
_ALLOWANCE = 2**24

# The parameters outside the layers: this project's names, and OpenAI's names.
_NAMES = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
    "visual_projection.weight": "visual.proj",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
    "logit_scale": "logit_scale",
}
_IMAGE_POSITIONS = "vision_model.embeddings.position_embedding.weight"
_LAYER = re.compile(r"(vision|text)_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_LAYER_NAMES = {
    "self_attn.out_proj": "attn.out_proj.",
    "layer_norm1": "ln_1.",
    "layer_norm2": "ln_2.",
    "mlp.fc1": "mlp.c_fc.",
    "mlp.fc2": "mlp.c_proj.",
}
# OpenAI stores the three input projections of attention in one matrix, in this order.
_INPUT_PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
# OpenAI stores the two projections to the shared space as (inputs, outputs), this project as (outputs, inputs).
_TRANSPOSED = ("visual_projection.weight", "text_projection.weight")
_LORA_NAMES = {
    "self_attn.q_proj": "attn.lora_{}_q",
    "self_attn.k_proj": "attn.lora_{}_k",
    "self_attn.v_proj": "attn.lora_{}_v",
    "self_attn.out_proj": "attn.lora_{}_o",
    "mlp.fc1": "mlp.c_fc.lora_{}",
    "mlp.fc2": "mlp.c_proj.lora_{}",
}
_LAYER_PREFIXES = {"vision": "visual.transformer.resblocks.", "text": "transformer.resblocks."}

# Keys that are ignored: the task heads of IRRA and of the methods that follow it, and three numbers in CLIP's files.
_IRRA_HEADS = ("classifier.", "mlm_head.", "cross_", "ln_pre_t.", "ln_pre_i.", "ln_post.")
_RDE_HEADS = ("visul_emb_layer.", "texual_emb_layer.")
_CLIP_NUMBERS = ("input_resolution", "context_length", "vocab_size")
_DEFAULT_LOGIT_SCALE = 2.6592
# Each attention head of OpenAI's CLIP has this width.
_HEAD_WIDTH = 64
# The published vision encoders of CLIP: width, layers and patch size, with the number of attention heads.
_VISION_HEADS = {
    (768, 12, 32): 12,
    (768, 12, 16): 12,
    (1024, 24, 14): 16,
    (1280, 32, 14): 16,  # ViT-H
    (1408, 40, 14): 16,  # ViT-g
    (1664, 48, 14): 16,  # ViT-G
}
# The published text encoders of CLIP: width and layers, with the number of attention heads.
_TEXT_HEADS = {(512, 12): 8, (640, 12): 10, (768, 12): 12, (1024, 24): 16, (1280, 32): 20}
# Training programs save a state dict under one of these keys, and some ways to train put a prefix before each name.
_WRAPPERS = ("model", "state_dict", "model_state_dict")
_PREFIXES = ("module.", "_orig_mod.")
# The largest default of `prompt_depth`: the published run prompts all 12 layers of ViT-B/16.
_PROMPT_DEPTH = 12


class LoraName(NamedTuple):
    """The place of a LoRA matrix: encoder (`vision` or `text`), layer number, module, and matrix (`A` or `B`)."""

    encoder: str
    layer: str
    module: str
    letter: str


class OriginalContent(NamedTuple):
    """The content of an original checkpoint, in the names and shapes of this project.

    Attributes:
        model: a model with the sizes of the checkpoint and random weights.
        weights: the float32 parameters by their names in `model`; the prompts only if the checkpoint has prompts.
        lora: the LoRA matrices; empty if the checkpoint has none.
    """

    model: ECCLModel
    weights: dict[str, torch.Tensor]
    lora: dict[LoraName, torch.Tensor]


class EncoderFacts(NamedTuple):
    """What a file does not say about its encoders; `None` where it is not known.

    Attributes:
        hidden_act: the activation function of both encoders, by transformers' name: `quick_gelu` or `gelu`.
        num_attention_heads: number of attention heads of the vision encoder, and of the text encoder.
    """

    hidden_act: str | None = None
    num_attention_heads: tuple[int, int] | None = None


def read_checkpoint(
    path: str | Path,
    image_size: tuple[int, int],
    num_prompt_tokens: int,
    prompt_depth: int | None,
    facts: EncoderFacts,
) -> OriginalContent:
    """Reads a checkpoint whose format is recognised by its keys.

    Args:
        path: a file with a CLIP state dict, with `{"model": {"base_model....": ...}}` (IRRA, MLLM4Text-ReID), or with
            `{"model": {"prompt_learner....": ...}}` (ECCL).
        image_size: height and width of the images in pixels.
        num_prompt_tokens, prompt_depth: sizes of the new prompts if the checkpoint has no prompts; the depth `None` is
            the number of layers of the shallower encoder, at most 12.
        facts: what the file does not say.

    Raises:
        ValueError: the file does not hold plain tensors, has none of the three formats, or has a key that is missing,
            unknown, or of another shape than the other keys require; or `facts` are needed to read it.
    """
    state = _read_state(Path(path))
    checkpoint = _Checkpoint(path, state, _recognise_format(state, path))
    prompts = _read_prompts(checkpoint) if checkpoint.to_key is _eccl_key else {}
    if prompts:
        prompt_depth, num_prompt_tokens = prompts["prompt_learner.text_prompts"].shape[:2]
    config = _read_config(checkpoint, image_size, num_prompt_tokens, prompt_depth, facts)
    model = ECCLModel(config)
    expected = model.state_dict()
    for name, tensor in prompts.items():
        checkpoint.check_shape(name, tensor.shape, expected[name].shape)
    weights = prompts | {
        name: _read_weight(checkpoint, name, tensor, config)
        for name, tensor in expected.items()
        if not name.startswith("prompt_learner.")
    }
    lora = _read_lora(checkpoint, config)
    checkpoint.check_unused_keys()
    return OriginalContent(model, weights, lora)


class _Checkpoint:
    """A state dict that remembers which of its keys were read.

    Args:
        path: the file, for error messages.
        state: the state dict.
        to_key: makes the key of the file from an OpenAI name; each format has a different function.
    """

    def __init__(self, path: str | Path, state: dict[str, Any], to_key: Callable[[str], str]):
        self.path, self.state, self.to_key = path, state, to_key
        self.used: set[str] = set()

    def __contains__(self, openai_name: str) -> bool:
        return self.to_key(openai_name) in self.state

    def get(self, openai_name: str, dims: int) -> torch.Tensor:
        """Returns the float32 tensor with an OpenAI name, which must have `dims` dimensions."""
        return self.get_key(self.to_key(openai_name), dims)

    def get_key(self, key: str, dims: int) -> torch.Tensor:
        """Returns the float32 tensor with a key of the file, which must have `dims` dimensions."""
        if key not in self.state:
            raise ValueError(f"{self.path}: the key {key} is missing")
        value = self.state[key]
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
            raise ValueError(f"{self.path}: {key} is {kind}, it must be a tensor of floating point numbers")
        if value.layout != torch.strided or value.is_meta:
            kind = "it is on the meta device" if value.is_meta else f"its layout is {value.layout}"
            raise ValueError(f"{self.path}: {key} is not a plain tensor: {kind}")
        if not value.isfinite().all():
            raise ValueError(f"{self.path}: {key} holds NaN or infinity")
        if value.ndim != dims:
            raise ValueError(f"{self.path}: {key} has the shape {tuple(value.shape)}, it must have {dims} dimensions")
        self.used.add(key)
        return value.float()

    def check_shape(self, key: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if tuple(shape) != tuple(expected):
            raise ValueError(
                f"{self.path}: {key} has the shape {tuple(shape)}, it must have {tuple(expected)} to fit the other keys"
            )

    def check_unused_keys(self) -> None:
        """Checks that every key was read, except the keys that a file of this format may hold in addition.

        Raises:
            ValueError: some keys are unknown; the message names the first five.
        """
        unused = self.state.keys() - self.used
        if self.to_key is _clip_key:
            known = unused & set(_CLIP_NUMBERS)
        elif self.to_key is _irra_key:
            known = {key for key in unused if key.startswith((*_IRRA_HEADS, *_RDE_HEADS))}
            if known:
                heads = ", ".join(sorted({key.split(".")[0] for key in known}))
                logger.warning(
                    f"{self.path}: ignored {len(known)} keys of task heads that are not part of the backbone: {heads}"
                )
        else:
            # The published model holds parts of CLIP's text encoder twice.
            known = {key for key in unused if key.removeprefix("clip_model.") in _NAMES.values()}
        unknown = sorted(unused - known)
        if unknown:
            more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            raise ValueError(f"{self.path}: unknown keys {', '.join(unknown[:5])}{more}")


def _read_state(path: Path) -> dict[str, Any]:
    """Loads the state dict of a file without running code from the file."""
    with path.open("rb") as file:
        start = file.read(64).lstrip().lower()
    if not start:
        raise ValueError(f"{path} is empty")
    if start.startswith(b"<"):
        raise ValueError(f"{path} is a web page, not a checkpoint: download the checkpoint file itself")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            _require_size(path, sum(entry.file_size for entry in archive.infolist()))
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    # torch raises many kinds of errors for broken files. Each of them means that the file is not a readable checkpoint.
    except Exception as error:
        reason = str(error).split("\n")[0]
        if "TorchScript" in str(error):
            reason = "it is a TorchScript archive: load it with torch.jit.load and save its state_dict()"
        elif "weights_only" in str(error) or "Weights only" in str(error):
            reason = "it holds more than tensors, and code from a checkpoint is never run: save only the state dict"
        raise ValueError(f"{path} cannot be read as a file of plain tensors: {reason}") from error
    state = content
    while isinstance(state, dict) and (
        key := next((key for key in _WRAPPERS if isinstance(state.get(key), dict)), None)
    ):
        state = state[key]
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise ValueError(f"{path} holds a {type(state).__name__}, it must hold a state dict whose keys are names")
    # Views that repeat a few stored numbers could ask for all memory when they are copied.
    _require_size(
        path, sum(each.numel() * each.element_size() for each in state.values() if isinstance(each, torch.Tensor))
    )
    while state and (prefix := next((each for each in _PREFIXES if all(key.startswith(each) for key in state)), None)):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _require_size(path: Path, size: int) -> None:
    """Refuses a file whose content takes far more bytes in memory; tensors that share their numbers may take twice."""
    stored = path.stat().st_size
    if size > 2 * stored + _ALLOWANCE:
        raise ValueError(
            f"{path} has {stored:,} bytes, but its content would take {size:,}: it is not a usual checkpoint"
        )


def _recognise_format(state: dict[str, Any], path: str | Path) -> Callable[[str], str]:
    """Returns the function that makes the keys of this file from OpenAI's names."""
    if "prompt_learner.ctx" in state or any(key.startswith("prompt_learner.compound_prompts_text.") for key in state):
        return _eccl_key
    if "prompt_learner.cls_ctx" in state:
        raise ValueError(
            f"{path} is a checkpoint of CLIP-ReID: its prompts belong to the persons of its training set, so it cannot "
            "search by sentences and is not converted"
        )
    if any(key.startswith("base_model.") for key in state):
        return _irra_key
    if any(key.startswith("visual.") for key in state):
        return _clip_key
    raise ValueError(
        f"{path} is neither a CLIP, an IRRA nor an ECCL checkpoint: no key starts with visual. or base_model., "
        f"and there is no prompt_learner.ctx; its first keys are {', '.join(list(state)[:5]) or 'none'}"
    )


def _clip_key(openai_name: str) -> str:
    """Returns the key of a parameter in a file of CLIP."""
    return openai_name


def _irra_key(openai_name: str) -> str:
    """Returns the key of a parameter in a file of IRRA or MLLM4Text-ReID."""
    return f"base_model.{openai_name}"


def _eccl_key(openai_name: str) -> str:
    """Returns the key of a parameter in a file of ECCL."""
    if openai_name.startswith("visual."):
        return f"image_encoder.{openai_name.removeprefix('visual.')}"
    if openai_name == "token_embedding.weight":
        return f"clip_model.{openai_name}"
    return openai_name if openai_name == "logit_scale" else f"text_encoder.{openai_name}"


def _read_config(
    checkpoint: _Checkpoint,
    image_size: tuple[int, int],
    num_prompt_tokens: int,
    prompt_depth: int | None,
    facts: EncoderFacts,
) -> ECCLConfig:
    """Reads the sizes of the model from the shapes in the checkpoint."""
    vocab_size, text_width = checkpoint.get("token_embedding.weight", 2).shape
    vision_width, channels, patch_size, _ = checkpoint.get("visual.conv1.weight", 4).shape
    projection_dim = checkpoint.get("visual.proj", 2).shape[1]
    hidden_act = facts.hidden_act or _known_activation(checkpoint)
    text = _read_encoder_sizes(checkpoint, "text", text_width, 0, facts) | {
        "hidden_act": hidden_act,
        "projection_dim": projection_dim,
        "vocab_size": vocab_size,
        "max_position_embeddings": len(checkpoint.get("positional_embedding", 2)),
        # The last two tokens of CLIP's vocabulary start and end a text.
        "bos_token_id": vocab_size - 2,
        "eos_token_id": vocab_size - 1,
        "pad_token_id": vocab_size - 1,
    }
    vision = _read_encoder_sizes(checkpoint, "vision", vision_width, patch_size, facts) | {
        "hidden_act": hidden_act,
        "projection_dim": projection_dim,
        "num_channels": channels,
        "image_size": list(image_size),
        "patch_size": patch_size,
    }
    if prompt_depth is None:
        prompt_depth = min(_PROMPT_DEPTH, text["num_hidden_layers"], vision["num_hidden_layers"])
    logit_scale = float(checkpoint.get("logit_scale", 0)) if "logit_scale" in checkpoint else _DEFAULT_LOGIT_SCALE
    try:
        return ECCLConfig(
            text_config=text,
            vision_config=vision,
            projection_dim=projection_dim,
            num_prompt_tokens=num_prompt_tokens,
            prompt_depth=prompt_depth,
            logit_scale_init_value=logit_scale,
        )
    except StrictDataclassError as error:
        raise ValueError(f"{checkpoint.path}: {error.__cause__ or error}") from error


def _is_openais(checkpoint: _Checkpoint) -> bool:
    """Returns whether the weights descend from OpenAI's CLIP, with its activation and its heads.

    IRRA and ECCL start from it. Of the files with OpenAI's names alone, its own are in half precision.
    """
    if checkpoint.to_key is not _clip_key:
        return True
    weight = checkpoint.state.get("visual.conv1.weight")
    return isinstance(weight, torch.Tensor) and weight.dtype == torch.float16


def _known_activation(checkpoint: _Checkpoint) -> str:
    if _is_openais(checkpoint):
        return "quick_gelu"
    raise ValueError(
        f"{checkpoint.path} does not say which activation function its layers have, and it is none of OpenAI's files, "
        "which are in half precision: give --hidden_act quick_gelu (for the models of OpenAI) or gelu (for those that "
        "open_clip trained)"
    )


def _read_encoder_sizes(
    checkpoint: _Checkpoint, encoder: str, width: int, patch_size: int, facts: EncoderFacts
) -> dict[str, Any]:
    """Reads the sizes of the layers of an encoder, `text` or `vision`, that is `width` wide."""
    prefix = checkpoint.to_key(_LAYER_PREFIXES[encoder])
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    layers = {int(match[1]) for match in map(pattern.match, checkpoint.state) if match}
    if not layers:
        raise ValueError(f"{checkpoint.path}: the {encoder} encoder has no layers, no key starts with {prefix}0.")
    num_layers = max(layers) + 1
    hidden = checkpoint.get(f"{_LAYER_PREFIXES[encoder]}0.mlp.c_fc.weight", 2).shape[0]
    if encoder == "vision":
        heads = _VISION_HEADS.get((width, num_layers, patch_size))
    else:
        heads = _TEXT_HEADS.get((width, num_layers))
    if facts.num_attention_heads:
        heads = facts.num_attention_heads[("vision", "text").index(encoder)]
    elif heads is None and not _is_openais(checkpoint):
        raise ValueError(
            f"{checkpoint.path}: the {encoder} encoder, {width} wide with {num_layers} layers, is not a published one, "
            "and the file does not say how many attention heads it has: give --num_attention_heads VISION TEXT"
        )
    elif heads is None and width % _HEAD_WIDTH:
        raise ValueError(
            f"{checkpoint.path}: the {encoder} encoder is {width} wide, it must be a multiple of {_HEAD_WIDTH}, the "
            "width of each attention head of OpenAI's CLIP"
        )
    heads = heads or width // _HEAD_WIDTH
    if heads < 1 or width % heads:
        raise ValueError(
            f"num_attention_heads is {heads} for the {encoder} encoder, it must divide the encoder's width of {width}"
        )
    return {
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
    }


def _read_weight(checkpoint: _Checkpoint, name: str, expected: torch.Tensor, config: ECCLConfig) -> torch.Tensor:
    """Reads the parameter `name` of the model, which has the shape of `expected`."""
    if name == _IMAGE_POSITIONS:
        return _read_image_positions(checkpoint, expected, config)
    if name == "logit_scale" and name not in checkpoint:
        return torch.tensor(_DEFAULT_LOGIT_SCALE)
    layer = _LAYER.fullmatch(name)
    part = None
    if layer is None:
        openai_name = _NAMES[name]
    else:
        encoder, index, module, kind = layer.groups()
        part = _INPUT_PROJECTIONS.index(module) if module in _INPUT_PROJECTIONS else None
        in_layer = f"{_LAYER_NAMES[module]}{kind}" if part is None else f"attn.in_proj_{kind}"
        openai_name = f"{_LAYER_PREFIXES[encoder]}{index}.{in_layer}"
    value = checkpoint.get(openai_name, expected.ndim)
    shape = tuple(expected.shape)
    if name in _TRANSPOSED:
        shape = shape[::-1]
    elif part is not None:
        shape = (3 * shape[0], *shape[1:])
    checkpoint.check_shape(checkpoint.to_key(openai_name), value.shape, shape)
    if name in _TRANSPOSED:
        return value.T.contiguous()
    return value if part is None else value.chunk(3)[part].clone()


def _read_image_positions(checkpoint: _Checkpoint, expected: torch.Tensor, config: ECCLConfig) -> torch.Tensor:
    """Reads the position embeddings of the image patches; those of a square grid are resized to the model's grid."""
    openai_name = _NAMES[_IMAGE_POSITIONS]
    key, value = checkpoint.to_key(openai_name), checkpoint.get(openai_name, 2)
    checkpoint.check_shape(key, value.shape[1:], expected.shape[1:])
    patches, (rows, columns) = len(value) - 1, config.grid_size
    if patches == rows * columns:
        return value
    side = round(patches**0.5)
    if side * side != patches:
        size = config.patch_side
        raise ValueError(
            f"{checkpoint.path}: {key} holds position embeddings for {patches} patches, which is neither a square grid "
            f"nor the grid of {rows} x {columns} patches of image_size {list(config.input_size)}: give the image_size "
            f"that the checkpoint was trained with, it has {patches} patches of {size} x {size} pixels"
        )
    return resize_position_grid(value, (side, side), config.grid_size)


def _read_prompts(checkpoint: _Checkpoint) -> dict[str, torch.Tensor]:
    """Reads the parameters of the prompt learner. The original code has special names for those of layer 0."""
    count = sum(key.startswith("prompt_learner.compound_prompts_text.") for key in checkpoint.state)
    texts = [checkpoint.get_key("prompt_learner.ctx", 2)]
    texts += [checkpoint.get_key(f"prompt_learner.compound_prompts_text.{index}", 2) for index in range(count)]
    for index, text in enumerate(texts[1:]):
        checkpoint.check_shape(f"prompt_learner.compound_prompts_text.{index}", text.shape, texts[0].shape)
    prompts = {"prompt_learner.text_prompts": torch.stack(texts)}
    projections = ["proj", *(f"compound_prompt_projections.{index}" for index in range(count))]
    for index, projection in enumerate(projections):
        for part, dims in (("weight", 2), ("bias", 1)):
            value = checkpoint.get_key(f"prompt_learner.{projection}.{part}", dims)
            prompts[f"prompt_learner.projections.{index}.{part}"] = value
    return prompts


def _read_lora(checkpoint: _Checkpoint, config: ECCLConfig) -> dict[LoraName, torch.Tensor]:
    """Reads the LoRA matrices of all layers; if the checkpoint holds no LoRA at all, the result is empty."""
    if not any(".lora_" in key for key in checkpoint.state):
        return {}
    matrices: dict[LoraName, torch.Tensor] = {}
    rank = None
    text, vision = config.encoder_configs
    encoders: dict[str, CLIPTextConfig | CLIPVisionConfig] = {"vision": vision, "text": text}
    for encoder, sizes in encoders.items():
        width, hidden = sizes.hidden_size, sizes.intermediate_size
        shapes = dict.fromkeys(_LORA_NAMES, (width, width)) | {"mlp.fc1": (width, hidden), "mlp.fc2": (hidden, width)}
        for index in range(sizes.num_hidden_layers):
            for module, pattern in _LORA_NAMES.items():
                inputs, outputs = shapes[module]
                for letter in "AB":
                    openai_name = f"{_LAYER_PREFIXES[encoder]}{index}.{pattern.format(letter)}"
                    value = checkpoint.get(openai_name, 2)
                    rank = value.shape[0] if rank is None else rank
                    expected = (rank, inputs) if letter == "A" else (outputs, rank)
                    checkpoint.check_shape(checkpoint.to_key(openai_name), value.shape, expected)
                    matrices[LoraName(encoder, str(index), module, letter)] = value
    return matrices


__all__ = ["EncoderFacts", "LoraName", "OriginalContent", "read_checkpoint"]
