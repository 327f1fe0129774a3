"""Any data set of persons: a benchmark, a flat list, a folder, a data set of the Hub. [`DataSource`] loads all of them.

source = DataSource("me/my-pedes", columns={"person_id": "pid"})
train = source.load().splits["train"]
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
from huggingface_hub import constants

from . import BENCHMARKS, BUILDERS
from .annotations import Layout, SplitSize
from .base import canonical_split
from .columns import find_columns, parse_columns
from .cuhk_pedes import CuhkPedes
from .icfg_pedes import IcfgPedes
from .list_files import read_parquet_schema
from .person_pairs import METADATA_FILES, is_list
from .persons import cut_by_person, person_column
from .records import Checks
from .rstpreid import RstpReid
from .tables import find_roles, is_image, prepare_tables, stream_rows

# Formats of the library that this project reads itself, with its own checks and messages.
_LIST_FORMATS = ("json", "csv")
_KINDS = (
    f"one of {', '.join(BUILDERS)}, a file, a folder, a format of datasets such as parquet or imagefolder, or a data "
    "set of the Hub (USER/NAME)"
)
_EVALUATION_SPLITS = ("val", "valid", "dev", "test")
DEFAULT_EVAL_FRACTION = 0.1


@dataclass(frozen=True)
class PersonData:
    """A loaded data set.

    Attributes:
        splits: rows as in [`~eccl.dataset_scripts.base.FEATURES`], by the name of the split.
        builder: what has loaded it.
        layout: the layout of a benchmark; `None` for other data sets.
        folder: the folder of its annotation; `None` if it has none.
        bad_captions: a line for each caption that was left out.
    """

    splits: datasets.DatasetDict
    builder: datasets.DatasetBuilder
    layout: Layout | None
    folder: Path | None
    bad_captions: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class DataSource:
    """What a data set is, where it is, and how it is read.

    Args:
        name: a benchmark (`cuhk_pedes`, ...), `person_pairs`, a file or a folder, a format of `datasets.load_dataset`
            (`parquet`, `imagefolder`, `json`, `csv`, ...), or a data set of the Hub.
        data_dir: the folder of a benchmark or a format; for a file, the folder of its images.
        config: name of the configuration, if a data set has several.
        revision: branch, tag or commit of a data set of the Hub.
        columns: the columns that are not named as usual, by role: `{"person_id": "pid"}`, or `["person_id=pid"]`.
        checks: what happens to faulty images, captions and paths.
        option: how the user gives the name, for messages.

    Raises:
        ValueError: there can be no such data set, or the columns are no mapping from roles to columns.
    """

    name: str
    data_dir: str | None = None
    config: str | None = None
    revision: str | None = None
    columns: Mapping[str, str] | Sequence[str] | None = field(default_factory=dict)
    checks: Checks = field(default_factory=Checks)
    option: str = "dataset_name"

    @classmethod
    def of_options(cls, options: Any, name: str, data_dir: str | None, option: str) -> "DataSource":
        """Makes the source of a command's options, see [`~eccl.utils.command_line.add_data_options`]."""
        checks = Checks(options.on_bad_image, options.on_bad_caption, options.fix_paths, options.follow_links)
        return cls(name, data_dir, options.dataset_config, options.revision, options.columns or {}, checks, option)

    def __post_init__(self) -> None:
        parse_columns(self.columns)
        known = self.name in BUILDERS or self.name in _PACKAGED_DATASETS_MODULES
        if not (known or self.path is not None or "/" in self.name):
            raise ValueError(f"{self.option} is {self.name!r}, it must be {_KINDS}")

    @property
    def roles(self) -> dict[str, str]:
        """The columns that are not named as usual, by role."""
        return parse_columns(self.columns)

    @property
    def path(self) -> Path | None:
        """The file or the folder that the name is, if it is one."""
        if self.name in BUILDERS or self.name in _PACKAGED_DATASETS_MODULES:
            return None
        # Unlike `Path.expanduser`, this takes the name of a user that does not exist.
        path = Path(os.path.expanduser(self.name))
        is_path = self.name.startswith((".", "/", "~")) or path.exists()
        return path if is_path else None

    @property
    def title(self) -> str:
        """The name without the path of a folder, for tables and cards."""
        return self.name if self.path is None else self.path.resolve().name

    @property
    def location(self) -> str:
        """Where the data set is, for messages: a path, or empty for a data set of the Hub."""
        return self.data_dir or (self.name if self.path is not None else "")

    def __str__(self) -> str:
        place = "" if self.location in ("", self.name) else f" in {self.location}"
        return f"{self.name}{place}"

    def load(self) -> PersonData:
        """Loads all splits, and checks all records and all images; the result of the checks is kept in the cache.

        Raises:
            ValueError: the data set has faults, or an argument does not apply to it.
            OSError: the data set is not there.
        """
        builder = self._make_builder()
        with self._naming_errors():
            builder.download_and_prepare()
            splits: Any = builder.as_dataset()
        if builder.name in BUILDERS:
            layout = builder.config.layout if builder.name in BENCHMARKS else None
            skips = self.checks.on_bad_caption == "skip"
            bad_captions = builder.read_left_out().captions if skips else []
            return PersonData(splits, builder, layout, builder.annotation.parent, bad_captions)
        cache_dir = Path(builder._cache_dir_root)
        splits = {str(canonical_split(split)): dataset for split, dataset in splits.items()}
        prepared, bad_captions = prepare_tables(
            splits, str(self), self.roles, self.checks, cache_dir, self._image_roots()
        )
        return PersonData(prepared, builder, None, None, bad_captions)

    def stream(self, split: str = "train") -> datasets.IterableDataset:
        """Opens a split as a stream: nothing is downloaded, prepared or checked before a row is read.

        A benchmark or a list is an exception: its annotation and its images are checked once.

        Returns:
            Rows with `image` (not decoded), `person_id`, `captions` (a list) and `file_path`. A faulty caption or
            person is a `ValueError` when its row is read. With `on_bad_caption`, faulty captions are left out, and rows
            without another one.

        Raises:
            ValueError: a column is missing, there is no such split, or the data set cannot be read.
        """
        builder = self._make_builder()
        with self._naming_errors():
            streams: Any = builder.as_streaming_dataset()
        if (name := canonical_split(split)) not in (known := {canonical_split(each): each for each in streams}):
            raise ValueError(f"{self} has no {split} split, only {', '.join(streams)}; train_split names another one")
        with self._naming_errors():
            rows = streams[known[name]]
            rows = rows if rows.features is not None else rows._resolve_features()
        # The builders of this project have mapped the columns already.
        roles = find_roles(rows.features, {} if builder.name in BUILDERS else self.roles, str(self))
        roots = [builder.config.find_files().folder] if builder.name in BUILDERS else self._image_roots()
        return stream_rows(rows, roles, f"{self}, split {split}", self.checks, roots)

    def _image_roots(self) -> list[Path]:
        """Returns the folders that the images of a table may be in: its own folder, and the caches of the Hub."""
        caches = [constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH]
        own = [self.location] if self.location else []
        return [Path(os.path.expanduser(each)).resolve() for each in (*own, *caches)]

    def _make_builder(self) -> datasets.DatasetBuilder:
        # Each argument that is given becomes a part of the name of the prepared data set, so defaults are left out.
        checks: dict[str, Any] = {
            name: value for name, value in vars(self.checks).items() if value != getattr(Checks(), name)
        }
        path, columns = self.path, self.roles
        if self.name in BENCHMARKS:
            self._refuse(f"the benchmark {self.name}", "config", "revision", "columns")
            return datasets.load_dataset_builder(self.name, data_dir=self.data_dir, **checks)
        if path is not None and not path.exists():
            raise FileNotFoundError(f"the data set {self.name} does not exist")
        if path is not None and not (path.is_file() or path.is_dir()):
            raise ValueError(f"the data set {self.name} is neither a file nor a folder")
        if path is not None and path.is_file():
            self._refuse("a file", "config", "revision")
            folder = self.data_dir or str(path.absolute().parent)
            file = str(path.absolute())
            return datasets.load_dataset_builder(
                "person_pairs", data_dir=folder, data_files=file, columns=columns, **checks
            )
        place = path if path is not None else Path(os.path.expanduser(self.data_dir)) if self.data_dir else None
        if self.name == "person_pairs" or (place is not None and self._is_list_folder(place)):
            self._refuse("a list of images and captions", "config", "revision")
            data_dir = str(place) if place is not None else None
            return datasets.load_dataset_builder("person_pairs", data_dir=data_dir, columns=columns, **checks)
        if self.checks.fix_paths or self.checks.follow_links:
            raise ValueError(f"fix_paths and follow_links do not apply to {self}: its images are not named by paths")
        if path is not None or self.name in _PACKAGED_DATASETS_MODULES:
            self._refuse("a folder", "revision")
            if path is None and self.data_dir is None:
                hint = f"; the folder of this name is ./{self.name}" if Path(self.name).is_dir() else ""
                raise ValueError(f"data_dir is missing: {self.name} needs the folder of its files{hint}")
        name = str(path) if path is not None else self.name
        with self._naming_errors():
            return datasets.load_dataset_builder(name, self.config, data_dir=self.data_dir, revision=self.revision)

    def _refuse(self, what: str, *names: str) -> None:
        given = [name for name in names if getattr(self, name)]
        if given:
            raise ValueError(
                f"{given[0]} is {getattr(self, given[0])!r}, but it does not apply to {what}: leave it out"
            )

    @contextlib.contextmanager
    def _naming_errors(self) -> Iterator[None]:
        """Turns the errors of the library into one line that names the data set."""
        try:
            yield
        except (DatasetNotFoundError, ConnectionError) as error:
            reason = " ".join(str(error).split()).removesuffix(".")
            raise ValueError(
                f"{self.option} is {self.name!r}: there is no such file or folder, and the Hub cannot give it: "
                f"{reason}; a private data set needs a login (hf auth login), a gated one its owners' consent, too"
            ) from error
        # The checks of this project raise these two.
        except (ValueError, OSError) as error:
            if isinstance(error, (UnicodeError, pa.ArrowException)):
                raise ValueError(f"{self} cannot be read: {error}") from error
            raise
        # On malformed files, the library and those below it raise errors of many types.
        except Exception as error:
            cause: BaseException = error
            while cause.__cause__ is not None and isinstance(cause, DatasetsError):
                cause = cause.__cause__
            raise ValueError(f"{self} cannot be read: {cause}") from error

    def _is_list_folder(self, folder: Path) -> bool:
        """Whether a folder has lists with paths of images, and no images inside Parquet files."""
        if self.name in _LIST_FORMATS:
            return True
        if self.name not in ("imagefolder", "parquet") and self.path is None:
            return False
        if not folder.is_dir() or (self.path is not None and self.data_dir):
            return False
        lists = [path for path in sorted(folder.iterdir()) if is_list(path)]
        if not lists:
            return any((folder / each / name).is_file() for each in _subfolders(folder) for name in METADATA_FILES)
        tables = [path for path in lists if path.suffix.lower() == ".parquet"]
        if not tables:
            return True
        schema = read_parquet_schema(tables[0])
        if "image" not in self.roles and any(is_image(schema.field(name).type) for name in schema.names):
            return False
        roles = find_columns(schema.names, self.roles, str(tables[0]))
        type_ = schema.field(roles["image"]).type
        is_text = pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_dictionary(type_)
        return is_text and tables[0].name != "metadata.parquet"


