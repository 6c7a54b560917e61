"""What an index is made of: pinned tables, users and their buckets, files filled by pieces."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import io
import itertools
import math
import mmap
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
from deltalake import DeltaTable

from downstream.index_arrays import Array
from pipelines import delta
from pipelines.errors import InputError
from pipelines.tables import Table

EVERY = ds.scalar(True)
ROWS_AT_ONCE = 524_288
"""Events in memory at a time, of each of two threads."""
HAS_JEMALLOC = "jemalloc" in pa.supported_memory_backends()
POOL = pa.jemalloc_memory_pool() if HAS_JEMALLOC else pa.default_memory_pool()
"""Of what is read: mimalloc, Arrow's own choice, keeps 100 MB more of what was given back."""
POPULATE_WRITE = 23
"""Linux's MADV_POPULATE_WRITE (5.14), which `mmap` has no name for."""
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
PIECE = 1 << 26
"""Bytes of a file that a thread makes pages of at a time."""


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


class Part(NamedTuple):
    """Which of a table's rows are read together; None: all."""

    buckets: Array | None = None
    day: date | None = None
    users: tuple[int, int] | None = None
    """Smallest and largest user_id."""


ALL = Part()


@dataclass(frozen=True)
class Source:
    """Some rows of one table at one version."""

    table: Table
    opened: DeltaTable
    days: delta.AskedDays
    kept: ds.Expression

    def batches(self, columns: list[str], part: Part = ALL) -> Iterator[pa.RecordBatch]:
        """Record batches of a part in an order that is the same each time, file by file: a scan of
        many files that is given up reads all of them first."""
        files = self.files if part.day is None else self.files_of(part.day)
        for file in files.get_fragments():
            yield from file.to_batches(schema=files.schema, **self._how(columns, part))

    def rows(self, columns: list[str], part: Part) -> pa.Table:
        """Those of a part at once."""
        files = self.files if part.day is None else self.files_of(part.day)
        return files.to_table(**self._how(columns, part))

    @cached_property
    def files(self) -> ds.FileSystemDataset:
        return delta.dataset(self.opened, self.table, self.days)

    def files_of(self, day: date) -> ds.FileSystemDataset:
        """Those of one day; asking the table for each day again would cost more than reading it."""
        files = self.files
        return ds.FileSystemDataset(
            self._by_day.get(day, []), files.schema, files.format, files.filesystem
        )

    @property
    def days_there(self) -> list[date]:
        """Days that have a file, ascending."""
        return sorted(self._by_day)

    @cached_property
    def _by_day(self) -> dict[date, list[ds.Fragment]]:
        found: dict[date, list[ds.Fragment]] = defaultdict(list)
        for fragment in self.files.get_fragments():
            keys = ds.get_partition_keys(fragment.partition_expression)
            found[date.fromisoformat(str(keys["event_date"]))].append(fragment)
        return found

    def _how(self, columns: list[str], part: Part) -> dict[str, Any]:
        """What of a file is read, and how."""
        kept, user = self.kept, ds.field("user_id")
        if part.users is not None:
            kept &= (user >= part.users[0]) & (user <= part.users[1])
        if part.buckets is not None:
            kept &= ds.field("user_bucket").isin(pa.array(part.buckets))
        values = self._projections.get(tuple(columns))
        if values is None:
            values = delta.projection(self.opened, self.table, columns)
            self._projections[tuple(columns)] = values
        # Whoever reads is one of two threads: Arrow's own beside them, and what it reads ahead,
        # take a third longer and several times the memory.
        held = {"use_threads": False, "batch_readahead": 1, "memory_pool": POOL}
        return {"columns": values, "filter": kept, **held}

    @cached_property
    def _projections(self) -> dict[tuple[str, ...], dict[str, ds.Expression]]:
        return {}


