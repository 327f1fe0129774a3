"""Loading a checkpoint of any kind: a merged model, an adapter, or a plain CLIP."""

from os import PathLike
from pathlib import Path

import torch

from ..configuration_eccl import checkpoint_kind
from ..modeling_eccl import ECCLModel, load_sound_model, naming_checkpoint_errors
from ..processing_eccl import ECCLProcessor, load_tokenizer
from .adapter import find_base, load_adapter, merge_lora
from .onnx_encoder import ONNX_INDEX


def load_model(name: str | PathLike[str], base: str | None = None) -> tuple[ECCLModel, ECCLProcessor]:
    """Loads a model and its processor with the classes of this package; no code from the checkpoint runs.

    LoRA of an adapter is merged into the weights. A plain CLIP becomes a model without prompts that takes images of
    384 x 128 pixels.

    Args:
        name: local folder or Hub id of a merged model, an adapter, or a plain CLIP.
        base: local folder or Hub id of the model that an adapter was trained on; by default the adapter names it.

    Returns:
        The model in float32 and evaluation mode, on the GPU if there is one, and its processor.

    Raises:
        ValueError: the checkpoint is of another kind; it is an adapter without a base, or with another base than the
            one that it was trained on; its files are damaged, ask for more than they have, or for code from elsewhere;
            its weights are incomplete or not finite; its processor does not fit the model; or it is an ONNX export.
        OSError: there is no such folder or Hub repository.
    """
    name = str(name)
    with naming_checkpoint_errors(name):
        model, processor = _load(name, base)
    if torch.cuda.is_available():
        # mypy takes `cuda` for a plain function, because transformers decorates it.
        model = model.cuda()  # type: ignore[call-arg]
    return model.eval(), processor


def _load(name: str, base: str | None) -> tuple[ECCLModel, ECCLProcessor]:
    if Path(name, ONNX_INDEX).is_file():
        raise ValueError(f"{name} is an ONNX export: load the model itself, or run the export with --runtime onnx")
    kind = checkpoint_kind(name)
    if kind == "adapter":
        model = merge_lora(load_adapter(name, base))
        return model, ECCLProcessor.for_model(model.config, load_tokenizer(find_base(name, base)))
    if kind == "clip":
        model = ECCLModel.from_clip(name, num_prompt_tokens=0)
        return model, ECCLProcessor.for_model(model.config, load_tokenizer(name))
    model = load_sound_model(ECCLModel, name, dtype=torch.float32)
    processor = ECCLProcessor.from_pretrained(name)
    try:
        processor.require_fit(model.config)
    except ValueError as error:
        raise ValueError(f"the processor in {name} is not that of the model: {error}") from error
    return model, processor


__all__ = ["load_model"]
