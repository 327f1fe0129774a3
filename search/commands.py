"""Keeps a gallery of pictures of persons, and searches it with sentences.

python -m eccl.search.gallery index photos/ --model DIR
python -m eccl.search.gallery search "a woman in a red coat with a black backpack"

If the first word is an option, the command is search.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.command_line import (
    CommandParser,
    add_data_options,
    add_shared_option,
    at_least,
    command,
    end_launched_process,
    say,
    tell,
)
from ..utils.files import (
    complete_file,
    require_absent,
    require_new_folder,
    require_no_input,
    require_picture_path,
    require_writable_folder,
)

if TYPE_CHECKING:
    from datasets import Dataset

    from ..hub.onnx_encoder import Precision
    from .gallery import Gallery, Match, Where

# More lines than these are only counted.
_MOST_LINES = 20
# Of fewer queries, a share says little.
_FEW_QUERIES = 100
_AGE = re.compile(r"(\d+(?:\.\d+)?)(min|h|d|w)")
_PRECISIONS: "dict[str, Precision]" = {"onnx": "float32", "onnx-int8": "int8"}
_UNITS = {"min": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def add_gallery_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that name a gallery and its model."""
    parser.add_argument(
        "--gallery", default="gallery.db", help="path of the gallery (it ends in .db), or address of a Milvus server"
    )
    parser.add_argument("--name", default="gallery", help="name of the gallery in its store")
    parser.add_argument(
        "--crops", help="folder for pictures that have no file; next to the gallery by default, needed for a server"
    )
    parser.add_argument("--token_env", help="environment variable that holds the token of the server")
    add_shared_option(
        parser,
        "model",
        required=False,
        help="folder or Hub id of a merged model, an adapter, or a plain CLIP (default: the model of the gallery)",
    )


def _add_runtime_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runtime",
        choices=("torch", *_PRECISIONS),
        default="torch",
        help="library that encodes pictures and sentences: torch, or onnxruntime in float32 (onnx) or 8 bits "
        "(onnx-int8), for a model in a local folder that eccl-export-onnx has exported to its subfolder onnx",
    )


def open_gallery(
    options: argparse.Namespace, create: bool = False, with_model: bool = True, runtime: str = "torch"
) -> "Gallery":
    """Opens the gallery that the options name.

    Args:
        options: with those of [`add_gallery_options`].
        create: makes the gallery if it is missing.
        with_model: loads the model, which encodes pictures and sentences.
        runtime: `torch`, `onnx` or `onnx-int8`: what runs the model.

    Raises:
        ValueError: `--model` is missing for a new gallery, or see [`Gallery.open`].
        OSError: see [`Gallery.open`].
    """
    token = os.environ.get(options.token_env) if options.token_env else None
    if options.token_env and not token:
        raise ValueError(f"--token_env is {options.token_env}, but there is no such environment variable")
    # Imported here, so that --help and a mistake in the arguments answer at once.
    from .processes import Processes
    from .store import VectorStore

    def find_model() -> str:
        try:
            store = VectorStore.open(options.gallery, options.name, token=token, create=False)
        except FileNotFoundError:
            if not create:
                raise
            if options.model is None:
                raise ValueError(f"--model is missing: {options.gallery} is new") from None
            return options.model
        try:
            return options.model or store.properties["model"]
        finally:
            store.close()

    if not with_model:
        from .gallery import Gallery

        return Gallery.open(None, None, options.gallery, options.name, token=token, create=False, crops=options.crops)
    name = Processes().share(find_model)
    say(f"loading {name}")
    from ..hub.loading import load_model
    from ..hub.onnx_encoder import load_onnx
    from .gallery import Gallery

    model, processor = load_model(name) if runtime == "torch" else load_onnx(name, _PRECISIONS[runtime])
    # The next command finds the model by this name.
    model.config._name_or_path = os.path.abspath(name) if os.path.isdir(name) else name
    return Gallery.open(
        model, processor, options.gallery, options.name, token=token, create=create, crops=options.crops
    )


