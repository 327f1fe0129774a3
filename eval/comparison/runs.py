"""Training and scoring one run of a comparison, in processes that can be stopped and started again."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from ...encoding_eccl import embed_split
from ...hub.loading import load_model
from ...hub.run_folder import TRAINING_LOG
from ...training.losses import unit_rows
from ...utils.command_line import say
from ...utils.files import complete_file, read_json
from ..person_retrieval.person_retrieval import retrieval_metrics
from .statistics import METRICS, PersonScores

# What the training command prints: "252,288 of the 5,558,721 parameters are trained", and for some losses "1,000
# parameters of the losses are trained, too".
_TRAINED = re.compile(r"^([\d,]+) (?:of the [\d,]+ parameters|parameters of the losses) are trained", re.MULTILINE)
# How it reports a loss or a gradient that is not finite, or features of an evaluation that are not.
_DIVERGED = re.compile(r"^error: (step \d+: .*|row \d+ of \w+ contains NaN or infinity.*)", re.MULTILINE)
RECORD_FILE, TEST_FILE = "run.json", "test.json"
# A training process: it ends when the comparison ends, however that ends.
_PROGRAM = (
    "import runpy; from eccl.utils.command_line import follow_parent; follow_parent(); "
    "runpy.run_module('eccl.train_eccl', run_name='__main__', alter_sys=True)"
)


@dataclass(frozen=True)
class Run:
    """One training of one method, or one method that is not trained.

    Args:
        setting: name of the setting, for messages.
        method: name of the method, for messages.
        name: name of the run among those of the method, for example `seed-3`.
        words: the command line of the training without its folders: recipes and options; `None` if nothing is trained.
        init_from: the backbone.
        data: options that say where the data set is.
        folder: the folder of the run; it gets `run.json` and the trained model.
        conditions: what the outcome depends on; a finished run is only used again under the same conditions.
        is_trial: whether it is a trial of a search, which is scored on the validation split. Otherwise the trained
            model is kept for the test split.
    """

    setting: str
    method: str
    name: str
    words: tuple[str, ...] | None
    init_from: str
    data: Mapping[str, str]
    folder: Path
    conditions: Mapping[str, Any]
    is_trial: bool = False

    @property
    def title(self) -> str:
        return f"{self.setting}, {self.method}, {self.name}"

    @property
    def model(self) -> Path:
        """The folder of the model that is scored."""
        return Path(self.init_from) if self.words is None else self.folder / "model"

    @property
    def record_file(self) -> Path:
        return self.folder / RECORD_FILE

    def read_record(self) -> dict[str, Any] | None:
        """Reads the record of a finished run; `None` if it has not finished.

        Raises:
            ValueError: the record is damaged, or was written under other conditions.
        """
        if not self.record_file.is_file():
            return None
        record = read_json(self.record_file)
        before, expected = record.get("conditions"), json.loads(json.dumps(dict(self.conditions)))
        if not isinstance(before, dict):
            raise ValueError(f"{self.record_file} is not the record of a run: it has no conditions")
        if changes := _find_changes(before, expected):
            raise ValueError(
                f"{self.record_file} was written under other conditions ({'; '.join(changes)}): name another "
                f"--output_dir, or remove {self.folder}"
            )
        return record


def _find_changes(before: Any, now: Any, name: str = "") -> list[str]:
    """Names the entries in which two objects of JSON differ, with both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted({*before, *now})
        return [change for key in keys for change in _find_changes(before.get(key), now.get(key), f"{name} {key}")]
    return [] if before == now else [f"{name.strip()}: {before} instead of {now}"]


class Stopped(Exception):
    """A run was stopped because another one has failed, or because the user has stopped the comparison."""


