"""Reads checkpoints of the original code: CLIP's own, IRRA's / MLLM4Text-ReID's, and ECCL's."""

from pathlib import Path

import torch

from .configuration_eccl import ECCLConfig
from .modeling_eccl import ECCLModel, resize_position_grid

# OpenAI's names -> transformers', for what is not inside a layer.
_NAMES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
# OpenAI stores projections as (in, out).
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_LAYER_NAMES = {
    "attn.out_proj.": "self_attn.out_proj.",
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}
_ENCODERS = {"visual.transformer.resblocks.": "vision_model", "transformer.resblocks.": "text_model"}
# Heads that IRRA and its descendants train beside the backbone.
_IGNORED_HEADS = ("classifier", "mlm_head", "cross_", "ln_pre_", "ln_post.", "loss")
_CLIP_SCALARS = ("input_resolution", "context_length", "vocab_size")
_DEFAULT_LOGIT_SCALE = 2.6592


def convert_checkpoint(
    path: str | Path,
    image_size: tuple[int, int] = (384, 128),
    num_prompt_tokens: int = 4,
    prompt_depth: int = 12,
) -> ECCLModel:
    """Builds an [`ECCLModel`] from a checkpoint of the original code, recognised by its keys.

    Args:
        path: a CLIP state dict with OpenAI's names; `{"model": {"base_model....": ...}}` (IRRA, MLLM4Text-ReID); or
            `{"model": {"prompt_learner....": ...}}` (ECCL), whose weights hold the LoRA product already.
        image_size: height and width; a position grid of another size is resized bilinearly.
        num_prompt_tokens, prompt_depth: of fresh prompts, where the file has none.

    Returns:
        A float32 model in evaluation mode.

    Raises:
        ValueError: none of the three formats, or a key that is missing or unknown; it is named.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is not a PyTorch file of plain tensors: {error}") from error
    state = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise ValueError(f"{path} holds a {type(state).__name__}, it must hold a state dict")
    if any(key.startswith("prompt_learner.") for key in state):
        openai, prompts = _split_eccl(state)
    elif any(key.startswith("base_model.") for key in state):
        openai = {
            key.removeprefix("base_model."): value for key, value in state.items() if key.startswith("base_model.")
        }
        rest = [key for key in state if not key.startswith(("base_model.", *_IGNORED_HEADS))]
        if rest:
            raise ValueError(f"{path}: unknown keys {', '.join(sorted(rest)[:5])}")
        openai.setdefault("logit_scale", torch.tensor(_DEFAULT_LOGIT_SCALE))
        prompts = {}
    elif "visual.conv1.weight" in state:
        openai, prompts = {key: value for key, value in state.items() if key not in _CLIP_SCALARS}, {}
    else:
        raise ValueError(
            f"{path} is neither a CLIP, an IRRA nor an ECCL checkpoint; it starts with the keys {list(state)[:5]}"
        )
    weights = _rename(openai, path)
    if prompts:
        prompt_depth, num_prompt_tokens = prompts["prompt_learner.text_prompts"].shape[:2]
    config = _read_config(weights, image_size, num_prompt_tokens, prompt_depth)
    grid = "vision_model.embeddings.position_embedding.weight"
    weights[grid] = resize_position_grid(weights[grid], _guess_grid(len(weights[grid]) - 1, config), config.grid_size)
    model = ECCLModel(config)
    missing, unexpected = model.load_state_dict(weights | prompts, strict=False)
    missing = [name for name in missing if prompts or not name.startswith("prompt_learner.")]
    if missing or unexpected:
        raise ValueError(
            f"{path}: missing {', '.join(missing) or 'nothing'}, unknown {', '.join(unexpected) or 'nothing'}"
        )
    return model.eval()


def _rename(openai: dict[str, torch.Tensor], path: str | Path) -> dict[str, torch.Tensor]:
    weights = {}
    for key, value in openai.items():
        value = value.float()
        if key in _NAMES:
            weights[_NAMES[key]] = value
        elif key in _TRANSPOSED:
            weights[_TRANSPOSED[key]] = value.T.contiguous()
        elif prefix := next((prefix for prefix in _ENCODERS if key.startswith(prefix)), None):
            index, _, name = key.removeprefix(prefix).partition(".")
            layer = f"{_ENCODERS[prefix]}.encoder.layers.{index}."
            renamed = next((part for part in _LAYER_NAMES if name.startswith(part)), None)
            if name in ("attn.in_proj_weight", "attn.in_proj_bias"):
                for projection, part in zip("qkv", value.chunk(3), strict=True):
                    weights[f"{layer}self_attn.{projection}_proj.{name.rpartition('_')[2]}"] = part.contiguous()
            elif renamed:
                weights[layer + _LAYER_NAMES[renamed] + name.removeprefix(renamed)] = value
            else:
                raise ValueError(f"{path}: unknown key {key}")
        else:
            raise ValueError(f"{path}: unknown key {key}")
    return weights


def _split_eccl(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The encoders under OpenAI's names, and the prompt learner under ours; LoRA is in the weights already."""
    openai = {}
    for key, value in state.items():
        owner, _, name = key.partition(".")
        if ".lora_" in key or owner == "prompt_learner":
            continue
        if owner == "image_encoder":
            openai[f"visual.{name}"] = value
        elif owner == "text_encoder" or key == "clip_model.token_embedding.weight":
            openai[name] = value
        elif owner != "clip_model":  # which otherwise repeats what the two encoders hold
            openai[key] = value
    learner = {
        key.removeprefix("prompt_learner."): value.float() for key, value in state.items() if "prompt_learner." in key
    }
    depth = 1 + sum(key.startswith("compound_prompts_text.") for key in learner)
    texts = [learner["ctx"], *(learner[f"compound_prompts_text.{index}"] for index in range(depth - 1))]
    prompts = {"prompt_learner.text_prompts": torch.stack(texts)}
    for part in ("weight", "bias"):
        prompts[f"prompt_learner.projections.0.{part}"] = learner[f"proj.{part}"]
        for index in range(depth - 1):
            source = learner[f"compound_prompt_projections.{index}.{part}"]
            prompts[f"prompt_learner.projections.{index + 1}.{part}"] = source
    return openai, prompts


