"""The arrays of a user index: names and files, what they were built from, the order of rows.

Files of rows only ever grow, and rows that a published generation holds never change. Which rows
those are is said by its segments, files of their own, and by META, which replaces the one before
it in one step: readers of any generation stay undisturbed, and a writer that is killed leaves the
last one as it was.

Shape legend: D token width, N rows of events, R item rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from downstream.segments import Segments
from downstream.token_store import HistoryRow, ItemRow
from pipelines.days import Days
from pipelines.errors import InputError
from pipelines.features import NEVER_US

Array = npt.NDArray[Any]

FORMAT = 2
META = "meta.json"
USERS, ITEMS = "users", "items"
"""Segments of an index, and of a line's item tokens."""
KEY_ARRAYS = ("event_time_us", "instance_id", "item_id", "request_id")
FIELD_ARRAYS = ("ids", "numbers")
TOKEN_ARRAYS = ("token", "available_us")
ITEM_ARRAYS = ("item_available_us", "item_sum", "item_count")
ITEM_DAY = "item_day"
"""Days since 1970 that item tokens are of: for who writes the index, not for who reads it."""


@dataclass(frozen=True, kw_only=True)
class LineMeta:
    """What a compressor line's arrays hold, and their folder below the index."""

    folder: str
    codec: str
    width: int
    item_base: int = 0
    item_rows: int = 0
    """As `Meta.base` and `Meta.num_rows`."""


@dataclass(frozen=True, kw_only=True)
class Meta:
    """What an index was built from, and how far its files hold it."""

    domain: str
    side: list[str]
    labels: list[str]
    match: list[str]
    """The side columns whose matches with a candidate are counted."""
    tables: dict[str, int] = field(default_factory=dict)
    """Table name -> the version that was read."""
    ids: dict[str, str] = field(default_factory=dict)
    """Table name -> its id in Delta: another one is another table."""
    days: list[str] | None = None
    """[start, end) of the events; None: all."""
    lines: dict[str, LineMeta] = field(default_factory=dict)
    has_fields: bool = False
    fields: list[str] = field(default_factory=list)
    """What each column of the logged fields' ids, and then of their numbers, is of."""
    of_some_users: bool = False
    """It was asked for a few users only, and holds no item tokens."""
    generation: int = 0
    """How often it was extended since it was built as a whole."""
    base: int = 0
    """The first row that came after the whole build."""
    num_rows: int = 0
    """Of event arrays; their files may hold more, which are nobody's."""
    format: int = FORMAT

    @property
    def label_arrays(self) -> list[str]:
        return [f"{kind}_{x}" for x in self.labels for kind in ("label", "label_time_us")]

    @property
    def held_days(self) -> Days | None:
        """Those of the events; None: all."""
        return Days(*map(date.fromisoformat, self.days)) if self.days else None

    def days_with(self, more: Days | None) -> Days | None:
        """The days held and more; None: all."""
        held = self.held_days
        if held is None or more is None:
            return None
        return Days(min(held.start, more.start), max(held.end, more.end))

    @classmethod
    def read(cls, folder: Path) -> Meta:
        if not (folder / META).is_file():
            raise InputError(f"no index in {folder}: it has no {META}; build it first")
        raw = json.loads((folder / META).read_text())
        if raw.get("format") != FORMAT:
            raise InputError(
                f"the index in {folder} has format {raw.get('format')}, needed {FORMAT}; "
                "build it again"
            )
        lines = {name: LineMeta(**spec) for name, spec in raw.pop("lines").items()}
        return cls(**raw, lines=lines)

    def write(self, folder: Path) -> None:
        """From now on the index is what this says."""
        part = folder / f".{META}.{os.getpid()}"
        part.write_text(json.dumps(asdict(self), indent=1, sort_keys=True))
        part.replace(folder / META)


@dataclass(frozen=True)
class ItemArrays:
    """Item tokens: which rows are whose, an item's in order of available_us."""

    segments: Segments
    available_us: Array
    """[R]"""
    decayed_sum: Array
    """[R, D] float32."""
    decayed_count: Array
    """[R] float32."""

    @classmethod
    def of(
        cls, item_id: Array, available_us: Array, decayed_sum: Array, decayed_count: Array
    ) -> ItemArrays:
        """From item rows [R] in any order."""
        order = np.lexsort((available_us, item_id))
        return cls(
            Segments.of_sorted(item_id[order]),
            np.asarray(available_us[order], np.int64),
            np.asarray(decayed_sum[order], np.float32),
            np.asarray(decayed_count[order], np.float32),
        )

    @classmethod
    def none(cls, width: int) -> ItemArrays:
        ids = np.zeros(0, np.int64)
        return cls.of(ids, ids, np.zeros((0, width), np.float32), np.zeros(0, np.float32))

    def compacted(self) -> ItemArrays:
        """The same rows and no others, item by item."""
        held = self.segments
        if not len(held.pages) and held.total == len(self.available_us):
            return self
        rows, segments = held.rows(), Segments.of(held.key, held.count)
        return ItemArrays(
            segments, self.available_us[rows], self.decayed_sum[rows], self.decayed_count[rows]
        )


