"""Features as data: which id slots and number columns a domain's instances have, and stream rows
as arrays.

Every non-number feature owns `width` id slots (1, or max_length for lists), every number one
column. An id is
a bucket: 0 missing, 1 .. buckets-1 a hashed value. Spark writes the buckets; this module only lays
them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.domain import Domain, Feature

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class FeatureLayout:
    """Slots of some features, in their order in the domain file."""

    features: tuple[Feature, ...]

    @classmethod
    def of(cls, domain: Domain, *, known: str | None = None) -> FeatureLayout:
        """All features of a domain, or those of one moment (`request` or `after`)."""
        return cls(tuple(f for f in domain.features if known in (None, f.known)))

    @property
    def categorical(self) -> tuple[Feature, ...]:
        return tuple(f for f in self.features if not f.is_number)

    @property
    def numbers(self) -> tuple[Feature, ...]:
        return tuple(f for f in self.features if f.is_number)

    @property
    def columns(self) -> list[str]:
        return [f.stream_column for f in self.features]

    @property
    def slots(self) -> dict[str, slice]:
        """Feature name -> its id slots."""
        found, at = {}, 0
        for feature in self.categorical:
            width = feature.max_length if feature.is_list else 1
            found[feature.name] = slice(at, at + width)
            at += width
        return found

    @property
    def num_slots(self) -> int:
        return sum(f.max_length if f.is_list else 1 for f in self.categorical)

    @property
    def slot_tables(self) -> list[str]:
        """The embedding table of each slot."""
        return [
            f.embedding_table
            for f in self.categorical
            for _ in range(f.max_length if f.is_list else 1)
        ]

    @property
    def slot_fields(self) -> list[int]:
        """The categorical field (its index in `categorical`) of each slot."""
        return [
            i
            for i, f in enumerate(self.categorical)
            for _ in range(f.max_length if f.is_list else 1)
        ]


@dataclass(frozen=True, slots=True)
class FeatureArrays:
    """ids [n, num_slots] int32 buckets (0: missing) and numbers [n, num_numbers] float32 (NaN:
    missing)."""

    ids: Ints
    numbers: Floats

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: npt.NDArray[np.intp] | slice) -> FeatureArrays:
        return FeatureArrays(self.ids[rows], self.numbers[rows])


def arrays(rows: pa.Table, layout: FeatureLayout) -> FeatureArrays:
    """Stream rows as arrays in the layout's order."""
    ids = np.zeros((len(rows), layout.num_slots), np.int32)
    for feature in layout.categorical:
        slots = layout.slots[feature.name]
        column = rows.column(feature.stream_column).combine_chunks()
        ids[:, slots] = (
            _padded(column, feature.max_length) if feature.is_list else _ints(column)[:, None]
        )
    numbers = np.full((len(rows), len(layout.numbers)), np.nan, np.float32)
    for i, feature in enumerate(layout.numbers):
        numbers[:, i] = rows.column(feature.stream_column).to_numpy()
    return FeatureArrays(ids, numbers)


def _ints(column: pa.Array) -> Ints:
    return np.asarray(pc.fill_null(column, 0).to_numpy(zero_copy_only=False), np.int32)


def _padded(column: pa.Array, width: int) -> Ints:
    """Lists as a zero-padded matrix; lists longer than `width` keep their last values."""
    lengths = np.asarray(
        pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False), np.int64
    )
    values = _ints(pc.list_flatten(column))
    ends = np.cumsum(lengths)
    kept = np.minimum(lengths, width)
    out = np.zeros((len(lengths), width), np.int32)
    row = np.repeat(np.arange(len(lengths)), kept)
    within = np.arange(kept.sum()) - np.repeat(np.cumsum(kept) - kept, kept)
    out[row, within] = values[np.repeat(ends - kept, kept) + within]
    return out


def times_us(rows: pa.Table | pa.RecordBatch, column: str) -> npt.NDArray[np.int64]:
    """A timestamp column as microseconds since 1970 UTC; null is the far future (never known)."""
    values = pc.fill_null(pc.cast(rows.column(column), pa.int64()), NEVER_US)
    return np.asarray(values.to_numpy(), np.int64)


NEVER_US = 2**62


def concat(parts: Sequence[FeatureArrays]) -> FeatureArrays:
    return FeatureArrays(
        np.concatenate([p.ids for p in parts]), np.concatenate([p.numbers for p in parts])
    )
