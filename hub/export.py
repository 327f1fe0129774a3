"""Exports the two encoders of a model as ONNX, for onnxruntime, and checks them against torch.

python -m eccl.hub.export --model runs/rstpreid --output_dir runs/rstpreid/onnx --int8
"""

import contextlib
import copy
import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.command_line import CommandParser, add_shared_option, command, say, tell
from ..utils.files import complete_folder, require_new_folder, require_no_input, require_writable_folder

# Imported by the functions that need them, so that --help and a mistake in the arguments answer at once.
if TYPE_CHECKING:
    import torch

    from ..modeling_eccl import ECCLModel
    from ..processing_eccl import ECCLProcessor
    from .onnx_encoder import OnnxEncoder

# The packages that an export needs. onnxscript is that of torch's exporter.
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_OPSET = 20
# A float32 export must agree with torch: the largest difference, relative to the largest feature.
_TOLERANCE = 1e-4
# A lower cosine similarity of an int8 feature with that of torch is no loss of precision, but a failure.
_LOWEST_COSINE = 0.9
# Sizes of the batches that are compared.
_BATCHES = (1, 3, 8)
# Bytes of an ONNX file without external data: a limit of its format.
_LARGEST_FILE = 2**31
# The files of an export besides those of the encoders.
_OTHER_FILES = (
    *("onnx.json", "config.json", "configuration_eccl.py", "processing_eccl.py"),
    *("processor_config.json", "tokenizer.json", "tokenizer_config.json"),
)


