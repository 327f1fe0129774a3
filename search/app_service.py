"""The service behind the web page: searches, heat maps and query pictures, and the routes that give them."""

import io
import json
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, TypeVar

import anyio
from fastapi import FastAPI, Request
from PIL import Image
from starlette.responses import JSONResponse, PlainTextResponse, Response

from ..modeling_eccl import ECCLModel
from ..processing_eccl import read_image
from ..utils.command_line import say
from ..utils.text import printable
from .app_guard import AuditLog, Desk, RateLimiter, RefusedError
from .app_settings import Settings
from .app_views import Query, parse_link, parse_query, to_csv, to_json, to_where
from .explanation import Explanation, draw_explanation, explain
from .gallery import Gallery, Match, by_time

_T = TypeVar("_T")
# The errors that are told to the one who asks.
MISTAKES = (ValueError, KeyError, OSError, RefusedError)
# The page shows no more results at a time; its timeline counts the best of them.
LONGEST_PAGE, _COUNTED = 100, 200
# A crop costs less than a search. A client shows a page of crops for each search.
_COST_OF_CROP = 1 / 50
# Longest sides of the pictures that leave, in pixels.
_CROP_SIDE, _HEAT_HEIGHT = 768, 480
_MOST_EXPLANATIONS = 64
# Formats of uploaded pictures. Pillow reads more; some of them start another program.
_UPLOAD_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
# Query pictures are kept no longer, in seconds, no larger, in pixels a side, and no more of them.
_PICTURE_AGE, _PICTURE_SIDE, _MOST_PICTURES = 900, 1024, 100


class Pictures:
    """Uploaded query pictures, for some minutes and in memory only."""

    def __init__(self, most_pixels: int):
        self._most_pixels = most_pixels
        self._pictures: OrderedDict[str, tuple[float, Image.Image]] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, content: bytes) -> tuple[str, Image.Image]:
        """Keeps a picture; returns its key and the picture, upright RGB.

        Raises:
            ValueError: the content is no picture, or has too many pixels.
        """
        try:
            with Image.open(io.BytesIO(content), formats=_UPLOAD_FORMATS) as header:
                width, height = header.size
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"the file is not a picture in one of the formats {', '.join(_UPLOAD_FORMATS)}") from error
        if width * height > self._most_pixels:
            raise ValueError(f"the picture has {width * height:,} pixels, at most {self._most_pixels:,} are read")
        try:
            picture = read_image(io.BytesIO(content))
        except ValueError as error:
            raise ValueError("the picture is damaged") from error
        picture.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
        key = secrets.token_hex(16)
        with self._lock:
            self._drop_old()
            while len(self._pictures) >= _MOST_PICTURES:
                self._pictures.popitem(last=False)
            self._pictures[key] = (time.monotonic(), picture)
        return key, picture

    def get(self, key: str) -> Image.Image:
        """Returns a picture.

        Raises:
            ValueError: it is not held, or not any more.
        """
        with self._lock:
            self._drop_old()
            if key not in self._pictures:
                raise ValueError("the query picture is not held any more: choose it again")
            return self._pictures[key][1]

    def _drop_old(self) -> None:
        oldest = time.monotonic() - _PICTURE_AGE
        while self._pictures and next(iter(self._pictures.values()))[0] < oldest:
            self._pictures.popitem(last=False)


