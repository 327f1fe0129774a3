"""The cases of the speed benchmark that need torch: steps, peak memory, encoding, and the memories of the losses.

Each function measures one part and yields its rows.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from ...encoding_eccl import embed_captions
from ...processing_eccl import ECCLImageProcessor, ECCLProcessor
from ...training.memory import CrossModalMemory
from ...utils.shipped import clip_tokenizer
from .processes import PROMPT_RELEASE, environment, peak_memory, run_in_new_process
from .speed_models import (
    CLIP_WITH_LORA,
    LONGEST,
    Batch,
    Settings,
    clip_loss,
    draw_batch,
    draw_captions,
    encode_images,
    encode_texts,
    image_flops,
    image_tokens,
    make_clip,
    make_clip_with_lora,
    make_ours,
    make_plain,
    our_loss,
    pair_flops,
    text_flops,
)
from .speed_report import Budget, Row, Spread, spread
from .speed_timing import Case, Gemm, dtype_of, ratios, shares, synchronize, time_in_turn

_PEAK_BATCH = 16
# Of CUHK-PEDES: rows of the identity memory and of the instance memory. The published recipe has this batch size.
_PERSONS, _IMAGES, _MEMORY_BATCH = 11_003, 34_054, 128


def make_step(model: nn.Module, loss: Callable[[nn.Module, Batch], torch.Tensor], batch: Batch, dtype: str) -> Case:
    """Makes a case of a forward pass, the loss, and the backward pass."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(batch.pixels.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            value = loss(model, batch)
        value.backward()

    return step


def measure_steps(settings: Settings) -> Iterator[Row]:
    """Compares training steps, and updates of Adam, with those of CLIP with LoRA."""
    config, device = settings.config, settings.device
    batch = draw_batch(config, settings.batch_size, device)
    kinds = [("float32", "float32", "sdpa"), ("bfloat16", "float32", "sdpa"), ("bfloat16", "bfloat16", "sdpa")]
    if device.type == "cpu":
        kinds.append(("bfloat16", "bfloat16", "eager"))
    ours = {(base, attention): make_ours(config, base, attention).to(device) for _, base, attention in kinds}
    clips = {attention: make_clip_with_lora(config, attention).to(device) for _, _, attention in kinds}
    vision = config.encoder_configs[1]
    gemms = {
        dtype: Gemm(settings.batch_size * image_tokens(config), vision, dtype_of(dtype), device)
        for dtype in ("float32", "bfloat16")
    }
    cases: dict[str, Case] = {f"gemm {dtype}": gemm for dtype, gemm in gemms.items()}
    for dtype, base, attention in kinds:
        cases[f"clip {dtype} {attention}"] = make_step(clips[attention], clip_loss, batch, dtype)
        cases[f"ours {dtype} {base} {attention}"] = make_step(ours[base, attention], our_loss, batch, dtype)
    # The updates come last: their first call needs the gradients of the steps.
    cases |= {"adam ours": make_adam(ours["float32", "sdpa"]).step, "adam clip": make_adam(clips["sdpa"]).step}
    seconds = time_in_turn(cases, settings.rounds, device)
    budgets = {
        "float32": (Budget("ratio", "at most", 0.82), Budget("share", "at least", 0.80)),
        "bfloat16": (Budget("ratio", "at most", 0.75), Budget("share", "at least", 0.60)),
    }
    for dtype, base, attention in kinds:
        mode = {"float32": "float32", "bfloat16": "bfloat16 autocast"}[dtype]
        mode += ", base in bfloat16" if base == "bfloat16" else ""
        mode += "" if attention == "sdpa" else f", {attention} attention in both"
        own, others = seconds[f"ours {dtype} {base} {attention}"], seconds[f"clip {dtype} {attention}"]
        yield Row(
            "step",
            f"training step, {mode}",
            "s",
            spread(own),
            CLIP_WITH_LORA,
            spread(others),
            ratios(own, others),
            # The gradient of the frozen weights is not needed: the backward pass costs as much as the forward pass.
            shares(2 * settings.batch_size * pair_flops(config), own, gemms[dtype], seconds[f"gemm {dtype}"]),
            # The budgets are for the default attention.
            budgets[dtype] if attention == "sdpa" else (),
        )
    yield _compare("step", "update of Adam", seconds["adam ours"], CLIP_WITH_LORA, seconds["adam clip"])