def export_onnx(
    model: "ECCLModel",
    processor: "ECCLProcessor",
    folder: str | os.PathLike[str],
    int8: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes both encoders of a model as ONNX files, for any batch size and any length of captions.

    The prompts, and the image prompts that are computed from them, become constants. The outputs are the features,
    not normalised. The files are run in onnxruntime and compared with torch before the folder appears.

    Args:
        model: the model; its adapter, if it had one, must be merged.
        processor: its processor. It is written to the folder, too.
        folder: a new or empty folder.
        int8: also writes both encoders with weights and activations of 8 bits (dynamic quantisation).
        overwrite: replaces an earlier export in the folder.

    Returns:
        What `onnx.json` in the folder holds: `format`, the digests `weights` and `encoder` (see
        [`digest_encoder`]), and under `files` for each precision and each encoder its `file`, the `sha256` of this
        file, and how far it is from torch: `difference` (the largest one, relative to the largest feature), and the
        lowest and the mean cosine similarity, `min_cosine` and `mean_cosine`. Both were measured on random inputs.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is not installed.
        FileExistsError: the folder is not empty, and holds something else than an earlier export with `overwrite`.
        ValueError: an encoder is larger than the format allows; the processor is not that of the model; LoRA is not
            merged; or a file does not agree with torch.
    """
    from ..modeling_eccl import ECCLModel
    from .digests import digest_model, digest_settings
    from .onnx_encoder import ONNX_FILES, ONNX_FORMAT, ONNX_INDEX, OnnxEncoder, digest_file

    folder = Path(folder)
    _require_packages()
    _require_target(folder, overwrite)
    if not isinstance(model, ECCLModel):
        raise ValueError(f"the model is a {type(model).__name__}, it must be an ECCLModel: merge LoRA with merge_lora")
    processor.require_fit(model.config)
    frozen = _freeze(model)
    weights = digest_model(model)
    index: dict[str, Any] = {
        "format": ONNX_FORMAT,
        "weights": weights,
        "encoder": digest_settings(weights, model.config, processor),
        "files": {},
    }
    with complete_folder(folder) as unfinished:
        frozen.config.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        for precision in ("float32", "int8") if int8 else ("float32",):
            for part, name in ONNX_FILES[precision].items():
                if precision == "float32":
                    _export(frozen, part, unfinished / name)
                else:
                    _quantize(unfinished / ONNX_FILES["float32"][part], unfinished / name)
                entry = {"file": name, "sha256": digest_file(unfinished / name)}
                index["files"].setdefault(precision, {})[part] = entry
            _write_json(unfinished / ONNX_INDEX, index)
            encoder = OnnxEncoder(unfinished, precision)
            for part, entry in index["files"][precision].items():
                entry |= _compare(frozen, encoder, part)
                _require_agreement(entry, precision)
        _write_json(unfinished / ONNX_INDEX, index)
        if overwrite:
            for name in _own_files():
                (folder / name).unlink(missing_ok=True)
    return index


def _require_packages() -> None:
    for name in _PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise ImportError(f'{name} is not installed: pip install "eccl[onnx]"')


def _own_files() -> set[str]:
    from .onnx_encoder import ONNX_FILES

    return {*_OTHER_FILES, *(name for files in ONNX_FILES.values() for name in files.values())}


def _require_target(folder: Path, overwrite: bool) -> None:
    """Checks that the folder may be written: it is new or empty, or has an earlier export that is to be replaced."""
    if overwrite and (folder / _OTHER_FILES[0]).is_file():
        others = sorted({path.name for path in folder.iterdir()} - _own_files())
        if others:
            raise FileExistsError(f"{folder} has {others[0]}, which no export wrote: nothing is overwritten")
    else:
        require_new_folder(folder)
    require_writable_folder(folder)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _freeze(model: "ECCLModel") -> "ECCLModel":
    """Copies a model to the CPU in float32, with prompts that are constants."""
    from torch import nn

    class FixedPrompts(nn.Module):
        """What a prompt learner returns, computed once."""

        def __init__(self, learner: nn.Module):
            super().__init__()
            for modality in ("text", "vision"):
                for layer, prompts in enumerate(learner(modality)):
                    self.register_buffer(f"{modality}_{layer}", prompts.detach().clone())

        def forward(self, modality: str) -> "list[torch.Tensor]":
            return [prompts for name, prompts in self.named_buffers() if name.startswith(f"{modality}_")]

    frozen = copy.deepcopy(model).cpu().float().eval()
    # Its graph has no guards against rows without any token, which never occur.
    frozen.set_attn_implementation("eager")
    if frozen.prompt_learner is not None:
        frozen.prompt_learner = FixedPrompts(frozen.prompt_learner)
    return frozen


def _export(model: "ECCLModel", part: str, file: Path) -> None:
    import torch
    from torch import nn

    from .onnx_encoder import ONNX_INPUTS, ONNX_OUTPUTS

    class Encoder(nn.Module):
        """One encoder, from its input to the pooled features."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return _encode(self.model, part, inputs)

    modules = [model.text_model, model.text_projection]
    if part == "image":
        modules = [model.vision_model, model.visual_projection]
    size = sum(4 * tensor.numel() for module in modules for tensor in module.state_dict().values())
    if size >= _LARGEST_FILE:
        raise ValueError(f"the {part} encoder has {size:,} bytes, an ONNX file has at most {_LARGEST_FILE:,}")
    inputs = _random_inputs(model, part, 2)
    shape: dict[int, Any] = {0: torch.export.Dim("batch")}
    if part == "text":
        # Start, one word and end, at least.
        shape[1] = torch.export.Dim("length", min=3, max=model.config.max_text_length)
    with _quiet(), torch.no_grad():
        torch.onnx.export(
            Encoder().eval(),
            (inputs,),
            file,
            input_names=[ONNX_INPUTS[part]],
            output_names=[ONNX_OUTPUTS[part]],
            dynamic_shapes=(shape,),
            opset_version=_OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides what the exporter says about torchvision, which is not needed, and about torch's own future."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _quantize(source: Path, target: Path) -> None:
    """Writes an encoder whose linear layers have 8 bits, with a scale for each of their outputs.

    The rest keeps float32. Embeddings in 8 bits would change the feature of a caption about ten times as much as all
    linear layers do.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    root = logging.getLogger()
    level = root.level
    # It advises to run a preparation first, which the exporter has done.
    root.setLevel(logging.ERROR)
    try:
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )
    finally:
        root.setLevel(level)


def _encode(model: "ECCLModel | OnnxEncoder", part: str, inputs: "torch.Tensor") -> "torch.Tensor":
    method = model.get_image_features if part == "image" else model.get_text_features
    return method(inputs, pooled_only=True, return_dict=True).pooler_output


def _random_inputs(model: "ECCLModel", part: str, batch: int, length: int | None = None) -> "torch.Tensor":
    """Draws soft random pictures, or random captions of `length` tokens, start and end included."""
    import torch
    from torch import nn

    config = model.config
    text, vision = config.encoder_configs
    generator = torch.Generator().manual_seed(0)
    if part == "image":
        coarse = torch.randn(batch, vision.num_channels, 12, 4, generator=generator)
        return nn.functional.interpolate(coarse, config.input_size, mode="bilinear")
    end = model.text_model.end_token
    ids = torch.randint(text.vocab_size - 1, (batch, length or min(16, config.max_text_length)), generator=generator)
    ids += ids >= end
    ids[:, -1] = end
    return ids


def _compare(model: "ECCLModel", encoder: "OnnxEncoder", part: str) -> dict[str, float]:
    """Measures how far features of onnxruntime are from those of torch, over batches and lengths, the longest too."""
    import torch
    from torch import nn

    longest = model.config.max_text_length
    lengths = (None,) if part == "image" else (3, (3 + longest) // 2, longest)
    cosines, difference = [], 0.0
    for batch in _BATCHES:
        for length in lengths:
            inputs = _random_inputs(model, part, batch, length)
            with torch.no_grad():
                expected = _encode(model, part, inputs)
            found = _encode(encoder, part, inputs)
            difference = max(difference, float((found - expected).abs().max() / expected.abs().max()))
            cosines.append(nn.functional.cosine_similarity(found, expected))
    all_cosines = torch.cat(cosines)
    return {
        "difference": difference,
        "min_cosine": float(all_cosines.min()),
        "mean_cosine": float(all_cosines.mean()),
    }


def _require_agreement(entry: dict[str, Any], precision: str) -> None:
    # Also false for NaN.
    if precision == "float32" and not entry["difference"] <= _TOLERANCE:
        raise ValueError(
            f"{entry['file']} does not agree with torch: the largest difference is {entry['difference']:.1e} of the "
            f"largest feature, at most {_TOLERANCE:.0e} is allowed"
        )
    if precision == "int8" and not entry["min_cosine"] >= _LOWEST_COSINE:
        raise ValueError(
            f"{entry['file']} does not agree with torch: the lowest cosine similarity is {entry['min_cosine']:.3f}, at "
            f"least {_LOWEST_COSINE} is needed: use float32 for this model"
        )


def make_parser() -> CommandParser:
    parser = CommandParser("python -m eccl.hub.export", __doc__)
    add_shared_option(parser, "model")
    add_shared_option(
        parser, "output_dir", help="folder to write to; runtimes also find the export in the subfolder onnx of a model"
    )
    parser.add_argument("--base", help="folder or Hub id of the model that an adapter was trained on")
    parser.add_argument(
        "--int8", action="store_true", help="also write both encoders in 8 bits: smaller and faster, less exact"
    )
    add_shared_option(parser, "overwrite", help="replace an earlier export in the folder")
    return parser


@command
def main(arguments: list[str]) -> None:
    options = make_parser().parse_args(arguments)
    output_dir = Path(options.output_dir).resolve()
    require_no_input(output_dir, {"--model": options.model, "--base": options.base})
    _require_packages()
    _require_target(output_dir, options.overwrite)
    say(f"loading {options.model}")
    from .loading import load_model

    model, processor = load_model(options.model, options.base)
    say("exporting both encoders")
    index = export_onnx(model, processor, output_dir, options.int8, options.overwrite)
    for precision, parts in index["files"].items():
        for part, entry in parts.items():
            size = (output_dir / entry["file"]).stat().st_size
            tell(
                f"{precision:7}  {part:5}  {entry['file']:15}  {size / 2**20:7.1f} MiB  difference from torch "
                f"{entry['difference']:.1e}, cosine at least {entry['min_cosine']:.4f}, mean {entry['mean_cosine']:.4f}"
            )
    tell(f"written: {output_dir}")


__all__ = ["export_onnx"]


if __name__ == "__main__":
    main()
