"""The table of batch sizes of the speed benchmark: what an accelerator reaches with each setting."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from .speed_cases import make_step
from .speed_models import (
    CLIP_WITH_LORA,
    LONGEST,
    Batch,
    Settings,
    clip_loss,
    draw_batch,
    encoder_flops,
    image_tokens,
    make_clip,
    make_clip_with_lora,
    make_ours,
    make_plain,
    our_loss,
    pair_flops,
)
from .speed_report import SweepRow, spread
from .speed_timing import Case, Gemm, dtype_of, shares, time_in_turn


class Variant(NamedTuple):
    """A task (`step` or `encode`), a model, a precision, an attention, and whether the model is compiled.

    `tf32` is float32 with matrix products in TensorFloat-32.
    """

    task: str
    side: str
    dtype: str
    attention: str = "sdpa"
    compiled: bool = False

    @property
    def name(self) -> str:
        """The name in the table."""
        task = "training step" if self.task == "step" else "image + text encode"
        return f"{task}, {self.side}, {self.dtype}, {self.attention}{', compiled' if self.compiled else ''}"

    @property
    def is_ours(self) -> bool:
        """Whether the model is ECCL."""
        return self.side == "ours"


VARIANTS = (
    Variant("step", "ours", "float32"),
    Variant("step", "ours", "tf32"),
    Variant("step", "ours", "bfloat16"),
    Variant("step", "ours", "bfloat16", "eager"),
    Variant("step", "ours", "bfloat16", compiled=True),
    Variant("step", CLIP_WITH_LORA, "bfloat16"),
    Variant("encode", "ours", "bfloat16"),
    Variant("encode", "ours", "bfloat16", compiled=True),
    Variant("encode", "CLIP", "bfloat16"),
)


def sweep(settings: Settings) -> Iterator[SweepRow]:
    """Measures each variant at each batch size, one model at a time. A batch that does not fit gives a row, too."""
    for variant in VARIANTS:
        if variant.dtype == "tf32" and settings.device.type != "cuda":
            continue
        with _matrix_precision(variant.dtype):
            model = _make_model(variant, settings)
            for size in settings.batch_sizes:
                yield _measure(variant, model, size, settings)
                if settings.device.type == "cuda":
                    torch.cuda.empty_cache()
            del model
            torch.compiler.reset()


@contextlib.contextmanager
def _matrix_precision(dtype: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _make_model(variant: Variant, settings: Settings) -> nn.Module:
    config = settings.config
    if variant.task == "step":
        make = make_ours if variant.is_ours else make_clip_with_lora
        model = make(config, attention=variant.attention)
    else:
        plain = make_plain(config) if variant.is_ours else make_clip(config)
        model = plain.to(dtype_of(variant.dtype))  # type: ignore[arg-type]
    model = model.to(settings.device)
    if variant.compiled:
        model.compile()
    return model


def _make_case(variant: Variant, model: nn.Module, batch: Batch) -> Case:
    if variant.task == "step":
        return make_step(model, our_loss if variant.is_ours else clip_loss, batch, variant.dtype)
    extra = {"pooled_only": True} if variant.is_ours else {}
    input_ids = batch.our_ids if variant.is_ours else batch.clip_ids

    @torch.inference_mode()
    def encode() -> None:
        # Not the methods for one modality: what is compiled is the call of the model.
        model(input_ids=input_ids, pixel_values=batch.pixels, **extra)

    return encode


def _measure(variant: Variant, model: nn.Module, size: int, settings: Settings) -> SweepRow:
    config, device = settings.config, settings.device
    padded = config.encoder_configs[0].max_position_embeddings
    prompts = config.num_prompt_tokens
    tokens = image_tokens(config) + (LONGEST + prompts if variant.is_ours else padded - prompts)
    row, peak = SweepRow(variant.name, size, None, tokens), None
    try:
        case = _make_case(variant, model, draw_batch(config, size, device))
        case()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            case()
            peak = torch.cuda.max_memory_allocated(device)
        gemm = Gemm(size * image_tokens(config), config.encoder_configs[1], dtype_of(variant.dtype), device)
        seconds = time_in_turn({"case": case, "gemm": gemm}, settings.rounds, device)
    except torch.OutOfMemoryError:
        return replace(row, problem="out of memory")
    except RuntimeError as error:
        # A compiler can be missing.
        if not variant.compiled:
            raise
        return replace(row, problem=f"torch.compile failed: {type(error).__name__}")
    text, vision = config.encoder_configs
    flops = pair_flops(config)
    if not variant.is_ours:
        flops += encoder_flops(text, padded) - encoder_flops(text, LONGEST + prompts)
        flops += encoder_flops(vision, image_tokens(config) - prompts) - encoder_flops(vision, image_tokens(config))
    passes = 2 if variant.task == "step" else 1
    share = shares(passes * size * flops, seconds["case"], gemm, seconds["gemm"])
    return replace(row, seconds=spread(seconds["case"]), peak_bytes=peak, share=share.median)


__all__ = ["VARIANTS", "Variant", "sweep"]