def _subfolders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


@dataclass(frozen=True)
class Splits:
    """The splits of a run; without evaluation, `evaluation` and `eval_split` are `None`.

    Attributes:
        data: the data set.
        train, evaluation: the rows.
        train_split, eval_split: the names of the splits.
        cut: how the evaluation split was cut from the training split; empty if the data set has both.
    """

    data: PersonData
    train: datasets.Dataset
    evaluation: datasets.Dataset | None
    train_split: str
    eval_split: str | None
    cut: str = ""


def choose_splits(
    source: DataSource,
    train_split: str | None = None,
    eval_split: str | None = None,
    eval_fraction: float | None = None,
    seed: int = 0,
    evaluated: bool = True,
) -> Splits:
    """Loads a data set, and chooses its training split and the split to evaluate on.

    Args:
        source: the data set.
        train_split: default: `train`, or the only split.
        eval_split: default: `val`, or `test` if there is no val.
        eval_fraction: part of the persons of the training split that is cut off as `val`. By default, a tenth if the
            data set has one split.
        seed: decides which persons are cut off.
        evaluated: whether the run evaluates.

    Raises:
        ValueError: there is no such split, or the two splits have persons in common.
    """
    data = source.load()
    splits = data.splits
    train_split, eval_split = canonical_split(train_split), canonical_split(eval_split)
    if train_split is None:
        train_split = "train" if "train" in splits or len(splits) > 1 else next(iter(splits))
    require_split(source, splits, train_split, "train_split")
    if not evaluated:
        if eval_fraction is not None:
            raise ValueError(f"eval_fraction is {eval_fraction}, but nothing is evaluated: leave it out")
        return Splits(data, splits[train_split], None, train_split, None)
    if eval_fraction is None and len(splits) == 1 and eval_split in (None, "val"):
        eval_fraction = DEFAULT_EVAL_FRACTION
    if eval_fraction is not None:
        name = eval_split or "val"
        if name in splits:
            raise ValueError(
                f"eval_fraction is {eval_fraction}, but {source} has a split {name}: leave eval_fraction out, or give "
                "eval_split a name that no split has"
            )
        train, evaluation = cut_by_person(splits[train_split], eval_fraction, seed)
        cut = f"{eval_fraction:.0%} of the persons of {train_split}, chosen with seed {seed}"
        return Splits(data, train, evaluation, train_split, name, cut)
    if eval_split is None:
        eval_split = next((name for name in _EVALUATION_SPLITS if name in splits and name != train_split), "test")
    require_split(source, splits, eval_split, "eval_split")
    _require_other_persons(source, splits, train_split, eval_split)
    return Splits(data, splits[train_split], splits[eval_split], train_split, eval_split)