def _add_filter_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--camera", nargs="+", default=(), help="only pictures of these cameras")
    parser.add_argument("--start", help="earliest time, in ISO form; without a time zone it is UTC")
    parser.add_argument("--stop", help="time before which the pictures were taken, in ISO form")
    parser.add_argument(
        "--where",
        nargs="+",
        default=(),
        metavar="COLUMN=VALUE",
        help="only pictures with this value in a column; several values of one column are alternatives",
    )


def _read_filter(options: argparse.Namespace, gallery: "Gallery") -> "Where | None":
    from .columns import Where, parse

    if not (options.camera or options.start or options.stop or options.where):
        return None
    columns: dict[str, list[Any]] = {}
    for text in options.where:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--where has {text!r}, it must be COLUMN=VALUE")
        columns.setdefault(name, []).append(parse(name, value, gallery.columns.get(name, "str")))
    return Where(tuple(options.camera), options.start, options.stop, columns)


def _add_search_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sentence", nargs="?", help="sentence that describes a person; may be left out with --image")
    parser.add_argument("--query", help="the same sentence, as an option")
    add_gallery_options(parser)
    _add_runtime_option(parser)
    parser.add_argument("--images", help="folder to search once with all its subfolders, without a gallery")
    parser.add_argument("--top_k", type=int, default=10, help="largest number of matches, at most 16,384")
    _add_filter_options(parser)
    parser.add_argument("--negative", help="sentence that describes who is not wanted")
    parser.add_argument("--image", help="picture of whom to find; with a sentence, both count")
    parser.add_argument("--group_by", help="column of which each value is shown once, for example tracklet")
    parser.add_argument("--min_score", type=float, help="lowest score of a match (default: the calibrated one)")
    parser.add_argument("--order", choices=("score", "time"), default="score", help="order of the matches")
    parser.add_argument("--offset", type=int, default=0, help="number of best matches to leave out, for the next page")
    parser.add_argument("--like", nargs="+", default=(), metavar="ID", help="matches that show the wanted person")
    parser.add_argument("--unlike", nargs="+", default=(), metavar="ID", help="matches that show somebody else")
    parser.add_argument(
        "--output",
        type=os.path.expanduser,
        help="file to write: .csv for a table, .png or .jpg for a sheet, or a folder",
    )
    parser.add_argument("--json", action="store_true", help="print the matches as JSON, one a line")
    add_shared_option(
        parser,
        "on_bad_image",
        help="with --images: stop at an unreadable image (error), or leave unreadable images out and name them (skip)",
    )
    add_shared_option(parser, "batch_size", help="with --images: number of images encoded at a time")


def _require_output(path: str | None, inputs: Mapping[str, str | None]) -> None:
    if path is None:
        return
    file = Path(path)
    if file.suffix.lower() == ".csv":
        if file.is_dir():
            raise IsADirectoryError(f"{file} is a folder, not a table")
        require_writable_folder(file.parent)
    elif file.suffix:
        require_picture_path(file)
    else:
        require_new_folder(file)
        require_writable_folder(file.parent)
    require_no_input(file, inputs, "--output")


def _search(options: argparse.Namespace) -> None:
    if options.sentence is not None and options.query is not None:
        raise ValueError("the query is given twice, as a sentence and with --query")
    options.query = options.sentence if options.query is None else options.query
    if options.query is not None and not options.query.strip():
        raise ValueError("--query is empty: it must be a sentence")
    if options.query is None and options.image is None:
        raise ValueError("the query is missing: give a sentence, --image, or both")
    from .columns import LONGEST_QUERY
    from .store import LONGEST_ANSWER

    if not 1 <= options.top_k <= LONGEST_ANSWER:
        raise ValueError(f"--top_k is {options.top_k}, it must be at least 1 and at most {LONGEST_ANSWER:,}")
    if options.images is None and options.query is not None and len(options.query) > LONGEST_QUERY:
        raise ValueError(f"the query has {len(options.query):,} characters, at most {LONGEST_QUERY:,} are allowed")
    if options.images is not None:
        _search_folder(options)
        return
    _require_output(options.output, {"--model": options.model, "--image": options.image})
    _refuse_unused(options, "--images", on_bad_image="error", batch_size=64)
    with open_gallery(options, runtime=options.runtime) as gallery:
        where = _read_filter(options, gallery)
        matches = gallery.refine(
            options.query,
            options.like,
            options.unlike,
            options.top_k,
            where,
            negative=options.negative,
            image=options.image,
            group_by=options.group_by,
            min_score=options.min_score,
            order=options.order,
            offset=options.offset,
        )
        if options.json:
            for match in matches:
                tell(json.dumps(asdict(match), default=datetime.isoformat))
        else:
            _tell_matches(matches, options, gallery, where)
        if options.output:
            gallery.export(options.output, matches)
            say(f"written: {options.output}")


