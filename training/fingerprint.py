"""What a run cannot change when it is resumed: its data, its base, its batches. Each checkpoint records it."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute as pc
import torch

from .arguments import ECCLTrainingArguments

RUN_FILE = "run.json"
_RUN_ID = "run id"
# The digest depends on this number.
_DIGEST_ROWS = 10_000


def describe_run(args: ECCLTrainingArguments, data: str, model: torch.nn.Module) -> dict[str, Any]:
    """Returns what a resumed run must have in common with the run that wrote the checkpoint, by names for messages.

    Args:
        args: the arguments of the run.
        data: digest of the training split, see [`digest_split`]; a stream has only a name.
        model: the model that is trained; the base of an [`~eccl.hub.adapter.ECCLPeftModel`] is part of the result.
    """
    return {
        "training data (SHA-256)": data,
        "base model (SHA-256)": getattr(model, "base_digests", None),
        "base_dtype": args.base_dtype,
        "pairs per step": args.train_batch_size * args.world_size * args.gradient_accumulation_steps,
        "number of processes": args.world_size,
        "seed": args.seed if args.data_seed is None else args.data_seed,
        "sampler": args.sampler,
    }


def digest_split(dataset: datasets.Dataset) -> str:
    """Computes a SHA-256 digest of the rows of a split: paths, persons, captions, and the sizes of the image files."""
    digest = hashlib.sha256()
    names = [name for name in ("file_path", "person_id", "captions") if name in dataset.column_names]
    undecoded = dataset.cast_column("image", datasets.Image(decode=False)).select_columns([*names, "image"])
    # As Arrow tables: row by row, a million rows would take minutes.
    for rows in undecoded.with_format("arrow").iter(_DIGEST_ROWS):
        for name in names:
            digest.update(json.dumps(rows[name].to_pylist()).encode())
        sizes = pc.binary_length(pc.struct_field(rows["image"], "bytes")).to_pylist()
        paths = pc.struct_field(rows["image"], "path").to_pylist()
        sizes = [os.path.getsize(path) if size is None else size for size, path in zip(sizes, paths, strict=True)]
        digest.update(json.dumps(sizes).encode())
    return digest.hexdigest()


def find_changes(checkpoint: Path, run: dict[str, Any]) -> list[str]:
    """Compares a run with the one that wrote a checkpoint.

    Args:
        checkpoint: a complete checkpoint.
        run: the result of [`describe_run`].

    Returns:
        A line for each difference. A checkpoint without a record is not compared.

    Raises:
        ValueError: the record is not JSON.
    """
    recorded = _read_run(checkpoint)
    return [
        f"{name}: {_shorten(recorded[name])} in the checkpoint, {_shorten(value)} now"
        for name, value in run.items()
        if name in recorded and recorded[name] != value
    ]


def write_run(checkpoint: Path, run: dict[str, Any], run_id: str) -> None:
    """Writes the record of a checkpoint: the result of [`describe_run`], and the id of the run."""
    (checkpoint / RUN_FILE).write_text(json.dumps({_RUN_ID: run_id} | run, indent=1), encoding="utf-8")


def read_run_id(checkpoint: Path) -> str | None:
    """Returns the id of the run that wrote a checkpoint; `None` if it has no record.

    Raises:
        ValueError: the record is not JSON.
    """
    return _read_run(checkpoint).get(_RUN_ID)


def _read_run(checkpoint: Path) -> dict[str, Any]:
    file = checkpoint / RUN_FILE
    if not file.is_file():
        return {}
    try:
        recorded = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(recorded, dict):
        raise ValueError(f"{file} holds a {type(recorded).__name__}, it must hold an object")
    return recorded


def _shorten(value: Any) -> str:
    if isinstance(value, dict):
        value = next(iter(value.values()))
    return f"{value[:12]}..." if isinstance(value, str) and len(value) > 12 else str(value)


__all__ = ["RUN_FILE", "describe_run", "digest_split", "find_changes", "read_run_id", "write_run"]