def _compare(
    part: str,
    name: str,
    seconds: Sequence[float],
    reference: str,
    others: Sequence[float],
    share: Spread | None = None,
    budgets: tuple[Budget, ...] = (),
) -> Row:
    return Row(part, name, "s", spread(seconds), reference, spread(others), ratios(seconds, others), share, budgets)


def make_adam(model: nn.Module) -> torch.optim.Optimizer:
    """Makes the optimiser of the published recipe for the parameters that are trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.Adam(trained, lr=1e-4, eps=1e-3, weight_decay=4e-5)


def step_peak(side: str, settings: Settings, base: str) -> int:
    """Runs one step in this process, in float32 or with the base in bfloat16, and returns the peak memory in bytes."""
    torch.set_num_threads(settings.threads)
    device = settings.device
    is_ours = side == "ours"
    model = make_ours(settings.config, base) if is_ours else make_clip_with_lora(settings.config)
    batch = draw_batch(settings.config, settings.batch_size, device)
    make_step(model.to(device), our_loss if is_ours else clip_loss, batch, base)()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()


def measure_peaks(settings: Settings) -> Iterator[Row]:
    """Compares the peak memory of a step with that of CLIP with LoRA in float32, each in a new process."""
    settings = Settings(settings.model, settings.device, _PEAK_BATCH, 1, settings.threads)
    limits = {"float32": 0.85, "bfloat16": 0.6}
    with environment(PROMPT_RELEASE):
        clip = run_in_new_process(step_peak, "clip", settings, "float32") / 2**30
        for base in limits:
            ours = run_in_new_process(step_peak, "ours", settings, base) / 2**30
            mode = "float32" if base == "float32" else "bfloat16 autocast, base in bfloat16"
            yield Row(
                "memory",
                f"peak memory of a step, batch {_PEAK_BATCH}, {mode}",
                "GiB",
                spread([ours]),
                f"{CLIP_WITH_LORA}, float32",
                spread([clip]),
                spread([ours / clip]),
                budgets=(Budget("ratio", "at most", limits[base]),),
            )


def _make_encoders(settings: Settings) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Makes our model and CLIP without LoRA for each dtype; the weights have the dtype."""

    def place(model: nn.Module, dtype: str) -> nn.Module:
        return model.to(settings.device, dtype_of(dtype))

    config = settings.config
    return {
        dtype: (place(make_plain(config), dtype), place(make_clip(config), dtype)) for dtype in ("float32", "bfloat16")
    }


def measure_images(settings: Settings) -> Iterator[Row]:
    """Compares the encoding of images with CLIP's and with the matrix rate."""
    config, device = settings.config, settings.device
    models = _make_encoders(settings)
    pixels = draw_batch(config, settings.batch_size, device).pixels
    gemms: dict[str, Gemm] = {}
    cases: dict[str, Case] = {}
    for dtype, (ours, clip) in models.items():
        rows, inputs = settings.batch_size * image_tokens(config), pixels.to(dtype_of(dtype))
        gemms[dtype] = Gemm(rows, config.encoder_configs[1], dtype_of(dtype), device)
        cases[f"gemm {dtype}"] = gemms[dtype]
        cases[f"ours {dtype}"] = functools.partial(encode_images, ours, inputs)
        cases[f"clip {dtype}"] = functools.partial(encode_images, clip, inputs)
    seconds = time_in_turn(cases, settings.rounds, device)
    for dtype, limit in (("float32", 0.95), ("bfloat16", 0.85)):
        own, flops = seconds[f"ours {dtype}"], settings.batch_size * image_flops(config)
        share = shares(flops, own, gemms[dtype], seconds[f"gemm {dtype}"])
        budgets = (Budget("ratio", "at most", 1.0), Budget("share", "at least", limit))
        yield _compare("images", f"image encode, {dtype}", own, "CLIP", seconds[f"clip {dtype}"], share, budgets)


def measure_texts(settings: Settings) -> Iterator[Row]:
    """Compares the encoding of captions with CLIP's: both encoders process the same number of tokens."""
    config, device = settings.config, settings.device
    models, count = _make_encoders(settings), 8 * settings.batch_size
    batch, tokens = draw_batch(config, count, device), LONGEST + config.num_prompt_tokens
    clip_ids = batch.clip_ids[:, :tokens]
    gemms: dict[str, Gemm] = {}
    cases: dict[str, Case] = {}
    for dtype, (ours, clip) in models.items():
        gemms[dtype] = Gemm(count * tokens, config.encoder_configs[0], dtype_of(dtype), device)
        cases[f"gemm {dtype}"] = gemms[dtype]
        cases[f"ours {dtype}"] = functools.partial(encode_texts, ours, batch.our_ids)
        cases[f"clip {dtype}"] = functools.partial(encode_texts, clip, clip_ids)
    seconds = time_in_turn(cases, settings.rounds, device)
    for dtype, budgets in (("float32", (Budget("ratio", "at most", 1.02),)), ("bfloat16", ())):
        own = seconds[f"ours {dtype}"]
        share = shares(count * text_flops(config, tokens), own, gemms[dtype], seconds[f"gemm {dtype}"])
        name = f"text encode, {count} captions of {tokens} tokens, {dtype}"
        yield _compare("texts", name, own, "CLIP", seconds[f"clip {dtype}"], share, budgets)