@dataclass(frozen=True)
class Users:
    """Who is in the histories, in which bucket, and which rows are theirs."""

    user_ids: Array
    offsets: Array
    bucket: Array
    day_counts: Mapping[date, Array]
    """Rows of each day, ascending, by bucket."""

    @classmethod
    def read(cls, source: Source) -> Users:
        """One pass over a table's keys: users, their buckets and their numbers of rows."""
        days = source.days_there
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda of: cls._count(source, of), (days[::2], days[1::2])))
        user_ids, bucket, count = cls._summed(source.table, *(users for users, _ in found))
        day_counts = dict(sorted(itertools.chain(*(of.items() for _, of in found))))
        return cls(user_ids, np.concatenate([[0], np.cumsum(count)]), bucket, day_counts)

    @classmethod
    def _count(cls, source: Source, days: Sequence[date]) -> tuple[Array, dict[date, Array]]:
        """[3, users] user, bucket, rows of these days; and each day's rows by bucket."""
        found, day_counts = np.zeros((3, 0), np.int64), {}
        runs: list[Array] = []
        for day in days:
            counts: Counter[int] = Counter()
            for batch in source.batches(["user_id", "user_bucket"], Part(day=day)):
                user, bucket = (np.asarray(column) for column in batch.columns)
                counts.update(dict(enumerate(np.bincount(bucket).tolist())))
                first = starts_of_runs(user)
                count = np.diff(first, append=len(user))
                runs.append(np.stack([user[first], bucket[first], count]))
            if counts:
                day_counts[day] = np.array([counts[at] for at in range(max(counts) + 1)])
            if sum(run.shape[1] for run in runs) > max(ROWS_AT_ONCE // 4, found.shape[1]):
                found, runs = cls._summed(source.table, found, *runs), []
        return cls._summed(source.table, found, *runs), day_counts

    @staticmethod
    def _summed(table: Table, *runs: Array) -> Array:
        """[3, users] user, bucket, rows of runs [3, n]."""
        found = np.concatenate(runs, axis=1)
        found = found[:, np.argsort(found[0])]
        first = starts_of_runs(found[0])
        if not len(first):
            return found
        bucket = found[1, first]
        if not np.array_equal(np.repeat(bucket, np.diff(first, append=found.shape[1])), found[1]):
            raise InputError(
                f"{table.name}: a user is in two buckets, so its days were written with "
                "different numbers of buckets; build the streams of all days again"
            )
        return np.stack([found[0, first], bucket, np.add.reduceat(found[2], first)])

    def check_buckets(self, source: Source) -> None:
        """Refuse a table whose users are in other buckets than here: its rows would be missed."""

        def check(day: date) -> None:
            for batch in source.batches(["user_id", "user_bucket"], Part(day=day)):
                user, bucket = (np.asarray(column) for column in batch.columns)
                first = starts_of_runs(user)
                place = np.searchsorted(self.user_ids, user[first]).clip(max=len(self.bucket) - 1)
                is_here = self.user_ids[place] == user[first]
                if not np.array_equal(self.bucket[place[is_here]], bucket[first[is_here]]):
                    raise InputError(
                        f"{source.table.name} was written with another number of user buckets than "
                        "the histories; write it again"
                    )

        if len(self.user_ids):
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(check, source.days_there))

    def groups(self, more: Array) -> list[Part]:
        """Buckets, theirs and more, in groups of at most about ROWS_AT_ONCE events of all days."""
        buckets = np.union1d(self.bucket, more)
        per_bucket = np.bincount(
            np.searchsorted(buckets, self.bucket), np.diff(self.offsets), minlength=len(buckets)
        )
        return [Part(group) for group in _groups(buckets, per_bucket)]

    def passes(self, most: int) -> Iterator[tuple[slice, list[Part]]]:
        """Rows of users who follow one another and have about `most` events, and the parts of all
        days, ascending, that they are in; one part is at most about ROWS_AT_ONCE events."""
        num = -(-int(self.offsets[-1]) // max(1, most))
        cuts = np.searchsorted(self.offsets, np.linspace(0, self.offsets[-1], num + 1))
        for first, end in itertools.pairwise(np.unique(cuts).tolist()):
            users = (int(self.user_ids[first]), int(self.user_ids[end - 1])) if num > 1 else None
            parts = [
                Part(buckets, day, users)
                for day, counts in self.day_counts.items()
                for buckets in self._groups_of(counts)
            ]
            yield slice(int(self.offsets[first]), int(self.offsets[end])), parts

    @staticmethod
    def _groups_of(counts: Array) -> Sequence[Array | None]:
        """A day's buckets, by part; None: all."""
        if counts.sum() <= ROWS_AT_ONCE:
            return [None]
        there = np.flatnonzero(counts)
        return _groups(there, counts[there])


def _groups(buckets: Array, num_rows: Array) -> list[Array]:
    """Buckets in groups of at most ROWS_AT_ONCE rows, or of one bucket."""
    found, total = [0] * min(1, len(buckets)), 0
    for at, num in enumerate(num_rows):
        if total and total + num > ROWS_AT_ONCE:
            found.append(at)
            total = 0
        total += num
    return np.split(buckets, found[1:]) if found else []


def starts_of_runs(sorted_values: Array) -> Array:
    """Where another value than before begins."""
    changes = sorted_values[1:] != sorted_values[:-1]
    return np.flatnonzero(np.concatenate([np.ones(min(1, len(sorted_values)), bool), changes]))


def memory_available() -> int:
    """Bytes that this process may come to use: of the machine, or of its control group."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    found = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, kinds, group = line.split(":", 2)
        if kinds not in ("", "memory"):
            continue
        name = "memory.limit_in_bytes" if kinds else "memory.max"
        root = Path("/sys/fs/cgroup", kinds)
        # A container sees its own group as the root.
        for limit in (root / group.lstrip("/") / name, root / name):
            if limit.is_file() and (text := limit.read_text().strip()).isdigit():
                found = min(found, int(text))
    return found


@dataclass
class Writer:
    """Arrays of a folder that are filled piece by piece."""

    folder: Path
    arrays: dict[str, Array] = field(default_factory=dict)
    fills: dict[str, Any] = field(default_factory=dict)
    """What rows hold until they are put, where that is not 0."""

    def allocate(self, name: str, shape: tuple[int, ...], dtype: Any, fill: Any = 0) -> None:
        """The array's file, whose rows must be reserved before they are put."""
        path = self.folder / f"{name}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        if fill:
            self.fills[name] = fill
        if not math.prod(shape):
            np.save(path, np.zeros(shape, dtype))
            self.arrays[name] = np.zeros(shape, dtype)
            return
        self.arrays[name] = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)

    def reserve(self, names: Iterable[str], rows: slice = slice(None)) -> None:
        """Disk space and memory for rows, taken at once: a full disk is an error here, not a crash
        at a later write to mapped memory, and pages that are made together take a fraction of the
        time of one fault each.
        """
        pieces = []
        for name in names:
            array, path = self.arrays[name], self.folder / f"{name}.npy"
            size, held = array[:1].nbytes, range(*rows.indices(len(array)))
            begin, end = held.start * size, held.stop * size
            pieces += [(path, array, at, min(PIECE, end - at)) for at in range(begin, end, PIECE)]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda piece: _reserve(*piece), pieces))
        for name in names:
            if name in self.fills:
                self.arrays[name][rows] = self.fills[name]

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
        array = self.arrays[name]
        if array.ndim == 2 and isinstance(values, np.ndarray) and array.shape[1]:
            # As one value a row, which is several times faster.
            values = np.ascontiguousarray(values, array.dtype)
            array, values = (
                x.view(f"V{array.dtype.itemsize * array.shape[1]}")[:, 0] for x in (array, values)
            )
        array[rows] = values

    def copy(self, name: str, rows: Array, to: Array) -> None:
        self.arrays[name][to] = self.arrays[name][rows]


def _reserve(path: Path, mapped: np.memmap[Any, Any], at: int, num_bytes: int) -> None:
    """Some bytes of an array that is in a file."""
    address = mapped.ctypes.data + at
    in_page = address % mmap.PAGESIZE
    if not LIBC.madvise(address - in_page, in_page + num_bytes, POPULATE_WRITE):
        return
    if ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    with path.open("r+b") as file:  # a system that can't: its pages come one by one
        os.posix_fallocate(file.fileno(), mapped.offset + at, num_bytes)


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