@dataclass(frozen=True)
class LineArrays:
    """Tokens of one compressor line, in the index's rows, and its item tokens."""

    token: Array
    """[N, D]; 0 where there is none."""
    available_us: Array
    """[N]; NEVER_US where there is no token."""
    items: ItemArrays

    @classmethod
    def none(cls, num_rows: int) -> LineArrays:
        """Histories without tokens: width 0."""
        token = np.zeros((num_rows, 0), np.float16)
        return cls(token, np.full(num_rows, NEVER_US), ItemArrays.none(0))


def load(folder: Path, name: str) -> Array:
    """One array of an index, memory-mapped."""
    path = folder / f"{name}.npy"
    try:
        # Copy-on-write rather than read-only: torch warns of tensors over read-only memory.
        return np.asarray(np.load(path, mmap_mode="c", allow_pickle=False))
    except (ValueError, EOFError):
        try:  # an empty array cannot be mapped
            return np.asarray(np.load(path, allow_pickle=False))
        except (ValueError, EOFError) as error:
            raise InputError(
                f"{path} is no array of numbers ({error}) and is not read: whatever would run code "
                "is refused. Build what is in its folder again"
            ) from error


def load_line(folder: Path, meta: Meta, name: str) -> LineArrays:
    """A line's arrays of the generation that `meta` says."""
    spec = meta.lines[name]
    of = folder / spec.folder
    token, available_us = (load(of, name)[: meta.num_rows] for name in TOKEN_ARRAYS)
    items = (load(of, name)[: spec.item_rows] for name in ITEM_ARRAYS)
    segments = load_segments(of, ITEMS, meta.generation, spec.item_base)
    return LineArrays(token, available_us, ItemArrays(segments, *items))


def load_segments(folder: Path, name: str, generation: int, base: int) -> Segments:
    """Segments of one generation of an index."""
    table, pages = (load(folder, f"{name}.{part}.{generation}") for part in ("keys", "pages"))
    return Segments.of_table(table, pages, base)


def save_segments(folder: Path, name: str, generation: int, segments: Segments) -> None:
    """The inverse of `load_segments`; nobody reads it before META says so."""
    np.save(folder / f"{name}.keys.{generation}.npy", segments.table)
    np.save(folder / f"{name}.pages.{generation}.npy", segments.pages)


def user_major_order(user_id: Array, event_time_us: Array, instance_id: Array) -> Array:
    """The permutation that sorts rows by (user_id, event_time, instance_id)."""
    return np.lexsort((instance_id, event_time_us, user_id))


def histories_of(
    rows: Sequence[HistoryRow], side: Sequence[str], labels: Sequence[str]
) -> dict[str, Any]:
    """Sorted rows as the history arguments of UserIndex.from_arrays."""

    def ints(name: str) -> Array:
        return np.array([getattr(row, name) for row in rows], np.int64)

    columns: dict[str, Any] = {
        name: ints(name) for name in ("user_id", "event_time_us", "item_id", "instance_id")
    }
    columns["side"] = {n: np.array([r.side.get(n, 0) for r in rows], np.int32) for n in side}
    columns["labels"] = {}
    for name in labels:
        known = [row.labels.get(name, (None, NEVER_US)) for row in rows]
        columns["labels"][name] = (
            np.array([-1 if value is None else value for value, _ in known], np.int8),
            np.array([time_us for _, time_us in known], np.int64),
        )
    return columns


def line_of(rows: Sequence[HistoryRow], items: Iterable[ItemRow], width: int) -> LineArrays:
    """The tokens of sorted rows, as float16, and item rows."""
    zero, held = [0.0] * width, list(items)
    return LineArrays(
        np.array([zero if r.token is None else r.token for r in rows], np.float16).reshape(
            -1, width
        ),
        np.array([NEVER_US if r.token is None else r.available_us for r in rows], np.int64),
        ItemArrays.of(
            np.array([r.item_id for r in held], np.int64),
            np.array([r.available_us for r in held], np.int64),
            np.array([r.decayed_sum for r in held], np.float32).reshape(-1, width),
            np.array([r.decayed_count for r in held], np.float32),
        ),
    )
