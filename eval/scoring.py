"""Scoring models on benchmarks: data sets in, one `Result` for each table row out."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..configuration_eccl import checkpoint_kind
from ..dataset_scripts.base import canonical_split, published_differences, undecoded_images
from ..dataset_scripts.persons import cut_by_person
from ..dataset_scripts.sources import DataSource, find_benchmark
from ..dataset_scripts.synthetic import LABELS_FILE
from ..encoding_eccl import SplitEmbeddings, embed_split
from ..hub.digests import digest_model
from ..hub.loading import load_model
from ..hub.model_card import DIRECTIONS, Result
from ..modeling_eccl import ECCLModel
from ..processing_eccl import ECCLProcessor
from ..training.fingerprint import digest_split
from ..training.losses import unit_rows
from ..utils.command_line import say
from ..utils.files import complete_file, read_json
from .person_retrieval.person_retrieval import retrieval_metrics, score_embeddings
from .pictures import choose_queries, draw_rankings
from .reports import shorten_names
from .reranking import rerank_blocks


@dataclass(frozen=True)
class Benchmark:
    """One split of a data set, ready to be scored.

    Args:
        name: name of the data set, for example `cuhk_pedes`.
        data_dir: where it is, as the user named it; empty for a data set of the Hub.
        split: for example `test`, or `test[:10]` for its first ten images.
        dataset: the split itself, one row per image.
        differences: how the size of the split differs from the published one; empty if it does not.
        oracle: the oracle's Rank-1 on this split in percent; `None` if the data set is not synthetic.
        digest: SHA-256 of the split, see [`digest_split`].
        published: the benchmark whose published figures belong next to those of this split; empty if there is none.
    """

    name: str
    data_dir: str
    split: str
    dataset: datasets.Dataset
    differences: list[str]
    oracle: float | None
    digest: str | None = None
    published: str = ""


@dataclass(frozen=True)
class Settings:
    """How splits are encoded and scored.

    Args:
        directions: `text_to_image`, `image_to_text`, or both.
        rerank: also score text to image with re-ranking.
        base: the model that adapters were trained on; `None` if the adapters name it.
        cache_dir: folder for embeddings; `None` keeps none.
        batch_size: number of images encoded at a time.
        num_workers: number of worker processes that decode images, in each process.
        label: what tables show instead of the name of the model; `None` shows the name.
    """

    directions: Sequence[str]
    rerank: bool
    base: str | None
    cache_dir: str | None
    batch_size: int
    num_workers: int
    label: str | None


@dataclass(frozen=True)
class RankedSplit:
    """A split that one model has ranked, for the picture of its rankings; `average_precisions` is `(queries,)`."""

    benchmark: Benchmark
    embeds: SplitEmbeddings
    direction: str
    average_precisions: np.ndarray


@dataclass
class Evaluation:
    """The outcome of an evaluation.

    Attributes:
        results: one entry for each model, benchmark, direction and kind of ranking.
        first_ranks: for each curve of the matching-curve picture, the rank of each query's first right answer.
        first: the split behind the first result.
    """

    results: list[Result] = field(default_factory=list)
    first_ranks: dict[str, np.ndarray] = field(default_factory=dict)
    first: RankedSplit | None = None


def connect_processes() -> PartialState:
    """Joins the processes of a launch, and returns the state of this one."""
    # By default, accelerate does not join processes that have no GPU.
    return PartialState(cpu=not torch.accelerator.is_available())


def check_names(models: Sequence[str], base: str | None) -> None:
    """Checks that each model is a checkpoint of a known kind; loads no weights.

    Raises:
        ValueError: a checkpoint is of another kind.
        OSError: a checkpoint is not there.
    """
    for name in [*models, *([base] if base else [])]:
        try:
            checkpoint_kind(name)
        except OSError as error:
            raise OSError(f"{name} is not the folder of a model, nor can it be read from the Hub: {error}") from error


def load_benchmarks(
    sources: Sequence[DataSource], split: str, eval_fraction: float | None = None, seed: int = 0
) -> list[Benchmark]:
    """Loads one split of each data set; all processes of a launch must call this.

    Args:
        sources: the data sets.
        split: name of a split, or a part of one, such as `test[:100]`; `validation` means `val`.
        eval_fraction: score the persons that a training with the same `eval_fraction` and seed cuts off this split.
        seed: seed of that training.

    Raises:
        ValueError: a data set has faults, or no such split, or the split is empty.
        OSError: a data set is not in its folder.
    """
    state = connect_processes()
    benchmarks = []
    for source in sources:
        # The other processes read what the first one has prepared.
        with state.main_process_first():
            data = source.load()
        name = str(canonical_split(split))
        dataset = _take_split(source, data.splits, name)
        if eval_fraction is not None:
            dataset = cut_by_person(dataset, eval_fraction, seed)[1]
            name = f"{name} ({eval_fraction:.0%} of the persons, seed {seed})"
        is_benchmark = data.layout is not None
        benchmarks.append(
            Benchmark(
                source.title,
                source.location,
                name,
                dataset,
                published_differences(data.layout, name, dataset) if data.layout else [],
                read_oracle(data.folder, name) if data.folder else None,
                digest_split(dataset),
                source.name if is_benchmark else find_benchmark(name, dataset) or "",
            )
        )
    return benchmarks


def _take_split(source: DataSource, splits: datasets.DatasetDict, split: str) -> datasets.Dataset:
    """Returns a split, or the part of it that a slice such as `[:100]`, `[10:20]` or `[:10%]` names.

    Raises:
        ValueError: there is no such split, or the slice is wrong, or no row is in it.
    """
    parts = []
    for part in split.split("+"):
        name = part.partition("[")[0].strip()
        if name not in splits:
            raise ValueError(
                f"Unknown split in --split {split!r}: {source} has {', '.join(splits)}; --split names one of them. To "
                "score persons that a training has cut off, add its --eval_fraction and --seed"
            )
        slices = datasets.ReadInstruction.from_spec(part.strip()).to_absolute({name: len(splits[name])})
        parts += [splits[name].select(range(each.from_, each.to)) for each in slices]
    dataset = datasets.concatenate_datasets(parts)
    if not len(dataset):
        raise ValueError(f'Instruction "{split}" corresponds to no data of {source}')
    return dataset


def read_oracle(folder: Path, split: str) -> float | None:
    """Reads the oracle's Rank-1 on a split, in percent.

    Args:
        folder: folder of the annotation file.
        split: a part of a split, such as `test[:10]`, has no oracle.

    Returns:
        `None` if the data set is not synthetic, or if the split has no oracle.
    """
    file = folder / LABELS_FILE
    if not file.is_file():
        return None
    try:
        oracle = read_json(file)["oracle_rank1"].get(split)
        return None if oracle is None else float(oracle)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{file} is not the file of a synthetic benchmark: it has no oracle_rank1 by split") from error


def evaluate_models(models: Sequence[str], benchmarks: Sequence[Benchmark], settings: Settings) -> Evaluation:
    """Scores every model on every benchmark; all processes of a launch must call this.

    Returns:
        The whole outcome in the main process, and an empty one in the others.
    """
    state = connect_processes()
    if len(models) > 1:
        # A model that cannot be loaded is found before the first one is scored.
        for name in models:
            load_model(name, settings.base)
    evaluation = Evaluation()
    model_labels, benchmark_labels = shorten_names(models), label_benchmarks(benchmarks)
    for name in models:
        say(f"evaluating {name}")
        model, processor = load_model(name, settings.base)
        digest = digest_model(model)
        for benchmark, benchmark_label in zip(benchmarks, benchmark_labels, strict=True):
            embeds = embed_cached(model, processor, digest, benchmark.dataset, settings, progress=state.is_main_process)
            if state.is_main_process:
                labels = model_labels[name], benchmark_label
                add_scores(evaluation, name, digest, benchmark, embeds, settings, labels)
    return evaluation


def label_benchmarks(benchmarks: Sequence[Benchmark]) -> list[str]:
    """Returns the words that tell the benchmarks apart in the label of a curve; empty if there is one benchmark."""
    if len(benchmarks) == 1:
        return [""]
    folders = shorten_names(benchmark.data_dir for benchmark in benchmarks)
    if len(folders) == len(benchmarks):
        return [f" on {folders[benchmark.data_dir]}" for benchmark in benchmarks]
    return [f" on {benchmark.name} in {folders[benchmark.data_dir]}" for benchmark in benchmarks]


def add_scores(
    evaluation: Evaluation,
    name: str,
    digest: str,
    benchmark: Benchmark,
    embeds: SplitEmbeddings,
    settings: Settings,
    curve_labels: tuple[str, str],
) -> None:
    """Scores a model on a benchmark in each direction, and adds the figures to an evaluation.

    Args:
        evaluation: is changed.
        name: the model, as the user named it.
        digest: the digest of its weights.
        benchmark: the split behind `embeds`.
        embeds: the split, encoded by the model.
        settings: gives the directions.
        curve_labels: the words for the model and for the benchmark in the labels of the curves.
    """
    for direction in settings.directions:
        for reranked in (False, True) if settings.rerank and direction == "text_to_image" else (False,):
            metrics = score(embeds, direction, reranked)
            per_query = metrics.pop("per_query")
            queries, gallery = len(embeds.text_embeds), len(embeds.image_embeds)
            if direction == "image_to_text":
                queries, gallery = gallery, queries
            result = Result(
                model=name,
                dataset=benchmark.name,
                data_dir=benchmark.data_dir,
                split=benchmark.split,
                direction=direction,
                reranked=reranked,
                queries=queries,
                gallery=gallery,
                metrics=metrics,
                differs=benchmark.differences,
                label=settings.label,
                weights_sha256=digest,
                data_sha256=benchmark.digest,
                benchmark=benchmark.published,
            )
            evaluation.results.append(result)
            label = (" (re-ranked)" if reranked else "").join(curve_labels)
            evaluation.first_ranks[f"{label}, {DIRECTIONS[direction]}"] = per_query["first_rank"]
            if evaluation.first is None:
                evaluation.first = RankedSplit(benchmark, embeds, direction, per_query["AP"])


def embed_cached(
    model: ECCLModel,
    processor: ECCLProcessor,
    digest: str,
    dataset: datasets.Dataset,
    settings: Settings,
    progress: bool,
) -> SplitEmbeddings:
    """Encodes a split, or reads the embeddings that an earlier call kept for the same weights and the same split.

    Args:
        model, processor: a model and its processor.
        digest: the digest of the model's weights.
        dataset: the split.
        settings: with `cache_dir`, that folder gets a file of embeddings, named after the weights, the processor and
            the split. Without it, nothing is kept.
        progress: shows a bar.
    """

    def encode() -> SplitEmbeddings:
        return embed_split(
            model, processor, dataset, settings.batch_size, settings.num_workers, progress, across_processes=True
        )

    if settings.cache_dir is None:
        return encode()
    file = Path(settings.cache_dir) / f"{_cache_key(model, processor, digest, dataset)}.safetensors"
    # All processes look between the two barriers. Otherwise, one could find the file that another one has just written,
    # and would not take its part in the encoding.
    state = connect_processes()
    state.wait_for_everyone()
    cached = _read_cached(file)
    state.wait_for_everyone()
    if cached is not None:
        return cached
    embeds = encode()
    if state.is_main_process:
        with complete_file(file) as unfinished:
            save_file({name: tensor.contiguous() for name, tensor in embeds._asdict().items()}, unfinished)
    return embeds


def _read_cached(file: Path) -> SplitEmbeddings | None:
    if not file.is_file():
        return None
    try:
        return SplitEmbeddings(**load_file(file))
    except (OSError, SafetensorError, TypeError) as error:
        say(f"{file} cannot be read, so the split is encoded again: {error}")
        return None


def _cache_key(model: ECCLModel, processor: ECCLProcessor, digest: str, dataset: datasets.Dataset) -> str:
    """Returns a digest of the data, the weights (by their `digest`), the preprocessing and the configuration."""
    key = hashlib.sha256(f"{dataset._fingerprint} {digest}".encode())
    key.update(json.dumps([str(processor.image_processor), processor.max_text_length, str(model.config)]).encode())
    return key.hexdigest()[:32]


def score(embeds: SplitEmbeddings, direction: str, rerank: bool = False) -> dict[str, Any]:
    """Returns the metrics of a split in one direction, with `per_query`; `rerank` needs `text_to_image`."""
    if rerank:
        blocks = rerank_blocks(unit_rows(embeds.text_embeds), unit_rows(embeds.image_embeds))
        return retrieval_metrics(
            (block.numpy() for block in blocks),
            embeds.query_person_ids,
            embeds.gallery_person_ids,
            return_per_query=True,
        )
    queries = embeds.text_embeds, embeds.query_person_ids
    gallery = embeds.image_embeds, embeds.gallery_person_ids
    if direction == "image_to_text":
        queries, gallery = gallery, queries
    return score_embeddings(*queries, *gallery, return_per_query=True)


def picture_rankings(ranked: RankedSplit) -> Image.Image:
    """Draws the top ranks of the captions with the best and the worst results, and of some random ones."""
    queries = choose_queries(ranked.average_precisions)
    chosen = [query for queries_of_kind in queries.values() for query in queries_of_kind]
    embeds, dataset = ranked.embeds, ranked.benchmark.dataset
    similarities = unit_rows(embeds.text_embeds[chosen]) @ unit_rows(embeds.image_embeds).T
    captions = [caption for captions_of_image in dataset["captions"] for caption in captions_of_image]
    images = undecoded_images(dataset)
    return draw_rankings(queries, captions, embeds.query_person_ids, similarities, images, embeds.gallery_person_ids)


__all__ = [
    "Benchmark",
    "Evaluation",
    "RankedSplit",
    "Settings",
    "check_names",
    "evaluate_models",
    "load_benchmarks",
    "picture_rankings",
]
