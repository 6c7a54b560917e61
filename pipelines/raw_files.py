"""What the files of a raw log hold of each day: which of them a day needs, and whether a day still
is what its instances were made of."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from urllib.parse import urlsplit

import pyarrow as pa

from pipelines import delta, tables
from pipelines.days import Days
from pipelines.domain import Domain


@dataclass(frozen=True)
class RawFiles:
    """What is known of a raw log's files, each opened once."""

    rows: pa.Table
    """Of the table `raw_files`."""

    @property
    def num_events(self) -> int:
        return sum(self.rows["num_events"].to_pylist())

    def days(self, before: date = date.max) -> list[date]:
        """Days with events, in order; those from `before` on are no days of the log."""
        found = {day for day in self.rows["event_date"].to_pylist() if day is not None}
        return sorted(day for day in found if day < before)

    def files_of(self, days: Days, before: date = date.max) -> set[str]:
        """The files with events of these days, or with events of no day at all."""
        files, counts = (self.rows[name].to_pylist() for name in ("file", "num_events"))
        return {
            file
            for file, day, count in zip(files, self._dates(), counts, strict=True)
            if count and (day is None or day in days or day >= before)
        }

    def marks(self, before: date = date.max) -> dict[date, str]:
        """What each day holds, in a few letters: the same events give the same mark, in whatever
        files and order."""
        held: dict[date, tuple[int, Decimal]] = defaultdict(lambda: (0, Decimal(0)))
        counts = self.rows["num_events"].to_pylist()
        contents = self.rows["content"].to_pylist()
        for day, count, content in zip(self._dates(), counts, contents, strict=True):
            if day is not None and day < before:
                held[day] = (held[day][0] + count, held[day][1] + content)
        return {
            day: hashlib.sha256(f"{count} {content}".encode()).hexdigest()[:12]
            for day, (count, content) in held.items()
        }

    def _dates(self) -> list[date | None]:
        found: list[date | None] = self.rows["event_date"].to_pylist()
        return found


def known(lake: str, domain: Domain) -> RawFiles | None:
    """What the last run found; None where none has looked."""
    table = tables.raw_files(domain)
    return RawFiles(delta.read(lake, table)) if delta.exists(lake, table) else None


def named(place: str, path: str) -> str:
    """A file of the log that is at a place: its path below that, with nothing that opens it.

    >>> named("/data/log", "file:/data/log/day=1/part-0.parquet")
    'day=1/part-0.parquet'
    >>> named("/data/log.csv", "file:/data/log.csv")
    'log.csv'
    >>> named("s3a://key:secret@bucket", "s3a://key:secret@bucket/day=1/part-0.parquet")
    'day=1/part-0.parquet'
    >>> named("s3a://bucket/day=*", "s3a://bucket/day=1/part-0.parquet")
    'day=1/part-0.parquet'
    """
    root = urlsplit(place).path if "://" in place else place
    if root and root in path:
        below = path.partition(root)[2].strip("/")
        return below or path.rpartition("/")[2]
    return path.partition("://")[2].partition("/")[2] or path