def _read_config(
    weights: dict[str, torch.Tensor], image_size: tuple[int, int], num_prompt_tokens: int, prompt_depth: int
) -> ECCLConfig:
    def layers(encoder: str) -> int:
        return sum(
            name.startswith(f"{encoder}.encoder.layers.") and name.endswith("layer_norm1.weight") for name in weights
        )

    def shape(name: str) -> torch.Size:
        if name not in weights:
            raise ValueError(f"the checkpoint lacks what becomes {name}")
        return weights[name].shape

    vocab_size, text_width = shape("text_model.embeddings.token_embedding.weight")
    vision_width, _, patch_size, _ = shape("vision_model.embeddings.patch_embedding.weight")
    projection_dim = shape("visual_projection.weight")[0]
    return ECCLConfig(
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": text_width,
            "intermediate_size": shape("text_model.encoder.layers.0.mlp.fc1.weight")[0],
            "num_hidden_layers": layers("text_model"),
            "num_attention_heads": text_width // 64,
            "max_position_embeddings": shape("text_model.embeddings.position_embedding.weight")[0],
            "projection_dim": projection_dim,
            "bos_token_id": vocab_size - 2,
            "eos_token_id": vocab_size - 1,
            "pad_token_id": vocab_size - 1,
        },
        vision_config={
            "hidden_size": vision_width,
            "intermediate_size": shape("vision_model.encoder.layers.0.mlp.fc1.weight")[0],
            "num_hidden_layers": layers("vision_model"),
            "num_attention_heads": vision_width // 64,
            "projection_dim": projection_dim,
            "image_size": list(image_size),
            "patch_size": patch_size,
        },
        projection_dim=projection_dim,
        num_prompt_tokens=num_prompt_tokens,
        prompt_depth=prompt_depth,
        logit_scale_init_value=float(weights.get("logit_scale", _DEFAULT_LOGIT_SCALE)),
    )


def _guess_grid(patches: int, config: ECCLConfig) -> tuple[int, int]:
    """The grid that a file's positions are for: the model's own, or else CLIP's square."""
    rows, columns = config.grid_size
    if patches == rows * columns:
        return rows, columns
    side = round(patches**0.5)
    return side, side
