"""Scores checkpoints on benchmarks: every caption of a split queries every image of it.

accelerate launch eval/evaluate_eccl.py --model DIR --dataset cuhk_pedes --data_dir DIR --output_dir OUT

Several --model, and several --dataset with a --data_dir each, give every model on every benchmark.
"""

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from safetensors.torch import load_file, save_file

from eccl.dataset_scripts import BENCHMARKS
from eccl.dataset_scripts.annotations import SplitSize, size_differences
from eccl.dataset_scripts.base import canonical_split
from eccl.dataset_scripts.synthetic import LABELS_FILE
from eccl.encoding_eccl import SplitEmbeddings, embed_split
from eccl.eval.person_retrieval.person_retrieval import retrieval_metrics, score_embeddings
from eccl.eval.pictures import choose_queries, draw_matching_curves, draw_rankings
from eccl.eval.reports import make_report, write_report
from eccl.eval.reranking import rerank_blocks
from eccl.hub.loading import load_model
from eccl.hub.model_card import DIRECTIONS, METRICS, Result
from eccl.modeling_eccl import ECCLModel
from eccl.processing_eccl import ECCLProcessor
from eccl.training.losses import unit_rows


def read_oracle(data_dir: str | Path, split: str) -> float | None:
    """The oracle's Rank-1 on a split, in percent, where the benchmark is a synthetic one."""
    file = Path(data_dir) / LABELS_FILE
    return json.loads(file.read_text(encoding="utf-8"))["oracle_rank1"][split] if file.is_file() else None


def embed_cached(
    model: ECCLModel,
    processor: ECCLProcessor,
    rows: datasets.Dataset,
    cache_dir: str | Path | None,
    batch_size: int,
    num_workers: int,
    progress: bool,
) -> SplitEmbeddings:
    """Encodes a split, or reads what the same weights gave for the same rows before.

    Args:
        cache_dir: gets a file named by weights, processor and rows; without it nothing is kept.
    """
    encode = lambda: embed_split(model, processor, rows, batch_size, num_workers, progress, share=True)  # noqa: E731
    if cache_dir is None:
        return encode()
    digest = hashlib.sha256(rows._fingerprint.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    digest.update(json.dumps([str(processor.image_processor), processor.max_text_length, str(model.config)]).encode())
    file = Path(cache_dir) / f"{digest.hexdigest()[:32]}.safetensors"
    # All processes decide alike, or those that encode would wait for those that read.
    state = PartialState()
    state.wait_for_everyone()
    known = file.is_file()
    state.wait_for_everyone()
    if known:
        return SplitEmbeddings(**load_file(file))
    embeds = encode()
    if state.is_main_process:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}")
        save_file({name: tensor.contiguous() for name, tensor in embeds._asdict().items()}, unfinished)
        unfinished.replace(file)
    return embeds


def score(embeds: SplitEmbeddings, direction: str, rerank: bool = False) -> dict:
    """The metrics of a split in one direction, `per_query` included."""
    if rerank:
        blocks = rerank_blocks(unit_rows(embeds.text_embeds), unit_rows(embeds.image_embeds))
        return retrieval_metrics(
            (block.numpy() for block in blocks),
            embeds.query_person_ids,
            embeds.gallery_person_ids,
            return_per_query=True,
        )
    parts = list(embeds)
    if direction == "image_to_text":
        parts = parts[2:] + parts[:2]
    return score_embeddings(*parts, return_per_query=True)