def measure_captions(settings: Settings) -> Iterator[Row]:
    """Compares a benchmark's captions, tokenised, sorted and cut, with CLIP's, tokenised and padded to the limit."""
    config, device = settings.config, settings.device
    count, size = (256, 32) if device.type == "cpu" else (6_156, 256)
    sentences, tokenizer = draw_captions(count), clip_tokenizer()
    limit = config.encoder_configs[0].max_position_embeddings
    processor = ECCLProcessor(ECCLImageProcessor(), tokenizer)

    def encode_padded(clip: nn.Module) -> None:
        for first in range(0, count, size):
            part = sentences[first : first + size]
            encoded = tokenizer(part, padding="max_length", truncation=True, max_length=limit, return_tensors="pt")
            encode_texts(clip, encoded["input_ids"].to(device)).float().cpu()

    cases: dict[str, Case] = {}
    for dtype, (ours, clip) in _make_encoders(settings).items():
        cases[f"ours {dtype}"] = functools.partial(embed_captions, ours, processor, sentences, size, progress=False)
        cases[f"clip {dtype}"] = functools.partial(encode_padded, clip)
    seconds = time_in_turn(cases, settings.rounds, device)
    for dtype, other, budgets in (
        ("float32", "float32", (Budget("ratio", "at most", 1 / 2.5),)),
        ("bfloat16", "float32", (Budget("ratio", "at most", 1 / 6),)),
        ("bfloat16", "bfloat16", ()),
    ):
        name, reference = f"{count:,} captions, sorted and cut, {dtype}", f"CLIP, padded to {limit}, {other}"
        yield _compare("captions", name, seconds[f"ours {dtype}"], reference, seconds[f"clip {other}"], budgets=budgets)


def measure_memories(settings: Settings) -> Iterator[Row]:
    """Compares loss, gradient and update of both memories with the matrix products in them."""
    device, dim = settings.device, settings.config.projection_dim
    torch.manual_seed(0)
    image_features, text_features = torch.randn(2, _MEMORY_BATCH, dim, device=device, requires_grad=True).unbind()
    cases: dict[str, Case] = {}
    for name, rows, temperature, eps in (("identity", _PERSONS, 0.03, 0.0), ("instance", _IMAGES, 0.015, 1e-8)):
        values, row_ids = torch.randn(2, rows, dim, device=device), torch.arange(rows, device=device)
        memory = CrossModalMemory(values[0], values[1], row_ids % _PERSONS, temperature, 0.1, eps)
        written = torch.randint(0, rows, (_MEMORY_BATCH,)).to(device)

        def step(memory: CrossModalMemory = memory, written: torch.Tensor = written) -> None:
            # Without the accumulation of gradients, which belongs to the encoders.
            losses = memory(image_features, text_features, written % _PERSONS)
            torch.autograd.grad(losses[0] + losses[1], (image_features, text_features))
            memory.update(image_features, text_features, written)

        @torch.inference_mode()
        def products(values: torch.Tensor = values) -> None:
            for features, memory_rows in zip((image_features, text_features), values, strict=True):
                gradient = features @ memory_rows.T
                gradient @ memory_rows

        cases |= {f"ours {name}": step, f"products {name}": products}
    seconds = time_in_turn(cases, settings.rounds, device)
    for name, rows in (("identity", _PERSONS), ("instance", _IMAGES)):
        title = f"{name} memory, batch {_MEMORY_BATCH}, {rows:,} rows"
        budgets = (Budget("ratio", "at most", 1.15),)
        yield _compare(
            "memories", title, seconds[f"ours {name}"], "its products", seconds[f"products {name}"], budgets=budgets
        )


__all__ = [
    "make_step",
    "measure_captions",
    "measure_images",
    "measure_memories",
    "measure_peaks",
    "measure_steps",
    "measure_texts",
    "step_peak",
]
