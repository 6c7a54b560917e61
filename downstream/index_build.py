"""Lake -> user index: tables whose days are each sorted user-major, merged without sorting.

Who has how many events is counted first, so that each user's place is known. Then days are read in
order, and each event is put behind its user's last. The folder appears whole or not at all.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from threading import Event

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from tqdm import tqdm

from downstream.index_arrays import (
    ITEM_ARRAYS,
    ITEM_DAY,
    ITEMS,
    USERS,
    Array,
    LineMeta,
    Meta,
    save_segments,
    user_major_order,
)
from downstream.index_files import (
    EVERY,
    Part,
    Snapshot,
    Source,
    Users,
    Writer,
    locked,
    memory_available,
    starts_of_runs,
)
from downstream.segments import Segments
from pipelines import tables
from pipelines.days import Days, as_number
from pipelines.domain import Domain
from pipelines.errors import InputError, RetryableError
from pipelines.features import NEVER_US, FeatureLayout, arrays, times_us
from pipelines.token_format import CODECS, TokenFormat, check, decode, of_line

log = logging.getLogger(__name__)

DAY_US = 86_400_000_000
ROWS_CHECKED = 524_288
"""Rows of whole users that are compared with one another at a time."""


def build(
    lake: str,
    domain: Domain,
    folder: Path,
    *,
    days: Days | None,
    lines: Sequence[str],
    fields: bool,
    only_users: Sequence[int] | None = None,
    versions: Mapping[str, int] | None = None,
) -> None:
    """Write the index of `days` (None: all) into `folder`, replacing what was there."""
    making = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        making.mkdir(parents=True)
        _write(Snapshot(lake, versions), domain, making, days, lines, fields, only_users)
        _publish(making, folder)
    except OSError as error:
        free = shutil.disk_usage(folder.parent).free if folder.parent.is_dir() else 0
        raise RetryableError(
            f"could not write the index in {folder} ({free / 2**30:.1f} GiB free): {error}"
        ) from error
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _publish(making: Path, folder: Path) -> None:
    """Swap the finished folder in; readers of the old one keep their memory maps."""
    if not folder.exists():
        making.rename(folder)
        return
    with locked(folder):
        old = making.with_name(making.name + ".old")
        folder.rename(old)
        making.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _write(
    snapshot: Snapshot,
    domain: Domain,
    folder: Path,
    days: Days | None,
    lines: Sequence[str],
    fields: bool,
    only_users: Sequence[int] | None,
) -> None:
    asked = EVERY
    if only_users is not None:
        asked = ds.field("user_id").isin(pa.array(only_users, pa.int64()))
    histories = snapshot.source(tables.histories(domain), days, asked)
    formats: dict[str, TokenFormat] = {}
    tokens: dict[str, Source] = {}
    for line in lines:
        kept = asked & (ds.field("compressor_line") == line)
        tokens[line] = snapshot.source(tables.instance_tokens(domain.name), days, kept)
        found = tokens[line]
        formats[line] = of_line(found.opened, found.table.name, line, found.batches(["token"]))
    real = asked & ~ds.field("is_sampled")
    logged = snapshot.source(tables.user_order(domain), days, real) if fields else None
    users = Users.read(histories)
    for source in tokens.values():
        users.check_buckets(source)
    writer = Writer(folder)
    num_rows = int(users.offsets[-1])
    _allocate(writer, domain, users, formats, fields)
    log.info("index of %s: %d users, %d events", domain.name, len(users.user_ids), num_rows)
    _write_events(writer, domain, users, histories, tokens, formats, logged)
    # A day's are others by now; those of two days are seen beside one another.
    starts = np.searchsorted(users.offsets, np.arange(0, num_rows, ROWS_CHECKED))
    bounds = np.unique([*users.offsets[starts], num_rows])
    instance_id, name = writer.arrays["instance_id"], histories.table.name
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda a, b: refuse_twice(instance_id[a:b], name), bounds, bounds[1:]))
    newest_us = writer.arrays["event_time_us"][users.offsets[1:] - 1]
    counts = np.diff(users.offsets)
    save_segments(folder, USERS, 0, Segments.of(users.user_ids, counts, users.bucket, newest_us))
    line_metas = {}
    for at, line in enumerate(lines):
        width, name, items = formats[line].width, f"line{at}", None
        if only_users is None:
            # They are cumulative: those from before the first day stay readable.
            until = Days(date.min, days.end) if days is not None else None
            is_its = ds.field("compressor_line") == line
            items = snapshot.source(tables.item_tokens(domain.name), until, is_its)
        segments = _put_items(writer, items, name, width)
        save_segments(folder / name, ITEMS, 0, segments)
        line_metas[line] = LineMeta(
            folder=name, codec=formats[line].codec, width=width, item_base=segments.total,
            item_rows=segments.total,
        )  # fmt: skip
    Meta(
        domain=domain.name,
        side=[f.stream_column for f in domain.side_features],
        labels=[label.name for label in domain.labels],
        match=[f.stream_column for f in domain.match_features],
        tables=snapshot.versions,
        ids=snapshot.ids,
        days=[str(days.start), str(days.end)] if days is not None else None,
        lines=line_metas,
        has_fields=fields,
        fields=field_columns(domain) if fields else [],
        of_some_users=only_users is not None,
        base=num_rows,
        num_rows=num_rows,
    ).write(folder)


def field_columns(domain: Domain) -> list[str]:
    """The table's column of each id and each number of an index's logged fields."""
    layout = FeatureLayout.of(domain)
    categorical = [layout.categorical[at] for at in layout.slot_fields]
    return [feature.stream_column for feature in (*categorical, *layout.numbers)]


def _allocate(
    writer: Writer, domain: Domain, users: Users, formats: dict[str, TokenFormat], fields: bool
) -> None:
    n = int(users.offsets[-1])
    for name in ("event_time_us", "instance_id", "item_id", "request_id"):
        writer.allocate(name, (n,), np.int64)
    for feature in domain.side_features:
        writer.allocate(feature.stream_column, (n,), np.int32)
    for label in domain.labels:
        writer.allocate(f"label_{label.name}", (n,), np.int8)
        writer.allocate(f"label_time_us_{label.name}", (n,), np.int64)
    for at, form in enumerate(formats.values()):
        writer.allocate(f"line{at}/token", (n, form.width), CODECS[form.codec])
        writer.allocate(f"line{at}/available_us", (n,), np.int64, fill=NEVER_US)
    if fields:
        layout = FeatureLayout.of(domain)
        writer.allocate("ids", (n, layout.num_slots), np.int32)
        writer.allocate("numbers", (n, len(layout.numbers)), np.float32)


def _write_events(
    writer: Writer,
    domain: Domain,
    users: Users,
    histories: Source,
    tokens: Mapping[str, Source],
    formats: Mapping[str, TokenFormat],
    logged: Source | None,
) -> None:
    """Days in order, each event to the place after its user's last: nothing is sorted that the
    tables have sorted. Two threads read and write parts, which take their places in turn.

    What a pass writes of the index stays in memory, or it would wait for the disk at every event;
    so many users a pass as that allows.
    """
    next_row = users.offsets[:-1].copy()
    names = [*writer.arrays]
    row_bytes = sum(writer.arrays[name][:1].nbytes for name in names)
    most = memory_available() // 2 // max(1, row_bytes)

    def put_part(part: Part, mine: Event, following: Event) -> None:
        try:
            events = Events.read(histories, domain, part)
            first = starts_of_runs(events.user_id)
            count = np.diff(first, append=len(events.user_id))
            place = np.searchsorted(users.user_ids, events.user_id[first])
            mine.wait()
            row = np.repeat(next_row[place] - first, count) + np.arange(len(events.user_id))
            next_row[place] += count
        finally:
            following.set()
        rows = events.put(writer, row)
        del events
        for at, (line, source) in enumerate(tokens.items()):
            put_tokens(writer, source, rows, f"line{at}", formats[line], part)
        if logged is not None:
            put_fields(writer, logged, rows, domain, part)

    passes = list(users.passes(most))
    total = sum(len(parts) for _, parts in passes)
    with (
        ThreadPoolExecutor(2) as pool,
        tqdm(total=total, desc=f"index {domain.name}", unit="part", delay=5) as done,
    ):
        for rows, parts in passes:
            writer.reserve(names, rows)
            turns = [Event() for _ in range(len(parts) + 1)]
            turns[0].set()
            for _ in pool.map(put_part, parts, turns, turns[1:]):
                done.update()


@dataclass(frozen=True)
class Rows:
    """Where each instance of some events is in the index."""

    instance_id: Array
    row: Array

    def find(self, instance_id: Array, expected: int = 0) -> tuple[Array, Array]:
        """(place, is_here): which of the events those instances are, of those that are any; they
        are looked for only where they don't follow one another from `expected` on."""
        place = np.arange(expected, expected + len(instance_id))
        if np.array_equal(instance_id, self.instance_id[expected : expected + len(instance_id)]):
            return place, np.ones(len(instance_id), bool)
        order, sorted_id = self._by_id
        if not len(order):
            return order, np.zeros(len(instance_id), bool)
        at = np.searchsorted(sorted_id, instance_id).clip(max=len(order) - 1)
        is_here = sorted_id[at] == instance_id
        return order[at[is_here]], is_here

    @cached_property
    def _by_id(self) -> tuple[Array, Array]:
        order = np.argsort(self.instance_id)
        return order, self.instance_id[order]


