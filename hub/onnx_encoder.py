"""Encoding with onnxruntime: the folder that `eccl-export-onnx` writes, and a stand-in for the model that reads it."""

import hashlib
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..configuration_eccl import ECCLConfig, checkpoint_kind
from ..modeling_eccl import naming_checkpoint_errors
from ..processing_eccl import ECCLProcessor
from ..utils.files import read_json
from .digests import digest_settings

Precision = Literal["float32", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
# The file that describes an export, and the subfolder of a model in which an export is found, too.
ONNX_INDEX, ONNX_FOLDER = "onnx.json", "onnx"
ONNX_FORMAT = 1
# The file of each encoder. The graphs have these inputs and outputs.
ONNX_FILES: dict[Precision, dict[str, str]] = {
    "float32": {"image": "image.onnx", "text": "text.onnx"},
    "int8": {"image": "image_int8.onnx", "text": "text_int8.onnx"},
}
ONNX_INPUTS = {"image": "pixel_values", "text": "input_ids"}
ONNX_OUTPUTS = {"image": "image_embeds", "text": "text_embeds"}


class OnnxEncoder(nn.Module):
    """Computes the features of an [`ECCLModel`] with onnxruntime, on the CPU, from the files of an export.

    It has the two methods of the model that encode, so that `embed_images`, `embed_captions` and [`Gallery`] take it in
    place of the model. It cannot be trained, and it has no attentions or hidden states.

    In int8, each image and each caption is run alone. The graph finds the scale of its activations at run time, one for
    the whole input; alone, a feature does not depend on what else is in the batch.

    Args:
        folder: a folder that `eccl-export-onnx` wrote, or a model with such a folder as its subfolder `onnx`.
        precision: `float32`, or `int8` if the folder has it. onnxruntime uses as many threads as torch.

    Attributes:
        folder: the folder of the export.
        precision: see above.
        config: the configuration of the model.
        weights: the digest of the model's weights, see [`digest_model`].

    Raises:
        FileNotFoundError: there is no export, or one of its files is missing.
        ValueError: a file is damaged, or is not that of the export; or there is no int8.
        ImportError: onnxruntime is not installed.
    """

    def __init__(self, folder: str | PathLike[str], precision: Precision = "float32"):
        super().__init__()
        runtime = import_onnxruntime()
        self.folder, self.precision = find_export(folder), precision
        index = _read_index(self.folder)
        self.weights: str = index["weights"]
        files = index["files"].get(precision)
        if files is None:
            raise ValueError(
                f"{self.folder} has no {precision} export, it has {', '.join(index['files'])}: "
                "run eccl-export-onnx with --int8"
            )
        with naming_checkpoint_errors(str(self.folder)):
            if checkpoint_kind(self.folder) != "eccl":
                raise ValueError(f"{self.folder / 'config.json'} is not that of an ECCL model")
            self.config = ECCLConfig.from_pretrained(self.folder)
        end_token = self.config.encoder_configs[0].eos_token_id
        if not isinstance(end_token, int):
            raise ValueError(f"{self.folder / 'config.json'}: eos_token_id is {end_token}, it must be one number")
        self._end_token = end_token
        self._sessions = {}
        for part, entry in files.items():
            path = self.folder / ONNX_FILES[precision][part]
            _require_digest(path, entry["sha256"])
            self._sessions[part] = _open_session(runtime, path)
        self.eval()

    @property
    def device(self) -> torch.device:
        """The device of the features: the CPU."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The type of the features, and of the pixels."""
        return torch.float32

    def get_image_features(self, pixel_values: torch.Tensor, pooled_only: bool = True, return_dict: bool = True) -> Any:
        """Encodes images; see [`ECCLModel.get_image_features`].

        Args:
            pixel_values: `(batch, channels, height, width)`, normalised as [`ECCLProcessor`] does.
            pooled_only: must be true: an export has nothing else.
            return_dict: `False` returns a tuple.

        Returns:
            `BaseModelOutputWithPooling` with `pooler_output` `(batch, projection_dim)`, float32, not normalised.

        Raises:
            ValueError: `pixel_values` has another shape than the model takes.
        """
        _require_pooled_only(pooled_only)
        expected = (self.config.encoder_configs[1].num_channels, *self.config.input_size)
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"pixel_values has the shape {tuple(pixel_values.shape)}, it must be (batch, "
                f"{', '.join(map(str, expected))})"
            )
        rows = [pixel_values] if self.precision == "float32" else list(pixel_values.split(1))
        return self._output("image", [part.float() for part in rows], return_dict)

    def get_text_features(self, input_ids: torch.Tensor, pooled_only: bool = True, return_dict: bool = True) -> Any:
        """Encodes captions; see [`ECCLModel.get_text_features`].

        Args:
            input_ids: `(batch, length)`, `[SOT, words.., EOT, padding..]`; the padding may be left out.
            pooled_only: must be true: an export has nothing else.
            return_dict: `False` returns a tuple.

        Returns:
            `BaseModelOutputWithPooling` with `pooler_output` `(batch, projection_dim)`, float32, not normalised.

        Raises:
            ValueError: a caption has no EOT among its first `config.max_text_length` tokens, or starts with it; or a
                number is not that of a token.
        """
        _require_pooled_only(pooled_only)
        ends = self._find_ends(input_ids)
        if self.precision == "float32":
            rows = [input_ids[:, : int(ends.max()) + 1]] if len(ends) else []
        else:
            rows = [ids[None, : int(end) + 1] for ids, end in zip(input_ids, ends, strict=True)]
        return self._output("text", [part.long() for part in rows], return_dict)

    def _find_ends(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Finds the first EOT of each caption, `(batch,)`. The graph checks nothing itself."""
        limit, vocab_size = self.config.max_text_length, self.config.encoder_configs[0].vocab_size
        if input_ids.ndim != 2 or input_ids.is_floating_point():
            raise ValueError(
                f"input_ids has the shape {tuple(input_ids.shape)} and the type {input_ids.dtype}, it must be "
                "(batch, length) whole numbers"
            )
        if input_ids.numel() and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < vocab_size:
            raise ValueError(
                f"input_ids runs from {int(input_ids.min())} to {int(input_ids.max())}, a token is a number from 0 to "
                f"{vocab_size - 1}"
            )
        is_end = torch.eq(input_ids[:, :limit], self._end_token)
        bad = (~is_end.any(dim=1) | is_end[:, 0]).nonzero() if is_end.shape[1] else torch.zeros(1, 1)
        if len(bad):
            raise ValueError(
                f"row {int(bad[0])} of input_ids must have its first end-of-text token ({self._end_token}) after the "
                f"start token and among its first {limit} tokens: make input_ids with ECCLProcessor"
            )
        return is_end.int().argmax(dim=1)

    def _output(self, part: str, rows: list[torch.Tensor], return_dict: bool) -> Any:
        session, names = self._sessions[part], (ONNX_OUTPUTS[part],)
        features = [session.run(names, {ONNX_INPUTS[part]: row.cpu().numpy()})[0] for row in rows]
        empty = np.zeros((0, self.config.projection_dim), dtype=np.float32)
        pooled = torch.from_numpy(np.concatenate([empty, *features]))
        return BaseModelOutputWithPooling(pooler_output=pooled) if return_dict else (pooled,)


def load_onnx(name: str | PathLike[str], precision: Precision = "float32") -> tuple[OnnxEncoder, ECCLProcessor]:
    """Loads an export and its processor, as [`load_model`] loads a model.

    Args:
        name: a local folder that `eccl-export-onnx` wrote, or a model in a local folder with such a subfolder `onnx`.
        precision: `float32` or `int8`.

    Raises:
        FileNotFoundError, ValueError, ImportError: see [`OnnxEncoder`]; or `config.json` and the processor are not
            those of the exported model.
    """
    encoder = OnnxEncoder(name, precision)
    with naming_checkpoint_errors(str(encoder.folder)):
        processor = ECCLProcessor.from_pretrained(encoder.folder)
        processor.require_fit(encoder.config)
    if digest_settings(encoder.weights, encoder.config, processor) != _read_index(encoder.folder)["encoder"]:
        raise ValueError(
            f"{encoder.folder}: config.json, or a file of the processor, is not that of the exported model: export it "
            "again"
        )
    return encoder, processor


def find_export(name: str | PathLike[str]) -> Path:
    """Finds the folder of an export: `name` itself, or its subfolder `onnx`.

    Raises:
        FileNotFoundError: there is none.
    """
    for folder in (Path(name), Path(name, ONNX_FOLDER)):
        if (folder / ONNX_INDEX).is_file():
            return folder
    if not Path(name).is_dir():
        raise FileNotFoundError(f"{name} is not a local folder: ONNX files are not read from the Hub")
    target = Path(name, ONNX_FOLDER)
    raise FileNotFoundError(
        f"{name} has no ONNX files: make them with eccl-export-onnx --model {name} --output_dir {target}"
    )


def import_onnxruntime() -> Any:
    """Imports onnxruntime.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError('onnxruntime is not installed: pip install "eccl[onnx]"') from error
    return onnxruntime


def digest_file(path: Path) -> str:
    """Computes the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_index(folder: Path) -> dict[str, Any]:
    """Reads the description of an export, and checks that it has what is used of it."""
    file = folder / ONNX_INDEX
    index = read_json(file)
    if index.get("format") != ONNX_FORMAT:
        raise ValueError(f"{file}: format is {index.get('format')!r}, it must be {ONNX_FORMAT}: export the model again")
    files = index.get("files")
    has_digests = isinstance(files, dict) and all(
        precision in ONNX_FILES
        and isinstance(parts, dict)
        and parts.keys() == ONNX_INPUTS.keys()
        and all(isinstance(entry, dict) and isinstance(entry.get("sha256"), str) for entry in parts.values())
        for precision, parts in files.items()
    )
    if not has_digests or not all(isinstance(index.get(name), str) for name in ("weights", "encoder")):
        raise ValueError(f"{file} is damaged: it must have the texts weights and encoder, and the digests of the files")
    return index


def _require_pooled_only(pooled_only: bool) -> None:
    if not pooled_only:
        raise ValueError("pooled_only is False, but an ONNX export has only pooled features")


def _require_digest(path: Path, digest: str) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: export the model again")
    if digest_file(path) != digest:
        raise ValueError(
            f"{path} is damaged, or belongs to another export: it is not the file that {ONNX_INDEX} describes"
        )


def _open_session(runtime: Any, path: Path) -> Any:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # onnxruntime has errors of its own classes.
    with naming_checkpoint_errors(str(path)):
        return runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


__all__ = [
    "ONNX_FILES",
    "ONNX_FOLDER",
    "ONNX_INDEX",
    "PRECISIONS",
    "OnnxEncoder",
    "Precision",
    "find_export",
    "load_onnx",
]
