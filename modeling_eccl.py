"""ECCL's model: CLIP's two encoders for person-shaped images, with deep prompts coupled between them.

A checkpoint carries this file, and with it each file that it names so (transformers reads lines, also in this text):

    from .pipeline_eccl import TextToPersonRetrievalPipeline
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPModel, PreTrainedModel
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

# Checkpoints of CLIP from before transformers 4.31 carry this end-of-text id, which no vocabulary of CLIP has there.
_LEGACY_EOS_TOKEN_ID = 2


@dataclass
class ECCLOutput(ModelOutput):
    """What [`ECCLModel`] returns; `None` for what needs an input that was not given.

    Args:
        text_embeds (`torch.Tensor` of shape `(texts, projection_dim)`): text features, not normalised.
        image_embeds (`torch.Tensor` of shape `(images, projection_dim)`): image features, not normalised.
        logits_per_text (`torch.Tensor` of shape `(texts, images)`): cosine similarities times exp(logit_scale).
        logits_per_image (`torch.Tensor` of shape `(images, texts)`): its transpose.
        text_model_output, vision_model_output (`BaseModelOutput`): where they were asked for, `hidden_states`, what
            goes into an encoder's first layer and what comes out of each, `(batch, tokens, width)` with the prompts
            among the tokens; and `attentions` of each layer, `(batch, heads, tokens, tokens)`.
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
    """Learnable text tokens for each prompted layer, and the linear maps that make image tokens of them.

    For layer l the text prompt is `T_l` and the image prompt `V_l = W_l T_l + b_l` (multi-modal prompt learning,
    MaPLe, CVPR 2023, section 3.2).
    """

    def __init__(self, config: ECCLConfig):
        super().__init__()
        text_width, vision_width = config.text_config.hidden_size, config.vision_config.hidden_size
        self.text_prompts = nn.Parameter(torch.empty(config.prompt_depth, config.num_prompt_tokens, text_width))
        self.projections = nn.ModuleList(nn.Linear(text_width, vision_width) for _ in range(config.prompt_depth))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Prompts N(0, 0.02); torch's own start for the maps, those of layers 1.. being copies of one another."""
        init.normal_(self.text_prompts, std=0.02)
        for projection in self.projections[:2]:
            bound = projection.in_features**-0.5
            init.uniform_(projection.weight, -bound, bound)
            init.uniform_(projection.bias, -bound, bound)
        for projection in self.projections[2:]:
            init.copy_(projection.weight, self.projections[1].weight)
            init.copy_(projection.bias, self.projections[1].bias)

    def forward(self, modality: str) -> list[torch.Tensor]:
        """The prompts of each layer, `(num_prompt_tokens, width)`, for `"text"` or `"vision"`."""
        if modality == "text":
            return list(self.text_prompts)
        return [project(prompts) for project, prompts in zip(self.projections, self.text_prompts, strict=True)]