class Pool:
    """Executes runs, several at a time, each in one thread of this process that waits for its training process.

    Args:
        jobs: number of runs at a time.
        threads: number of threads of each training process.
        batch_size: number of images encoded at a time.
    """

    def __init__(self, jobs: int, threads: int, batch_size: int):
        self.jobs, self.threads, self.batch_size = jobs, threads, batch_size
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def execute(self, runs: Sequence[Run], splits: Mapping[str, datasets.Dataset]) -> list[dict[str, Any]]:
        """Trains the runs that have not finished, and scores the trials among them on the validation split.

        Args:
            runs: the runs.
            splits: the validation split of each setting, by name.

        Returns:
            The record of each run, in the order of `runs`. A run whose loss was not finite has `diverged`, the message,
            and no scores.

        Raises:
            ValueError: a training has failed; the message names its log. The other trainings are stopped.
        """
        records = [run.read_record() for run in runs]
        missing = [index for index, record in enumerate(records) if record is None]
        if len(missing) < len(runs):
            say(
                f"{len(runs) - len(missing)} of {len(runs)} runs have finished before and are used again (after a "
                "change of the code, name another --output_dir)"
            )
        done = len(runs) - len(missing)

        def finish(index: int) -> None:
            nonlocal done
            start = time.monotonic()
            record = self._train_and_score(runs[index], splits[runs[index].setting])
            records[index] = record
            with self._lock:
                done += 1
                outcome = record.get("diverged", "finished")
                if "val" in record:
                    outcome = f"Rank-1 on val {scores_from_json(record['val']).mean('rank1'):.2f}"
                seconds = time.monotonic() - start
                say(f"[{done} of {len(runs)}] {runs[index].title}: {outcome} ({seconds:.0f} s)")

        self.map(finish, missing)
        return [record for record in records if record is not None]

    def map(self, function: Callable[[Any], None], values: Sequence[Any]) -> None:
        """Calls a function with each value, several at a time; after an error, nothing more is started.

        Raises:
            Exception: the first error of a call.
        """
        with ThreadPoolExecutor(self.jobs) as pool:
            futures = [pool.submit(function, value) for value in values]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            except KeyboardInterrupt:
                self._stop(futures)
                raise
            failures = [error for each in done if (error := each.exception()) is not None]
            if failures:
                self._stop(futures)
                raise next((error for error in failures if not isinstance(error, Stopped)), failures[0])

    def _stop(self, futures: Sequence[Any]) -> None:
        with self._lock:
            self._stopped = True
            for future in futures:
                future.cancel()
            for process in self._processes:
                process.kill()

    def _train_and_score(self, run: Run, split: datasets.Dataset) -> dict[str, Any]:
        run.folder.mkdir(parents=True, exist_ok=True)
        # Those of an earlier training, whose record was removed, are not those of this one.
        (run.folder / TEST_FILE).unlink(missing_ok=True)
        record: dict[str, Any] = {"conditions": dict(run.conditions)}
        if run.words is not None:
            record |= self._train(run)
        if run.is_trial and "diverged" not in record:
            record["val"] = scores_to_json(self.score(run.model, split))
        with complete_file(run.record_file) as unfinished:
            unfinished.write_text(json.dumps(record) + "\n", encoding="utf-8")
        if run.words is not None and (run.is_trial or "diverged" in record):
            shutil.rmtree(run.model, ignore_errors=True)
        return record

    def _train(self, run: Run) -> dict[str, Any]:
        """Runs the training command, and returns what it has measured.

        Raises:
            ValueError: the training has failed for another reason than a loss that is not finite.
        """
        options = {**run.data, "init_from": run.init_from, "output_dir": str(run.model), "overwrite": "True"}
        # Each training has its part of the cores. The number of workers changes no result.
        options["dataloader_num_workers"] = str(min(8, max(0, (os.cpu_count() or 1) // self.jobs - 2)))
        words = [*(run.words or ()), *(word for name, value in options.items() for word in (f"--{name}", value))]
        log = run.folder / "train.log"
        start = time.monotonic()
        with log.open("wb") as output, self._lock:
            if self._stopped:
                raise Stopped
            environment = dict(os.environ, OMP_NUM_THREADS=str(self.threads), MKL_NUM_THREADS=str(self.threads))
            process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
            )
            self._processes.add(process)
        # Unlike Popen.wait, this also returns the largest memory of this one process.
        _, status, usage = os.wait4(process.pid, 0)
        with self._lock:
            process.returncode = os.waitstatus_to_exitcode(status)
            self._processes.discard(process)
            if self._stopped:
                raise Stopped
        text = log.read_text(encoding="utf-8", errors="replace")
        if process.returncode:
            if diverged := _DIVERGED.search(text):
                return {"diverged": diverged[1]}
            last = [line for line in text.splitlines() if line.strip()][-1:] or ["it wrote nothing"]
            raise ValueError(f"the training of {run.title} has failed: {last[0]} (the whole output is in {log})")
        trained = _TRAINED.findall(text)
        if not trained:
            raise ValueError(f"{log} does not say how many parameters are trained: another version has written it")
        history = read_json(run.model / TRAINING_LOG)["log_history"]
        rates = [entry["pairs_per_second"] for entry in history if "pairs_per_second" in entry]
        unit = 1 if sys.platform == "darwin" else 1024
        return {
            "seconds": round(time.monotonic() - start, 1),
            "trained_parameters": sum(int(number.replace(",", "")) for number in trained),
            "pairs_per_second": float(np.median(rates)) if rates else None,
            "peak_memory": usage.ru_maxrss * unit,
            "log_history": history,
        }

    def score(self, model_name: Path, split: datasets.Dataset) -> PersonScores:
        """Scores a model on a split: every caption queries every image.

        Args:
            model_name: folder of the model.
            split: the split.

        Raises:
            ValueError: the model is damaged.
            OSError: there is no such model.
        """
        torch.set_num_threads(self.threads)
        model, processor = load_model(str(model_name))
        embeds = embed_split(model, processor, split, self.batch_size, progress=False)
        similarities = unit_rows(embeds.text_embeds) @ unit_rows(embeds.image_embeds).T
        return score_similarities(
            similarities.numpy(), embeds.query_person_ids.numpy(), embeds.gallery_person_ids.numpy()
        )


def score_similarities(
    similarities: np.ndarray, query_person_ids: np.ndarray, gallery_person_ids: np.ndarray
) -> PersonScores:
    """Scores similarities as the metric does, and sums the scores of each person's queries.

    Args:
        similarities: `(queries, images)`.
        query_person_ids, gallery_person_ids: the person of each.

    Returns:
        The scores; the persons are in the order of their ids.
    """
    metrics = retrieval_metrics([similarities], query_person_ids, gallery_person_ids, return_per_query=True)
    per_query = metrics["per_query"]
    values = {f"rank{k}": 100.0 * (per_query["first_rank"] <= k) for k in (1, 5, 10)}
    values |= {"mAP": per_query["AP"], "mINP": per_query["INP"]}
    _, person_of_query = np.unique(query_person_ids, return_inverse=True)
    return PersonScores(
        np.bincount(person_of_query),
        {metric: np.bincount(person_of_query, weights=values[metric]) for metric in METRICS},
    )


def scores_to_json(scores: PersonScores) -> dict[str, Any]:
    """Writes scores as objects of JSON."""
    sums = {metric: [round(value, 4) for value in scores.sums[metric].tolist()] for metric in METRICS}
    return {"queries": scores.queries.tolist(), **sums}


def scores_from_json(content: Mapping[str, Any]) -> PersonScores:
    """Reads scores from objects of JSON."""
    return PersonScores(np.array(content["queries"]), {metric: np.array(content[metric]) for metric in METRICS})


__all__ = ["RECORD_FILE", "TEST_FILE", "Pool", "Run", "score_similarities", "scores_from_json", "scores_to_json"]