def _search_folder(options: argparse.Namespace) -> None:
    """Searches the images of a folder once: they are encoded, and forgotten at the end."""
    _refuse_unused(
        options, "a gallery, not to --images",
        **{"gallery": "gallery.db", "name": "gallery", "crops": None, "token_env": None, "camera": (), "start": None},
        **{"stop": None, "where": (), "negative": None, "image": None, "group_by": None, "min_score": None},
        **{"order": "score", "offset": 0, "like": (), "unlike": (), "json": False, "runtime": "torch"},
    )  # fmt: skip
    if options.model is None:
        raise ValueError("--model is missing: --images has no gallery that names a model")
    output = Path(options.output) if options.output else None
    if output:
        require_picture_path(output)
        require_no_input(output, {"--model": options.model}, "--output")
        if output.resolve().is_relative_to(Path(options.images).resolve()):
            raise ValueError(f"--output is {output}, inside the folder of --images: the next search would find it")
    say(f"loading {options.model}")
    from ..hub.loading import load_model
    from ..pipeline_eccl import TextToPersonRetrievalPipeline
    from ..processing_eccl import list_images
    from ..utils.sheets import draw_ranked_images

    paths = list_images(options.images)
    model, processor = load_model(options.model)
    search = TextToPersonRetrievalPipeline(model=model, processor=processor, device=model.device)
    search.index(paths, batch_size=options.batch_size, on_bad_image=options.on_bad_image)
    for line in search.skipped:
        say(f"skipped {line}")
    # A list of sentences gives a list of results for each.
    (found,) = search([options.query], top_k=options.top_k)
    tell(f'"{options.query}" among {len(search.paths)} images:')
    for rank, match in enumerate(found, start=1):
        tell(f"{rank:3}  {match['score']:.3f}  {match['path']}")
    if output:
        with complete_file(output) as unfinished:
            draw_ranked_images([(options.query, [(Path(match["path"]), None) for match in found])]).save(unfinished)
        tell(f"picture: {output}")


def _tell_matches(
    matches: "list[Match]", options: argparse.Namespace, gallery: "Gallery", where: "Where | None"
) -> None:
    from .gallery import choose_cut_off

    tell(f'"{options.query or options.image}" among {len(gallery):,} images:')
    if not matches:
        is_plain = not (options.image or options.negative or options.like or options.unlike)
        lowest = choose_cut_off(options.min_score, gallery.threshold, is_plain)
        if where is not None and not gallery.count(where):
            tell("no picture passes the filter")
        elif options.offset:
            tell("there are no more matches")
        else:
            tell("nobody fits" + ("" if lowest is None else f": no picture has a score of {lowest:.3f} or more"))
    for rank, match in enumerate(matches, start=1 + options.offset):
        time = match.columns["time"]
        seen = [match.columns["camera"], time and f"{time:%Y-%m-%d %H:%M:%S}"]
        tell("  ".join([f"{rank:3}", f"{match.score:.3f}", _shorten(match.path) or match.id, *filter(None, seen)]))


def _shorten(path: str) -> str:
    """Writes a path below the current folder as a relative one."""
    return path.removeprefix(os.path.join(os.getcwd(), ""))


