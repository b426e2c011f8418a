"""A recommender that answers many at once: concurrent requests in one batch, and a new model without a pause."""

from __future__ import annotations

import asyncio
import collections
import io
import itertools
import json
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import polars as pl
from PIL import Image, ImageOps

from nqf.fields.image import open_picture
from nqf.serving.index import Kind
from nqf.serving.recommender import Recommender
from nqf.serving.requests import Change, Explain, Lookup, Recommend, Remove, Search, Similar
from nqf.stages.graph import served

T = TypeVar("T")

LARGEST_BATCH = 64
"""Requests that are answered by one call at most."""
WAITING = 1_024
"""Requests that may wait; beyond, they are refused at once."""
_SIDE = 320
_log = logging.getLogger("nqf.serve")


class Busy(RuntimeError):
    """Too many requests wait."""


class Service:
    """Answers requests by a run, in threads of its own, so that none waits for more than those before it.

    Attributes:
      recommender: The one that answers now.
      failed: Whether the run has changed into something that cannot be loaded; the one before continues answering.
      ended: Set when the service ends.
      batches: Number of requests to how often so many were answered by one call.
    """

    def __init__(self, folder: Path, *, stage: str = "joint", writable: bool = True, index: Kind = "exact") -> None:
        self.folder, self.stage, self.writable = folder, stage, writable
        self.index: Kind = index
        self.recommender = Recommender.load(folder, stage=stage, index=index)
        self.failed = False
        # A program that is being compiled when the process ends would take it down with a fault.
        self.ended = threading.Event()
        self.batches: collections.Counter[int] = collections.Counter()
        self._stages = served(self.stage, self.folder)
        self._seen = self._version()
        self._waiting: collections.deque[tuple[Recommend, asyncio.Future]] = collections.deque()
        self._wake: asyncio.Event | None = None
        # One computes recommendations and one all that may take longer, so that neither waits for the other.
        self._fast, self._slow = ThreadPoolExecutor(1, "fast"), ThreadPoolExecutor(1, "slow")

    def warm(self) -> None:
        """Compiles what single requests need, and in a thread of its own what many at a time do."""
        _warm(self.recommender, 1)
        threading.Thread(target=_warm, args=(self.recommender, 8, LARGEST_BATCH), kwargs={"ended": self.ended}).start()

    def _version(self) -> list[tuple[str, int]]:
        paths = [self.folder / stage.name / "stage.json" for stage in self._stages]
        paths.append(self.folder / "items" / "items.json")
        return [(str(path), path.stat().st_mtime_ns) for path in paths if path.is_file()]

    async def watch(self, seconds: float) -> None:
        """Loads the run again whenever it has changed; who is being answered keeps the recommender that began it."""
        while True:
            await asyncio.sleep(seconds)
            if self._version() == self._seen:
                continue
            try:
                await self._in(self._slow, self._load_again)
                self.failed = False
            except Exception:
                if not self.failed:
                    _log.exception("the run has changed and cannot be loaded; the one before continues answering")
                self.failed = True

    def _load_again(self) -> None:
        # In the thread of the changes to items, so that none comes between.
        found = self._version()
        # A stage that is being made again has no record: what is loaded is good until there is one.
        if found == self._seen or len(found) < len(self._stages):
            return
        recommender = Recommender.load(self.folder, stage=self.stage, index=self.index)
        # The one before answers until this one need not compile anything.
        _warm(recommender, 1, 8, LARGEST_BATCH, ended=self.ended)
        self.recommender, self._seen, self._stages = recommender, found, served(self.stage, self.folder)
        _log.info("the run has changed and was loaded again")

    async def work(self) -> None:
        """Answers what waits: as many requests by one call as can share it."""
        self._wake = asyncio.Event()
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                group = [self._waiting.popleft()]
                for _ in range(len(self._waiting)):
                    if len(group) == LARGEST_BATCH:
                        break
                    other = self._waiting.popleft()
                    (group if _share(group[0][0]) == _share(other[0]) != "" else self._waiting).append(other)
                await self._in(self._fast, lambda group=group: self._answer(group))

    def _answer(self, group: list[tuple[Recommend, asyncio.Future]]) -> None:
        recommender = self.recommender
        alive = [(request, future) for request, future in group if not future.cancelled()]
        self.batches[len(alive)] += 1
        found: list[Any] = []
        if len(alive) > 1:
            first = alive[0][0]
            one, many = ("user", "users") if first.user is not None else ("history", "histories")
            asked = {many: [getattr(request, one) for request, _ in alive]}
            try:
                frame = recommender.recommend(
                    **asked, **first.filters(), fallback=first.fallback, repeats=first.repeats
                )
                # The same user may have asked twice: the lists are told apart by where each begins.
                begins = [*(frame["rank"] == 1).arg_true(), frame.height]
                if len(begins) == len(alive) + 1:
                    found = [frame[start:end].drop(frame.columns[0]) for start, end in itertools.pairwise(begins)]
            except Exception:
                # One of them cannot be answered; which one is found out by asking for each.
                found = []
        for index, (request, future) in enumerate(alive):
            try:
                answer = found[index] if found else _recommend(recommender, request)
            except Exception as error:
                future.get_loop().call_soon_threadsafe(_settle, future, None, error)
            else:
                future.get_loop().call_soon_threadsafe(_settle, future, (recommender, answer), None)

    async def recommend(self, request: Recommend) -> dict[str, Any]:
        """Lists of the best items.

        Raises:
          Busy: Too many requests wait.
          ValueError: It cannot be answered.
        """
        if len(self._waiting) >= WAITING or self._wake is None:
            raise Busy
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        self._wake.set()
        recommender, frame = await future
        return {"items": self._listed(recommender, frame)}

    async def similar(self, request: Similar) -> dict[str, Any]:
        """Items like one."""
        recommender = self.recommender
        frame = await self._in(self._slow, lambda: recommender.similar_items(request.item_id, **request.filters()))
        return {"items": self._listed(recommender, frame)}

    async def explain(self, request: Explain) -> dict[str, Any]:
        """What speaks for an item after a history."""
        recommender = self.recommender
        found = await self._in(self._slow, lambda: recommender.explain(request.history, request.item_id))
        return {
            "item_id": found.item_id,
            "title": found.title,
            "rank": found.rank,
            "log_probability": found.log_probability,
            "history": found.history.to_dicts(),
            "fields": found.fields.to_dicts(),
        }

    async def lookup(self, request: Lookup) -> dict[str, Any]:
        """Contents of items."""
        recommender = self.recommender
        return {"items": await self._in(self._slow, lambda: self._contents(recommender, request.item_ids))}

    async def search(self, request: Search) -> dict[str, Any]:
        """Items by the words of their titles."""
        recommender = self.recommender

        def find() -> dict[str, Any]:
            ids, titles = recommender.item_ids, recommender.titles
            words = request.text.casefold().split()
            rows = [
                row
                for row, (item_id, title) in enumerate(zip(ids, titles, strict=True))
                if recommender.available[row]
                and (item_id.startswith(request.text) or all(word in title.casefold() for word in words))
            ]
            page = rows[request.offset : request.offset + request.limit]
            return {"found": len(rows), "items": self._contents(recommender, [ids[row] for row in page])}

        return await self._in(self._slow, find)

    async def add(self, request: Change) -> dict[str, Any]:
        """Adds items to the run."""
        return await self._change("add_items", request.items)

    async def update(self, request: Change) -> dict[str, Any]:
        """Replaces fields of items."""
        return await self._change("update_items", request.items)

    async def remove(self, request: Remove) -> dict[str, Any]:
        """Takes items out of all recommendations."""
        return await self._change("remove_items", request.item_ids)

    async def _change(self, name: str, what: Any) -> dict[str, Any]:
        pictures = self.recommender.columns("image")
        if name != "remove_items" and any(item.get(column) is not None for item in what for column in pictures):
            # A name of a file is one of this machine, which whoever asks has no business to read.
            raise ValueError("pictures of new items are added with `nqf items`; leave them out here")

        def change() -> dict[str, Any]:
            recommender = self.recommender
            getattr(recommender, name)(what, save=True)
            self._seen = self._version()
            return {"items": int(recommender.available.sum())}

        return await self._in(self._slow, change)

    async def picture(self, item_id: str) -> bytes | None:
        """A small JPEG of an item's first local picture; None if there is none that can be read."""
        recommender = self.recommender

        def draw() -> bytes | None:
            row = recommender.items([item_id]).row(0, named=True)
            for field in recommender.fields("image"):
                path = row[field]
                if not path or "://" in path:
                    continue
                try:
                    with open_picture(path) as image:
                        image.draft("RGB", (2 * _SIDE, 2 * _SIDE))
                        small = ImageOps.exif_transpose(image).convert("RGB")
                        small.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
                        out = io.BytesIO()
                        small.save(out, "JPEG", quality=85)
                        return out.getvalue()
                except Exception as error:
                    # A damaged file may raise anything; the card then has none.
                    _log.debug("picture of %s: %s", item_id, error)
            return None

        return await self._in(self._slow, draw)

    def _listed(self, recommender: Recommender, frame: pl.DataFrame) -> list[dict[str, Any]]:
        marks = recommender.marks(frame["item_id"].to_list())
        return [row | mark for row, mark in zip(frame.to_dicts(), marks, strict=True)]

    def _contents(self, recommender: Recommender, ids: list[str]) -> list[dict[str, Any]]:
        if not ids:
            return []
        pictures = recommender.fields("image")
        frame = recommender.items(ids)
        shown = [name for name in frame.columns if name not in (*pictures, *recommender.fields("vector"))]
        found = []
        for row, mark in zip(frame.iter_rows(named=True), recommender.marks(ids), strict=True):
            picture = any(row[name] and "://" not in row[name] for name in pictures)
            values = {name: row[name] for name in shown if name not in ("item_id", "title") and row[name] is not None}
            found.append(
                {"item_id": row["item_id"], "title": row["title"] or "", "values": values, "picture": picture} | mark
            )
        return found

    async def _in(self, pool: ThreadPoolExecutor, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, call)