@dataclass(frozen=True)
class Events:
    """Events read from histories: a user's together, in order of (event_time, instance_id)."""

    user_id: Array
    bucket: Array
    time_us: Array
    instance_id: Array
    columns: Mapping[str, Sequence[Array]]
    """What the index holds of them, by array, in pieces as they were read."""

    @classmethod
    def read(cls, source: Source, domain: Domain, part: Part) -> Events:
        """Those of a part."""
        columns = [c for c in source.table.schema.names if c != "event_date"]
        found: dict[str, list[Array]] = defaultdict(list)
        for batch in source.batches(columns, part):
            for name in ("user_id", "user_bucket", "instance_id", "item_id", "request_id"):
                found[name].append(_ints(batch, name))
            found["event_time_us"].append(times_us(batch, "event_time"))
            for feature in domain.side_features:
                found[feature.stream_column].append(_ints(batch, feature.stream_column))
            for label in domain.labels:
                value = pc.fill_null(batch.column(f"label_{label.name}"), -1)
                found[f"label_{label.name}"].append(value.to_numpy())
                known_us = times_us(batch, f"label_time_{label.name}")
                found[f"label_time_us_{label.name}"].append(known_us)
        user_id, bucket = _joined(found.pop("user_id", [])), _joined(found.pop("user_bucket", []))
        time_us, instance_id = _joined(found["event_time_us"]), _joined(found["instance_id"])
        refuse_twice(instance_id, source.table.name)
        is_other = time_us // DAY_US != as_number(part.day) if part.day else None
        if is_other is not None and is_other.any():
            raise InputError(
                f"{source.table.name}: {is_other.sum()} events of {part.day} have a time of another"
                " day, and days are merged as they are; build that day again"
            )
        events = cls(user_id, bucket, time_us, instance_id, found)
        return events if events._is_ordered() else events._ordered()

    def _is_ordered(self) -> bool:
        user, time_us, tie = self.user_id, self.time_us, self.instance_id
        is_later = (time_us[1:] > time_us[:-1]) | (
            (time_us[1:] == time_us[:-1]) & (tie[1:] > tie[:-1])
        )
        is_next = user[1:] != user[:-1]
        users = np.sort(user[starts_of_runs(user)])
        return bool((is_later | is_next).all() and (users[1:] != users[:-1]).all())

    def _ordered(self) -> Events:
        order = user_major_order(self.user_id, self.time_us, self.instance_id)
        columns = {name: [_joined(pieces)[order]] for name, pieces in self.columns.items()}
        return Events(
            self.user_id[order], self.bucket[order], self.time_us[order], self.instance_id[order],
            columns,
        )  # fmt: skip

    def put(self, writer: Writer, row: Array) -> Rows:
        """Write each event at its row; says where each instance went."""
        for name, pieces in self.columns.items():
            at = 0
            for piece in pieces:
                writer.put(name, row[at : at + len(piece)], piece)
                at += len(piece)
        return Rows(self.instance_id, row)


