"""What an index is made of: pinned tables, users and their buckets, files filled by pieces."""

from __future__ import annotations

import fcntl
import io
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
from deltalake import DeltaTable

from downstream.index_arrays import Array
from pipelines import delta
from pipelines.errors import InputError
from pipelines.tables import Table

EVERY = ds.scalar(True)
ROWS_AT_ONCE = 4_000_000
"""Events sorted in memory at a time."""


class Snapshot:
    """A lake's tables, each at the version given or else that it had when first asked for."""

    def __init__(self, lake: str, pinned: Mapping[str, int] | None = None) -> None:
        self.lake = lake
        self.pinned = pinned or {}
        self.opened: dict[str, DeltaTable] = {}

    def open(self, table: Table) -> DeltaTable:
        if table.name not in self.opened:
            self.opened[table.name] = delta.open_table(
                self.lake, table, self.pinned.get(table.name)
            )
        return self.opened[table.name]

    def source(
        self, table: Table, days: delta.AskedDays = None, kept: ds.Expression = EVERY
    ) -> Source:
        """The rows of a table's days that `kept` keeps."""
        return Source(table, self.open(table), days, kept)

    @property
    def versions(self) -> dict[str, int]:
        return {name: opened.version() for name, opened in self.opened.items()}

    @property
    def ids(self) -> dict[str, str]:
        """By which a table is told from another one made under its name."""
        return {name: str(opened.metadata().id) for name, opened in self.opened.items()}


@dataclass(frozen=True)
class Source:
    """Some rows of one table at one version."""

    table: Table
    opened: DeltaTable
    days: delta.AskedDays
    kept: ds.Expression

    def batches(self, columns: list[str]) -> Any:
        """Record batches in an order that is the same each time."""
        return self._scan(columns, self.kept).to_batches()

    def rows(self, columns: list[str], buckets: Array) -> pa.Table:
        kept = self.kept & ds.field("user_bucket").isin(pa.array(buckets))
        return self._scan(columns, kept).to_table()

    def _scan(self, columns: list[str], kept: ds.Expression) -> ds.Scanner:
        return delta.scan(self.opened, self.table, columns, kept, days=self.days)


@dataclass(frozen=True)
class Users:
    """Who is in the histories, in which bucket, and which rows are theirs."""

    user_ids: Array
    offsets: Array
    bucket: Array

    @classmethod
    def read(cls, source: Source) -> Users:
        """One pass over a table's keys: users, their buckets and their numbers of rows."""
        parts: list[Array] = [np.zeros((0, 3), np.int64)]
        for batch in source.batches(["user_id", "user_bucket"]):
            user, first, count = np.unique(
                batch.column("user_id").to_numpy(), return_index=True, return_counts=True
            )
            bucket = batch.column("user_bucket").to_numpy()[first]
            parts.append(np.stack([user, bucket, count], axis=1))
        found = np.concatenate(parts)
        user_ids, first, of = np.unique(found[:, 0], return_index=True, return_inverse=True)
        bucket = found[first, 1]
        if not np.array_equal(bucket[of], found[:, 1]):
            raise InputError(
                f"{source.table.name}: a user is in two buckets, so its days were written with "
                "different numbers of buckets; build the streams of all days again"
            )
        counts = np.zeros(len(user_ids), np.int64)
        np.add.at(counts, of, found[:, 2])
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        return cls(user_ids, offsets, bucket)

    def check_buckets(self, other: Users, name: str) -> None:
        """Refuse a table whose users are in other buckets than here: its rows would be missed."""
        _, here, there = np.intersect1d(
            self.user_ids, other.user_ids, assume_unique=True, return_indices=True
        )
        if not np.array_equal(self.bucket[here], other.bucket[there]):
            raise InputError(
                f"{name} was written with another number of user buckets than the histories; "
                "write it again"
            )

    def groups(self, more: Array | None = None) -> list[Array]:
        """Buckets, theirs and more, in groups of at most about ROWS_AT_ONCE events."""
        buckets = np.union1d(self.bucket, self.bucket if more is None else more)
        per_bucket = np.bincount(
            np.searchsorted(buckets, self.bucket), np.diff(self.offsets), minlength=len(buckets)
        )
        group = np.cumsum(per_bucket) // ROWS_AT_ONCE
        return [buckets[group == g] for g in np.unique(group)]


@dataclass
class Writer:
    """Arrays of a folder that are filled piece by piece."""

    folder: Path
    arrays: dict[str, Array] = field(default_factory=dict)

    def allocate(self, name: str, shape: tuple[int, ...], dtype: Any, fill: Any = 0) -> None:
        """The array's file, its disk space taken at once: a full disk is an error here, not a
        crash at a later write to mapped memory.
        """
        path = self.folder / f"{name}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not math.prod(shape):
            np.save(path, np.zeros(shape, dtype))
            self.arrays[name] = np.zeros(shape, dtype)
            return
        mapped = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        if hasattr(os, "posix_fallocate"):
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        if fill:
            mapped[:] = fill
        self.arrays[name] = mapped

    def grow(self, name: str, num_rows: int) -> None:
        """Open an array that is there, its file made long enough; its rows stay as they are.

        Its header is replaced in one write, after the rows that it tells of are there.
        """
        path = self.folder / f"{name}.npy"
        with path.open("r+b") as file:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            start = file.tell()
            if shape[0] < num_rows:
                row_bytes = math.prod(shape[1:]) * dtype.itemsize
                if row_bytes:
                    new_bytes = (num_rows - shape[0]) * row_bytes
                    os.posix_fallocate(file.fileno(), start + shape[0] * row_bytes, new_bytes)
                shape = (num_rows, *shape[1:])
                header = io.BytesIO()
                described = {
                    "descr": np.lib.format.dtype_to_descr(dtype),
                    "fortran_order": False,
                    "shape": shape,
                }
                np.lib.format.write_array_header_1_0(header, described)
                if header.tell() != start:
                    raise InputError(f"{path} has another header than ours; build the index again")
                os.pwrite(file.fileno(), header.getvalue(), 0)
        is_empty = not math.prod(shape)
        self.arrays[name] = (
            np.zeros(shape, dtype) if is_empty else np.memmap(path, dtype, "r+", start, shape)
        )

    def put(self, name: str, rows: Array, values: Array | int) -> None:
        self.arrays[name][rows] = values

    def copy(self, name: str, rows: Array, to: Array) -> None:
        self.arrays[name][to] = self.arrays[name][rows]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else extends or replaces the index in a folder meanwhile, in this or another process;
    a lock ends with its process."""
    while True:
        held = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(held, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(held), folder.stat()):  # else it was replaced meanwhile
                yield
                return
        finally:
            os.close(held)
