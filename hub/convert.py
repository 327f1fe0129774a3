"""Converts a checkpoint of the original code (CLIP, IRRA, MLLM4Text-ReID or ECCL) to a folder that AutoModel loads.

python -m eccl.hub.convert --checkpoint best.pth --output_dir converted
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.command_line import CommandParser, add_shared_option, at_least, command, require_push, say, tell
from ..utils.files import complete_folder, require_new_folder, require_writable_folder
from ..utils.text import code_span
from .publish import publish, require_publishable

# Imported by the functions that need them, so that --help and a mistake in the arguments answer at once.
if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import CLIPTokenizer

    from ..configuration_eccl import ECCLConfig
    from ..modeling_eccl import ECCLModel
    from ..processing_eccl import ECCLImageProcessor, ECCLProcessor
    from .adapter import ECCLPeftModel
    from .original_checkpoints import OriginalContent

_CLIP_VOCAB_SIZE = 49408
_ACTIVATIONS = ("quick_gelu", "gelu")
_PEFT_NAME = re.compile(r"base_model\.model\.(vision|text)_model\.encoder\.layers\.(\d+)\.(.+)\.lora_(A|B)\..+")


def convert_checkpoint(
    path: str | Path,
    image_size: tuple[int, int] = (384, 128),
    num_prompt_tokens: int = 4,
    prompt_depth: int | None = 12,
    lora_alpha: int = 4,
    merge_lora: bool = True,
    hidden_act: str | None = None,
    num_attention_heads: tuple[int, int] | None = None,
) -> "ECCLModel | PeftModel":
    """Builds an [`ECCLModel`] from a checkpoint of the original code. The format is recognised by the keys.

    Args:
        path: a file with one of three formats: a CLIP state dict with OpenAI's names;
            `{"model": {"base_model....": ...}}` (IRRA, MLLM4Text-ReID); or `{"model": {"prompt_learner....": ...}}`
            (ECCL). The weights of an ECCL file already contain the LoRA product.
        image_size: height and width of the images in pixels. Position embeddings of a square grid of patches are
            resized to it bilinearly.
        num_prompt_tokens: number of tokens of the new prompts in each prompted layer, if the file has no prompts.
        prompt_depth: number of layers, counted from the first, that get new prompts, if the file has no prompts;
            `None`: all layers of the shallower encoder, at most 12.
        lora_alpha: the value that the ECCL file was trained with; the file does not contain it. The LoRA product is
            `lora_alpha / rank * B A`. It matters only with `merge_lora=False`.
        merge_lora: `False` (only for an ECCL file) subtracts the LoRA product from the weights and returns LoRA as an
            adapter of peft. The adapter can be trained further or saved alone (a few MB).
        hidden_act: the activation function of the encoders, `quick_gelu` or `gelu`. No file says it. By default it is
            that of OpenAI's CLIP, from which all models of IRRA and ECCL descend; a CLIP in another precision than
            OpenAI's own files needs this argument.
        num_attention_heads: number of attention heads of the vision encoder, and of the text encoder; no file says it.
            By default it is that of the published model with these sizes; a CLIP of other sizes that is not OpenAI's
            needs this argument.

    Returns:
        A float32 model in evaluation mode; with `merge_lora=False` it is wrapped by peft.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file does not hold plain tensors; it has none of the three formats; a key is missing, unknown,
            or of another shape than the other keys require; `hidden_act` or `num_attention_heads` is needed or wrong;
            or `merge_lora` is `False` and the file has no LoRA.
    """
    path = Path(path)
    _require_file(path)
    if hidden_act not in (None, *_ACTIVATIONS):
        raise ValueError(f"hidden_act is {hidden_act!r}, it must be one of {', '.join(_ACTIVATIONS)}")
    from .original_checkpoints import EncoderFacts, read_checkpoint

    facts = EncoderFacts(hidden_act, num_attention_heads)
    content = read_checkpoint(path, image_size, num_prompt_tokens, prompt_depth, facts)
    model = content.model
    if not merge_lora:
        if not content.lora:
            raise ValueError(f"{path} holds no LoRA matrices: merge_lora=False needs a checkpoint with LoRA")
        return _separate_lora(content, lora_alpha)
    has_new_prompts = model.prompt_learner is not None and "prompt_learner.text_prompts" not in content.weights
    model.load_state_dict(content.weights, strict=not has_new_prompts)
    return model.eval()


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file" if path.exists() else f"{path} does not exist")


def _separate_lora(content: "OriginalContent", alpha: int) -> "ECCLPeftModel":
    """Subtracts the LoRA product from the weights, and gives the LoRA matrices to an adapter of peft."""
    import torch

    from .adapter import attach_lora
    from .original_checkpoints import LoraName

    model, weights, lora = content
    rank = next(iter(lora.values())).shape[0]
    for encoder, layer, module, letter in lora:
        if letter == "A":
            product = lora[LoraName(encoder, layer, module, "B")] @ lora[LoraName(encoder, layer, module, "A")]
            weights[f"{encoder}_model.encoder.layers.{layer}.{module}.weight"] -= alpha / rank * product
    model.load_state_dict(weights)
    wrapped = attach_lora(model, rank=rank, alpha=alpha)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if match := _PEFT_NAME.fullmatch(name):
                parameter.copy_(lora[LoraName(*match.groups())])
    # The subtraction rounds: the base is not exactly the one that the checkpoint was trained on.
    wrapped.base_digests = None
    return wrapped.eval()


def make_parser() -> CommandParser:
    parser = CommandParser("python -m eccl.hub.convert", __doc__)
    parser.add_argument("--checkpoint", required=True, help="file to convert: a .pth or .pt file of the original code")
    add_shared_option(parser, "output_dir", help="folder to write to; it must not exist yet, or be empty")
    add_shared_option(
        parser,
        "tokenizer",
        help="folder or Hub id of a CLIP tokenizer (default: the tokenizer of CLIP, if it fits the vocabulary)",
    )
    parser.add_argument(
        "--image_size",
        type=at_least(1),
        nargs=2,
        default=[384, 128],
        metavar=("HEIGHT", "WIDTH"),
        help="height and width of the images in pixels, multiples of the patch size",
    )
    parser.add_argument(
        "--num_prompt_tokens",
        type=at_least(0),
        default=0,
        help="number of tokens of the new prompts in each prompted layer, for a checkpoint without prompts; "
        "0 adds no prompts and gives a backbone for --init_from of train_eccl.py",
    )
    parser.add_argument(
        "--prompt_depth",
        type=at_least(1),
        help="number of layers, counted from the first, that get the new prompts (default: all layers of the shallower "
        "encoder, at most 12); without effect if none are added",
    )
    parser.add_argument(
        "--hidden_act",
        choices=_ACTIVATIONS,
        help="activation function of the encoders (default: that of OpenAI's CLIP, for a file that descends from it)",
    )
    parser.add_argument(
        "--num_attention_heads",
        type=at_least(1),
        nargs=2,
        metavar=("VISION", "TEXT"),
        help="number of attention heads of each encoder (default: that of the published CLIP with the same sizes)",
    )
    parser.add_argument(
        "--push_to_hub",
        metavar="NAME",
        help="also publish the folder on the Hub as this model: USER/NAME, or NAME alone for the user who is logged in",
    )
    add_shared_option(parser, "public")
    return parser


@command
def main(arguments: list[str]) -> None:
    parser = make_parser()
    options = parser.parse_args(arguments)
    require_push(parser, options)
    checkpoint, output_dir = Path(options.checkpoint), Path(options.output_dir).expanduser().resolve()
    require_new_folder(output_dir)
    require_writable_folder(output_dir)
    _require_file(checkpoint)
    if options.push_to_hub:
        require_publishable(options.push_to_hub, "model", options.public)
    say(f"reading {checkpoint}")
    from ..modeling_eccl import ECCLModel
    from ..processing_eccl import ECCLProcessor, load_tokenizer

    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else None
    model = convert_checkpoint(
        checkpoint,
        tuple(options.image_size),
        options.num_prompt_tokens,
        options.prompt_depth,
        hidden_act=options.hidden_act,
        num_attention_heads=tuple(options.num_attention_heads) if options.num_attention_heads else None,
    )
    assert isinstance(model, ECCLModel)  # LoRA is merged.
    processor = _make_processor(model.config, tokenizer)
    card = _make_card(checkpoint, options.push_to_hub or output_dir.name, model.config)
    with complete_folder(output_dir) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / "README.md").write_text(card, "utf-8", "backslashreplace")
    tell(f"{output_dir}: {sum(tensor.numel() for tensor in model.parameters()):,} parameters")
    if not isinstance(processor, ECCLProcessor):
        tell(
            "the folder has no tokenizer: the vocabulary of the model is not CLIP's, and --tokenizer is not given. "
            "AutoModel loads the folder, AutoProcessor does not"
        )
    if options.push_to_hub:
        tell(f"published: {publish(output_dir, options.push_to_hub, options.public)}")


def _make_card(checkpoint: Path, name: str, config: "ECCLConfig") -> str:
    """Makes the card of a converted model. It names the origin of the weights and has no figures."""
    from .model_card import Facts, make_model_card

    kind = "an ECCL model with prompts" if config.num_prompt_tokens else "a CLIP without prompts"
    height, width = config.input_size
    method = (
        f"This is {kind}, for images of {height} x {width} pixels. Its weights were converted from "
        f"{code_span(checkpoint.name)}, a checkpoint of the original code; LoRA, if the checkpoint has any, is merged "
        "into them. The weights belong to the authors of the checkpoint."
    )
    return make_model_card(Facts(name, None, method))


def _make_processor(config: "ECCLConfig", tokenizer: "CLIPTokenizer | None") -> "ECCLProcessor | ECCLImageProcessor":
    """Makes the processor of a converted model; without a tokenizer for its vocabulary, only an image processor."""
    from ..processing_eccl import ECCLImageProcessor, ECCLProcessor
    from ..utils.shipped import clip_tokenizer

    if tokenizer is None and config.encoder_configs[0].vocab_size == _CLIP_VOCAB_SIZE:
        tokenizer = clip_tokenizer()
    if tokenizer is not None:
        return ECCLProcessor.for_model(config, tokenizer)
    height, width = config.input_size
    return ECCLImageProcessor(size={"height": height, "width": width})


__all__ = ["convert_checkpoint"]


if __name__ == "__main__":
    main()
