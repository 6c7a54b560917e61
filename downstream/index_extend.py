"""A user index extended by what its tables have gained: the days that changed are read, and no
others.

Rows of the changed days leave, and what the tables hold of those days now comes in; see
`segments.grown` for where. All is written where nobody reads yet, and then published at once.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds

from downstream.index_arrays import (
    FIELD_ARRAYS,
    ITEM_ARRAYS,
    ITEM_DAY,
    ITEMS,
    KEY_ARRAYS,
    TOKEN_ARRAYS,
    USERS,
    Array,
    Meta,
    load_segments,
    save_segments,
)
from downstream.index_build import Events, ItemKeys, field_columns, put_fields, put_tokens
from downstream.index_files import Snapshot, Users, Writer, locked
from downstream.segments import Growth, NewRows, Segments, grown
from pipelines import delta, tables
from pipelines.days import Days, as_number
from pipelines.domain import Domain
from pipelines.errors import RetryableError
from pipelines.features import NEVER_US
from pipelines.tables import Table
from pipelines.token_format import TokenFormat

log = logging.getLogger(__name__)

DAY_US = 86_400_000_000
SMALL = 65_536
"""Rows: this few are never too many to be wasted, or to come in at once."""


class NotExtendableError(Exception):
    """The index has to be built as a whole, and why."""


def extend(lake: str, domain: Domain, folder: Path, *, days: Days | None) -> bool:
    """Bring the index in `folder` to the newest versions of its tables, and to these days (None:
    all); False, with nothing changed, where it has to be built as a whole."""
    with locked(folder):
        try:
            _Extension(Snapshot(lake), domain, folder, Meta.read(folder), days).run()
        except NotExtendableError as reason:
            log.info("the index in %s is built as a whole: %s", folder, reason)
            return False
        except OSError as error:
            free = shutil.disk_usage(folder).free
            raise RetryableError(
                f"could not extend the index in {folder} ({free / 2**30:.1f} GiB free): {error}"
            ) from error
    return True


@dataclass(frozen=True)
class _Extension:
    snapshot: Snapshot
    domain: Domain
    folder: Path
    meta: Meta
    """Of before."""
    days: Days | None

    def run(self) -> None:
        """Write all that changed, then publish it."""
        self._check()
        changed = self._changed()
        items = {line: self._changed_items(line) for line in self.meta.lines}
        meta = replace(
            self.meta,
            tables=self.snapshot.versions,
            ids=self.snapshot.ids,
            days=[str(self.days.start), str(self.days.end)] if self.days is not None else None,
        )
        if not changed and not any(items.values()):
            if meta != self.meta:
                meta.write(self.folder)
            return
        new = self.meta.generation + 1
        writer = Writer(self.folder)
        users, num_rows = self._events(writer, changed)
        lines = {}
        for line, spec in self.meta.lines.items():
            segments, item_rows = self._items(writer, line, items[line])
            save_segments(self.folder / spec.folder, ITEMS, new, segments)
            lines[line] = replace(spec, item_rows=item_rows)
        save_segments(self.folder, USERS, new, users)
        replace(meta, generation=new, num_rows=num_rows, lines=lines).write(self.folder)
        log.info("index of %s: %d changed days, %d events", meta.domain, len(changed), users.total)
        for part in ("keys", "pages"):
            for old in self.folder.rglob(f"*.{part}.{new - 2}.npy"):
                old.unlink()  # one generation more stays, for who is opening it just now

    def _check(self) -> None:
        """The index is one of all users and of these features, and grows at its end only."""
        meta, domain, held = self.meta, self.domain, self.meta.held_days
        features = (
            [f.stream_column for f in domain.side_features],
            [label.name for label in domain.labels],
            [f.stream_column for f in domain.match_features],
        )
        if meta.of_some_users or (meta.domain, meta.side, meta.labels, meta.match) != (
            domain.name,
            *features,
        ):
            raise NotExtendableError("it was built of something else")
        if meta.has_fields and meta.fields != field_columns(domain):
            raise NotExtendableError("the domain's features have changed")
        if (held is None) != (self.days is None) or (
            held is not None and self.days is not None
            and (held.start != self.days.start or held.end > self.days.end)
        ):  # fmt: skip
            raise NotExtendableError("it was built of other days")

    def _days_of(self, table: Table, line: str | None = None) -> set[date]:
        """The days of a table, those that the index needs, that are not as the index has them."""
        opened = self.snapshot.open(table)
        name, held = table.name, self.meta.held_days
        if self.meta.ids.get(name) != str(opened.metadata().id):
            raise NotExtendableError(f"{name} is another table than before")
        found = delta.days_changed(opened, self.meta.tables[name], line=line)
        if found is None:
            raise NotExtendableError(f"{name} does not say which days have changed")
        if held is None or self.days is None:
            return found
        partitions = opened.partitions() if held.end < self.days.end else []
        there = {date.fromisoformat(str(part["event_date"])) for part in partitions}
        more = there | found
        return {day for day in found if day < held.end} | {
            day for day in more if held.end <= day < self.days.end
        }

    def _changed(self) -> list[date]:
        """Days whose events, tokens or features may be others than those held."""
        found = self._days_of(tables.histories(self.domain))
        for line in self.meta.lines:
            found |= self._days_of(tables.instance_tokens(self.domain.name), line)
        if self.meta.has_fields:
            found |= self._days_of(tables.user_order(self.domain))
        return sorted(day for day in found if self.days is None or day in self.days)

    def _changed_items(self, line: str) -> list[date]:
        return sorted(self._days_of(tables.item_tokens(self.domain.name), line))

    def _events(self, writer: Writer, days: list[date]) -> tuple[Segments, int]:
        """Write the events of changed days; the segments after them, and the arrays' rows."""
        meta, domain = self.meta, self.domain
        held = load_segments(self.folder, USERS, meta.generation, meta.base)
        num_rows = meta.num_rows
        if not days:
            return held, num_rows
        histories = self.snapshot.source(tables.histories(domain), days)
        tokens = {
            line: self.snapshot.source(
                tables.instance_tokens(domain.name), days, ds.field("compressor_line") == line
            )
            for line in meta.lines
        }
        logged = None
        if meta.has_fields:
            real = ~ds.field("is_sampled")
            logged = self.snapshot.source(tables.user_order(domain), days, real)
        users = Users.read(histories)
        for source in tokens.values():
            users.check_buckets(source)
        _, here, there = np.intersect1d(held.key, users.user_ids, True, return_indices=True)
        if not np.array_equal(held.bucket[here], users.bucket[there]):
            raise NotExtendableError("the number of user buckets has changed")
        if users.offsets[-1] > max(held.total, SMALL):
            raise NotExtendableError("more of its events have changed than not")
        names = self._event_arrays()
        numbers = np.array([as_number(day) for day in days])
        going_us = [(first * DAY_US, last * DAY_US) for first, last in runs(numbers)]
        buckets_before = np.unique(held.bucket[held.newest_us >= going_us[0][0]])
        for part in users.groups(buckets_before):
            events = Events.read(histories, domain, part)
            for name in names:
                writer.grow(name, num_rows)
            time_us, instance_id = (writer.arrays[x] for x in ("event_time_us", "instance_id"))

            def is_gone(row: Array, time_us: Array = time_us) -> Array:
                return np.isin(time_us[row] // DAY_US, numbers)

            new = NewRows(events.user_id, events.time_us, events.instance_id, events.bucket)
            if not np.isin(new.time_us // DAY_US, numbers).all():
                raise NotExtendableError("an event is of another day than its time says")
            growth = grown(
                held, num_rows, time_us, instance_id, is_gone, new, going_us, part.buckets
            )
            self._write(writer, names, growth)
            rows = events.put(writer, growth.new_to)
            for line, spec in meta.lines.items():
                writer.put(f"{spec.folder}/token", growth.new_to, 0)
                writer.put(f"{spec.folder}/available_us", growth.new_to, NEVER_US)
                form = TokenFormat(spec.codec, spec.width)
                put_tokens(writer, tokens[line], rows, spec.folder, form, part)
            if logged is not None:
                put_fields(writer, logged, rows, domain, part)
            held, num_rows = growth.segments, growth.num_rows
        return held, num_rows

    def _event_arrays(self) -> list[str]:
        meta = self.meta
        names = [*KEY_ARRAYS, *meta.side, *meta.label_arrays]
        if meta.has_fields:
            names += FIELD_ARRAYS
        return names + [f"{x.folder}/{name}" for x in meta.lines.values() for name in TOKEN_ARRAYS]

    def _items(self, writer: Writer, line: str, days: list[date]) -> tuple[Segments, int]:
        """Write the item tokens of changed days, as `_events` does."""
        spec = self.meta.lines[line]
        place = self.folder / spec.folder
        held = load_segments(place, ITEMS, self.meta.generation, spec.item_base)
        if not days:
            return held, spec.item_rows
        source = self.snapshot.source(
            tables.item_tokens(self.domain.name), days, ds.field("compressor_line") == line
        )
        keys = ItemKeys.read(source, spec.width)
        names = [f"{spec.folder}/{name}" for name in (*ITEM_ARRAYS, ITEM_DAY)]
        for name in names:
            writer.grow(name, spec.item_rows)
        day_R = writer.arrays[f"{spec.folder}/{ITEM_DAY}"]
        numbers = np.array([as_number(day) for day in days])
        # They can be read after their day at the earliest.
        going_us = [(int(numbers[0]) * DAY_US, NEVER_US)]
        bucket = np.zeros(len(keys.item_id), np.int64)
        growth = grown(
            held, spec.item_rows, writer.arrays[f"{spec.folder}/item_available_us"], day_R,
            lambda row: np.isin(day_R[row], numbers),
            NewRows(keys.item_id, keys.available_us, keys.day, bucket), going_us,
        )  # fmt: skip
        self._write(writer, names, growth)
        keys.put(writer, spec.folder, growth.new_to)
        keys.put_sums(writer, source, spec.folder, spec.width, growth.new_to)
        return growth.segments, growth.num_rows

    def _write(self, writer: Writer, names: list[str], growth: Growth) -> None:
        """Make room, and move the rows that move."""
        events = growth.segments.total
        if growth.num_rows - events > max(events, SMALL):
            raise NotExtendableError("half of its rows would be waste")
        for name in names:
            writer.grow(name, growth.num_rows)
            writer.copy(name, growth.copied_from, growth.copied_to)


def runs(numbers: Array) -> list[tuple[int, int]]:
    """Ascending numbers as half-open ranges."""
    cuts = np.flatnonzero(np.diff(numbers) > 1) + 1
    return [(int(part[0]), int(part[-1]) + 1) for part in np.split(numbers, cuts)]