class SearchService:
    """What the page, its routes and its API have in common: one gallery, shared by all requests.

    Args:
        gallery: an open gallery; the caller closes it.
        settings: the limits.
    """

    def __init__(self, gallery: Gallery, settings: Settings):
        self.gallery, self.settings = gallery, settings
        self.pictures = Pictures(settings.most_pixels)
        self._limiter = RateLimiter(settings.requests_per_minute)
        self._desk = Desk(settings.workers, settings.waiting)
        self._audit = AuditLog(settings.audit_log)
        self._explanations: OrderedDict[tuple[str, str], Explanation] = OrderedDict()

    async def serve(self, client: str, work: Callable[..., _T], *values: Any, cost: float = 1.0) -> _T:
        """Does work in a thread, when it is the client's turn.

        Raises:
            RefusedError: the client asks too often, or too many wait.
        """
        if not self._limiter.take(client, cost):
            raise RefusedError(429, "you ask too often: wait a few seconds, then try again")
        async with self._desk.turn():
            return await anyio.to_thread.run_sync(work, *values)

    def search(self, query: Query, client: str, action: str = "search") -> list[Match]:
        """Finds the pictures that a query asks for.

        Raises:
            ValueError: the query cannot be answered; the message says why.
            OSError: the store does not answer.
        """
        matches = self._find(query)
        self._log(query, client, action, len(matches))
        return matches

    def _log(self, query: Query, client: str, action: str, results: int) -> None:
        hidden = {"picture": bool(query.picture), "like": len(query.like), "unlike": len(query.unlike)}
        asked = {name: value for name, value in (asdict(query) | hidden).items() if value}
        self._audit.write(client, action, query=asked, results=results)

    def _find(self, query: Query) -> list[Match]:
        if query.is_empty:
            raise ValueError("the query is empty: write a sentence, or choose a picture")
        options: dict[str, Any] = {
            "where": to_where(query, self.gallery.columns),
            "negative": query.negative or None,
            "image": self.pictures.get(query.picture) if query.picture else None,
            "group_by": query.group_by or None,
            "min_score": query.min_score,
            "order": query.order,
            "offset": query.offset,
        }
        sentence = query.sentence or None
        if query.like or query.unlike:
            return self.gallery.refine(sentence, query.like, query.unlike, query.top_k, **options)
        return self.gallery.search(sentence, query.top_k, **options)

    def search_page(self, query: Query, client: str) -> tuple[list[Match], bool, list[Match] | None]:
        """Finds the results of a page, whether there are more, and on the first page the best results to count."""
        if query.top_k > LONGEST_PAGE:
            raise ValueError(f"the page shows at most {LONGEST_PAGE} results at a time, not {query.top_k:,}")
        if query.offset:
            found = self.search(query, client)
            return found, len(found) == query.top_k, None
        # The results to count begin with those of the first page.
        counted = self._find(replace(query, top_k=_COUNTED, order="score"))
        found = counted[: query.top_k]
        if query.order == "time":
            found.sort(key=by_time)
        self._log(query, client, "search", len(found))
        return found, len(counted) > len(found), counted

    def explain(self, id: str, sentence: str, client: str) -> tuple[Image.Image, Explanation]:
        """Returns a crop, and how well each word of a sentence fits each part of it.

        Raises:
            KeyError: the gallery has no such picture.
            RefusedError: its file is gone, or has changed.
            ValueError: the sentence is empty or too long; or the gallery was opened with an ONNX export.
        """
        crop = self._read_crop(id)
        self._audit.write(client, "explain", query={"sentence": sentence})
        explanation = self._explanations.get((id, sentence))
        if explanation is None:
            if not isinstance(self.gallery.model, ECCLModel):
                raise ValueError("a heat map needs the model itself: open the gallery without an ONNX export")
            explanation = explain(self.gallery.model, self.gallery.processor, crop, sentence)
            self._explanations[id, sentence] = explanation
            while len(self._explanations) > _MOST_EXPLANATIONS:
                self._explanations.popitem(last=False)
        return crop, explanation

    def describe(self, id: str, sentence: str, client: str) -> tuple[Match, list[tuple[str, float]]]:
        """Returns a result, and the words of a sentence, each with the strongest value of its map, 0 to 1.

        Raises:
            KeyError, RefusedError, ValueError: as in [`explain`].
        """
        match = self.gallery.get([id])[id]
        if not sentence:
            return match, []
        _, explanation = self.explain(id, sentence, client)
        return match, [
            (word, max(0.0, float(part.max())))
            for word, part in zip(explanation.words, explanation.scores, strict=True)
        ]

    def draw_heat(self, id: str, sentence: str, words: str, client: str) -> bytes:
        """Draws the heat map of chosen words, such as `0,3`; without words, of the whole sentence. Returns a JPEG."""
        crop, explanation = self.explain(id, sentence, client)
        try:
            places = [int(place) for place in words.split(",")] if words else []
        except ValueError:
            raise ValueError(f"words is {words[:80]!r}, it must be numbers with commas between them") from None
        scores = explanation.of(places) if places else explanation.overall
        return _to_jpeg(draw_explanation(crop, scores, _HEAT_HEIGHT))

    def _read_crop(self, id: str) -> Image.Image:
        try:
            return self.gallery.read_crop(id)
        except (ValueError, FileNotFoundError):  # The message names the file, which is nobody's business.
            raise RefusedError(410, "the file of this picture is gone, or is another picture now") from None

    def draw_crop(self, id: str) -> bytes:
        """Returns a crop as a new JPEG: without EXIF, place or thumbnail, and not too large."""
        crop = self._read_crop(id)
        crop.thumbnail((_CROP_SIDE, _CROP_SIDE))
        return _to_jpeg(crop)