def _add_index_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sources",
        nargs="*",
        help="folders, globs, picture files, or lists (.txt, .csv, .tsv, .json, .jsonl, .parquet) of pictures",
    )
    add_gallery_options(parser)
    _add_runtime_option(parser)
    parser.add_argument(
        "--pattern",
        help="columns in the path of a picture, for example 'cam{camera}/{time:%%Y%%m%%d_%%H%%M%%S}_*.jpg'",
    )
    parser.add_argument("--metadata", help="table (.csv) with the paths of pictures and columns: camera, time, others")
    parser.add_argument(
        "--dataset_name", help="data set to index, as for training: a name, a folder, a file or a Hub id"
    )
    add_shared_option(parser, "data_dir", required=False)
    parser.add_argument("--split", help="split of the data set to index (default: all splits)")
    parser.add_argument(
        "--keep_columns", nargs="+", default=(), help="columns of the data set to keep with its pictures"
    )
    add_data_options(parser)
    parser.add_argument("--video", nargs="+", default=(), metavar="FILE|URL", help="videos in which to find people")
    parser.add_argument("--detector", default="hog", help="hog, or a Hub id of an object-detection model")
    parser.add_argument("--camera", help="name of the camera of all pictures")
    parser.add_argument(
        "--start", help="time of the first frame of a video, in ISO form; without a time zone it is UTC"
    )
    parser.add_argument(
        "--every", type=at_least(1), help="search every Nth frame of a video (default: about five frames a second)"
    )
    parser.add_argument("--interval", type=float, default=1.0, help="seconds of a tracklet from which one crop is kept")
    parser.add_argument("--min_detection", type=float, default=0.5, help="lowest score of a detected person")
    add_shared_option(parser, "batch_size")


def _index(options: argparse.Namespace) -> None:
    kinds = [bool(options.sources), bool(options.dataset_name), bool(options.video)]
    if sum(kinds) != 1:
        raise ValueError("give either sources, or --dataset_name, or --video: one of them says what to index")
    if len(options.video) > 1 and (options.start or any("://" in video for video in options.video)):
        raise ValueError("give one --video: a start is that of one video, and a stream goes on until it is stopped")
    if not options.video:
        _refuse_unused(options, "--video", detector="hog", start=None, every=None, interval=1.0, min_detection=0.5)
    if not options.sources:
        _refuse_unused(options, "sources", pattern=None, metadata=None)
    if not options.dataset_name:
        names = ("data_dir", "split", "dataset_config", "revision", "columns")
        _refuse_unused(options, "--dataset_name", **dict.fromkeys(names), keep_columns=(), on_bad_caption="error")
        _refuse_unused(options, "--dataset_name", fix_paths=False, follow_links=False)
    from accelerate import PartialState

    from .processes import Processes

    PartialState()
    sets = _list_pictures(options)
    columns = {"camera": options.camera} if options.camera and not options.video else None
    added, known = 0, 0
    skipped: list[str] = []
    changes: list[str] = []
    with open_gallery(options, create=True, runtime=options.runtime) as gallery:
        for pictures in sets:
            report = gallery.add(
                pictures,
                columns=columns,
                batch_size=options.batch_size,
                on_bad_image=options.on_bad_image,
                progress=not options.video,
            )
            added, known, skipped = added + report.added, known + report.known, [*skipped, *report.skipped]
            changes += [f"{report.updated:,} got other columns"] if report.updated else []
            changes += [f"{report.replaced:,} removed because their file has changed"] if report.replaced else []
        for line in skipped:
            say(f"skipped {line}")
        if Processes().rank == 0:
            counts = f"added {added:,}, known {known:,}, skipped {len(skipped):,}"
            tell(f"{', '.join([counts, *changes])}: {len(gallery):,} pictures in {options.gallery}")
    end_launched_process()


def _refuse_unused(options: argparse.Namespace, needed: str, **defaults: Any) -> None:
    """Refuses options that would do nothing."""
    for name, default in defaults.items():
        if getattr(options, name) != default:
            raise ValueError(f"--{name} only applies to {needed}")


