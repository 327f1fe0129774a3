"""What the web page asks, and how its answers look: queries, links, HTML and CSV. Nothing here knows Gradio.

Every text that comes from outside is escaped before it becomes HTML.
"""

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from html import escape
from pathlib import PurePath
from typing import Any, Literal
from urllib.parse import parse_qsl, urlencode

from .columns import Where, parse
from .export import defuse
from .gallery import LONGEST_QUERY, LONGEST_TOP_K, Match, choose_cut_off

_LONGEST_TEXT, _LONGEST_LIST = 256, 100
_TEXTS = ("sentence", "negative", "picture", "start", "stop", "group_by", "order")
_LISTS = ("cameras", "like", "unlike")
# The parts of the timeline.
_BINS, _MOST_ROWS = 24, 12
# Number of results that the link of a page saves.
_EXPORTED = 1_000


@dataclass(frozen=True)
class Query:
    """A search, as the page, a link and the REST API describe it.

    Args:
        sentence: describes a person.
        negative: describes what the person must not look like.
        picture: key of an uploaded picture.
        cameras: only pictures of these cameras; empty: of all.
        start, stop: only pictures with `start <= time < stop`, as ISO text, in UTC if it names no zone.
        columns: only pictures with these values of the gallery's own columns.
        group_by: `tracklet` or another column: only the best picture of each group.
        order: `score` or `time`.
        min_score: only pictures with at least this score.
        top_k, offset: number of results, and of better ones that are left out.
        like, unlike: ids of results that look like the person, and of those that do not.
    """

    sentence: str = ""
    negative: str = ""
    picture: str = ""
    cameras: tuple[str, ...] = ()
    start: str = ""
    stop: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)
    group_by: str = ""
    order: Literal["score", "time"] = "score"
    min_score: float | None = None
    top_k: int = 20
    offset: int = 0
    like: tuple[str, ...] = ()
    unlike: tuple[str, ...] = ()

    @property
    def is_empty(self) -> bool:
        return not (self.sentence or self.picture)


def parse_query(values: Mapping[str, Any]) -> Query:
    """Makes a query of named values; `None` and missing ones get their default.

    Raises:
        ValueError: a name is unknown, or a value is of the wrong type or too long. The message names it.
    """
    known = [each.name for each in fields(Query)]
    parsed: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"unknown field {name[:80]!r}: the fields of a query are {', '.join(known)}")
        if value is not None:
            parsed[name] = _parse_value(name, value)
    return Query(**parsed)


def _parse_value(name: str, value: Any) -> Any:
    if name in _TEXTS:
        return _parse_text(name, value)
    if name in _LISTS:
        if not isinstance(value, (list, tuple)) or len(value) > _LONGEST_LIST:
            raise ValueError(f"{name} must be a list of at most {_LONGEST_LIST} texts")
        texts = tuple(_parse_text(name, each) for each in value)
        if name != "cameras" and not all(re.fullmatch("[0-9a-f]{64}", text) for text in texts):
            raise ValueError(f"{name} must be a list of ids of results, which have 64 hexadecimal digits")
        return texts
    if name == "columns":
        if not isinstance(value, Mapping) or len(value) > _LONGEST_LIST:
            raise ValueError("columns must be an object of names and values")
        wrong = [key for key, each in value.items() if not isinstance(each, (str, int, float, bool))]
        if wrong:
            raise ValueError(f"the value of column {str(wrong[0])[:80]!r} must be a text, a number or a truth value")
        return {str(key): _parse_text(str(key), each) if isinstance(each, str) else each for key, each in value.items()}
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if name == "min_score":
        if not is_number or not -1 <= value <= 1:
            raise ValueError(f"min_score is {str(value)[:80]!r}, it must be a number from -1 to 1")
        return float(value)
    lowest = 1 if name == "top_k" else 0
    if not is_number or not math.isfinite(value) or value != int(value) or not lowest <= value <= LONGEST_TOP_K:
        raise ValueError(f"{name} is {str(value)[:80]!r}, it must be a whole number from {lowest} to {LONGEST_TOP_K:,}")
    return int(value)