def picture_rankings(rows: datasets.Dataset, embeds: SplitEmbeddings, average_precisions: np.ndarray) -> Image.Image:
    """The top ranks of the best, the worst and some random captions of a split."""
    queries = choose_queries(average_precisions)
    chosen = [query for own in queries.values() for query in own]
    similarities = unit_rows(embeds.text_embeds[chosen]) @ unit_rows(embeds.image_embeds).T
    captions = [caption for own in rows["captions"] for caption in own]
    files = [image["path"] for image in rows.cast_column("image", datasets.Image(decode=False))["image"]]
    return draw_rankings(queries, captions, embeds.query_person_ids, similarities, files, embeds.gallery_person_ids)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="eval/evaluate_eccl.py", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--model", required=True, action="append", help="folder or Hub id of a model, an adapter or a plain CLIP"
    )
    parser.add_argument("--base", help="what adapters were trained on, if it is not where they say")
    parser.add_argument("--dataset", required=True, action="append", choices=BENCHMARKS)
    parser.add_argument("--data_dir", required=True, action="append", help="one for each --dataset")
    parser.add_argument("--split", default="test", type=canonical_split)
    parser.add_argument("--direction", choices=(*DIRECTIONS, "both"), default="text_to_image")
    parser.add_argument("--rerank", action="store_true", help="also re-ranked by visual neighbours, as rows of its own")
    parser.add_argument("--output_dir", help="gets results.json, results.md and pictures")
    parser.add_argument("--cache_dir", help="keeps embeddings, and takes those that are there")
    parser.add_argument("--before", help="results.json of an earlier evaluation, shown beside this one")
    parser.add_argument("--batch_size", type=int, default=64, help="images encoded at a time")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that decode images, of each process")
    options = parser.parse_args(arguments)
    if len(options.dataset) != len(options.data_dir):
        parser.error(f"{len(options.dataset)} --dataset and {len(options.data_dir)} --data_dir: each needs the other")
    if options.rerank and options.direction == "image_to_text":
        parser.error("--rerank is of text_to_image: it compares images with images")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    try:
        evaluate_all(options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def evaluate_all(options: argparse.Namespace) -> None:
    """Every model on every benchmark, then the report."""
    # Without being told, accelerate takes processes without a GPU for strangers.
    state = PartialState(cpu=not torch.accelerator.is_available())
    directions = tuple(DIRECTIONS) if options.direction == "both" else (options.direction,)
    results, curves, first = [], {}, None
    for name in options.model:
        model, processor = load_model(name, options.base)
        for dataset, data_dir in zip(options.dataset, options.data_dir, strict=True):
            with state.main_process_first():
                builder = datasets.load_dataset_builder(dataset, data_dir=data_dir)
                builder.download_and_prepare()
            rows = builder.as_dataset(split=options.split)
            embeds = embed_cached(
                model,
                processor,
                rows,
                options.cache_dir,
                options.batch_size,
                options.num_workers,
                progress=state.is_main_process,
            )
            if not state.is_main_process:
                continue
            published = {options.split: builder.config.layout.published_sizes.get(options.split)}
            sizes = {options.split: SplitSize.of(rows["person_id"], rows["captions"])}
            differs = size_differences(sizes, published) if published[options.split] else []
            wanted = [(direction, False) for direction in directions]
            if options.rerank:
                wanted.insert(1, ("text_to_image", True))
            for direction, rerank in wanted:
                figures = score(embeds, direction, rerank)
                per_query = figures.pop("per_query")
                counts = (len(embeds.text_embeds), len(embeds.image_embeds))
                queries, gallery = counts if direction == "text_to_image" else counts[::-1]
                shown = "after" if options.before else None
                where = (name, dataset, data_dir, options.split)
                results.append(Result(*where, direction, rerank, queries, gallery, figures, differs, shown))
                label = Path(name).name + (" (re-ranked)" if rerank else "")
                label += f" on {data_dir}" if len(options.dataset) > 1 else ""
                curves[f"{label}, {DIRECTIONS[direction]}"] = per_query["first_rank"]
                if first is None:
                    first = (rows, embeds, per_query["AP"], direction)
    if state.is_main_process:
        report(options, results, curves, first)


def report(options: argparse.Namespace, results: list[Result], curves: dict, first: tuple) -> None:
    """Prints the tables, and writes what `--output_dir` gets: figures of all results, pictures of the first."""
    summary: dict = dict(results[0].metrics)
    before = oracle = None
    if options.before:
        content = json.loads(Path(options.before).read_text(encoding="utf-8"))
        summary["before"] = before = {metric: content[metric] for metric in METRICS}
    if len(options.dataset) == 1 and (oracle := read_oracle(options.data_dir[0], options.split)) is not None:
        summary["oracle_rank1"] = oracle
    text = make_report(results, before, oracle)
    print(text)
    if not options.output_dir:
        return
    folder = Path(options.output_dir)
    write_report(folder, results, text, summary)
    written = [folder / "results.json", folder / "results.md", folder / "matching_curve.png"]
    draw_matching_curves(curves).save(written[-1])
    rows, embeds, average_precisions, direction = first
    if direction == "text_to_image":
        written.append(folder / "rankings.png")
        picture_rankings(rows, embeds, average_precisions).save(written[-1])
    print(f"written: {', '.join(map(str, written))}")


if __name__ == "__main__":
    main(sys.argv[1:])