def _joined(pieces: Sequence[Array]) -> Array:
    return np.concatenate([np.zeros(0, np.int64), *pieces])


def refuse_twice(instance_id: Array, name: str) -> None:
    """InputError where instances are not all others."""
    sorted_id = np.sort(instance_id)
    if (sorted_id[1:] == sorted_id[:-1]).any():
        raise InputError(f"{name} holds an instance_id twice; build it again")


def put_tokens(
    writer: Writer,
    source: Source,
    rows: Rows,
    line: str,
    form: TokenFormat,
    part: Part,
) -> None:
    """Write the tokens of one line beside events just written; those without one stay empty."""
    columns = ["instance_id", "available_time", "token"]
    at = num_tokens = num_lost = 0
    has_token = np.zeros(len(rows.row), bool)
    for batch in source.batches(columns, part):
        place, is_here = rows.find(batch.column("instance_id").to_numpy(), at)
        num_tokens += len(place)
        has_token[place] = True
        if np.count_nonzero(has_token) != num_tokens:
            raise InputError(
                f"{source.table.name} holds two tokens of one instance; write it again"
            )
        token = decode(batch.column("token"), form)
        available_us = times_us(batch, "available_time")
        if not is_here.all():
            num_lost += int((~is_here).sum())
            token, available_us = token[is_here], available_us[is_here]
        writer.put(f"{line}/token", rows.row[place], token)
        writer.put(f"{line}/available_us", rows.row[place], available_us)
        at += len(batch)
    if num_lost:
        log.warning("%s: %d tokens have no history row", source.table.name, num_lost)


