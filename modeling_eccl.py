"""The ECCL model: the two encoders of CLIP for person-shaped images, with deep prompts that are coupled between them.

transformers saves this file with each checkpoint, and also every file that a relative import in it names. It looks at
each line, this text included, so the next line brings the pipeline along:

    from .pipeline_eccl import TextToPersonRetrievalPipeline
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPModel, CLIPTextConfig, CLIPVisionConfig, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.clip.modeling_clip import (
    CLIPMLP,
    CLIPAttention,
    CLIPEncoder,
    CLIPPreTrainedModel,
    CLIPTextEmbeddings,
)
from transformers.utils import ModelOutput

from .configuration_eccl import ECCLConfig, checkpoint_kind

# CLIP checkpoints that were saved before transformers 4.31 have this end-of-text id. It is wrong for all of them: the
# end-of-text token of CLIP is the last one of the vocabulary.
_LEGACY_EOS_TOKEN_ID = 2
_POSITION_WEIGHT = "vision_model.embeddings.position_embedding.weight"


@dataclass
class ECCLOutput(ModelOutput):
    """The output of [`ECCLModel`]. A field is `None` if it needs an input that was not given.

    Args:
        text_embeds (`torch.Tensor` of shape `(texts, projection_dim)`): text features, not normalised.
        image_embeds (`torch.Tensor` of shape `(images, projection_dim)`): image features, not normalised.
        logits_per_text (`torch.Tensor` of shape `(texts, images)`): cosine similarities times exp(logit_scale).
        logits_per_image (`torch.Tensor` of shape `(images, texts)`): the transpose of `logits_per_text`.
        text_model_output, vision_model_output (`BaseModelOutput`): two fields, each given on request only.
            `hidden_states` has the input of the encoder's first layer and the output of each layer,
            `(batch, tokens, width)`; the prompts are among the tokens. `attentions` has the attention weights of each
            layer, `(batch, heads, tokens, tokens)`.
    """

    text_embeds: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    text_model_output: BaseModelOutput | None = None
    vision_model_output: BaseModelOutput | None = None

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

    def __init__(self, config: ECCLConfig):
        super().__init__()
        _, vision = config.encoder_configs
        self.config = vision
        self.image_size = config.input_size
        self.embed_dim = vision.hidden_size
        self.class_embedding = nn.Parameter(torch.empty(self.embed_dim))
        self.patch_embedding = nn.Conv2d(
            vision.num_channels, self.embed_dim, kernel_size=config.patch_side, stride=config.patch_side, bias=False
        )
        rows, columns = config.grid_size
        self.position_embedding = nn.Embedding(1 + rows * columns, self.embed_dim)

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
        return tokens + self.position_embedding.weight


class ECCLTextEncoder(nn.Module):
    """The text transformer of CLIP, with prompts between the start token and the caption."""

    def __init__(self, config: ECCLConfig):
        super().__init__()
        self.config = config.encoder_configs[0]
        self.embeddings = CLIPTextEmbeddings(self.config)
        self.encoder = _transformer_layers(self.config)
        self.final_layer_norm = _layer_norm(self.config)

    def forward(self, input_ids: torch.Tensor, prompts: list[torch.Tensor], pool: bool = True) -> torch.Tensor:
        """Encodes captions.

        Args:
            input_ids: `(batch, length)`, the token ids.
            prompts: the prompts of each prompted layer, `(num_prompt_tokens, width)`; an empty list for no prompts.
            pool: returns only the feature at the end-of-text token of each caption.

        Returns:
            `(batch, width)`; with `pool=False` `(batch, length, width)`, the features of all tokens but the prompts.
        """
        end_positions = (input_ids == self.end_token).int().argmax(dim=-1)
        count = len(prompts[0]) if prompts else 0
        if not torch.compiler.is_compiling():
            self._check_end(input_ids, end_positions, count)
        hidden = self.embeddings.token_embedding(input_ids)
        if prompts:
            hidden = torch.cat([hidden[:, :1], _repeat_for_batch(prompts[0], hidden), hidden[:, 1:]], dim=1)
            hidden = hidden[:, : self.config.max_position_embeddings]
        hidden = self.embeddings(inputs_embeds=hidden)
        mask = create_causal_mask(config=self.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None)
        for index, layer in enumerate(self.encoder.layers):
            if 1 <= index < len(prompts):
                layer_prompts = _repeat_for_batch(prompts[index], hidden)
                hidden = torch.cat([hidden[:, :1], layer_prompts, hidden[:, 1 + count :]], dim=1)
            hidden = layer(hidden, mask, is_causal=True)
        if not pool:
            return self.final_layer_norm(torch.cat([hidden[:, :1], hidden[:, 1 + count :]], dim=1))
        at_end = hidden[torch.arange(hidden.shape[0], device=hidden.device), end_positions + count]
        return self.final_layer_norm(at_end)

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


class ECCLVisionEncoder(nn.Module):
    """The vision transformer of CLIP, with prompts after the patches."""

    def __init__(self, config: ECCLConfig):
        super().__init__()
        _, vision = config.encoder_configs
        self.embeddings = ECCLVisionEmbeddings(config)
        # transformers misspells this name. With the same name here, the weights of CLIP load unchanged.
        self.pre_layrnorm = _layer_norm(vision)
        self.encoder = _transformer_layers(vision)
        self.post_layernorm = _layer_norm(vision)

    def forward(self, pixel_values: torch.Tensor, prompts: list[torch.Tensor], pool: bool = True) -> torch.Tensor:
        """Encodes images.

        Args:
            pixel_values: `(batch, channels, height, width)`.
            prompts: the prompts of each prompted layer, `(num_prompt_tokens, width)`; an empty list for no prompts.
            pool: returns only the feature of the class token of each image.

        Returns:
            `(batch, width)`; with `pool=False` `(batch, patches, width)`, the features of the patches.
        """
        hidden = self.embeddings(pixel_values)
        length = hidden.shape[1]
        if prompts:
            hidden = torch.cat([hidden, _repeat_for_batch(prompts[0], hidden)], dim=1)
        hidden = self.pre_layrnorm(hidden)
        for index, layer in enumerate(self.encoder.layers):
            if 1 <= index < len(prompts):
                hidden = torch.cat([hidden[:, :length], _repeat_for_batch(prompts[index], hidden)], dim=1)
            hidden = layer(hidden, None)
        return self.post_layernorm(hidden[:, 0] if pool else hidden[:, 1:length])


def _transformer_layers(config: CLIPTextConfig | CLIPVisionConfig) -> CLIPEncoder:
    # transformers annotates `CLIPConfig`, but passes the configuration of one encoder, as here.
    return CLIPEncoder(config)  # type: ignore[arg-type]


def _layer_norm(config: CLIPTextConfig | CLIPVisionConfig) -> nn.LayerNorm:
    # transformers annotates that this value may be `None`, but gives each encoder a number.
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # type: ignore[arg-type]


@contextlib.contextmanager
def _record_layers(encoder: CLIPEncoder, hidden_states: bool, attentions: bool) -> Iterator[BaseModelOutput]:
    """Records the hidden states and attention weights of an encoder's layers with hooks.

    The record that it yields is empty at first; it is filled when the context ends.
    """
    record, hooks = BaseModelOutput(), []
    states: list[torch.Tensor] = []
    weights: list[torch.Tensor] = []
    if hidden_states:
        hooks.append(encoder.layers[0].register_forward_pre_hook(lambda _, inputs: states.append(inputs[0])))
        hooks += [
            layer.register_forward_hook(lambda _, inputs, output: states.append(output)) for layer in encoder.layers
        ]
    if attentions:
        hooks += [
            layer.get_submodule("self_attn").register_forward_hook(lambda _, inputs, output: weights.append(output[1]))
            for layer in encoder.layers
        ]
    try:
        yield record
    finally:
        for hook in hooks:
            hook.remove()
    if hidden_states:
        record["hidden_states"] = tuple(states)
    if attentions:
        record["attentions"] = tuple(weights)


def _encode_in_chunks(
    encode: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor, chunk_size: int | None
) -> torch.Tensor:
    if not chunk_size:
        return encode(inputs)
    return torch.cat([checkpoint(encode, chunk, use_reentrant=False) for chunk in inputs.split(chunk_size)])


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
    _no_split_modules = ["CLIPTextEmbeddings", "CLIPEncoderLayer", "ECCLVisionEmbeddings"]

    def __init__(self, config: ECCLConfig):
        super().__init__(config)
        # The layers read the attention implementation from the configuration of their encoder.
        text, vision = config.encoder_configs
        text._attn_implementation = vision._attn_implementation = config._attn_implementation
        self.text_model = ECCLTextEncoder(config)
        self.vision_model = ECCLVisionEncoder(config)
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
        elif isinstance(module, ECCLVisionEmbeddings):
            std = module.config.initializer_range * factor
            init.normal_(module.class_embedding, std=module.embed_dim**-0.5 * factor)
            init.normal_(module.patch_embedding.weight, std=std)
            init.normal_(module.position_embedding.weight, std=std)
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
            ValueError: `clip` is not a CLIP, or it has prompts already, or the sizes do not fit.
        """
        if isinstance(clip, str):
            clip = cls._load_backbone(clip)
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
        kind = checkpoint_kind(name)
        if kind == "adapter":
            raise ValueError(f"from_clip takes a CLIP or an ECCL model without prompts, {name} is an adapter")
        return (cls if kind == "eccl" else CLIPModel).from_pretrained(name)

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.embeddings.token_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.embeddings.set_submodule("token_embedding", value)

    def _prompts(self, modality: str) -> list[torch.Tensor]:
        return [] if self.prompt_learner is None else self.prompt_learner(modality)

    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Encodes captions.

        Args:
            input_ids: `(batch, length)`, `[SOT, words.., EOT, padding..]`; the padding may be left out.
            attention_mask: `(batch, length)`. It has no effect, because under the causal mask no token after EOT
                reaches the feature. It is accepted so that the output of a processor can be passed as it is.

        Returns:
            `(batch, projection_dim)`, not normalised.

        Raises:
            ValueError: a caption has no EOT among its first `config.max_text_length` tokens.
        """
        return self.text_projection(self.text_model(input_ids, self._prompts("text")))

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encodes images.

        Args:
            pixel_values: `(batch, channels, height, width)`, normalised as [`ECCLProcessor`] does.

        Returns:
            `(batch, projection_dim)`, not normalised.

        Raises:
            ValueError: the images have another size than `config.vision_config.image_size`.
        """
        return self.visual_projection(self.vision_model(pixel_values, self._prompts("vision")))

    def get_token_features(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Per-token caption features in the shared space, before pooling.

        Args:
            input_ids: `(batch, length)`, as for [`~ECCLModel.get_text_features`]. The feature of the end token is the
                feature that this other method returns.

        Returns:
            `(batch, tokens, projection_dim)`, not normalised. Tokens at the end of the sequence are missing if the
            prompts take their positions.
        """
        return self.text_projection(self.text_model(input_ids, self._prompts("text"), pool=False))

    def get_patch_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Per-patch image features in the shared space, before pooling.

        Args:
            pixel_values: `(batch, channels, height, width)`, as for [`~ECCLModel.get_image_features`].

        Returns:
            `(batch, rows, columns, projection_dim)`, one feature for each patch of the grid, not normalised.
        """
        patches = self.visual_projection(self.vision_model(pixel_values, self._prompts("vision"), pool=False))
        return patches.unflatten(1, self.config.grid_size)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        embed_chunk_size: int | None = None,
    ) -> ECCLOutput | tuple[torch.Tensor, ...]:
        """Encodes captions, images or both; if both are given, it also compares them.

        Args:
            input_ids: `(texts, length)`, see [`~ECCLModel.get_text_features`].
            pixel_values: `(images, channels, height, width)`, see [`~ECCLModel.get_image_features`].
            attention_mask: `(texts, length)`. It has no effect.
            output_hidden_states: also returns the hidden states between the layers.
            output_attentions: also returns the attention weights. This needs `attn_implementation="eager"`.
            return_dict: `False` returns a tuple of the fields that are not `None`.
            embed_chunk_size: encode this many captions and images at a time and recompute them in the backward pass, so
                that only one chunk's activations are in memory. Features and gradients stay the same (gradient caching:
                "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP 2021).

        Raises:
            ValueError: neither input is given; or attentions are requested with another attention implementation than
                "eager"; or hidden states or attentions are requested together with `embed_chunk_size`.
        """
        if input_ids is None and pixel_values is None:
            raise ValueError("ECCLModel needs input_ids, pixel_values or both, got neither")
        hidden_states = bool(self.config.output_hidden_states if output_hidden_states is None else output_hidden_states)
        attentions = bool(self.config.output_attentions if output_attentions is None else output_attentions)
        if attentions and self.config._attn_implementation != "eager":
            raise ValueError(
                f"output_attentions needs attn_implementation 'eager', the model has "
                f"{self.config._attn_implementation!r}: call model.set_attn_implementation('eager') first"
            )
        if (hidden_states or attentions) and embed_chunk_size:
            raise ValueError(
                f"embed_chunk_size is {embed_chunk_size}, but hidden states and attentions need the whole batch at "
                "once: leave embed_chunk_size out"
            )
        output = ECCLOutput()
        if input_ids is not None:
            with _record_layers(self.text_model.encoder, hidden_states, attentions) as text_record:
                output["text_embeds"] = _encode_in_chunks(self.get_text_features, input_ids, embed_chunk_size)
        if pixel_values is not None:
            with _record_layers(self.vision_model.encoder, hidden_states, attentions) as vision_record:
                output["image_embeds"] = _encode_in_chunks(self.get_image_features, pixel_values, embed_chunk_size)
        if input_ids is not None and pixel_values is not None:
            texts, images = (nn.functional.normalize(output[name], dim=-1) for name in ("text_embeds", "image_embeds"))
            output["logits_per_text"] = texts @ images.T * self.logit_scale.exp()
            output["logits_per_image"] = output["logits_per_text"].T
        if (hidden_states or attentions) and input_ids is not None:
            output["text_model_output"] = text_record
        if (hidden_states or attentions) and pixel_values is not None:
            output["vision_model_output"] = vision_record
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


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


__all__ = ["ECCLModel", "ECCLOutput", "ECCLPromptLearner", "resize_position_grid"]
