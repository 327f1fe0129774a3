"""Configuration of ECCL: a CLIP dual encoder with a person-shaped image and deep coupled prompts."""

import copy
from os import PathLike
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import CLIPTextConfig, CLIPVisionConfig, PreTrainedConfig
from transformers.utils.peft_utils import find_adapter_config_file

# What `pipeline(task, model=...)` finds beside the model; it travels with a checkpoint.
_PIPELINES = {
    "text-to-person-retrieval": {"impl": "pipeline_eccl.TextToPersonRetrievalPipeline", "pt": ["AutoModel"]},
}
# 24 x 8 patches of 16 pixels: the input of the published model.
_IMAGE_SIZE = [384, 128]
_PATCH_SIZE = 16


@strict
class ECCLConfig(PreTrainedConfig):
    """The shape of an [`ECCLModel`]; it holds no training value.

    Args:
        text_config (`dict` or `CLIPTextConfig`, *optional*): the text encoder; ViT-B/16's by default.
        vision_config (`dict` or `CLIPVisionConfig`, *optional*): the image encoder; ViT-B/16's at
            `image_size=[384, 128]` (height, width) by default.
        projection_dim (`int`, defaults to 512): width of the space that both encoders share.
        num_prompt_tokens (`int`, defaults to 4): learnable tokens per prompted layer; 0 is a plain dual encoder.
        prompt_depth (`int`, defaults to 12): the first so many layers of both encoders get prompts of their own.
        logit_scale_init_value (`float`, defaults to 2.6592): natural logarithm of the scale of the logits.
        initializer_factor (`float`, defaults to 1.0): factor on the standard deviations of CLIP's initialisation.

    Raises:
        ValueError: sizes that do not fit each other; both numbers are named.
    """

    model_type = "eccl"
    _auto_class = "AutoConfig"
    sub_configs_defaults = {"text_config": CLIPTextConfig, "vision_config": CLIPVisionConfig}

    text_config: dict | CLIPTextConfig | None = None
    vision_config: dict | CLIPVisionConfig | None = None
    projection_dim: int = 512
    num_prompt_tokens: int = 4
    prompt_depth: int = 12
    logit_scale_init_value: float | int = 2.6592
    initializer_factor: float = 1.0

    def __post_init__(self, **kwargs):
        if self.vision_config is None or isinstance(self.vision_config, dict):
            self.vision_config = {"image_size": _IMAGE_SIZE, "patch_size": _PATCH_SIZE} | (self.vision_config or {})
        kwargs["custom_pipelines"] = copy.deepcopy(_PIPELINES)
        super().__post_init__(**kwargs)
        if isinstance(self.vision_config.image_size, int):
            self.vision_config.image_size = [self.vision_config.image_size] * 2
        self.vision_config.image_size = list(self.vision_config.image_size)

    def to_dict(self) -> dict:
        # `pipeline` puts classes in the place of their names.
        return super().to_dict() | {"custom_pipelines": copy.deepcopy(_PIPELINES)}

    def validate_architecture(self):
        """Part of `@strict`: refuses shapes that no model can be built from."""
        text, vision = self.text_config, self.vision_config
        if not isinstance(vision.patch_size, int):
            raise ValueError(
                f"vision_config.patch_size is {vision.patch_size}, it must be one number: patches are square"
            )
        if len(vision.image_size) != 2 or any(side < 1 or side % vision.patch_size for side in vision.image_size):
            raise ValueError(
                f"vision_config.image_size is {vision.image_size}, it must be [height, width], "
                f"both multiples of patch_size ({vision.patch_size})"
            )
        if self.num_prompt_tokens < 0:
            raise ValueError(f"num_prompt_tokens is {self.num_prompt_tokens}, it must not be negative")
        if not self.num_prompt_tokens:
            return
        # SOT, one word and EOT are the least that a caption holds.
        if self.num_prompt_tokens + 3 > text.max_position_embeddings:
            raise ValueError(
                f"num_prompt_tokens is {self.num_prompt_tokens}, which leaves no room for a caption within "
                f"text_config.max_position_embeddings ({text.max_position_embeddings})"
            )
        layers = min(text.num_hidden_layers, vision.num_hidden_layers)
        if not 1 <= self.prompt_depth <= layers:
            raise ValueError(
                f"prompt_depth is {self.prompt_depth}, it must be between 1 and the layers of the shallower "
                f"encoder ({layers})"
            )

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of image patches."""
        height, width = self.vision_config.image_size
        return height // self.vision_config.patch_size, width // self.vision_config.patch_size

    @property
    def max_text_length(self) -> int:
        """Tokens of the longest caption, SOT and EOT included: the prompts take the places of the rest."""
        return self.text_config.max_position_embeddings - self.num_prompt_tokens


def checkpoint_kind(name: str | PathLike[str]) -> Literal["adapter", "clip", "eccl"]:
    """Tells what a checkpoint is: an adapter of peft's, a CLIP of transformers', or an ECCL model.

    Args:
        name: a local folder or a Hub id.

    Raises:
        ValueError: it is none of the three.
        OSError: there is no such folder or Hub repository, or it has neither `adapter_config.json` nor `config.json`.
    """
    if find_adapter_config_file(str(name)) is not None:
        return "adapter"
    model_type = PreTrainedConfig.get_config_dict(str(name))[0].get("model_type")
    if model_type == ECCLConfig.model_type:
        return "eccl"
    if model_type == "clip":
        return "clip"
    raise ValueError(f"{name} has model_type {model_type!r}: it must be 'clip' or 'eccl', or an adapter")


__all__ = ["ECCLConfig", "checkpoint_kind"]
