"""Scores a checkpoint on a benchmark: every caption of a split queries every image of it.

python -m eccl.eval.evaluate_eccl --model DIR --dataset cuhk_pedes --data_dir DIR --output_dir OUT
"""

import argparse
import json
from pathlib import Path

import datasets
import torch
from PIL import Image

from ..data_eccl import embed_split
from ..dataset_scripts import BENCHMARKS
from ..dataset_scripts.base import canonical_split
from ..dataset_scripts.synthetic import LABELS_FILE
from ..gallery_eccl import draw_matches, load_model
from ..losses_eccl import unit_rows
from .person_retrieval.person_retrieval import score_embeddings

METRICS = ("rank1", "rank5", "rank10", "mAP", "mINP")
_PICTURED_QUERIES, _PICTURED_RANKS = 6, 10


def read_oracle(data_dir: str | Path, split: str) -> float | None:
    """The oracle's Rank-1 on a split, in percent, where the benchmark is a synthetic one."""
    file = Path(data_dir) / LABELS_FILE
    return json.loads(file.read_text(encoding="utf-8"))["oracle_rank1"][split] if file.is_file() else None


def format_table(rows: dict[str, dict[str, float]]) -> str:
    """A Markdown table, a row a method, `-` for figures that are not there."""
    width = max(len("method"), *map(len, rows))
    lines = [
        "| " + " | ".join(["method".ljust(width), "Rank-1", "Rank-5", "Rank-10", "mAP  ", "mINP "]) + " |",
        "|" + "|".join(["-" * (width + 2), *["-------:"] * 2, "--------:", *["------:"] * 2]) + "|",
    ]
    for name, figures in rows.items():
        cells = [f"{figures[metric]:.2f}" if metric in figures else "-" for metric in METRICS]
        widths = (6, 6, 7, 5, 5)
        padded = [cell.rjust(size) for cell, size in zip(cells, widths, strict=True)]
        lines.append("| " + " | ".join([name.ljust(width), *padded]) + " |")
    return "\n".join(lines)


def draw_rankings(rows: datasets.Dataset, similarities: torch.Tensor, files: list[str]) -> Image.Image:
    """A picture of queries spread over the split: the top ranks of each, right ones framed green, wrong ones red."""
    person_ids = rows["person_id"]
    queries = [(person, caption) for person, own in zip(person_ids, rows["captions"], strict=True) for caption in own]
    pictured = []
    for index in torch.linspace(0, len(queries) - 1, min(_PICTURED_QUERIES, len(queries))).long().tolist():
        person, caption = queries[index]
        best = similarities[index].argsort(descending=True, stable=True)[:_PICTURED_RANKS].tolist()
        pictured.append((caption, [(Path(files[image]), person_ids[image] == person) for image in best]))
    return draw_matches(pictured)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m eccl.eval.evaluate_eccl", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="folder or Hub id of a model")
    parser.add_argument("--dataset", required=True, choices=BENCHMARKS)
    parser.add_argument("--data_dir", required=True, help="the benchmark's folder, or the one that holds it")
    parser.add_argument("--split", default="test", type=canonical_split)
    parser.add_argument("--output_dir", help="gets results.json and rankings.png")
    parser.add_argument("--before", help="results.json of an earlier evaluation, shown beside this one")
    parser.add_argument("--batch_size", type=int, default=64, help="images encoded at a time")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that decode images")
    options = parser.parse_args(arguments)
    rows = datasets.load_dataset(options.dataset, data_dir=options.data_dir, split=options.split)
    embeds = embed_split(*load_model(options.model), rows, options.batch_size, options.num_workers)
    metrics = score_embeddings(*(part.numpy() for part in embeds))
    oracle = read_oracle(options.data_dir, options.split)
    table, result = {}, dict(metrics)
    if options.before:
        before = json.loads(Path(options.before).read_text(encoding="utf-8"))
        result["before"] = {metric: before[metric] for metric in METRICS}
        table["before"] = result["before"]
    table["after" if options.before else options.model] = metrics
    if oracle is not None:
        result["oracle_rank1"] = oracle
        table["oracle"] = {"rank1": oracle}
    captions = sum(map(len, rows["captions"]))
    print(f"{options.model} on {options.dataset} {options.split}: {captions} captions query {len(rows)} images")
    print(format_table(table))
    if options.output_dir:
        folder = Path(options.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        files = [image["path"] for image in rows.cast_column("image", datasets.Image(decode=False))["image"]]
        draw_rankings(rows, unit_rows(embeds.text_embeds) @ unit_rows(embeds.image_embeds).T, files).save(
            folder / "rankings.png"
        )
        print(f"written: {folder / 'results.json'}, {folder / 'rankings.png'}")


if __name__ == "__main__":
    main()
