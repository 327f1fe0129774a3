"""The ECCL model: the two encoders of CLIP for person-shaped images, with deep prompts that are coupled between them.

transformers saves this file with each checkpoint, and also every file that a relative import in it names. It looks at
each line, this text included, so the next line brings the pipeline along:

    from .pipeline_eccl import TextToPersonRetrievalPipeline
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import QuickGELUActivation
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import (
    CLIPMLP,
    CLIPAttention,
    CLIPEncoder,
    CLIPEncoderLayer,
    CLIPPreTrainedModel,
    image_text_contrastive_loss,
)
from transformers.processing_utils import Unpack
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    ModelOutput,
    TransformersKwargs,
    cached_file,
)
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .configuration_eccl import (
    ECCLConfig,
    checkpoint_kind,
    expected_parameters,
    list_shards,
    require_sound_config,
)

# CLIP checkpoints that were saved before transformers 4.31 have this end-of-text id. It is wrong for all of them: the
# end-of-text token of CLIP is the last one of the vocabulary.
_LEGACY_EOS_TOKEN_ID = 2
# The arguments of `from_pretrained` that choose the files.
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# Bytes. The names and shapes of the largest known CLIP take a twentieth.
_LARGEST_HEADER = 4 * 2**20
# Parameters, 256 MiB in float32: no harm is done if a checkpoint without weights makes such a model.
_SMALL_MODEL = 2**26
_POSITION_WEIGHT = "vision_model.embeddings.position_embedding.weight"


@dataclass
class ECCLOutput(ModelOutput):
    """The output of [`ECCLModel`], with the fields of CLIP's output in the same order.

    A field is `None` if it needs an input that was not given.

    Args:
        loss (`torch.Tensor`, one number): with `return_loss=True` the contrastive loss of CLIP: caption i belongs to
            image i.
        logits_per_image (`torch.Tensor` of shape `(images, texts)`): the transpose of `logits_per_text`.
        logits_per_text (`torch.Tensor` of shape `(texts, images)`): cosine similarities times exp(logit_scale).
        text_embeds (`torch.Tensor` of shape `(texts, projection_dim)`): text features. They are not normalised, unlike
            CLIP's: the losses and the metric normalise.
        image_embeds (`torch.Tensor` of shape `(images, projection_dim)`): image features, not normalised.
        text_model_output (`BaseModelOutputWithPooling`): the output of [`~ECCLModel.get_text_features`]; `None` with
            `embed_chunk_size`.
        vision_model_output (`BaseModelOutputWithPooling`): the output of [`~ECCLModel.get_image_features`]; `None` with
            `embed_chunk_size`.
    """

    loss: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple:
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


class ECCLPromptLearner(nn.Module):
    """Learnable text prompts for each prompted layer, and the linear maps that compute image prompts from them.

    Layer l has the text prompt `T_l` and the image prompt `V_l = W_l T_l + b_l` (multi-modal prompt learning, MaPLe,
    CVPR 2023, section 3.2).
    """

    def __init__(self, config: ECCLConfig):
        super().__init__()
        text_width, vision_width = (encoder.hidden_size for encoder in config.encoder_configs)
        self.text_prompts = nn.Parameter(torch.empty(config.prompt_depth, config.num_prompt_tokens, text_width))
        self.projections = nn.ModuleList(nn.Linear(text_width, vision_width) for _ in range(config.prompt_depth))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the prompts from N(0, 0.02), and the maps as `nn.Linear` does; all maps from layer 1 on are equal."""
        init.normal_(self.text_prompts, std=0.02)
        weights = [projection.get_parameter("weight") for projection in self.projections]
        biases = [projection.get_parameter("bias") for projection in self.projections]
        bound = self.text_prompts.shape[-1] ** -0.5
        for weight, bias in zip(weights[:2], biases[:2], strict=True):
            init.uniform_(weight, -bound, bound)
            init.uniform_(bias, -bound, bound)
        for weight, bias in zip(weights[2:], biases[2:], strict=True):
            init.copy_(weight, weights[1])
            init.copy_(bias, biases[1])

    def forward(self, modality: str) -> list[torch.Tensor]:
        """Returns the prompts of each layer, `(num_prompt_tokens, width)`, for the modality `"text"` or `"vision"`."""
        if modality == "text":
            return list(self.text_prompts)
        return [project(prompts) for project, prompts in zip(self.projections, self.text_prompts, strict=True)]


class ECCLVisionEmbeddings(nn.Module):
    """The embeddings of patches, class token and learned positions, as in CLIP. The grid need not be square."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        # `ECCLConfig` refuses everything else.
        assert isinstance(config.image_size, (list, tuple)) and isinstance(config.patch_size, int)
        self.config = config
        self.image_size = tuple(config.image_size)
        self.embed_dim = config.hidden_size
        self.class_embedding = nn.Parameter(torch.empty(self.embed_dim))
        self.patch_embedding = nn.Conv2d(
            config.num_channels, self.embed_dim, kernel_size=config.patch_size, stride=config.patch_size, bias=False
        )
        rows, columns = (side // config.patch_size for side in self.image_size)
        self.position_embedding = nn.Embedding(1 + rows * columns, self.embed_dim)
        positions = torch.arange(1 + rows * columns).expand((1, -1))
        self.position_ids = nn.Buffer(positions, persistent=False)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Embeds images.

        Args:
            pixel_values: `(batch, channels, height, width)`.

        Returns:
            `(batch, 1 + patches, width)`, the class token first.
        """
        if tuple(pixel_values.shape[-2:]) != self.image_size:
            raise ValueError(
                f"pixel_values are {pixel_values.shape[-2]} x {pixel_values.shape[-1]} (height x width), "
                f"the model takes {self.image_size[0]} x {self.image_size[1]}"
            )
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_embedding.expand(patches.shape[0], 1, -1), patches], dim=1)
        # Offloading brings the weights of a module only when the module is called.
        return tokens + self.position_embedding(self.position_ids)


