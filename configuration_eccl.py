"""Configuration of ECCL: a CLIP dual encoder for person-shaped images, with deep coupled prompts."""

import copy
import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import CLIPTextConfig, CLIPVisionConfig, PreTrainedConfig
from transformers.utils.peft_utils import find_adapter_config_file

# The name of the task, for `transformers.pipeline`.
PIPELINE_TASK = "text-to-person-retrieval"
# `config.json` carries this table: `pipeline(task, model=...)` finds the pipeline's class in it.
_PIPELINES = {
    PIPELINE_TASK: {"impl": "pipeline_eccl.TextToPersonRetrievalPipeline", "pt": ["AutoModel"]},
}
# The input of the published model: 24 x 8 patches of 16 x 16 pixels.
_IMAGE_SIZE = [384, 128]
_PATCH_SIZE = 16
# Limits for checkpoints from others: beyond them, a small file could ask for all memory. Known models stay below.
_LARGEST = {
    "num_hidden_layers": 256,
    "hidden_size": 16_384,
    "intermediate_size": 65_536,
    "num_attention_heads": 256,
    "vocab_size": 2_000_000,
    "max_position_embeddings": 8_192,
    "num_channels": 16,
    "patch_size": 1_024,
    # transformers makes a table of the labels, although the model has none.
    "num_labels": 10_000,
}
# Bytes of a JSON file; the largest known tokenizer takes a third.
_LARGEST_JSON = 2**26
_LARGEST_PROJECTION = 16_384
_MOST_PATCHES = 4_096


@strict
class ECCLConfig(PreTrainedConfig):
    """The shape of an [`ECCLModel`]. It holds no training settings.

    Args:
        text_config (`dict` or `CLIPTextConfig`, *optional*): the text encoder. The default is that of CLIP ViT-B/16.
        vision_config (`dict` or `CLIPVisionConfig`, *optional*): the image encoder. The default is that of CLIP
            ViT-B/16 with `image_size=[384, 128]` (height, width).
        projection_dim (`int`, defaults to 512): width of the space that both encoders share.
        num_prompt_tokens (`int`, defaults to 4): number of learnable tokens in each prompted layer; 0 gives a plain
            dual encoder.
        prompt_depth (`int`, defaults to 12): number of layers, counted from the first, that get their own prompts (in
            both encoders).
        logit_scale_init_value (`float`, defaults to 2.6592): natural logarithm of the factor on the logits.
        initializer_factor (`float`, defaults to 1.0): factor on the standard deviations of CLIP's initialisation.

    Raises:
        ValueError: two sizes do not fit each other. The message names both.
    """

    model_type = "eccl"
    _auto_class = "AutoConfig"
    # transformers declares a table of `SubConfigSpec` and makes one of each class.
    sub_configs_defaults = {"text_config": CLIPTextConfig, "vision_config": CLIPVisionConfig}  # type: ignore[dict-item]

    text_config: dict | CLIPTextConfig | None = None
    vision_config: dict | CLIPVisionConfig | None = None
    projection_dim: int = 512
    num_prompt_tokens: int = 4
    prompt_depth: int = 12
    logit_scale_init_value: float | int = 2.6592
    initializer_factor: float = 1.0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.vision_config is None or isinstance(self.vision_config, dict):
            self.vision_config = {"image_size": _IMAGE_SIZE, "patch_size": _PATCH_SIZE} | (self.vision_config or {})
        # Before transformers computes with these numbers.
        for encoder, values in (("text_config", self.text_config), ("vision_config", self.vision_config)):
            if isinstance(values, dict):
                _require_limits(f"{encoder}.", values)
        _require_limits("", kwargs)
        kwargs["custom_pipelines"] = copy.deepcopy(_PIPELINES)
        super().__post_init__(**kwargs)
        vision = self.encoder_configs[1]
        if isinstance(vision.image_size, int):
            vision.image_size = [vision.image_size] * 2
        elif vision.image_size is not None:
            vision.image_size = list(vision.image_size)

    def to_dict(self) -> dict:
        # `pipeline` replaces the names in `custom_pipelines` by classes, which JSON cannot hold. transformers takes the
        # dtype for the one to compute in, and half precision, in which weights can be stored, is slow on many CPUs.
        return super().to_dict() | {"custom_pipelines": copy.deepcopy(_PIPELINES), "dtype": "float32"}

    def validate_architecture(self) -> None:
        """Refuses shapes from which no model can be built. `@strict` calls it."""
        text, vision = self.encoder_configs
        require_sound_config(self)
        size = vision.image_size
        if any(side < 1 or side % self.patch_side for side in self.input_size):
            raise ValueError(
                f"vision_config.image_size is {size}, it must be [height, width], "
                f"both multiples of vision_config.patch_size ({vision.patch_size})"
            )
        if self.num_prompt_tokens < 0:
            raise ValueError(f"num_prompt_tokens is {self.num_prompt_tokens}, it must not be negative")
        if not self.num_prompt_tokens:
            return
        # The shortest caption has three tokens: SOT, one word and EOT.
        if self.num_prompt_tokens + 3 > text.max_position_embeddings:
            raise ValueError(
                f"num_prompt_tokens is {self.num_prompt_tokens}, which leaves no room for a caption within "
                f"text_config.max_position_embeddings ({text.max_position_embeddings})"
            )
        layers = min(text.num_hidden_layers, vision.num_hidden_layers)
        if not 1 <= self.prompt_depth <= layers:
            raise ValueError(
                f"prompt_depth is {self.prompt_depth}, it must be between 1 and the number of layers of the "
                f"shallower encoder ({layers})"
            )

    @property
    def encoder_configs(self) -> tuple[CLIPTextConfig, CLIPVisionConfig]:
        """The configurations of the text encoder and of the image encoder."""
        text, vision = self.text_config, self.vision_config
        # The field types also allow the forms that the constructor takes; `__post_init__` has parsed them.
        assert isinstance(text, CLIPTextConfig) and isinstance(vision, CLIPVisionConfig)
        return text, vision

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        size = self.encoder_configs[1].image_size
        assert isinstance(size, (list, tuple))  # `validate_architecture` refuses everything else.
        height, width = size
        return height, width

    @property
    def patch_side(self) -> int:
        """Height, and also width, of an image patch in pixels."""
        size = self.encoder_configs[1].patch_size
        assert isinstance(size, int)  # `validate_architecture` refuses everything else.
        return size

    @property
    def grid_size(self) -> tuple[int, int]:
        """Number of rows and number of columns of image patches."""
        height, width = self.input_size
        return height // self.patch_side, width // self.patch_side

    @property
    def max_text_length(self) -> int:
        """Maximum caption length in tokens, SOT and EOT included; the prompts take the other positions."""
        return self.encoder_configs[0].max_position_embeddings - self.num_prompt_tokens