def require_split(source: DataSource, splits: datasets.DatasetDict, name: str, option: str) -> None:
    """Checks that a data set has a split.

    Raises:
        ValueError: it has none of this name; the message says which it has, and that `option` names another one.
    """
    if name not in splits:
        raise ValueError(f"{source} has no {name} split, only {', '.join(splits)}; {option} names another one")


def _require_other_persons(source: DataSource, splits: datasets.DatasetDict, train: str, evaluation: str) -> None:
    if train == evaluation:
        raise ValueError(
            f"train_split and eval_split are both {train}: the model would be scored on what it has learnt"
        )
    persons, others = person_column(splits[train]), person_column(splits[evaluation])
    common = sorted(set(persons.tolist()) & set(others.tolist()))
    if common:
        record = int((others == common[0]).argmax())
        raise ValueError(
            f"{source}: {len(common):,} persons are in the splits {train} and {evaluation}, the first is person_id "
            f"{common[0]}, in {evaluation} record {record}: a person must be in one of them only"
        )


def find_benchmark(split: str, dataset: datasets.Dataset) -> str | None:
    """Returns the name of the benchmark whose published split has the size of this one; `None` if there is none."""
    size = SplitSize.of(person_column(dataset).tolist(), dataset["captions"])
    for builder in (CuhkPedes, IcfgPedes, RstpReid):
        config = builder.BUILDER_CONFIGS[0]
        if config.layout.published_sizes.get(split) == size:
            return config.name
    return None


__all__ = [
    "DEFAULT_EVAL_FRACTION",
    "DataSource",
    "PersonData",
    "Splits",
    "choose_splits",
    "find_benchmark",
    "require_split",
]