class ECCLQuickGELU(nn.Module):
    """The activation of CLIP, `x * sigmoid(1.702 x)`. For its gradient it keeps one tensor, not two."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(inputs * 1.702) / 1.702


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Returns the dtype of autocast on a device; `None` if it is off, or does not know the device."""
    is_on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if is_on else None


class ECCLLayerNorm(nn.LayerNorm):
    """A layer norm whose output has the dtype of autocast, if this is on.

    Autocast computes a layer norm in float32, and each linear layer after it would convert, and keep, the same output.

    Args:
        norm: the layer norm whose weights it takes.
    """

    def __init__(self, norm: nn.LayerNorm):
        nn.Module.__init__(self)
        self.normalized_shape, self.eps = norm.normalized_shape, norm.eps
        self.elementwise_affine = norm.elementwise_affine
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).to(autocast_dtype(input.device) or input.dtype)


class ECCLLastLayer(CLIPEncoderLayer):
    """The last layer of an encoder of CLIP. It can compute the one token of each sequence that the encoder pools.

    The other tokens are then only keys and values, which saves their queries, output projections and MLPs.

    Args:
        layer: the layer whose parts it takes.
    """

    def __init__(self, layer: CLIPEncoderLayer):
        # New parts would draw random numbers for weights that are not used.
        nn.Module.__init__(self)
        self.embed_dim = layer.embed_dim
        for name, part in layer.named_children():
            self.add_module(name, part)

    # transformers also passes None, although it annotates a tensor.
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any,
        pooled_positions: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Computes the layer.

        Args:
            hidden_states: `(batch, length, width)`.
            attention_mask: as for CLIP's layer. It has no effect with `pooled_positions`.
            pooled_positions: `(batch,)`: the only token of each sequence to compute; by default all are.
            **kwargs: `is_causal`: whether a token sees only itself and earlier tokens; and arguments of the attention,
                which have no effect with `pooled_positions`.

        Returns:
            `(batch, length, width)`, or `(batch, width)` with `pooled_positions`.
        """
        if pooled_positions is None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        attention, rows = self.self_attn, torch.arange(hidden_states.shape[0], device=hidden_states.device)

        def split_heads(tokens: torch.Tensor) -> torch.Tensor:
            return tokens.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)

        tokens = self.layer_norm1(hidden_states)
        mask = None
        if kwargs.get("is_causal"):
            tokens_to_see = torch.arange(hidden_states.shape[1], device=hidden_states.device)
            mask = (tokens_to_see <= pooled_positions[:, None])[:, None, None]
        # With one query per sequence, this is fast whatever the attention implementation is.
        attended = nn.functional.scaled_dot_product_attention(
            split_heads(attention.q_proj(tokens[rows, pooled_positions][:, None])),
            split_heads(attention.k_proj(tokens)),
            split_heads(attention.v_proj(tokens)),
            mask,
            dropout_p=float(attention.dropout or 0) if self.training else 0.0,
            scale=attention.scale,
        )
        pooled = hidden_states[rows, pooled_positions] + attention.out_proj(attended.flatten(1))
        return pooled + self.mlp(self.layer_norm2(pooled))


def _speed_up(encoder: CLIPEncoder) -> None:
    """Replaces parts of an encoder of CLIP by those above, which take less time. Names and values of weights stay."""
    layers = cast(list[CLIPEncoderLayer], encoder.layers)
    layers[-1] = ECCLLastLayer(layers[-1])
    for layer in layers:
        layer.layer_norm1, layer.layer_norm2 = ECCLLayerNorm(layer.layer_norm1), ECCLLayerNorm(layer.layer_norm2)
        if isinstance(layer.mlp.activation_fn, QuickGELUActivation):
            layer.mlp.activation_fn = ECCLQuickGELU()


class ECCLTextModel(CLIPTextModel):
    """The text transformer of CLIP, with prompts between the start token and the caption."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__(config)
        _speed_up(self.encoder)

    # As in transformers' own models, `position_ids` is among the `TransformersKwargs`, too.
    @capture_outputs(tie_last_hidden_states=False)
    def forward(  # type: ignore[misc]
        self,
        input_ids: torch.Tensor,
        prompts: list[torch.Tensor],
        position_ids: torch.Tensor | None = None,
        pooled_only: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Encodes captions.

        Args:
            input_ids: `(batch, length)`, the token ids.
            prompts: the prompts of each prompted layer, `(num_prompt_tokens, width)`; an empty list for no prompts.
            position_ids: `(batch, length)`, the positions of the tokens, without the prompts; 0, 1, 2, ... by default.
            pooled_only: leaves out what only `last_hidden_state` needs, which is then `None`.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`, and arguments of the attention.

        Returns:
            `pooler_output` `(batch, width)`: the feature at the end-of-text token of each caption. `last_hidden_state`
            `(batch, length, width)`: the features of all tokens of `input_ids`, after the last layer norm; tokens at
            the end of the sequence are missing if the prompts take their positions. On request `hidden_states` and
            `attentions`, in which the prompts are among the tokens.
        """
        _check_outputs(self.config, kwargs, pooled_only)
        end_positions = (input_ids == self.end_token).int().argmax(dim=-1)
        count = len(prompts[0]) if prompts else 0
        if not torch.compiler.is_compiling():
            self._check_end(input_ids, end_positions, count)
        hidden = self.embeddings.token_embedding(input_ids)
        if prompts:
            hidden = torch.cat([hidden[:, :1], _repeat_for_batch(prompts[0], hidden), hidden[:, 1:]], dim=1)
            hidden = hidden[:, : self.config.max_position_embeddings]
            position_ids = None if position_ids is None else _make_room(position_ids, count)[:, : hidden.shape[1]]
        hidden = self.embeddings(inputs_embeds=hidden, position_ids=position_ids)
        # The configuration, the embeddings, no attention mask, no cache. Their names change between transformers 5.23
        # and 5.40.
        mask = create_causal_mask(self.config, hidden, None, None)
        kwargs.pop("is_causal", None)
        for index, layer in enumerate(self.encoder.layers):
            if 1 <= index < len(prompts):
                layer_prompts = _repeat_for_batch(prompts[index], hidden)
                hidden = torch.cat([hidden[:, :1], layer_prompts, hidden[:, 1 + count :]], dim=1)
            if pooled_only and index == len(self.encoder.layers) - 1:
                pooled = layer(hidden, mask, pooled_positions=end_positions + count, is_causal=True, **kwargs)
                return BaseModelOutputWithPooling(pooler_output=self.final_layer_norm(pooled))
            hidden = layer(hidden, mask, is_causal=True, **kwargs)
        if prompts:
            hidden = torch.cat([hidden[:, :1], hidden[:, 1 + count :]], dim=1)
        hidden = self.final_layer_norm(hidden)
        at_end = hidden[torch.arange(hidden.shape[0], device=hidden.device), end_positions]
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=at_end)

    @property
    def end_token(self) -> int:
        """The id of the end-of-text token."""
        end_token = self.config.eos_token_id
        if not isinstance(end_token, int):
            raise ValueError(f"text_config.eos_token_id is {end_token}, it must be one number")
        return end_token

    def _check_end(self, input_ids: torch.Tensor, end_positions: torch.Tensor, num_prompt_tokens: int) -> None:
        limit = self.config.max_position_embeddings - num_prompt_tokens
        has_end = input_ids.gather(1, end_positions[:, None])[:, 0] == self.end_token
        bad = (~has_end | (end_positions >= limit)).nonzero()
        if len(bad):
            raise ValueError(
                f"row {int(bad[0])} of input_ids has no end-of-text token ({self.end_token}) among its first "
                f"{limit} tokens: truncate captions with ECCLProcessor, which keeps that token at the end"
            )
        if not end_positions.all():
            row = int((end_positions == 0).nonzero()[0])
            raise ValueError(
                f"row {row} of input_ids starts with the end-of-text token ({self.end_token}): pad captions at their "
                "end, as ECCLProcessor does"
            )


class ECCLVisionModel(CLIPPreTrainedModel):
    """The vision transformer of CLIP for images of any shape, with prompts after the patches."""

    # transformers declares `CLIPConfig` for the family.
    config: CLIPVisionConfig  # type: ignore[assignment]
    main_input_name = "pixel_values"
    # transformers declares the two modalities of the family.
    input_modalities = ("image",)  # type: ignore[assignment]
    _input_embed_layer = "patch_embedding"

    def __init__(self, config: CLIPVisionConfig):
        super().__init__(config)
        self.embeddings = ECCLVisionEmbeddings(config)
        # transformers misspells this name. With the same name here, the weights of CLIP load unchanged.
        self.pre_layrnorm = _layer_norm(config)
        # transformers annotates `CLIPConfig`, but passes the configuration of one encoder, as here.
        self.encoder = CLIPEncoder(config)  # type: ignore[arg-type]
        _speed_up(self.encoder)
        self.post_layernorm = _layer_norm(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ECCLVisionEmbeddings):
            factor = self.config.initializer_factor
            init.normal_(module.class_embedding, std=module.embed_dim**-0.5 * factor)
            init.normal_(module.patch_embedding.weight, std=self.config.initializer_range * factor)
            init.normal_(module.position_embedding.weight, std=self.config.initializer_range * factor)
            init.copy_(module.position_ids, torch.arange(module.position_ids.shape[-1]).expand((1, -1)))

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        prompts: list[torch.Tensor],
        pooled_only: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Encodes images.

        Args:
            pixel_values: `(batch, channels, height, width)`.
            prompts: the prompts of each prompted layer, `(num_prompt_tokens, width)`; an empty list for no prompts.
            pooled_only: leaves out what only `last_hidden_state` needs, which is then `None`.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`, and arguments of the attention.

        Returns:
            `pooler_output` `(batch, width)`: the feature of the class token of each image, after the last layer norm.
            `last_hidden_state` `(batch, 1 + patches, width)`: the class token and the patches, before this layer norm,
            as in CLIP. On request `hidden_states` and `attentions`, in which the prompts are among the tokens.
        """
        _check_outputs(self.config, kwargs, pooled_only)
        hidden = self.embeddings(pixel_values)
        length = hidden.shape[1]
        if prompts:
            hidden = torch.cat([hidden, _repeat_for_batch(prompts[0], hidden)], dim=1)
        hidden = self.pre_layrnorm(hidden)
        for index, layer in enumerate(self.encoder.layers):
            if 1 <= index < len(prompts):
                hidden = torch.cat([hidden[:, :length], _repeat_for_batch(prompts[index], hidden)], dim=1)
            if pooled_only and index == len(self.encoder.layers) - 1:
                class_positions = hidden.new_zeros(hidden.shape[0], dtype=torch.long)
                pooled = layer(hidden, None, pooled_positions=class_positions, **kwargs)
                return BaseModelOutputWithPooling(pooler_output=self.post_layernorm(pooled))
            hidden = layer(hidden, None, **kwargs)
        hidden = hidden[:, :length]
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=self.post_layernorm(hidden[:, 0]))


def _layer_norm(config: CLIPVisionConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


def _check_outputs(config: PreTrainedConfig, kwargs: Mapping[str, Any], pooled_only: bool) -> None:
    """Refuses a request for attention weights or hidden states that an encoder would not compute.

    transformers would return an empty tuple.
    """
    requested = kwargs.get("output_attentions", config.output_attentions)
    if pooled_only and (requested or kwargs.get("output_hidden_states", config.output_hidden_states)):
        raise ValueError("pooled_only computes neither hidden states nor attentions of the last layer: leave it out")
    if requested and config._attn_implementation != "eager":
        name = config.model_type.removesuffix("_model").removeprefix("clip_")  # text or vision
        raise ValueError(
            f"output_attentions needs attn_implementation 'eager', the {name} encoder has "
            f"{config._attn_implementation!r}: call model.set_attn_implementation('eager') first"
        )


def _make_room(position_ids: torch.Tensor, num_prompt_tokens: int) -> torch.Tensor:
    """Adds the positions of the prompts, which come after the start token, and moves the tokens behind them."""
    prompts = torch.arange(1, 1 + num_prompt_tokens, device=position_ids.device).expand(position_ids.shape[0], -1)
    return torch.cat([position_ids[:, :1], prompts, position_ids[:, 1:] + num_prompt_tokens], dim=1)


def _encode(
    get_features: Callable[..., Any],
    inputs: torch.Tensor | None,
    chunk_size: int | None,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor | None, BaseModelOutputWithPooling | None]:
    """The features of `inputs` and the output that holds them; in chunks there is no such output."""
    if inputs is None:
        return None, None
    if not chunk_size:
        output = get_features(inputs, **kwargs, return_dict=True)
        return output.pooler_output, output

    def encode(chunk: torch.Tensor) -> torch.Tensor:
        return get_features(chunk, **kwargs, return_dict=True).pooler_output

    return torch.cat([checkpoint(encode, chunk, use_reentrant=False) for chunk in inputs.split(chunk_size)]), None


def _repeat_for_batch(prompts: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    # `len(hidden)` would fix the batch size in a model that is exported for any batch size.
    return prompts.to(hidden.dtype).expand(hidden.shape[0], -1, -1)


class ECCLModel(CLIPPreTrainedModel):
    """A CLIP for person-shaped images, with deep coupled prompts. It maps sentences and images of people to one space.

    Args:
        config: the shape of the model.
    """

    # transformers declares `CLIPConfig`; an ECCLConfig has the same fields and more.
    config: ECCLConfig  # type: ignore[assignment]
    config_class = ECCLConfig
    # With this name, `save_pretrained` also saves the code of the model, for `trust_remote_code`. transformers declares
    # `None`.
    _auto_class = "AutoModel"  # type: ignore[assignment]
    base_model_prefix = "eccl"
    _no_split_modules = ["CLIPTextEmbeddings", "CLIPEncoderLayer", "ECCLLastLayer", "ECCLVisionEmbeddings"]
    # Of the checkpoint that the model was loaded from.
    _loading_problems: tuple[str, ...] = ()

    def __init__(self, config: ECCLConfig):
        super().__init__(config)
        text, vision = config.encoder_configs
        # Each encoder takes the attention implementation and the dtype of its own configuration.
        self.text_model = ECCLTextModel._from_config(text)
        self.vision_model = ECCLVisionModel._from_config(vision)
        self.text_projection = nn.Linear(text.hidden_size, config.projection_dim, bias=False)
        self.visual_projection = nn.Linear(vision.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.prompt_learner = ECCLPromptLearner(config) if config.num_prompt_tokens else None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        factor = self.config.initializer_factor
        if isinstance(module, ECCLPromptLearner):
            module.reset_parameters()
        elif isinstance(module, ECCLModel):
            for projection in (module.text_projection, module.visual_projection):
                init.normal_(projection.weight, std=projection.in_features**-0.5 * factor)
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
            # For a model whose code is outside transformers, transformers skips modules that have no direct
            # parameters. Without these lines, the layers of CLIP would start with a standard deviation of 1.0 instead
            # of CLIP's values.
            for part in module.modules():
                if isinstance(part, (CLIPAttention, CLIPMLP)):
                    super()._init_weights(part)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Loads a model as any model of transformers, which only warns about missing tensors and starts them at random.

        [`~ECCLModel.require_whole_weights`] refuses such a model. A configuration of a large model, for which the files
        are far too small, is an error before memory is taken.
        """
        name = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        if name is not None and not kwargs.get("variant"):
            hub_arguments = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
            config = kwargs.get("config") or name
            if not isinstance(config, PreTrainedConfig):
                config = cls.config_class.from_pretrained(config, **hub_arguments)
            _require_files_for(config, str(name), _SMALL_MODEL, **hub_arguments)
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        model._loading_problems = tuple(_loading_problems(info))
        return (model, info) if output_loading_info else model

    def require_whole_weights(self) -> None:
        """Checks that the weights are the model's: complete, nothing besides, and finite.

        Raises:
            ValueError: the checkpoint lacked a tensor, had one that is not the model's or of another shape, or a tensor
                has NaN or infinite values. The message names the tensors.
        """
        require_finite(self.name_or_path or "the model", self.state_dict(), self._loading_problems)

    @classmethod
    def from_clip(
        cls,
        clip: str | PreTrainedModel,
        image_size: tuple[int, int] = (384, 128),
        num_prompt_tokens: int = 4,
        prompt_depth: int = 12,
    ) -> "ECCLModel":
        """Builds an ECCL model from a trained CLIP.

        The model gets the weights of CLIP and new prompts. CLIP's position embeddings are resized bilinearly to the new
        grid of patches.

        Args:
            clip: a Hub id, a local folder, a `CLIPModel`, or an [`ECCLModel`] without prompts.
            image_size: height and width in pixels, multiples of the patch size.
            num_prompt_tokens: number of prompt tokens in each prompted layer; 0 gives a plain dual encoder.
            prompt_depth: number of layers, counted from the first, that get prompts; the shallower encoder must have
                at least as many.

        Returns:
            A model in evaluation mode that shares no memory with `clip`.

        Raises:
            ValueError: `clip` is not a CLIP, or it has prompts already, or the sizes do not fit, or its weights are not
                sound (see [`load_sound_model`]).
        """
        if isinstance(clip, str):
            clip = cls._load_backbone(clip)
        else:
            problems = getattr(clip, "_loading_problems", ())
            require_finite(clip.name_or_path or "the given model", clip.state_dict(), problems)
        config = _config_from_clip(clip.config, image_size, num_prompt_tokens, prompt_depth)
        model = cls(config)
        weights = dict(clip.state_dict())
        weights[_POSITION_WEIGHT] = resize_position_grid(
            weights[_POSITION_WEIGHT], _grid_of_clip(clip.config), config.grid_size
        )
        missing, unexpected = model.load_state_dict(weights, strict=False)
        missing = [name for name in missing if not name.startswith("prompt_learner.")]
        if missing or unexpected:
            raise ValueError(f"the weights do not fit the model: missing {missing}, unexpected {unexpected}")
        return model.eval()

    @classmethod
    def _load_backbone(cls, name: str) -> PreTrainedModel:
        with naming_checkpoint_errors(name):
            kind = checkpoint_kind(name)
        if kind == "adapter":
            raise ValueError(f"from_clip takes a CLIP or an ECCL model without prompts, {name} is an adapter")
        return load_sound_model(cls if kind == "eccl" else CLIPModel, name)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Writes the weights, the configuration and the code, as any model of transformers does.

        The weights have the permissions of any new file. The configuration names float32 as the dtype, also if the
        weights are stored in half precision, so that the model runs in float32 unless another `dtype` is asked for.
        """
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):  # the process that writes
            share_weights(Path(save_directory))

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.embeddings.token_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.embeddings.set_submodule("token_embedding", value)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        # peft loads an adapter by this method. It would drop the prompts of the adapter without a word.
        if self.prompt_learner is None and any(key.startswith(f"{prefix}prompt_learner.") for key in state_dict):
            raise ValueError(
                "the adapter or checkpoint has prompts, but the model has none: load an adapter with "
                "eccl.load_adapter, which makes the model that it needs, and a checkpoint with from_pretrained"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _prompts(self, modality: str) -> list[torch.Tensor]:
        return [] if self.prompt_learner is None else self.prompt_learner(modality)

    # As in transformers' own models, `position_ids` is among the `TransformersKwargs`, too: here and in `forward`.
    @can_return_tuple
    def get_text_features(  # type: ignore[misc]
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        pooled_only: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Encodes captions.

        Args:
            input_ids: `(batch, length)`, `[SOT, words.., EOT, padding..]`; the padding may be left out.
            attention_mask: `(batch, length)`. It has no effect, because under the causal mask no token after EOT
                reaches the feature. It is accepted so that the output of a processor can be passed as it is.
            position_ids: `(batch, length)`, the positions of the tokens, without the prompts; 0, 1, 2, ... by default.
            pooled_only: leaves out `last_hidden_state`. The last layer then computes one token of each caption, which
                saves 7 % of the operations of an encoder with twelve layers. The feature stays the same.
            output_hidden_states: `True` also returns the input of the first layer and the output of each layer; a list
                returns those of them that it numbers, and `None` for the others.
            output_attentions: `True` also returns the attention weights of each layer. This needs
                `attn_implementation="eager"`.
            return_dict: `False` returns a tuple of the fields that are not `None`.

        Returns:
            `pooler_output` `(batch, projection_dim)`: the features, not normalised. `last_hidden_state` `(batch,
            length, width)`: the tokens of `input_ids` after the last layer norm; tokens at the end of the sequence are
            missing if the prompts take their positions. `hidden_states`, a tuple of `(batch, tokens, width)`, and
            `attentions`, a tuple of `(batch, heads, tokens, tokens)`; the prompts are among their tokens.

        Raises:
            ValueError: a caption has no EOT among its first `config.max_text_length` tokens, or starts with EOT, as one
                that is padded at its start; or attentions are requested with another attention implementation than
                "eager", or attentions or hidden states with `pooled_only`.
        """
        requested = {**kwargs, **self._requested_outputs(kwargs, pooled_only), "return_dict": True}
        output = self.text_model(input_ids, self._prompts("text"), position_ids, pooled_only, **requested)
        output.pooler_output = self.text_projection(output.pooler_output)
        return output

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, pooled_only: bool = False, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """Encodes images.

        Args:
            pixel_values: `(batch, channels, height, width)`, normalised as [`ECCLProcessor`] does.
            pooled_only, output_hidden_states, output_attentions, return_dict: see [`~ECCLModel.get_text_features`].

        Returns:
            `pooler_output` `(batch, projection_dim)`: the features, not normalised. `last_hidden_state` `(batch, 1 +
            patches, width)`: the class token and the patches before the last layer norm, as in CLIP. `hidden_states`
            and `attentions` as for captions.

        Raises:
            ValueError: the images have another size than `config.vision_config.image_size`; or attentions are requested
                with another attention implementation than "eager", or attentions or hidden states with `pooled_only`.
        """
        requested = {**kwargs, **self._requested_outputs(kwargs, pooled_only), "return_dict": True}
        output = self.vision_model(pixel_values, self._prompts("vision"), pooled_only, **requested)
        output.pooler_output = self.visual_projection(output.pooler_output)
        return output

    def get_token_features(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Per-token caption features in the shared space, before pooling.

        Args:
            input_ids: `(batch, length)`, as for [`~ECCLModel.get_text_features`]. The feature of the end token is the
                feature that this other method returns.

        Returns:
            `(batch, tokens, projection_dim)`, not normalised. Tokens at the end of the sequence are missing if the
            prompts take their positions.
        """
        return self.text_projection(self.get_text_features(input_ids, return_dict=True).last_hidden_state)

    def get_patch_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Per-patch image features in the shared space, before pooling.

        Args:
            pixel_values: `(batch, channels, height, width)`, as for [`~ECCLModel.get_image_features`].

        Returns:
            `(batch, rows, columns, projection_dim)`, one feature for each patch of the grid, not normalised.
        """
        patches = self.get_image_features(pixel_values, return_dict=True).last_hidden_state[:, 1:]
        return self.visual_projection(self.vision_model.post_layernorm(patches)).unflatten(1, self.config.grid_size)

    @can_return_tuple
    def forward(  # type: ignore[misc]
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        return_loss: bool | None = None,
        embed_chunk_size: int | None = None,
        pooled_only: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ECCLOutput:
        """Encodes captions, images or both; if both are given, it also compares them.

        Args:
            input_ids: `(texts, length)`, see [`~ECCLModel.get_text_features`].
            pixel_values: `(images, channels, height, width)`, see [`~ECCLModel.get_image_features`].
            attention_mask: `(texts, length)`. It has no effect.
            position_ids: `(texts, length)`, see [`~ECCLModel.get_text_features`].
            return_loss: also returns the contrastive loss of CLIP; caption i belongs to image i.
            embed_chunk_size: encode this many captions and images at a time and recompute them in the backward pass, so
                that only one chunk's activations are in memory. Features and gradients stay the same (gradient caching:
                "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP 2021).
            pooled_only: leaves out the `last_hidden_state` of both encoders, which saves time, see
                [`~ECCLModel.get_text_features`]. With `embed_chunk_size` it is always left out.
            output_hidden_states, output_attentions, return_dict: see [`~ECCLModel.get_text_features`].

        Raises:
            ValueError: neither input is given; or captions start with EOT; or the loss is requested without
                as many captions as images; or attentions are requested with another attention implementation than
                "eager"; or hidden states, attentions or positions are given together with `embed_chunk_size`; or hidden
                states or attentions together with `pooled_only`.
        """
        if input_ids is None and pixel_values is None:
            raise ValueError("ECCLModel needs input_ids, pixel_values or both, got neither")
        captions, pictures = (0 if inputs is None else len(inputs) for inputs in (input_ids, pixel_values))
        if return_loss and captions != pictures:
            raise ValueError(
                f"return_loss needs one image for each caption, got {captions} captions and {pictures} images"
            )
        if embed_chunk_size and (position_ids is not None or any(self._requested_outputs(kwargs).values())):
            raise ValueError(
                f"embed_chunk_size is {embed_chunk_size}, but hidden states, attentions and position_ids need the "
                "whole batch at once: leave embed_chunk_size out"
            )
        kwargs_of_both = {**kwargs, "pooled_only": pooled_only or bool(embed_chunk_size)}
        text_embeds, text_output = _encode(
            self.get_text_features, input_ids, embed_chunk_size, {**kwargs_of_both, "position_ids": position_ids}
        )
        image_embeds, image_output = _encode(self.get_image_features, pixel_values, embed_chunk_size, kwargs_of_both)
        logits_per_text = loss = None
        if text_embeds is not None and image_embeds is not None:
            texts, images = (nn.functional.normalize(embeds, dim=-1) for embeds in (text_embeds, image_embeds))
            logits_per_text = texts @ images.T.to(texts.device) * self.logit_scale.exp().to(texts.device)
            loss = image_text_contrastive_loss(logits_per_text) if return_loss else None
        return ECCLOutput(
            loss=loss,
            logits_per_image=None if logits_per_text is None else logits_per_text.T,
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text_output,
            vision_model_output=image_output,
        )

    def _requested_outputs(self, kwargs: Mapping[str, Any], pooled_only: bool = False) -> dict[str, Any]:
        """The arguments that request hidden states or attentions; the configuration of the whole model gives defaults.

        Without a default there, the configuration of each encoder decides. With `pooled_only`, only a call requests
        them.
        """
        names = ("output_hidden_states", "output_attentions")
        defaults = {name: not pooled_only for name in names if pooled_only or getattr(self.config, name)}
        return defaults | {name: kwargs[name] for name in names if name in kwargs}


def _config_from_clip(
    clip: PreTrainedConfig, image_size: tuple[int, int], num_prompt_tokens: int, prompt_depth: int
) -> ECCLConfig:
    """Makes the configuration of an ECCL model from that of a CLIP, or from that of an ECCL model without prompts.

    Raises:
        ValueError: `clip` is neither, or the sizes do not fit.
    """
    if clip.model_type not in ("clip", ECCLConfig.model_type):
        raise ValueError(
            f"from_clip takes a CLIP or an ECCL model without prompts, this model has model_type {clip.model_type!r}"
        )
    if clip.model_type == ECCLConfig.model_type and clip.num_prompt_tokens:
        raise ValueError(
            f"from_clip takes a model without prompts, this one has {clip.num_prompt_tokens} prompt tokens; "
            "load it with from_pretrained"
        )
    text, vision = clip.text_config.to_dict(), clip.vision_config.to_dict()
    # An encoder is built with the dtype of its configuration. The weights are copied in float32.
    text["dtype"] = vision["dtype"] = None
    if text["eos_token_id"] == _LEGACY_EOS_TOKEN_ID and clip.model_type == "clip":
        text |= {"bos_token_id": text["vocab_size"] - 2, "eos_token_id": text["vocab_size"] - 1}
    return ECCLConfig(
        text_config=text,
        vision_config=vision | {"image_size": list(image_size)},
        projection_dim=clip.projection_dim,
        num_prompt_tokens=num_prompt_tokens,
        prompt_depth=prompt_depth,
        logit_scale_init_value=clip.logit_scale_init_value,
    )


def _grid_of_clip(clip: PreTrainedConfig) -> tuple[int, int]:
    """Number of rows and number of columns of image patches of a CLIP, whose image size can be one number."""
    size, patch_size = clip.vision_config.image_size, clip.vision_config.patch_size
    height, width = (size, size) if isinstance(size, int) else size
    return height // patch_size, width // patch_size


def load_sound_model(model_class: type[PreTrainedModel], name: str, **kwargs: Any) -> Any:
    """Loads a model of a checkpoint whose weights are complete and finite.

    Args:
        model_class: the class of the model.
        name: local folder or Hub id of the checkpoint.
        **kwargs: as for `from_pretrained`.

    Raises:
        ValueError: the configuration asks for more than the files have, or for code from elsewhere; the file of the
            weights is damaged; a tensor is missing, is not the model's, has another shape, or has NaN or infinite
            values. The message names the tensors.
        OSError: there is no such folder or Hub repository, or it has no weights.
    """
    # Tensors of another shape are then among the problems, by name.
    kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with naming_checkpoint_errors(name):
        config_class: Any = model_class.config_class
        config = config_class.from_pretrained(name)
        require_sound_config(config)
        _require_files_for(config, name)
        loaded: Any = model_class.from_pretrained(name, **kwargs)
    model, info = loaded
    require_finite(name, model.state_dict(), _loading_problems(info))
    return model


def _require_files_for(config: PreTrainedConfig, name: str, allowance: int = 0, **hub_arguments: Any) -> None:
    """Checks that a configuration fits the files of the weights, before memory is taken for a model.

    Args:
        config: the configuration of the checkpoint.
        name: local folder or Hub id of the checkpoint.
        allowance: number of parameters that the files may lack.
        **hub_arguments: those of `from_pretrained` that choose the files, for example `revision`.

    Raises:
        ValueError: the model would have more parameters than the files have bytes, and than `allowance`; or the files
            are not in the checkpoint's own folder, or have too many tensors.
    """

    def find(file: str) -> Path | None:
        path = cached_file(
            name,
            file,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **hub_arguments,
        )
        return None if path is None else Path(path)

    # In the order in which transformers looks for them.
    for single, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if (path := find(single)) is not None:
            paths = [path]
        elif (path := find(index)) is not None:
            paths = [found for shard in list_shards(path) if (found := find(shard)) is not None]
        else:
            continue
        parameters, size = expected_parameters(config), sum(path.stat().st_size for path in paths)
        if parameters > max(size, allowance):
            raise ValueError(
                f"config.json of {name} describes a model of {parameters:,} parameters, but the files of the weights "
                f"have only {size:,} bytes: they do not belong together"
            )
        for path in paths if single == SAFE_WEIGHTS_NAME else ():
            with path.open("rb") as file:
                header = int.from_bytes(file.read(8), "little")
            if header > _LARGEST_HEADER:
                raise ValueError(f"{path} cannot be used: its list of tensors has {header:,} bytes")
        return


@contextlib.contextmanager
def naming_checkpoint_errors(name: str) -> Iterator[None]:
    """Turns any error about the files of a checkpoint into a `ValueError` that names the checkpoint.

    The libraries that read a damaged or malicious checkpoint raise errors of many types.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and name in str(error):
            raise
        # The library that reads the weights is not among those that this file may import.
        if type(error).__name__ == "SafetensorError":
            raise ValueError(f"the weights of {name} are damaged: {error}") from error
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{name} cannot be loaded: {kind}{error}") from error


def _loading_problems(info: Mapping[str, Any]) -> list[str]:
    """Describes, in a line each, the tensors of a checkpoint that do not fit its model."""
    # Old checkpoints of CLIP store the numbers of the positions.
    unexpected = sorted(key for key in info["unexpected_keys"] if not key.endswith(".position_ids"))
    mismatched = [
        f"{key} {tuple(stored)} instead of {tuple(expected)}"
        for key, stored, expected in sorted(info["mismatched_keys"])
    ]
    return _describe_kinds(
        {"missing": info["missing_keys"], "not of this model": unexpected, "of another shape": mismatched}
    )


def _describe_kinds(kinds: Mapping[str, Iterable[str]]) -> list[str]:
    """Makes a line for each kind of problem, with the names of at most three tensors and the number of the others."""
    lines = []
    for kind, names in ((kind, sorted(names)) for kind, names in kinds.items()):
        if names:
            more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
            lines.append(f"{kind}: {', '.join(names[:3])}{more}")
    return lines


def require_tensors(name: str, stored: Iterable[str], expected: Iterable[str]) -> None:
    """Checks that a file of weights has the tensors of a model, and no other ones.

    Args:
        name: what the message calls the weights.
        stored, expected: the names of the tensors in the file, and of those of the model.

    Raises:
        ValueError: a tensor is missing, or is not the model's. The message names the tensors.
    """
    stored, expected = set(stored), set(expected)
    _refuse(name, _describe_kinds({"missing": expected - stored, "not of this model": stored - expected}))


def require_finite(name: str, tensors: Mapping[str, torch.Tensor], problems: Sequence[str] = ()) -> None:
    """Checks that no tensor has NaN or infinite values.

    Args:
        name: what the message calls the weights.
        tensors: those that are not in memory (on the `meta` device) are not checked.
        problems: lines about other problems of the weights, which are reported together.

    Raises:
        ValueError: there is a problem. The message names the tensors.
    """
    bad = [key for key, value in tensors.items() if not value.is_meta and not value.isfinite().all()]
    _refuse(name, [*problems, *_describe_kinds({"with NaN or infinite values": bad})])


def _refuse(name: str, problems: Sequence[str]) -> None:
    if problems:
        raise ValueError(f"the weights of {name} cannot be used; tensors {'; tensors '.join(problems)}")


def share_weights(folder: Path) -> None:
    """Gives the `.safetensors` files of a folder the permissions that any new file gets there.

    safetensors lets only the owner of a file read it.
    """
    probe = folder / f".permissions-{os.getpid()}"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)


def resize_position_grid(positions: torch.Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> torch.Tensor:
    """Resizes the position embeddings of a vision transformer's patches bilinearly (`align_corners=False`).

    The position embedding of the class token stays as it is.

    Args:
        positions: `(1 + rows * columns, width)`, the class token first.
        old_grid, new_grid: number of rows and number of columns of patches.

    Returns:
        `(1 + new rows * new columns, width)` in the same dtype.

    Raises:
        ValueError: the number of `positions` does not fit `old_grid`.
    """
    if len(positions) != 1 + old_grid[0] * old_grid[1]:
        raise ValueError(
            f"there are {len(positions)} position embeddings, a grid of {old_grid[0]} x {old_grid[1]} patches has "
            f"{1 + old_grid[0] * old_grid[1]}"
        )
    if old_grid == new_grid:
        return positions
    grid = positions[1:].float().T.reshape(1, -1, *old_grid)
    grid = nn.functional.interpolate(grid, size=new_grid, mode="bilinear", align_corners=False)
    return torch.cat([positions[:1], grid.flatten(2)[0].T.to(positions.dtype)])


__all__ = [
    "ECCLModel",
    "ECCLOutput",
    "ECCLPromptLearner",
    "autocast_dtype",
    "load_sound_model",
    "naming_checkpoint_errors",
    "require_finite",
    "require_tensors",
    "resize_position_grid",
    "share_weights",
]