def parse_number(name: str, text: str) -> float:
    """Reads a finite number.

    Raises:
        ValueError: the text is none.
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} is {text[:80]!r}, it must be a number")
    return number


def _parse_text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text, not {str(value)[:80]!r}")
    longest = LONGEST_QUERY if name in ("sentence", "negative") else _LONGEST_TEXT
    if len(value) > longest:
        raise ValueError(f"{name} has {len(value):,} characters, at most {longest:,} are read")
    return value.strip()


def to_link(query: Query, keep_picture: bool = False) -> str:
    """Writes a query as the part of a URL after the question mark, without defaults.

    Args:
        query: the query.
        keep_picture: whether the link names the uploaded picture, which the server keeps for some minutes only.
    """
    pairs: list[tuple[str, Any]] = []
    for each in fields(Query):
        value = getattr(query, each.name)
        if value is None or value == each.default or (each.name == "picture" and not keep_picture):
            continue
        if each.name in _LISTS:
            pairs += [(each.name, text) for text in value]
        elif each.name == "columns":
            pairs += [(f"column.{name}", str(text)) for name, text in value.items()]
        else:
            pairs.append((each.name, value))
    return urlencode(pairs)


def parse_link(text: str) -> Query:
    """Reads what [`to_link`] has written. Names that start with two underscores are Gradio's own.

    Raises:
        ValueError: as in [`parse_query`].
    """
    values: dict[str, Any] = {}
    for name, value in parse_qsl(text[:20_000], keep_blank_values=True):
        if name in _LISTS:
            values.setdefault(name, []).append(value)
        elif name.startswith("column."):
            values.setdefault("columns", {})[name.removeprefix("column.")] = value
        elif name in ("min_score", "top_k", "offset"):
            values[name] = parse_number(name, value)
        elif not name.startswith("__"):
            values[name] = value
    return parse_query(values)


def to_where(query: Query, column_types: Mapping[str, str]) -> Where:
    """Makes the filter of a query. The values of a link are texts: they get the type of their column.

    Raises:
        ValueError: a text is not a value of the type of its column.
    """
    columns = {
        name: parse(name, value, column_types.get(name, "str")) if isinstance(value, str) else value
        for name, value in query.columns.items()
    }
    return Where(camera=query.cameras, start=query.start or None, stop=query.stop or None, columns=columns)


# --- results as data ---


def to_json(match: Match) -> dict[str, Any]:
    """Describes a result: its id, score and columns; of its path only the last part, as folders can name people."""
    columns = {name: _plain(value) for name, value in match.columns.items()}
    return {"id": match.id, "score": round(match.score, 6), "name": name_of(match), **columns}


def to_csv(matches: Iterable[Match]) -> str:
    rows = [{"rank": rank, **to_json(match)} for rank, match in enumerate(matches, start=1)]
    names = dict.fromkeys(name for row in rows for name in row) or ["rank", "id", "score", "name"]
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(defuse(name) for name in names)
    writer.writerows([defuse(row.get(name, "")) for name in names] for row in rows)
    return file.getvalue()


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value


def name_of(match: Match) -> str:
    return PurePath(match.path).name


def _show_time(time: datetime | None) -> str:
    return f"{time:%Y-%m-%d %H:%M:%S} UTC" if time else ""


def _describe(match: Match, rank: int) -> str:
    """Describes a result in a few words, for those who do not see it."""
    camera = match.columns.get("camera")
    parts = [
        f"Result {rank}",
        f"score {match.score:.3f}",
        f"camera {camera}" if camera else "",
        _show_time(match.columns.get("time")),
    ]
    return ", ".join(part for part in parts if part)


# --- results as HTML ---


def show_cards(matches: Sequence[Match], query: Query, has_more: bool) -> str:
    """Shows a page of results: crops with buttons, and below them the buttons that turn the page."""
    cards = "".join(_show_card(match, query.offset + row + 1, query) for row, match in enumerate(matches))
    link = escape(to_link(query))
    download = escape(to_link(replace(query, offset=0, top_k=_EXPORTED), keep_picture=True))
    turns = (("back", "Previous page", query.offset > 0), ("on", "Next page", has_more))
    pages = "".join(_button(action, text) for action, text, is_shown in turns if is_shown)
    links = (
        f'<a href="?{link}">Link to this search</a><a href="export.csv?{download}" download>Save as CSV</a>'
        if matches
        else ""
    )
    bar = f'<div class="bar">{pages}{links}</div>' if pages or links else ""
    return f'<ol class="cards" start="{query.offset + 1}">{cards}</ol>{bar}' if cards else bar


def _show_card(match: Match, rank: int, query: Query) -> str:
    text = escape(_describe(match, rank))
    size = "".join(
        f' {name}="{match.columns[name]:d}"' for name in ("width", "height") if isinstance(match.columns.get(name), int)
    )
    lines = "".join(
        f"<span>{escape(str(line))}</span>"
        for line in (match.columns.get("camera"), _show_time(match.columns.get("time")))
        if line
    )
    chosen = {"like": match.id in query.like, "unlike": match.id in query.unlike}
    buttons = _button("explain", "Details", match.id) + "".join(
        _button(action, words, match.id, chosen[action])
        for action, words in (("like", "More like this"), ("unlike", "Less like this"))
    )
    return (
        f'<li><img src="crop/{escape(match.id)}" alt="{text}" loading="lazy"{size}>'
        f'<p><strong>{rank}</strong><span class="score">{match.score:.3f}</span>{lines}</p>'
        f'<div role="group" aria-label="{text}">{buttons}</div></li>'
    )


def _button(action: str, text: str, id: str = "", is_pressed: bool | None = None) -> str:
    pressed = "" if is_pressed is None else f' aria-pressed="{str(is_pressed).lower()}"'
    return f'<button type="button" data-action="{action}" data-id="{escape(id)}"{pressed}>{escape(text)}</button>'


def show_status(query: Query, count: int, has_more: bool, threshold: float | None) -> str:
    """Says in a line what is shown, or why nothing is."""
    settings = escape(_describe_query(query))
    if count:
        more = "" if has_more else " These are all."
        return f"Results {query.offset + 1} to {query.offset + count}{settings}.{more}"
    if query.offset:
        return f"There are no more results{settings}."
    is_plain = not (query.picture or query.negative or query.like or query.unlike)
    least = choose_cut_off(query.min_score, threshold, is_plain)
    if least is not None:
        return f"Nobody fits{settings}: no picture that passes the filters has a score of {least:.3f} or more."
    return f"No picture passes the filters{settings}."


def _describe_query(query: Query) -> str:
    between = f"from {query.start or 'the start'} until {query.stop or 'the end'}"
    parts = [
        f" for “{query.sentence}”" if query.sentence else "",
        " and the picture" if query.picture else "",
        f", not “{query.negative}”" if query.negative else "",
        f", cameras {', '.join(query.cameras)}" if query.cameras else "",
        f", {between}" if query.start or query.stop else "",
        *(f", {name} = {value}" for name, value in query.columns.items()),
        f", with at least {query.min_score:.3f}" if query.min_score is not None else "",
        f", one of each {query.group_by}" if query.group_by else "",
        ", by time" if query.order == "time" else "",
        f", more like {len(query.like)}" if query.like else "",
        f", less like {len(query.unlike)}" if query.unlike else "",
    ]
    return "".join(parts)


def show_timeline(matches: Sequence[Match]) -> str:
    """Shows when each camera saw the results: a row for a camera, a cell for a part of the time."""
    seen = [
        (match.columns.get("camera") or "unknown", match.columns["time"])
        for match in matches
        if match.columns.get("time")
    ]
    if len({time for _, time in seen}) < 2:
        return ""
    first, last = min(time for _, time in seen), max(time for _, time in seen)
    span = (last - first) / _BINS
    counts = Counter((camera, min(_BINS - 1, int((time - first) / span))) for camera, time in seen)
    most = max(counts.values())
    rows = []
    for camera, total in Counter(camera for camera, _ in seen).most_common(_MOST_ROWS):
        cells = "".join(
            f'<i style="opacity:{counts[camera, cell] / most:.2f}" title="{counts[camera, cell]} from '
            f'{first + cell * span:%Y-%m-%d %H:%M:%S}"></i>'
            for cell in range(_BINS)
        )
        busiest = max(range(_BINS), key=lambda cell: counts[camera, cell])
        label = escape(
            f"camera {camera}: {total} results, most of them from {first + busiest * span:%Y-%m-%d %H:%M:%S}"
        )
        rows.append(
            f'<span>{escape(str(camera))}</span><div role="img" aria-label="{label}">{cells}</div><b>{total}</b>'
        )
    return (
        f"<h2>When the best {len(matches)} results were seen</h2>"
        f'<div class="timeline">{"".join(rows)}</div>'
        f'<p class="ends"><span>{first:%Y-%m-%d %H:%M:%S}</span><span>{last:%Y-%m-%d %H:%M:%S} UTC</span></p>'
    )


def show_details(match: Match, sentence: str, words: Sequence[tuple[str, float]]) -> str:
    """Shows one result: its crop, the heat map with a choice of words, and its columns.

    Args:
        match: the result.
        sentence: the sentence that found it; empty if only a picture did.
        words: the words of the sentence, each with its weight, 0 to 1.
    """
    name = escape(name_of(match))
    heat = f"heat/{match.id}?{urlencode({'sentence': sentence})}"
    choices = "".join(
        f'<label><input type="checkbox" name="word" value="{place}" data-word="{escape(word)}"> {escape(word)}'
        f'<meter min="0" max="1" value="{weight:.3f}" title="weight {weight:.2f}">{weight:.2f}</meter></label>'
        for place, (word, weight) in enumerate(words)
    )
    maps = (
        f'<figure><img src="{escape(heat)}" data-heat="{escape(heat)}" alt="Heat map of the whole sentence">'
        "<figcaption>Orange speaks for it, blue against it</figcaption></figure>"
        if words
        else ""
    )
    chooser = (
        "<fieldset><legend>Words of the heat map (none: the whole sentence)</legend>"
        f'<div class="words">{choices}</div></fieldset>'
        if words
        else "<p>A heat map needs a sentence.</p>"
    )
    columns = "".join(
        f"<dt>{escape(str(column))}</dt>"
        f"<dd>{escape(_show_time(value) if isinstance(value, datetime) else str(value))}</dd>"
        for column, value in {"file": name_of(match), **match.columns}.items()
        if value not in ("", None)
    )
    return (
        f'<section aria-label="Details of a result"><h2 tabindex="-1">{name}</h2><div class="pair"><figure>'
        f'<img src="crop/{match.id}" alt="The picture"><figcaption>The picture</figcaption></figure>{maps}</div>'
        f"{chooser}<dl>{columns}</dl>{_button('close', 'Close')}</section>"
    )


# The warnings are at the bottom, where they do not hide the button that searches.
STYLE = """
.eccl button, .eccl a, .eccl label { font: inherit; }
.eccl button { min-height: 2rem; padding: .2rem .6rem; border: 1px solid var(--border-color-primary);
  border-radius: .4rem; background: var(--background-fill-secondary); color: var(--body-text-color); cursor: pointer; }