def _to_jpeg(picture: Image.Image) -> bytes:
    # A new picture has the pixels and nothing else.
    plain = Image.new("RGB", picture.size)
    plain.paste(picture)
    file = io.BytesIO()
    plain.save(file, "JPEG", quality=88)
    return file.getvalue()


def in_words(error: Exception) -> tuple[int, str]:
    """Returns the status and the words for an error; what the store or the disk says stays on this machine."""
    if isinstance(error, RefusedError):
        return error.status, str(error)
    if isinstance(error, KeyError):
        return 404, "there is no such result: it may have been removed"
    if isinstance(error, ValueError):
        return 400, printable(error)
    say(f"the gallery does not answer: {error}")
    return 503, "the gallery does not answer: try again later"


def add_routes(app: FastAPI, service: SearchService) -> None:
    @app.get("/healthz")
    async def healthz() -> Response:
        return PlainTextResponse("ok")

    @app.post("/api/search")
    async def search(request: Request) -> Response:
        try:
            values = json.loads(await request.body())
        except (ValueError, RecursionError):
            raise ValueError("the request is not valid JSON") from None
        if not isinstance(values, dict):
            raise ValueError("the request must be a JSON object")
        client = request.state.client
        matches = await service.serve(client, service.search, parse_query(values), client)
        return JSONResponse({"matches": [to_json(match) for match in matches]})

    @app.post("/api/picture")
    async def picture(request: Request) -> Response:
        key, kept = await service.serve(request.state.client, service.pictures.add, await request.body())
        return JSONResponse({"picture": key, "width": kept.width, "height": kept.height})

    @app.get("/crop/{id}")
    async def crop(id: str, request: Request) -> Response:
        content = await service.serve(request.state.client, service.draw_crop, id, cost=_COST_OF_CROP)
        return Response(content, media_type="image/jpeg")

    @app.get("/heat/{id}")
    async def heat(id: str, request: Request, sentence: str = "", words: str = "") -> Response:
        client = request.state.client
        sentence = parse_query({"sentence": sentence}).sentence
        content = await service.serve(client, service.draw_heat, id, sentence, words, client)
        return Response(content, media_type="image/jpeg")

    @app.get("/export.csv")
    async def export(request: Request) -> Response:
        client, query = request.state.client, parse_link(request.url.query)
        matches = await service.serve(client, service.search, query, client, "export")
        headers = {"Content-Disposition": 'attachment; filename="results.csv"'}
        return Response(to_csv(matches), media_type="text/csv", headers=headers)


__all__ = ["LONGEST_PAGE", "MISTAKES", "Pictures", "SearchService", "add_routes", "in_words"]
