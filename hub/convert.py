"""Reads checkpoints of the original code: CLIP's own, IRRA's / MLLM4Text-ReID's, and ECCL's.

`python -m eccl.hub.convert --checkpoint best.pth --output_dir out` writes what `AutoModel.from_pretrained` loads.
"""

import argparse
import logging
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from transformers import CLIPTokenizer

from ..configuration_eccl import ECCLConfig
from ..modeling_eccl import ECCLModel, resize_position_grid
from ..processing_eccl import ECCLImageProcessor, ECCLProcessor
from ..utils.shipped import clip_tokenizer
from .adapter import attach_lora
from .model_card import Facts, make_model_card
from .publish import publish

logger = logging.getLogger(__name__)

# Our names -> OpenAI's, for what is not inside a layer.
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
_GRID = "vision_model.embeddings.position_embedding.weight"
_LAYER = re.compile(r"(vision|text)_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_LAYER_NAMES = {
    "self_attn.out_proj": "attn.out_proj.",
    "layer_norm1": "ln_1.",
    "layer_norm2": "ln_2.",
    "mlp.fc1": "mlp.c_fc.",
    "mlp.fc2": "mlp.c_proj.",
}
# OpenAI keeps the three input projections of attention in one matrix, in this order.
_INPUT_PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
# ... and the two projections to the shared space as (in, out).
_TRANSPOSED = ("visual_projection.weight", "text_projection.weight")
_LORA_NAMES = {
    "self_attn.q_proj": "attn.lora_{}_q",
    "self_attn.k_proj": "attn.lora_{}_k",
    "self_attn.v_proj": "attn.lora_{}_v",
    "self_attn.out_proj": "attn.lora_{}_o",
    "mlp.fc1": "mlp.c_fc.lora_{}",
    "mlp.fc2": "mlp.c_proj.lora_{}",
}
_TRANSFORMERS = {"vision": "visual.transformer.resblocks.", "text": "transformer.resblocks."}
_PEFT_LAYER = re.compile(r"base_model\.model\.(vision|text)_model\.encoder\.layers\.(\d+)\.(.+)\.lora_(A|B)\..+")

# Beside the backbone: the heads of IRRA and its descendants, and three numbers in CLIP's own files.
_IRRA_HEADS = ("classifier.", "mlm_head.", "cross_", "ln_pre_t.", "ln_pre_i.", "ln_post.")
_CLIP_NUMBERS = ("input_resolution", "context_length", "vocab_size")
_CLIP_VOCAB_SIZE = 49408
_DEFAULT_LOGIT_SCALE = 2.6592


def convert_checkpoint(
    path: str | Path,
    image_size: tuple[int, int] = (384, 128),
    num_prompt_tokens: int = 4,
    prompt_depth: int = 12,
    lora_alpha: int = 4,
    merge_lora: bool = True,
) -> ECCLModel | PeftModel:
    """Builds an [`ECCLModel`] from a checkpoint of the original code, recognised by its keys.

    Args:
        path: a CLIP state dict with OpenAI's names; `{"model": {"base_model....": ...}}` (IRRA, MLLM4Text-ReID); or
            `{"model": {"prompt_learner....": ...}}` (ECCL), whose weights hold the LoRA product already.
        image_size: height and width; a square grid of positions is resized to it bilinearly.
        num_prompt_tokens, prompt_depth: of fresh prompts, where the file has none.
        lora_alpha: of the run that wrote an ECCL file (the file does not say): its product is
            `lora_alpha / rank * B A`. Only needed to take the product out again.
        merge_lora: `False`, for an ECCL file, takes the product out of the weights and gives it as an adapter of
            peft's: to train on, or to have the few MB apart.

    Returns:
        A float32 model in evaluation mode; as peft wraps it without `merge_lora`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file of plain tensors, none of the three formats, a key that is missing or unknown or has
            another shape than the rest asks for, LoRA asked for that is not there.
    """
    state = _read_state(Path(path))
    file_name = _recognise(state, path)
    checkpoint = _Checkpoint(path, state, file_name)
    prompts = _read_prompts(checkpoint) if file_name is _in_eccl else {}
    if prompts:
        prompt_depth, num_prompt_tokens = prompts["prompt_learner.text_prompts"].shape[:2]
    config = _read_config(checkpoint, image_size, num_prompt_tokens, prompt_depth)
    model = ECCLModel(config)
    expected = model.state_dict()
    if prompts:
        checkpoint.check_shapes(prompts, expected)
    weights = prompts | {
        name: _read_weight(checkpoint, name, tensor, config)
        for name, tensor in expected.items()
        if not name.startswith("prompt_learner.")
    }
    lora = _read_lora(checkpoint, config)
    checkpoint.finish()
    if not merge_lora:
        if not lora:
            raise ValueError(f"{path} holds no LoRA matrices, merge_lora=False asks for them")
        return _unmerge(model, weights, lora, lora_alpha)
    model.load_state_dict(weights, strict=bool(prompts) or not num_prompt_tokens)
    return model.eval()