def require_sound_config(config: PreTrainedConfig) -> None:
    """Refuses a configuration that asks for absurd sizes, or for code from elsewhere.

    Args:
        config: the configuration of an ECCL model or of a CLIP, for example of an unknown checkpoint.

    Raises:
        ValueError: a size is not a number from 1 to its limit; or the attention is a kernel of the Hub, which is a
            program; or the weights are quantised. The message names the field.
    """
    encoders = {"text_config": config.text_config, "vision_config": config.vision_config}
    for encoder, values in encoders.items():
        _require_limits(f"{encoder}.", values.to_dict())
        if not isinstance(values.layer_norm_eps, (int, float)):
            raise ValueError(f"{encoder}.layer_norm_eps is {values.layer_norm_eps!r}, it must be a number")
    if not 1 <= config.projection_dim <= _LARGEST_PROJECTION:
        raise ValueError(f"projection_dim is {config.projection_dim}, it must be between 1 and {_LARGEST_PROJECTION:,}")
    patches = _count_patches(config.vision_config)
    if patches > _MOST_PATCHES:
        raise ValueError(
            f"vision_config.image_size is {config.vision_config.image_size}: an image would have {patches:,} patches, "
            f"the limit is {_MOST_PATCHES:,}"
        )
    for name, values in {"config": config, **encoders}.items():
        for field in ("output_attentions", "output_hidden_states", "return_dict"):
            if not isinstance(getattr(values, field), bool):
                raise ValueError(f"{name}.{field} is {getattr(values, field)!r}, it must be true or false")
        if "/" in str(values._attn_implementation):
            raise ValueError(
                f"{name}.attn_implementation is {values._attn_implementation!r}: a checkpoint must not choose a kernel "
                "from the Hub; pass attn_implementation to from_pretrained if you trust it"
            )
        if getattr(values, "quantization_config", None):
            raise ValueError(f"{name}.quantization_config is set: quantised weights are not supported")


