"""The arrays of a user index: names and files, what they were built from, the order of rows.

Shape legend: D token width, U users, N events, K items, R item rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from downstream.token_store import HistoryRow, ItemRow
from pipelines.errors import InputError
from pipelines.features import NEVER_US

Array = npt.NDArray[Any]

FORMAT = 1
META = "meta.json"
KEY_ARRAYS = ("user_ids", "offsets", "event_time_us", "instance_id", "item_id", "request_id")
FIELD_ARRAYS = ("ids", "numbers")
ITEM_ARRAYS = ("item_ids", "item_offsets", "item_available_us", "item_sum", "item_count")


@dataclass(frozen=True, kw_only=True)
class LineMeta:
    """What a compressor line's arrays hold, and their folder below the index."""

    folder: str
    codec: str
    width: int


@dataclass(frozen=True, kw_only=True)
class Meta:
    """What an index was built from: two indexes with equal meta hold equal arrays."""

    domain: str
    side: list[str]
    labels: list[str]
    match: list[str]
    """The side columns whose matches with a candidate are counted."""
    tables: dict[str, int] = field(default_factory=dict)
    """Table name -> the version that was read."""
    days: list[str] | None = None
    """[start, end) of the events; None: all."""
    lines: dict[str, LineMeta] = field(default_factory=dict)
    has_fields: bool = False
    format: int = FORMAT

    @property
    def label_arrays(self) -> list[str]:
        return [f"{kind}_{x}" for x in self.labels for kind in ("label", "label_time_us")]

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
        (folder / META).write_text(json.dumps(asdict(self), indent=1, sort_keys=True))


@dataclass(frozen=True)
class ItemArrays:
    """Item tokens sorted by (item, available): item k owns rows [offsets[k], offsets[k + 1])."""

    item_ids: Array
    """[K] sorted, unique."""
    offsets: Array
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
        item_ids, offsets = segments_of(item_id[order])
        return cls(
            item_ids,
            offsets,
            np.asarray(available_us[order], np.int64),
            np.asarray(decayed_sum[order], np.float32),
            np.asarray(decayed_count[order], np.float32),
        )

    @classmethod
    def none(cls, width: int) -> ItemArrays:
        ids = np.zeros(0, np.int64)
        return cls.of(ids, ids, np.zeros((0, width), np.float32), np.zeros(0, np.float32))


@dataclass(frozen=True)
class LineArrays:
    """Tokens of one compressor line, in the index's row order, and its item tokens."""

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


def load_line(folder: Path) -> LineArrays:
    """A line's arrays from its folder."""
    items = ItemArrays(*(load(folder, name) for name in ITEM_ARRAYS))
    return LineArrays(load(folder, "token"), load(folder, "available_us"), items)


def user_major_order(user_id: Array, event_time_us: Array, instance_id: Array) -> Array:
    """The permutation that sorts rows by (user_id, event_time, instance_id)."""
    return np.lexsort((instance_id, event_time_us, user_id))


def segments_of(sorted_keys: Array) -> tuple[Array, Array]:
    """Unique keys [K] and offsets [K + 1] of sorted keys."""
    keys, counts = np.unique(np.asarray(sorted_keys, np.int64), return_counts=True)
    return keys, np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


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