def put_fields(
    writer: Writer,
    source: Source,
    rows: Rows,
    domain: Domain,
    part: Part,
) -> None:
    """Write model-ready features beside events just written; every one must have them."""
    layout = FeatureLayout.of(domain)
    found = source.rows(["instance_id", *layout.columns], part)
    place, is_here = rows.find(_ints(found, "instance_id"))
    has_fields = np.zeros(len(rows.row), bool)
    has_fields[place] = True
    num_found = np.count_nonzero(has_fields)
    if num_found != len(rows.row):
        raise InputError(
            f"{source.table.name} has features of {num_found} of {len(rows.row)} events "
            "of the histories; build the streams of all days again"
        )
    made = arrays(found, layout).take(np.flatnonzero(is_here))
    writer.put("ids", rows.row[place], made.ids)
    writer.put("numbers", rows.row[place], made.numbers)


@dataclass(frozen=True)
class ItemKeys:
    """What item tokens are sorted by, in the table's order, and all else but their sums."""

    item_id: Array
    available_us: Array
    day: Array
    count: Array

    @classmethod
    def read(cls, source: Source, width: int) -> ItemKeys:
        check(source.opened, source.table.name, TokenFormat("float32", width))
        names = ["item_id", "available_time", "event_date", "decayed_count"]
        parts = [pa.Table.from_batches([batch]) for batch in source.batches(names)]
        empty = pa.schema([source.table.schema.field(name) for name in names]).empty_table()
        found = pa.concat_tables([empty, *parts])
        day = found.column("event_date").cast(pa.int32()).to_numpy()
        return cls(
            _ints(found, "item_id"), times_us(found, "available_time"), day,
            found.column("decayed_count").to_numpy(),
        )  # fmt: skip

    @classmethod
    def none(cls) -> ItemKeys:
        ids = np.zeros(0, np.int64)
        return cls(ids, ids, ids, np.zeros(0, np.float32))

    def put(self, writer: Writer, line: str, row: Array) -> None:
        """Write each at its row."""
        writer.put(f"{line}/item_available_us", row, self.available_us)
        writer.put(f"{line}/{ITEM_DAY}", row, self.day)
        writer.put(f"{line}/item_count", row, self.count)

    def put_sums(self, writer: Writer, source: Source, line: str, width: int, row: Array) -> None:
        """Write their sums, in a second pass over the table."""
        at = 0
        for batch in source.batches(["item_id", "decayed_sum"]):
            here = slice(at, at + len(batch))
            if not np.array_equal(batch.column("item_id").to_numpy(), self.item_id[here]):
                raise AssertionError("the scan's order changed between two passes")
            sums = decode(batch.column("decayed_sum"), TokenFormat("float32", width))
            writer.put(f"{line}/item_sum", row[here], sums)
            at += len(batch)


def _put_items(writer: Writer, source: Source | None, line: str, width: int) -> Segments:
    """Write a line's item tokens (None: none), sorted by (item, available); says whose they are."""
    keys = ItemKeys.none() if source is None else ItemKeys.read(source, width)
    n = len(keys.item_id)
    order = np.lexsort((keys.day, keys.available_us, keys.item_id))
    row = np.empty(n, np.int64)
    row[order] = np.arange(n)
    types = (np.int64, np.float32, np.float32, np.int32)
    for name, dtype in zip((*ITEM_ARRAYS, ITEM_DAY), types, strict=True):
        shape = (n, width) if name == "item_sum" else (n,)
        writer.allocate(f"{line}/{name}", shape, dtype)
    writer.reserve([f"{line}/{name}" for name in (*ITEM_ARRAYS, ITEM_DAY)])
    keys.put(writer, line, row)
    if source is not None:
        keys.put_sums(writer, source, line, width, row)
    item_ids, count = np.unique(keys.item_id, return_counts=True)
    newest_us = keys.available_us[order][np.cumsum(count) - 1]
    return Segments.of(item_ids, count, newest_us=newest_us)


def _ints(rows: pa.Table | pa.RecordBatch, name: str) -> Array:
    return np.asarray(rows.column(name).to_numpy())