def _list_pictures(options: argparse.Namespace) -> list[Iterable[Any]]:
    from .ingest import find_pictures, from_dataset

    if options.sources:
        return [find_pictures(options.sources, options.pattern, options.metadata)]
    if options.dataset_name:
        return [from_dataset(split, options.keep_columns) for split in _load_splits(options)]
    from .columns import read_time, show_time
    from .video import read_video

    start = show_time(read_time(options.start)) if options.start else None
    settings = {"detector": options.detector, "min_score": options.min_detection}
    settings |= {"every": options.every, "interval": options.interval}
    return [read_video(video, options.camera, start, **settings) for video in options.video]


def _load_splits(options: argparse.Namespace) -> "list[Dataset]":
    """Loads the split that the options name, or else all splits of the data set."""
    from ..dataset_scripts.sources import DataSource, require_split

    source = DataSource.of_options(options, options.dataset_name, options.data_dir, "--dataset_name")
    splits = source.load().splits
    if options.split is None:
        return list(splits.values())
    require_split(source, splits, options.split, "--split")
    return [splits[options.split]]


def _info(options: argparse.Namespace) -> None:
    with open_gallery(options, with_model=False) as gallery:
        for name, value in asdict(gallery.info()).items():
            if isinstance(value, dict):
                value = ", ".join(f"{key or 'none'}: {number}" for key, number in value.items())
            elif isinstance(value, int):
                value = f"{value:,}"
            tell(f"{name.replace('_', ' '):14} {'none' if value in (None, '') else value}")


def _add_remove_options(parser: argparse.ArgumentParser) -> None:
    add_gallery_options(parser)
    parser.add_argument("--ids", nargs="+", help="ids of pictures")
    parser.add_argument("--path", help="a file, or a folder with all that is in it")
    _add_filter_options(parser)


def _remove(options: argparse.Namespace) -> None:
    with open_gallery(options, with_model=False) as gallery:
        count = gallery.remove(options.ids, _read_filter(options, gallery), options.path)
        if not count:
            say("warning: no picture of the gallery matches")
        tell(f"removed {count:,} pictures, {len(gallery):,} are left")


def read_age(text: str) -> timedelta | datetime:
    """Reads an age (`30d`, `12h`, `90min`, `2w`) or a moment in ISO form.

    Raises:
        ValueError: it is neither.
    """
    match = _AGE.fullmatch(text.strip())
    if match:
        try:
            return timedelta(**{_UNITS[match[2]]: float(match[1])})
        except OverflowError:
            raise ValueError(f"{text!r} is too long an age") from None
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(
            f"{text!r} is no age: it must be a number with min, h, d or w, such as 30d, or a time in ISO form"
        ) from None


def _expire(options: argparse.Namespace) -> None:
    age = read_age(options.older_than)
    with open_gallery(options, with_model=False) as gallery:
        tell(f"removed {gallery.expire(age):,} pictures, {len(gallery):,} are left")


def _verify(options: argparse.Namespace) -> None:
    with open_gallery(options, runtime=options.runtime) as gallery:
        report = gallery.verify(options.samples)
    faults = {
        "the file is gone": report.missing,
        "the file is another picture now": report.changed,
        "the model makes another vector": report.wrong_vectors,
        "a crop that belongs to no picture": report.spare_crops,
    }
    for fault, ids in faults.items():
        for id in ids[:_MOST_LINES]:
            tell(f"{fault}: {id}")
        if len(ids) > _MOST_LINES:
            tell(f"{fault}: {len(ids) - _MOST_LINES:,} more")
    tell(f"{report.pictures:,} pictures, " + ", ".join(f"{len(ids):,} x {fault}" for fault, ids in faults.items()))
    if not report.is_sound:
        sys.exit(1)


def _add_export_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", help="file to write: .csv for a table, .png or .jpg for a contact sheet, or a folder")
    add_gallery_options(parser)
    _add_filter_options(parser)
    add_shared_option(parser, "overwrite", help="replace a file that exists")