class _Checkpoint:
    """A state dict that knows what was asked of it: every key must be, and every key asked for must be there."""

    def __init__(self, path: str | Path, state: dict[str, torch.Tensor], file_name: Callable[[str], str]):
        self.path, self.state, self.file_name = path, state, file_name
        self.used: set[str] = set()

    def __contains__(self, openai_name: str) -> bool:
        return self.file_name(openai_name) in self.state

    def get(self, openai_name: str, dims: int) -> torch.Tensor:
        """The tensor of a name of OpenAI's, in float32."""
        return self.get_key(self.file_name(openai_name), dims)

    def get_key(self, key: str, dims: int) -> torch.Tensor:
        if key not in self.state:
            raise ValueError(f"{self.path}: the key {key} is missing")
        value = self.state[key]
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
            raise ValueError(f"{self.path}: {key} is {kind}, it must be a tensor of floating point numbers")
        if value.layout != torch.strided or value.is_meta:
            raise ValueError(
                f"{self.path}: {key} is no plain tensor but {'on meta' if value.is_meta else value.layout}"
            )
        if not value.isfinite().all():
            raise ValueError(f"{self.path}: {key} holds NaN or infinity")
        if value.ndim != dims:
            raise ValueError(f"{self.path}: {key} has the shape {tuple(value.shape)}, it must have {dims} dimensions")
        self.used.add(key)
        return value.float()

    def check_shape(self, key: str, shape: torch.Size, expected: tuple[int, ...]) -> None:
        if tuple(shape) != tuple(expected):
            raise ValueError(
                f"{self.path}: {key} has the shape {tuple(shape)}, beside the other keys it must have {tuple(expected)}"
            )

    def check_shapes(self, tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            self.check_shape(name, tensor.shape, expected[name].shape)

    def finish(self) -> None:
        """Every key must have been used, but for those that are known to be of no use here.

        Raises:
            ValueError: a key that is unknown.
        """
        rest = self.state.keys() - self.used
        if self.file_name is _in_clip:
            known = rest & set(_CLIP_NUMBERS)
        elif self.file_name is _in_irra:
            known = {key for key in rest if key.startswith(_IRRA_HEADS)}
            if known:
                heads = ", ".join(sorted({key.split(".")[0] for key in known}))
                logger.warning(f"{self.path}: {len(known)} keys are of heads beside the backbone, left out: {heads}")
        else:
            # The published model holds parts of CLIP's text encoder a second time.
            known = {key for key in rest if key.removeprefix("clip_model.") in _NAMES.values()}
        unknown = sorted(rest - known)
        if unknown:
            more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            raise ValueError(f"{self.path}: unknown keys {', '.join(unknown[:5])}{more}")


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist" if not path.exists() else f"{path} is no file")
    with path.open("rb") as file:
        start = file.read(64).lstrip().lower()
    if not start:
        raise ValueError(f"{path} is empty")
    if start.startswith(b"<"):
        raise ValueError(f"{path} is a web page, not a checkpoint: download the file itself")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    # What torch raises depends on what is wrong with the file: any of it means that this is not a readable checkpoint.
    except Exception as error:
        reason = str(error).split("\n")[0]
        if "TorchScript" in str(error):
            reason = "it is a TorchScript archive: save the state_dict() of what torch.jit.load gives"
        elif "weights_only" in str(error) or "Weights only" in str(error):
            reason = "it holds more than tensors, and code in a checkpoint is not run; save its state dict alone"
        raise ValueError(f"{path} cannot be read as a file of plain tensors: {reason}") from error
    state = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise ValueError(f"{path} holds a {type(state).__name__}, it must hold a state dict")
    return state


def _recognise(state: dict[str, torch.Tensor], path: str | Path) -> Callable[[str], str]:
    """How the file writes OpenAI's names."""
    if any(key.startswith("prompt_learner.") for key in state):
        return _in_eccl
    if any(key.startswith("base_model.") for key in state):
        return _in_irra
    if any(key.startswith("visual.") for key in state):
        return _in_clip
    raise ValueError(
        f"{path} is neither a CLIP, an IRRA nor an ECCL checkpoint: no key starts with visual., base_model. or "
        f"prompt_learner.; its first keys are {', '.join(list(state)[:5]) or 'none'}"
    )


def _in_clip(openai_name: str) -> str:
    return openai_name


def _in_irra(openai_name: str) -> str:
    return f"base_model.{openai_name}"


def _in_eccl(openai_name: str) -> str:
    if openai_name.startswith("visual."):
        return f"image_encoder.{openai_name.removeprefix('visual.')}"
    if openai_name == "token_embedding.weight":
        return f"clip_model.{openai_name}"
    return openai_name if openai_name == "logit_scale" else f"text_encoder.{openai_name}"


def _read_config(
    checkpoint: _Checkpoint, image_size: tuple[int, int], num_prompt_tokens: int, prompt_depth: int
) -> ECCLConfig:
    def encoder(name: str, width: int) -> dict:
        pattern = re.compile(re.escape(checkpoint.file_name(_TRANSFORMERS[name])) + r"(\d+)\.")
        indices = {int(match[1]) for match in map(pattern.match, checkpoint.state) if match}
        if not indices:
            raise ValueError(f"{checkpoint.path}: no key of a {name} layer, {pattern.pattern} ...")
        hidden = checkpoint.get(f"{_TRANSFORMERS[name]}0.mlp.c_fc.weight", 2).shape[0]
        if width % 64:
            raise ValueError(f"{checkpoint.path}: the {name} encoder is {width} wide, CLIP's heads are 64 wide")
        return {
            "hidden_size": width,
            "intermediate_size": hidden,
            "num_hidden_layers": max(indices) + 1,
            "num_attention_heads": width // 64,
            "projection_dim": projection_dim,
        }

    vocab_size, text_width = checkpoint.get("token_embedding.weight", 2).shape
    vision_width, channels, patch_size, _ = checkpoint.get("visual.conv1.weight", 4).shape
    projection_dim = checkpoint.get("visual.proj", 2).shape[1]
    text = encoder("text", text_width) | {
        "vocab_size": vocab_size,
        "max_position_embeddings": len(checkpoint.get("positional_embedding", 2)),
        "bos_token_id": vocab_size - 2,
        "eos_token_id": vocab_size - 1,
        "pad_token_id": vocab_size - 1,
    }
    vision = encoder("vision", vision_width) | {
        "num_channels": channels,
        "image_size": list(image_size),
        "patch_size": patch_size,
    }
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


def _read_weight(checkpoint: _Checkpoint, name: str, like: torch.Tensor, config: ECCLConfig) -> torch.Tensor:
    """The tensor that becomes the parameter `name`, which is shaped like `like`."""
    if name == _GRID:
        return _read_grid(checkpoint, like, config)
    if name == "logit_scale" and name not in checkpoint:
        return torch.tensor(_DEFAULT_LOGIT_SCALE)
    layer = _LAYER.fullmatch(name)
    if layer is None:
        source, part = _NAMES[name], None
    else:
        encoder, index, module, kind = layer.groups()
        part = _INPUT_PROJECTIONS.index(module) if module in _INPUT_PROJECTIONS else None
        in_layer = f"{_LAYER_NAMES[module]}{kind}" if part is None else f"attn.in_proj_{kind}"
        source = f"{_TRANSFORMERS[encoder]}{index}.{in_layer}"
    value = checkpoint.get(source, like.ndim)
    shape = tuple(like.shape)
    if name in _TRANSPOSED:
        shape = shape[::-1]
    elif part is not None:
        shape = (3 * shape[0], *shape[1:])
    checkpoint.check_shape(checkpoint.file_name(source), value.shape, shape)
    if name in _TRANSPOSED:
        return value.T.contiguous()
    return value if part is None else value.chunk(3)[part].clone()


def _read_grid(checkpoint: _Checkpoint, like: torch.Tensor, config: ECCLConfig) -> torch.Tensor:
    """The image positions: the model's own grid, or CLIP's square, which is resized."""
    source = _NAMES[_GRID]
    value = checkpoint.get(source, 2)
    checkpoint.check_shape(checkpoint.file_name(source), value.shape[1:], like.shape[1:])
    patches, (rows, columns) = len(value) - 1, config.grid_size
    if patches == rows * columns:
        return value
    side = round(patches**0.5)
    if side * side != patches:
        size = config.vision_config.patch_size
        raise ValueError(
            f"{checkpoint.path}: {checkpoint.file_name(source)} is for {patches} patches, neither a square nor the "
            f"{rows} x {columns} of image_size {config.vision_config.image_size}: give the image_size that the "
            f"checkpoint was trained with, {patches} patches of {size} x {size} pixels"
        )
    return resize_position_grid(value, (side, side), config.grid_size)


def _read_prompts(checkpoint: _Checkpoint) -> dict[str, torch.Tensor]:
    """The prompt learner under our names; the original's gives layer 0 names of its own."""
    count = sum(key.startswith("prompt_learner.compound_prompts_text.") for key in checkpoint.state)
    texts = [checkpoint.get_key("prompt_learner.ctx", 2)]
    texts += [checkpoint.get_key(f"prompt_learner.compound_prompts_text.{index}", 2) for index in range(count)]
    for index, text in enumerate(texts[1:]):
        checkpoint.check_shape(f"prompt_learner.compound_prompts_text.{index}", text.shape, texts[0].shape)
    prompts = {"prompt_learner.text_prompts": torch.stack(texts)}
    sources = ["proj", *(f"compound_prompt_projections.{index}" for index in range(count))]
    for index, source in enumerate(sources):
        for part, dims in (("weight", 2), ("bias", 1)):
            value = checkpoint.get_key(f"prompt_learner.{source}.{part}", dims)
            prompts[f"prompt_learner.projections.{index}.{part}"] = value
    return prompts


def _read_lora(checkpoint: _Checkpoint, config: ECCLConfig) -> dict[tuple[str, str, str, str], torch.Tensor]:
    """The LoRA matrices by encoder, layer, module and `A` or `B`: all of them, or none where the file has none."""
    if not any(".lora_" in key for key in checkpoint.state):
        return {}
    matrices, rank = {}, None
    for encoder, shape in (("vision", config.vision_config), ("text", config.text_config)):
        width, hidden = shape.hidden_size, shape.intermediate_size
        sizes = dict.fromkeys(_LORA_NAMES, (width, width)) | {"mlp.fc1": (width, hidden), "mlp.fc2": (hidden, width)}
        for index in range(shape.num_hidden_layers):
            for module, pattern in _LORA_NAMES.items():
                inputs, outputs = sizes[module]
                for letter in "AB":
                    source = f"{_TRANSFORMERS[encoder]}{index}.{pattern.format(letter)}"
                    value = checkpoint.get(source, 2)
                    rank = value.shape[0] if rank is None else rank
                    expected = (rank, inputs) if letter == "A" else (outputs, rank)
                    checkpoint.check_shape(checkpoint.file_name(source), value.shape, expected)
                    matrices[encoder, str(index), module, letter] = value
    return matrices


def _unmerge(
    model: ECCLModel, weights: dict[str, torch.Tensor], lora: dict[tuple[str, str, str, str], torch.Tensor], alpha: int
) -> PeftModel:
    """The model as it is trained: the LoRA product out of its weights, and the matrices in peft's hands."""
    rank = next(iter(lora.values())).shape[0]
    for encoder, index, module, letter in lora:
        if letter == "A":
            product = lora[encoder, index, module, "B"] @ lora[encoder, index, module, "A"]
            weights[f"{encoder}_model.encoder.layers.{index}.{module}.weight"] -= alpha / rank * product
    model.load_state_dict(weights)
    wrapped = attach_lora(model, rank=rank, alpha=alpha)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if match := _PEFT_LAYER.fullmatch(name):
                parameter.copy_(lora[match.groups()])
    return wrapped.eval()


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m eccl.hub.convert", description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", required=True, help="A .pth or .pt file of the original code.")
    parser.add_argument("--output_dir", required=True, help="A new or empty folder.")
    parser.add_argument("--tokenizer", help="Hub id or folder of a CLIP tokenizer; by default CLIP's own.")
    parser.add_argument("--image_size", type=int, nargs=2, default=(384, 128), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument(
        "--num_prompt_tokens",
        type=int,
        default=0,
        help="Fresh prompts for a file that has none; 0, the default, gives a backbone for train_eccl.py --init_from.",
    )
    parser.add_argument("--prompt_depth", type=int, default=12, help="Layers with fresh prompts.")
    parser.add_argument("--push_to_hub", metavar="NAME", help="Publish the folder as the model USER/NAME.")
    values = parser.parse_args(arguments)
    output_dir = Path(values.output_dir).expanduser().resolve()
    try:
        if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
            raise FileExistsError(f"{output_dir} exists and is not an empty folder: nothing is written over it")
        model = convert_checkpoint(
            values.checkpoint, tuple(values.image_size), values.num_prompt_tokens, values.prompt_depth
        )
        processor = _make_processor(model.config, values.tokenizer)
        _save_whole(output_dir, model, processor, _card(values, output_dir, model.config))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{output_dir}: {sum(tensor.numel() for tensor in model.parameters()):,} parameters")
    if not isinstance(processor, ECCLProcessor):
        print("no --tokenizer, and its vocabulary is not CLIP's: AutoModel loads it, AutoProcessor does not")
    if values.push_to_hub:
        try:
            print(f"published: {publish(output_dir, values.push_to_hub)}")
        except RuntimeError as error:
            sys.exit(f"error: {error}")


def _card(values: argparse.Namespace, output_dir: Path, config: ECCLConfig) -> str:
    """What is known of a converted model: where its weights are from. Nothing was measured on it."""
    method = f"Converted from `{Path(values.checkpoint).name}`, a checkpoint of the original code, "
    method += "its LoRA merged" if config.num_prompt_tokens else "a person-shaped CLIP without prompts"
    return make_model_card(
        Facts(values.push_to_hub or output_dir.name, None, f"{method}. The weights are its authors'.")
    )


def _make_processor(config: ECCLConfig, tokenizer: str | None) -> ECCLProcessor | ECCLImageProcessor:
    if tokenizer is not None:
        return ECCLProcessor.for_model(config, CLIPTokenizer.from_pretrained(tokenizer))
    if config.text_config.vocab_size == _CLIP_VOCAB_SIZE:
        return ECCLProcessor.for_model(config, clip_tokenizer())
    height, width = config.vision_config.image_size
    return ECCLImageProcessor(size={"height": height, "width": width})


def _save_whole(output_dir: Path, model: ECCLModel, processor: ECCLProcessor | ECCLImageProcessor, card: str) -> None:
    """Writes beside the folder first, so that it is there whole or not at all."""
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}-") as unfinished:
        folder = Path(unfinished) / "model"
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
        folder.replace(output_dir)


if __name__ == "__main__":
    main(sys.argv[1:])
