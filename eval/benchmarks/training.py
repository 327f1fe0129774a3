"""What training costs: memory of a batch in chunks, the memories' rows, two processes for one.

`python -m eccl.eval.benchmarks.training chunks|rows|scaling`; each part is measured side by side in one run, in
processes of its own, and prints a table.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from ...configuration_eccl import ECCLConfig
from ...dataset_scripts.synthetic import SyntheticBenchmark, write_benchmark
from ...hub.adapter import attach_lora
from ...modeling_eccl import ECCLModel
from ...training.losses import triplet_alignment_loss
from ...training.memory import CrossModalMemory

_ROOT = Path(__file__).parents[2]
_DIM = 512


def measure_chunks(batch_sizes: list[tuple[int, int | None]]) -> None:
    """Peak memory and time of a step of ViT-B/16 at 384 x 128, by batch size and `embed_chunk_size`."""
    # Read by glibc as a process starts: what is freed goes back, so that a peak is of what was in use.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = os.environ["MALLOC_TRIM_THRESHOLD_"] = "65536"
    print(f"{'batch':>6} {'chunk':>6} {'peak GiB':>9} {'s a step':>9}")
    for batch_size, chunk_size in batch_sizes:
        peak, seconds = peak_of_a_step(batch_size, chunk_size)
        print(f"{batch_size:>6} {chunk_size or '-':>6} {peak / 2**30:>9.2f} {seconds:>9.1f}", flush=True)


def peak_of_a_step(batch_size: int, chunk_size: int | None) -> tuple[int, float]:
    """Bytes at the most, and seconds, of a step of ViT-B/16 in a process of its own."""
    return _in_process(_chunk_step, batch_size, chunk_size)


def _chunk_step(batch_size: int, chunk_size: int | None) -> tuple[int, float]:
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model = attach_lora(ECCLModel(ECCLConfig()))
    tokens = torch.full((batch_size, 40), 49407)
    tokens[:, :30] = torch.randint(0, 49000, (batch_size, 30))
    pixels = torch.randn(batch_size, 3, 384, 128)
    began = time.perf_counter()
    output = model(input_ids=tokens, pixel_values=pixels, embed_chunk_size=chunk_size)
    triplet_alignment_loss(output.image_embeds, output.text_embeds, torch.arange(batch_size)).backward()
    return _peak_memory(), time.perf_counter() - began


def measure_rows(numbers_of_rows: list[int], batch_size: int = 128) -> None:
    """Bytes, arithmetic and time of one memory in a step, by its rows."""
    print(f"{'rows':>9} {'rows GiB':>9} {'GFLOP':>8} {'peak GiB':>9} {'s a step':>9} {'GFLOP/s':>8}")
    for rows in numbers_of_rows:
        peak, seconds = _in_process(_row_step, rows, batch_size)
        # Two sides, forwards and back to the features, a multiplication and an addition for each entry.
        operations = 2 * 2 * 2 * batch_size * rows * _DIM
        size = 2 * rows * _DIM * 4
        print(
            f"{rows:>9} {size / 2**30:>9.3f} {operations / 1e9:>8.1f} {peak / 2**30:>9.2f} {seconds:>9.3f} "
            f"{operations / 1e9 / seconds:>8.0f}",
            flush=True,
        )


def _row_step(rows: int, batch_size: int) -> tuple[int, float]:
    torch.manual_seed(0)
    memory = CrossModalMemory(torch.randn(rows, _DIM), torch.randn(rows, _DIM), torch.arange(rows), 0.03, 0.1)
    features = torch.randn(2, batch_size, _DIM, requires_grad=True)
    own = torch.randint(0, rows, (batch_size,))
    times = []
    for _ in range(5):
        began = time.perf_counter()
        sum(memory(*features, own)).backward()
        memory.update(*features, own)
        times.append(time.perf_counter() - began)
    return _peak_memory(), statistics.median(times)


def measure_scaling(rounds: int = 3, steps: int = 30) -> None:
    """Pairs a second of the small backbone, a thread each: one process with 64 pairs a step, two with 32."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        write_benchmark(SyntheticBenchmark("cuhk_pedes", train_ids=100, val_ids=2, test_ids=2), data, num_workers=2)
        rates: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(rounds):
            for processes in rates:
                rates[processes].append(_rate(processes, 64 // processes, steps, data, Path(folder) / "out"))
    one, two = (statistics.median(values) for values in rates.values())
    for processes, values in rates.items():
        print(f"{processes} processes: {', '.join(f'{value:.1f}' for value in values)} pairs/s")
    print(f"two for one: {two / one:.2f} times (medians of {rounds})")


def _rate(processes: int, batch_size: int, steps: int, data: Path, output_dir: Path) -> float:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", processes]
    command += ["--multi_gpu"] if processes > 1 else []
    command += ["--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--num_cpu_threads_per_process", 1, "--main_process_port", 0, _ROOT / "train_eccl.py"]
    command += [_ROOT / "recipes" / "demo.yaml", "--init_from", _ROOT / "assets" / "synthetic-backbone"]
    command += ["--data_dir", data, "--output_dir", output_dir, "--per_device_train_batch_size", batch_size]
    command += ["--max_steps", steps, "--logging_steps", steps // 2, "--eval_strategy", "no", "--disable_tqdm", "True"]
    command += ["--load_best_model_at_end", "False", "--save_strategy", "steps", "--save_steps", steps]
    command += ["--report_to", "none"]
    subprocess.run(list(map(str, command)), check=True, stdin=subprocess.DEVNULL, capture_output=True)
    state = json.loads((output_dir / f"checkpoint-{steps}" / "trainer_state.json").read_text(encoding="utf-8"))
    # The first half warms up.
    return [entry["pairs_per_second"] for entry in state["log_history"] if "pairs_per_second" in entry][-1]


def _peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _in_process(function: Callable, *arguments) -> tuple[int, float]:
    """Runs it in a fresh process, whose peak is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("chunks", "rows", "scaling"))
    part = parser.parse_args().part
    print(f"torch {torch.__version__}, {os.cpu_count()} CPUs")
    if part == "chunks":
        measure_chunks([(8, None), (16, None), (32, None), (32, 8), (128, 8)])
    elif part == "rows":
        measure_rows([1_000, 10_000, 100_000, 1_000_000])
    else:
        measure_scaling()


if __name__ == "__main__":
    main()