def _export(options: argparse.Namespace) -> None:
    options.output = os.path.expanduser(options.output)
    _require_output(options.output, {"--model": options.model})
    if Path(options.output).suffix:
        require_absent([Path(options.output)], options.overwrite)
    elif options.overwrite:
        raise ValueError("--overwrite only applies to a file: the folder must be new or empty")
    with open_gallery(options, with_model=False) as gallery:
        gallery.export(options.output, where=_read_filter(options, gallery))
    tell(f"written: {options.output}")


def _add_calibrate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset_name", required=True, help="labelled data set, as for training")
    add_shared_option(parser, "data_dir", required=False)
    parser.add_argument("--split", default="val", help="split to measure on")
    add_data_options(parser)
    add_gallery_options(parser)
    _add_runtime_option(parser)
    parser.add_argument("--precision", type=float, default=0.9, help="wanted share of right matches, 0 to 1")
    parser.add_argument("--top_k", type=at_least(1), default=10, help="number of best matches that count")


def _calibrate(options: argparse.Namespace) -> None:
    (split,) = _load_splits(options)
    with open_gallery(options, runtime=options.runtime) as gallery:
        found = gallery.calibrate(split, options.precision, options.top_k)
        size = len(gallery)
    tell(
        f"threshold {found.threshold:.4f}: {100 * found.precision:.1f} % of the matches with this score or more are "
        f"right, and {100 * found.answered:.1f} % of the {found.queries:,} queries have one"
    )
    if found.queries < _FEW_QUERIES:
        say(f"warning: it was measured with {found.queries:,} queries: use {_FEW_QUERIES} or more")
    if size > 2 * found.pictures:
        say(
            f"warning: it was measured among {found.pictures:,} pictures, the gallery has {size:,}: among more "
            "pictures, more wrong ones have a high score"
        )


def _add_expire_options(parser: argparse.ArgumentParser) -> None:
    add_gallery_options(parser)
    parser.add_argument("--older_than", required=True, help="age such as 30d, 12h or 90min, or a time in ISO form")


def _add_verify_options(parser: argparse.ArgumentParser) -> None:
    add_gallery_options(parser)
    _add_runtime_option(parser)
    parser.add_argument("--samples", type=at_least(0), default=32, help="number of pictures that are encoded again")


# The commands: what each does, its options, and its function.
_COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], None]]] = {
    "index": ("add pictures, a data set or a video", _add_index_options, _index),
    "search": ("find pictures with a sentence, a picture, or both", _add_search_options, _search),
    "info": ("show what the gallery contains", add_gallery_options, _info),
    "remove": ("remove pictures, without a trace", _add_remove_options, _remove),
    "expire": ("remove pictures that are too old", _add_expire_options, _expire),
    "verify": ("check that every picture is still there", _add_verify_options, _verify),
    "export": ("write a table, a contact sheet, or the pictures", _add_export_options, _export),
    "calibrate": ("find the score from which a match counts", _add_calibrate_options, _calibrate),
}


def make_parser() -> CommandParser:
    parser = CommandParser("python -m eccl.search.gallery", __doc__)
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", help="what to do", parser_class=_SubParser
    )
    for name, (help, add_options, _) in _COMMANDS.items():
        add_options(commands.add_parser(name, help=help, description=help))
    return parser


class _SubParser(CommandParser):
    """The parser of one of the commands; argparse gives it the name of the program as `prog`."""

    def __init__(self, prog: str, description: str | None = None, **kwargs: Any):
        super().__init__(prog, description, **kwargs)


@command
def main(arguments: list[str]) -> None:
    if arguments and arguments[0].startswith("--") and arguments[0] not in ("--help", "--debug"):
        arguments = ["search", *arguments]
    options = make_parser().parse_args(arguments)
    _COMMANDS[options.command][2](options)


if __name__ == "__main__":
    main()


__all__ = ["add_gallery_options", "main", "make_parser", "open_gallery", "read_age"]
