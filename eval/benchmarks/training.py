"""Measures what training costs: a batch in chunks, the rows of a memory, or two processes compared with one.

python -m eccl.eval.benchmarks.training chunks

Each measurement runs in a new process, so that its peak memory is not that of another one.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from ...utils.command_line import CommandParser, command, say
from ...utils.shipped import find_recipe, shipped_backbone
from .processes import PROMPT_RELEASE, environment, peak_memory, run_in_new_process

_TRAINING_COMMAND = Path(__file__).parents[2] / "train_eccl.py"
_DIM = 512


def measure_chunks(sizes: Sequence[tuple[int, int | None]]) -> None:
    """Prints peak memory and time of one step of ViT-B/16 at 384 x 128, by batch size and `embed_chunk_size`."""
    print(f"{'batch':>6} {'chunk':>6} {'peak GiB':>9} {'s a step':>9}")
    for batch_size, chunk_size in sizes:
        peak, seconds = peak_of_a_step(batch_size, chunk_size)
        print(f"{batch_size:>6} {chunk_size or '-':>6} {peak / 2**30:>9.2f} {seconds:>9.1f}", flush=True)


def peak_of_a_step(batch_size: int, chunk_size: int | None) -> tuple[int, float]:
    """Measures one step of ViT-B/16 in a new process: its peak memory in bytes, and its seconds."""
    with environment(PROMPT_RELEASE):
        return run_in_new_process(_run_chunked_step, batch_size, chunk_size)


def _run_chunked_step(batch_size: int, chunk_size: int | None) -> tuple[int, float]:
    import torch

    from ...configuration_eccl import ECCLConfig
    from ...hub.adapter import attach_lora
    from ...modeling_eccl import ECCLModel
    from ...training.losses import triplet_alignment_loss

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model = attach_lora(ECCLModel(ECCLConfig()))
    tokens = torch.full((batch_size, 40), 49407)
    tokens[:, :30] = torch.randint(0, 49000, (batch_size, 30))
    pixels = torch.randn(batch_size, 3, 384, 128)
    start = time.perf_counter()
    output = model(input_ids=tokens, pixel_values=pixels, embed_chunk_size=chunk_size)
    triplet_alignment_loss(output.image_embeds, output.text_embeds, torch.arange(batch_size)).backward()
    return peak_memory(), time.perf_counter() - start


def measure_rows(numbers_of_rows: Sequence[int], batch_size: int = 128) -> None:
    """Prints size, arithmetic, peak memory and time of one memory in a step, by its number of rows."""
    print(f"{'rows':>9} {'rows GiB':>9} {'GFLOP':>8} {'peak GiB':>9} {'s a step':>9} {'GFLOP/s':>8}")
    for rows in numbers_of_rows:
        peak, seconds = run_in_new_process(_run_memory_steps, rows, batch_size)
        # Two modalities, a forward and a backward pass, one multiplication and one addition for each entry.
        operations = 2 * 2 * 2 * batch_size * rows * _DIM
        size = 2 * rows * _DIM * 4
        print(
            f"{rows:>9} {size / 2**30:>9.3f} {operations / 1e9:>8.1f} {peak / 2**30:>9.2f} {seconds:>9.3f} "
            f"{operations / 1e9 / seconds:>8.0f}",
            flush=True,
        )


def _run_memory_steps(rows: int, batch_size: int) -> tuple[int, float]:
    import torch

    from ...training.memory import CrossModalMemory

    torch.manual_seed(0)
    memory = CrossModalMemory(torch.randn(rows, _DIM), torch.randn(rows, _DIM), torch.arange(rows), 0.03, 0.1)
    image_features, text_features = torch.randn(2, batch_size, _DIM, requires_grad=True).unbind()
    # Each row belongs to another person, so these are the persons and the rows of the batch.
    person_ids = torch.randint(0, rows, (batch_size,))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        image_to_text, text_to_image = memory(image_features, text_features, person_ids)
        (image_to_text + text_to_image).backward()
        memory.update(image_features, text_features, person_ids)
        times.append(time.perf_counter() - start)
    return peak_memory(), statistics.median(times)


def measure_scaling(rounds: int = 3, steps: int = 30) -> None:
    """Prints the pairs per second of the small backbone: one process with 64 pairs per step, and two with 32 each.

    Each process computes with one thread.
    """
    # Checked before the data set is drawn, which takes longer.
    shipped_backbone()
    from ...dataset_scripts.synthetic import SyntheticBenchmark, write_benchmark

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        write_benchmark(SyntheticBenchmark("cuhk_pedes", train_ids=100, val_ids=2, test_ids=2), data, num_workers=2)
        rates: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(rounds):
            for processes, values in rates.items():
                values.append(_measure_rate(processes, 64 // processes, steps, data, Path(folder) / "out"))
    one, two = (statistics.median(values) for values in rates.values())
    for processes, values in rates.items():
        print(f"{processes} processes: {', '.join(f'{value:.1f}' for value in values)} pairs/s")
    print(f"two processes are {two / one:.2f} times as fast as one (medians of {rounds} runs)")


def _measure_rate(processes: int, batch_size: int, steps: int, data: Path, output_dir: Path) -> float:
    """Trains for some steps, and returns the pairs per second of the second half of them; the first half warms up."""
    words: list[object] = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", processes]
    words += ["--multi_gpu"] if processes > 1 else []
    words += ["--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no"]
    words += ["--num_cpu_threads_per_process", 1, "--main_process_port", 0, _TRAINING_COMMAND]
    words += [find_recipe("demo"), "--init_from", shipped_backbone()]
    words += ["--data_dir", data, "--output_dir", output_dir, "--overwrite", True]
    words += ["--per_device_train_batch_size", batch_size]
    words += ["--max_steps", steps, "--logging_steps", steps // 2, "--eval_strategy", "no", "--disable_tqdm", "True"]
    words += ["--load_best_model_at_end", "False", "--save_strategy", "steps", "--save_steps", steps]
    words += ["--report_to", "none"]
    done = subprocess.run(list(map(str, words)), stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{_TRAINING_COMMAND} failed with exit status {done.returncode}:\n{done.stderr[-3000:]}")
    state = json.loads((output_dir / f"checkpoint-{steps}" / "trainer_state.json").read_text(encoding="utf-8"))
    return [entry["pairs_per_second"] for entry in state["log_history"] if "pairs_per_second" in entry][-1]


def make_parser() -> CommandParser:
    parser = CommandParser("python -m eccl.eval.benchmarks.training", __doc__)
    parser.add_argument(
        "part",
        choices=("chunks", "rows", "scaling"),
        help="chunks: memory and time of a step, by batch size and chunk size; rows: memory and time of a cross-modal "
        "memory, by its number of rows; scaling: speed of two processes compared with one",
    )
    return parser


@command
def main(arguments: list[str]) -> None:
    part = make_parser().parse_args(arguments).part
    say(f"measuring {part}")
    import torch

    print(f"torch {torch.__version__}, {os.cpu_count()} CPUs", flush=True)
    if part == "chunks":
        measure_chunks([(8, None), (16, None), (32, None), (32, 8), (128, 8)])
    elif part == "rows":
        measure_rows([1_000, 10_000, 100_000, 1_000_000])
    else:
        measure_scaling()


if __name__ == "__main__":
    main()