def _require_limits(prefix: str, values: Mapping[str, Any]) -> None:
    for name, largest in _LARGEST.items():
        value = values.get(name, 1)
        if isinstance(value, int) and not 1 <= value <= largest:
            raise ValueError(f"{prefix}{name} is {value}, it must be between 1 and {largest:,}")


def expected_parameters(config: PreTrainedConfig) -> int:
    """Computes the number of parameters of an ECCL model or of a CLIP, from its configuration alone."""
    text, vision = config.text_config, config.vision_config
    total = config.projection_dim * (text.hidden_size + vision.hidden_size) + 1
    for encoder in (text, vision):
        width, inner = encoder.hidden_size, encoder.intermediate_size
        attention, mlp, norms = 4 * (width * width + width), 2 * width * inner + width + inner, 4 * width
        total += encoder.num_hidden_layers * (attention + mlp + norms)
    total += (text.vocab_size + text.max_position_embeddings + 2) * text.hidden_size
    # The patch embedding, the class token, the positions, and two layer norms.
    total += (vision.num_channels * vision.patch_size**2 + 1 + 1 + _count_patches(vision) + 4) * vision.hidden_size
    if getattr(config, "num_prompt_tokens", 0):
        prompts, projection = config.num_prompt_tokens * text.hidden_size, (text.hidden_size + 1) * vision.hidden_size
        total += config.prompt_depth * (prompts + projection)
    return total


def _count_patches(vision: PreTrainedConfig) -> int:
    size, patch_size = vision.image_size, vision.patch_size
    if not isinstance(patch_size, int):
        raise ValueError(f"vision_config.patch_size is {patch_size}, it must be one number: patches are square")
    sides = [size] * 2 if isinstance(size, int) else list(size or ())
    if len(sides) != 2:
        raise ValueError(f"vision_config.image_size is {size}, it must be [height, width]")
    return (sides[0] // patch_size) * (sides[1] // patch_size)


def checkpoint_kind(name: str | PathLike[str]) -> Literal["adapter", "clip", "eccl"]:
    """Tells which kind of checkpoint this is: an adapter of peft, a CLIP of transformers, or an ECCL model.

    Args:
        name: local folder or Hub id of the checkpoint.

    Raises:
        ValueError: the checkpoint is none of the three; or it has a JSON file of absurd size, or asks for absurd sizes.
        OSError: there is no such folder or Hub repository, or it has neither `adapter_config.json` nor `config.json`.
    """
    for file in Path(name).glob("*.json"):
        if file.stat().st_size > _LARGEST_JSON:
            raise ValueError(f"{file} has {file.stat().st_size:,} bytes, the limit is {_LARGEST_JSON:,}")
    if find_adapter_config_file(str(name)) is not None:
        return "adapter"
    try:
        config, _ = PreTrainedConfig.get_config_dict(str(name))
        for part in ("text_config", "vision_config"):
            values = config.get(part) or {}
            if not isinstance(values, dict):
                raise ValueError(f"config.json of {name}: {part} is {values!r}, it must be an object")
            _require_limits(f"{part}.", values)
        _require_limits("", config)
    except (TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"config.json of {name} does not describe a model: {error}") from error
    if not config:  # transformers returns an empty dict if the file is missing.
        raise FileNotFoundError(
            f"{name} is not a checkpoint: it has no adapter_config.json, and config.json is missing or empty"
        )
    model_type = config.get("model_type")
    if model_type == ECCLConfig.model_type:
        return "eccl"
    if model_type == "clip":
        return "clip"
    raise ValueError(
        f"{name} has model_type {model_type!r} in its config.json: it must be 'clip' or 'eccl', "
        "or the checkpoint must be an adapter (a folder with adapter_config.json)"
    )


def list_shards(index: Path) -> list[str]:
    """Returns the names of the files that an index of weights names; each must be in the folder of the index.

    Raises:
        ValueError: the index is damaged, or names a file elsewhere.
    """
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is not an index of weights: {error}") from error
    for shard in shards:
        is_name = isinstance(shard, str) and Path(shard).name == shard and "\\" not in shard
        if not is_name or Path(shard).suffix not in (".safetensors", ".bin"):
            raise ValueError(f"{index} names the file {shard!r}: it must be a file in the same folder, of weights")
    return shards


__all__ = [
    "PIPELINE_TASK",
    "ECCLConfig",
    "checkpoint_kind",
    "expected_parameters",
    "list_shards",
    "require_sound_config",
]