.eccl button[aria-pressed=true] { background: var(--color-accent); color: white; }
.eccl :focus-visible { outline: 3px solid var(--color-accent); outline-offset: 2px; }
.eccl h2 { margin: .8rem 0 .4rem; font-size: 1.1rem; overflow-wrap: anywhere; }
.eccl .cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr)); gap: .8rem; margin: 0;
  padding: 0; list-style: none; }
.eccl .cards li { display: flex; flex-direction: column; gap: .3rem; padding: .5rem; overflow: hidden;
  border: 1px solid var(--border-color-primary); border-radius: .5rem; }
.eccl .cards img { width: 100%; height: 14rem; object-fit: contain; background: #8882; }
.eccl .cards p { display: flex; flex-wrap: wrap; gap: 0 .6rem; margin: 0; font-size: .85rem; overflow-wrap: anywhere; }
.eccl .cards div { display: flex; flex-direction: column; gap: .25rem; margin-top: auto; font-size: .85rem; }
.eccl .bar { display: flex; flex-wrap: wrap; gap: 1rem; align-items: center; margin: 1rem 0; }
.eccl a { color: var(--link-text-color); text-decoration: underline; }
.eccl .pair { display: flex; flex-wrap: wrap; gap: 1rem; }
.eccl figure { margin: 0; max-width: 100%; }
.eccl .pair img { height: 24rem; max-width: 100%; object-fit: contain; background: #8882; }
.eccl fieldset { margin: .8rem 0; padding: .5rem; border: 1px solid var(--border-color-primary); min-width: 0; }
.eccl .words { display: flex; flex-wrap: wrap; gap: .4rem .8rem; }
.eccl .words label { overflow-wrap: anywhere; cursor: pointer; }
.eccl input[type=checkbox] { appearance: auto; width: 1rem; height: 1rem; margin: 0 .3rem 0 0; }
.eccl meter { display: block; width: 5rem; }
.eccl dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .8rem; font-size: .85rem; }
.eccl dd { margin: 0; overflow-wrap: anywhere; }
.eccl .timeline { display: grid; grid-template-columns: minmax(3rem, max-content) 1fr max-content; gap: .2rem .5rem;
  align-items: center; }
.eccl .timeline span { max-width: 8rem; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.eccl .timeline div { display: grid; grid-template-columns: repeat(24, 1fr); gap: 1px; height: 1.2rem;
  background: #8882; }
.eccl .timeline i { background: var(--color-accent); }
.eccl .ends { display: flex; justify-content: space-between; margin: .2rem 0 0; font-size: .8rem; }
.eccl input[type=file] { max-width: 100%; }
.toast-wrap { top: auto !important; bottom: 1rem; }
"""

__all__ = [
    "STYLE",
    "Query",
    "name_of",
    "parse_link",
    "parse_number",
    "parse_query",
    "show_cards",
    "show_details",
    "show_status",
    "show_timeline",
    "to_csv",
    "to_json",
    "to_link",
    "to_where",
]