class ECCLVisionEmbeddings(nn.Module):
    """Patches, class token and learned positions, as in CLIP, on a grid that need not be square."""

    def __init__(self, config: ECCLConfig):
        super().__init__()
        vision = config.vision_config
        self.config = vision
        self.embed_dim = vision.hidden_size
        self.class_embedding = nn.Parameter(torch.empty(self.embed_dim))
        self.patch_embedding = nn.Conv2d(
            vision.num_channels, self.embed_dim, kernel_size=vision.patch_size, stride=vision.patch_size, bias=False
        )
        rows, columns = config.grid_size
        self.position_embedding = nn.Embedding(1 + rows * columns, self.embed_dim)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(batch, channels, height, width)` -> `(batch, 1 + patches, width)`."""
        if list(pixel_values.shape[-2:]) != self.config.image_size:
            raise ValueError(
                f"pixel_values are {pixel_values.shape[-2]} x {pixel_values.shape[-1]} (height x width), "
                f"the model takes {self.config.image_size[0]} x {self.config.image_size[1]}"
            )
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_embedding.expand(patches.shape[0], 1, -1), patches], dim=1)
        return tokens + self.position_embedding.weight


class ECCLTextEncoder(nn.Module):
    """CLIP's text transformer with prompts after the start token."""

    def __init__(self, config: ECCLConfig):
        super().__init__()
        self.config = config.text_config
        self.embeddings = CLIPTextEmbeddings(self.config)
        self.encoder = CLIPEncoder(self.config)
        self.final_layer_norm = nn.LayerNorm(self.config.hidden_size, eps=self.config.layer_norm_eps)

    def forward(self, input_ids: torch.Tensor, prompts: list[torch.Tensor], pool: bool = True) -> torch.Tensor:
        """`(batch, length)` token ids and each layer's prompts -> `(batch, width)` at the end-of-text token.

        Without `pool` `(batch, length, width)`, of every token but the prompts.
        """
        end_positions = (input_ids == self.config.eos_token_id).int().argmax(dim=-1)
        count = len(prompts[0]) if prompts else 0
        if not torch.compiler.is_compiling():
            self._check_end(input_ids, end_positions, count)
        hidden = self.embeddings.token_embedding(input_ids)
        if prompts:
            hidden = torch.cat([hidden[:, :1], _expand(prompts[0], hidden), hidden[:, 1:]], dim=1)
            hidden = hidden[:, : self.config.max_position_embeddings]
        hidden = self.embeddings(inputs_embeds=hidden)
        mask = create_causal_mask(config=self.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None)
        for index, layer in enumerate(self.encoder.layers):
            if 1 <= index < len(prompts):
                hidden = torch.cat([hidden[:, :1], _expand(prompts[index], hidden), hidden[:, 1 + count :]], dim=1)
            hidden = layer(hidden, mask, is_causal=True)
        if not pool:
            return self.final_layer_norm(torch.cat([hidden[:, :1], hidden[:, 1 + count :]], dim=1))
        at_end = hidden[torch.arange(hidden.shape[0], device=hidden.device), end_positions + count]
        return self.final_layer_norm(at_end)

    def _check_end(self, input_ids: torch.Tensor, end_positions: torch.Tensor, num_prompt_tokens: int) -> None:
        limit = self.config.max_position_embeddings - num_prompt_tokens
        ends = input_ids.gather(1, end_positions[:, None])[:, 0] == self.config.eos_token_id
        bad = (~ends | (end_positions >= limit)).nonzero()
        if len(bad):
            raise ValueError(
                f"row {int(bad[0])} of input_ids has no end-of-text token ({self.config.eos_token_id}) among its first "
                f"{limit} tokens: truncate captions with ECCLProcessor, which keeps the token last"
            )


class ECCLVisionEncoder(nn.Module):
    """CLIP's vision transformer with prompts behind the patches."""

    def __init__(self, config: ECCLConfig):
        super().__init__()
        vision = config.vision_config
        self.embeddings = ECCLVisionEmbeddings(config)
        # The misspelt name is transformers' own: it lets CLIP's weights load as they are.
        self.pre_layrnorm = nn.LayerNorm(vision.hidden_size, eps=vision.layer_norm_eps)
        self.encoder = CLIPEncoder(vision)
        self.post_layernorm = nn.LayerNorm(vision.hidden_size, eps=vision.layer_norm_eps)

    def forward(self, pixel_values: torch.Tensor, prompts: list[torch.Tensor], pool: bool = True) -> torch.Tensor:
        """`(batch, channels, height, width)` and each layer's prompts -> `(batch, width)` at the class token.

        Without `pool` `(batch, patches, width)`, of the patches.
        """
        hidden = self.embeddings(pixel_values)
        length = hidden.shape[1]
        if prompts:
            hidden = torch.cat([hidden, _expand(prompts[0], hidden)], dim=1)
        hidden = self.pre_layrnorm(hidden)
        for index, layer in enumerate(self.encoder.layers):
            if 1 <= index < len(prompts):
                hidden = torch.cat([hidden[:, :length], _expand(prompts[index], hidden)], dim=1)
            hidden = layer(hidden, None)
        return self.post_layernorm(hidden[:, 0] if pool else hidden[:, 1:length])


@contextlib.contextmanager
def _recording(encoder: CLIPEncoder, hidden_states: bool, attentions: bool) -> Iterator[BaseModelOutput]:
    """What passes through an encoder's layers meanwhile, filled in at the end."""
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
            layer.self_attn.register_forward_hook(lambda _, inputs, output: weights.append(output[1]))
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


def _in_chunks(
    encode: Callable[[torch.Tensor], torch.Tensor], items: torch.Tensor, chunk_size: int | None
) -> torch.Tensor:
    if not chunk_size:
        return encode(items)
    return torch.cat([checkpoint(encode, chunk, use_reentrant=False) for chunk in items.split(chunk_size)])


def _expand(prompts: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    # Not len(): an export for any batch would fix it.
    return prompts.to(hidden.dtype).expand(hidden.shape[0], -1, -1)


class ECCLModel(CLIPPreTrainedModel):
    """A person-shaped CLIP with deep coupled prompts: sentences and images of people in one space.

    Args:
        config: the shape of the model.
    """

    config: ECCLConfig
    config_class = ECCLConfig
    # The files of this model travel with a saved checkpoint, for `trust_remote_code`.
    _auto_class = "AutoModel"
    base_model_prefix = "eccl"
    _no_split_modules = ["CLIPTextEmbeddings", "CLIPEncoderLayer", "ECCLVisionEmbeddings"]

    def __init__(self, config: ECCLConfig):
        super().__init__(config)
        # The layers read it from the configuration of their own encoder.
        for encoder_config in (config.text_config, config.vision_config):
            encoder_config._attn_implementation = config._attn_implementation
        self.text_model = ECCLTextEncoder(config)
        self.vision_model = ECCLVisionEncoder(config)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim, bias=False)
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim, bias=False)
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
            # transformers passes over modules without parameters of their own when a model's code is not its own,
            # which would leave these with its general start, 1.0 wide, in place of CLIP's.
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
        """Builds ECCL on a trained CLIP: its weights, a grid of positions resized bilinearly, fresh prompts.

        Args:
            clip: a Hub id, a local folder, a `CLIPModel`, or an [`ECCLModel`] without prompts.
            image_size: height and width in pixels, multiples of the patch size.
            num_prompt_tokens: 0 gives a plain person-shaped dual encoder.
            prompt_depth: how many layers get prompts; no more than the shallower encoder has.

        Returns:
            A model in evaluation mode that shares no memory with `clip`.

        Raises:
            ValueError: `clip` is no CLIP, or has prompts already, or the sizes do not fit.
        """
        if isinstance(clip, str):
            clip = cls._load_backbone(clip)
        model_type = clip.config.model_type
        if model_type not in ("clip", ECCLConfig.model_type):
            raise ValueError(f"from_clip takes a CLIP or an ECCL model without prompts, got model_type {model_type!r}")
        if model_type == ECCLConfig.model_type and clip.config.num_prompt_tokens:
            raise ValueError(
                f"from_clip takes a model without prompts, this one has {clip.config.num_prompt_tokens} prompt tokens; "
                "load it with from_pretrained"
            )
        text_config, vision_config = copy.deepcopy(clip.config.text_config), copy.deepcopy(clip.config.vision_config)
        if text_config.eos_token_id == _LEGACY_EOS_TOKEN_ID and model_type == "clip":
            text_config.bos_token_id, text_config.eos_token_id = text_config.vocab_size - 2, text_config.vocab_size - 1
        old_size = vision_config.image_size
        old_size = (old_size, old_size) if isinstance(old_size, int) else tuple(old_size)
        vision_config.image_size = list(image_size)
        config = ECCLConfig(
            text_config=text_config.to_dict(),
            vision_config=vision_config.to_dict(),
            projection_dim=clip.config.projection_dim,
            num_prompt_tokens=num_prompt_tokens,
            prompt_depth=prompt_depth,
            logit_scale_init_value=clip.config.logit_scale_init_value,
        )
        model = cls(config)
        weights = dict(clip.state_dict())
        grid = "vision_model.embeddings.position_embedding.weight"
        patch = vision_config.patch_size
        weights[grid] = resize_position_grid(
            weights[grid], (old_size[0] // patch, old_size[1] // patch), config.grid_size
        )
        missing, unexpected = model.load_state_dict(weights, strict=False)
        missing = [name for name in missing if not name.startswith("prompt_learner.")]
        if missing or unexpected:
            raise ValueError(f"the weights do not fit: missing {missing}, unexpected {unexpected}")
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
        self.text_model.embeddings.token_embedding = value

    def _prompts(self, modality: str) -> list[torch.Tensor]:
        return [] if self.prompt_learner is None else self.prompt_learner(modality)

    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Encodes captions.

        Args:
            input_ids: `(batch, length)`, `[SOT, words.., EOT, padding..]`; the padding may be cut.
            attention_mask: `(batch, length)`, taken so that a processor's output can be passed whole. It changes
                nothing: under the causal mask, what follows EOT never reaches the feature.

        Returns:
            `(batch, projection_dim)`, not normalised.

        Raises:
            ValueError: a caption without EOT among the first `config.max_text_length` tokens.
        """
        return self.text_projection(self.text_model(input_ids, self._prompts("text")))

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encodes images.

        Args:
            pixel_values: `(batch, channels, height, width)`, normalised as [`ECCLProcessor`] does.

        Returns:
            `(batch, projection_dim)`, not normalised.

        Raises:
            ValueError: another size than `config.vision_config.image_size`.
        """
        return self.visual_projection(self.vision_model(pixel_values, self._prompts("vision")))

    def get_token_features(self, input_ids: torch.Tensor) -> torch.Tensor:
        """What every token of a caption answers to in the shared space, before the caption is pooled.

        Args:
            input_ids: `(batch, length)`, as for [`~ECCLModel.get_text_features`], whose result is the row of the end
                token here.

        Returns:
            `(batch, tokens, projection_dim)`, not normalised; what the prompts push out at the end is not there.
        """
        return self.text_projection(self.text_model(input_ids, self._prompts("text"), pool=False))

    def get_patch_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """What every patch of an image looks like in the shared space, before the image is pooled.

        Args:
            pixel_values: `(batch, channels, height, width)`, as for [`~ECCLModel.get_image_features`].

        Returns:
            `(batch, rows, columns, projection_dim)`, the grid of patches, not normalised.
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
        """Encodes captions, images or both, and compares them where both are given.

        Args:
            input_ids: `(texts, length)`, see [`~ECCLModel.get_text_features`].
            pixel_values: `(images, channels, height, width)`, see [`~ECCLModel.get_image_features`].
            attention_mask: `(texts, length)`, of no effect.
            output_hidden_states: also gives what passes between the layers.
            output_attentions: also gives the attention weights, which only `attn_implementation="eager"` computes.
            return_dict: `False` for a tuple of what is not `None`.
            embed_chunk_size: encodes so many captions, and images, at a time, and again in the backward pass, so that
                no more activations than theirs are kept. Features and gradients are the same (gradient caching:
                "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP 2021).

        Raises:
            ValueError: neither input was given, attentions are asked of another implementation, or hidden states or
                attentions of chunks.
        """
        if input_ids is None and pixel_values is None:
            raise ValueError("ECCLModel needs input_ids, pixel_values or both, got neither")
        hidden_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        attentions = self.config.output_attentions if output_attentions is None else output_attentions
        if attentions and self.config._attn_implementation != "eager":
            raise ValueError(
                f"output_attentions needs attn_implementation 'eager', the model has "
                f"{self.config._attn_implementation!r}: model.set_attn_implementation('eager')"
            )
        output, asked = ECCLOutput(), bool(hidden_states or attentions)
        if asked and embed_chunk_size:
            raise ValueError("hidden states and attentions are of a whole batch: leave embed_chunk_size out")
        if input_ids is not None:
            with _recording(self.text_model.encoder, hidden_states, attentions) as text_record:
                output["text_embeds"] = _in_chunks(self.get_text_features, input_ids, embed_chunk_size)
        if pixel_values is not None:
            with _recording(self.vision_model.encoder, hidden_states, attentions) as vision_record:
                output["image_embeds"] = _in_chunks(self.get_image_features, pixel_values, embed_chunk_size)
        if input_ids is not None and pixel_values is not None:
            texts, images = (nn.functional.normalize(output[name], dim=-1) for name in ("text_embeds", "image_embeds"))
            output["logits_per_text"] = texts @ images.T * self.logit_scale.exp()
            output["logits_per_image"] = output["logits_per_text"].T
        if asked and input_ids is not None:
            output["text_model_output"] = text_record
        if asked and pixel_values is not None:
            output["vision_model_output"] = vision_record
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


def resize_position_grid(positions: torch.Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> torch.Tensor:
    """Resizes the patch positions of a vision transformer bilinearly (`align_corners=False`); the class token's stays.

    Args:
        positions: `(1 + rows * columns, width)`, the class token's first.
        old_grid, new_grid: rows and columns of patches.

    Returns:
        `(1 + new rows * new columns, width)` in the same dtype.

    Raises:
        ValueError: `positions` does not have the rows of `old_grid`.
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