def _warm(recommender: Recommender, *sizes: int, ended: threading.Event | None = None) -> None:
    """Compiles the programs of batches of some sizes and of all lengths, until `ended` is set; of several, all."""
    ids = recommender.item_ids
    for size in sizes:
        for length in recommender.lengths:
            if ended is not None and ended.is_set():
                return
            recommender.recommend(histories=[(ids * length)[:length]] * size)
    if len(sizes) > 1:
        # What many at a time do not share with a bare history by itself: one of a known user, or after a change.
        for length in recommender.lengths:
            if ended is None or not ended.is_set():
                recommender.encode_users([(ids * length)[:length]])


def _settle(future: asyncio.Future, answer: Any, error: Exception | None) -> None:
    # Who asked may have gone.
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(answer)


def _share(request: Recommend) -> str:
    """Requests with the same of this, unless it is empty, can be answered by one call."""
    if (
        request.users is not None
        or request.histories is not None
        or (request.user is None) == (request.history is None)
    ):
        return ""
    if request.times is not None or request.ratings is not None or request.reviews is not None:
        return ""
    kind = "user" if request.user is not None else "history"
    return kind + json.dumps(request.model_dump(exclude={"user", "history"}), sort_keys=True)


def _recommend(recommender: Recommender, request: Recommend) -> pl.DataFrame:
    names = ("history", "histories", "user", "users", "fallback", "repeats", "times", "ratings", "reviews")
    return recommender.recommend(**{name: getattr(request, name) for name in names}, **request.filters())
