"""Lake -> user index: tables whose days are each sorted user-major, merged bucket by bucket.

A user lives in one bucket, so a group of buckets small enough for memory is read over all days,
sorted, and written to its users' places. The folder appears whole or not at all.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from tqdm import tqdm

from downstream.index_arrays import (
    ITEM_ARRAYS,
    Array,
    ItemArrays,
    LineMeta,
    Meta,
    segments_of,
    user_major_order,
)
from downstream.index_files import Snapshot, Source, Users, Writer
from pipelines import tables
from pipelines.days import Days
from pipelines.domain import Domain
from pipelines.errors import InputError, RetryableError
from pipelines.features import NEVER_US, FeatureLayout, arrays, times_us
from pipelines.token_format import CODECS, TokenFormat, check, declared, decode

log = logging.getLogger(__name__)


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
    old = making.with_name(making.name + ".old")
    if folder.exists():
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
    asked = _of_days(days)
    if only_users is not None:
        asked = asked & ds.field("user_id").isin(pa.array(only_users, pa.int64()))
    histories = snapshot.source(tables.histories(domain), asked)
    formats: dict[str, TokenFormat] = {}
    tokens: dict[str, Source] = {}
    for line in lines:
        kept = asked & (ds.field("compressor_line") == line)
        tokens[line] = snapshot.source(tables.instance_tokens(domain.name), kept)
        formats[line] = _format(tokens[line], line)
    real = asked & ~ds.field("is_sampled")
    logged = snapshot.source(tables.user_order(domain), real) if fields else None
    users = Users.read(histories)
    for source in tokens.values():
        users.check_buckets(Users.read(source), source.table.name)
    writer = Writer(folder)
    num_rows = int(users.offsets[-1])
    _allocate(writer, domain, users, formats, fields)
    log.info("index of %s: %d users, %d events", domain.name, len(users.user_ids), num_rows)
    for buckets in tqdm(users.groups(), desc=f"index {domain.name}", unit="group", delay=5):
        rows = _put_histories(writer, histories, users, buckets, domain)
        for at, line in enumerate(lines):
            _put_tokens(writer, tokens[line], buckets, rows, f"line{at}", formats[line])
        if logged is not None:
            _put_fields(writer, logged, buckets, rows, domain)
    for at, line in enumerate(lines):
        if only_users is not None:
            _allocate_items(writer, f"line{at}", ItemArrays.none(formats[line].width))
            continue
        items = snapshot.source(tables.item_tokens(domain.name), _items_until(days, line))
        _put_items(writer, items, f"line{at}", formats[line].width)
    Meta(
        domain=domain.name,
        side=[f.stream_column for f in domain.side_features],
        labels=[label.name for label in domain.labels],
        match=[f.stream_column for f in domain.match_features],
        tables=snapshot.versions,
        days=[str(days.start), str(days.end)] if days is not None else None,
        lines={
            line: LineMeta(folder=f"line{at}", codec=formats[line].codec, width=formats[line].width)
            for at, line in enumerate(lines)
        },
        has_fields=fields,
    ).write(folder)


def _of_days(days: Days | None) -> ds.Expression:
    if days is None:
        return ds.scalar(True)
    return (ds.field("event_date") >= days.start) & (ds.field("event_date") < days.end)


def _items_until(days: Days | None, line: str) -> ds.Expression:
    """Item tokens are cumulative: those from before the first day stay readable."""
    kept = ds.field("compressor_line") == line
    return kept if days is None else kept & (ds.field("event_date") < days.end)


def _format(tokens: Source, line: str) -> TokenFormat:
    """The line's format, as the table declares it, or else as its first token shows."""
    name = tokens.table.name
    found = {part["compressor_line"] for part in tokens.opened.partitions()}
    if line not in found:
        held = ", ".join(sorted(found)) or "none"
        raise InputError(f"{name} has no tokens of line {line!r}; lines there: {held}")
    form = declared(tokens.opened)
    first = next((b for b in tokens.batches(["token"]) if len(b)), None)
    if first is None:
        if form is None:
            raise InputError(
                f"{name} has no tokens of line {line!r} in the asked days, and declares no width"
            )
        return form
    num_bytes = len(first.column("token")[0].as_py())
    if form is None:
        return TokenFormat("float16", num_bytes // CODECS["float16"].itemsize)
    if num_bytes != form.num_bytes:
        raise InputError(
            f"{name} declares {form} ({form.num_bytes} bytes) and a token of line {line!r} "
            f"has {num_bytes} bytes; write the line again, or to another lake"
        )
    return form


def _allocate(
    writer: Writer, domain: Domain, users: Users, formats: dict[str, TokenFormat], fields: bool
) -> None:
    n = int(users.offsets[-1])
    for name, values in (("user_ids", users.user_ids), ("offsets", users.offsets)):
        writer.allocate(name, values.shape, np.int64)
        writer.put(name, np.arange(len(values)), values)
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


@dataclass(frozen=True)
class Rows:
    """Where each instance of a group of buckets is in the index, by ascending instance_id."""

    instance_id: Array
    row: Array

    def find(self, instance_id: Array) -> tuple[Array, Array]:
        """The rows of those instances that are here, and which those are."""
        if not len(self.instance_id):
            return np.zeros(0, np.int64), np.zeros(len(instance_id), bool)
        place = np.searchsorted(self.instance_id, instance_id).clip(max=len(self.instance_id) - 1)
        is_here = self.instance_id[place] == instance_id
        return self.row[place[is_here]], is_here


def _put_histories(
    writer: Writer, source: Source, users: Users, buckets: Array, domain: Domain
) -> Rows:
    """Write a group's histories in order; says where each instance went."""
    columns = [c for c in source.table.schema.names if c not in ("user_bucket", "event_date")]
    found = source.rows(columns, buckets)
    user, time_us = _ints(found, "user_id"), times_us(found, "event_time")
    order = user_major_order(user, time_us, _ints(found, "instance_id"))
    user_row = np.searchsorted(users.user_ids, user[order])
    _, starts = segments_of(user_row)
    in_user = np.arange(len(order)) - np.repeat(starts[:-1], np.diff(starts))
    row = users.offsets[user_row] + in_user
    writer.put("event_time_us", row, time_us[order])
    for name in ("instance_id", "item_id", "request_id"):
        writer.put(name, row, _ints(found, name)[order])
    for feature in domain.side_features:
        writer.put(feature.stream_column, row, _ints(found, feature.stream_column)[order])
    for label in domain.labels:
        value = np.asarray(pc.fill_null(found.column(f"label_{label.name}"), -1).to_numpy())
        writer.put(f"label_{label.name}", row, value[order])
        known_us = times_us(found, f"label_time_{label.name}")
        writer.put(f"label_time_us_{label.name}", row, known_us[order])
    instance_id = _ints(found, "instance_id")[order]
    by_id = np.argsort(instance_id)
    if (np.diff(instance_id[by_id]) == 0).any():
        raise InputError(f"{source.table.name} holds an instance_id twice; build it again")
    return Rows(instance_id[by_id], row[by_id])


def _put_tokens(
    writer: Writer,
    source: Source,
    buckets: Array,
    rows: Rows,
    line: str,
    form: TokenFormat,
) -> None:
    """Write a group's tokens of one line beside its histories; events without one stay empty."""
    found = source.rows(["instance_id", "available_time", "token"], buckets)
    row, is_here = rows.find(_ints(found, "instance_id"))
    if len(np.unique(row)) != len(row):
        raise InputError(f"{source.table.name} holds two tokens of one instance; write it again")
    if not is_here.all():
        log.warning("%s: %d tokens have no history row", source.table.name, (~is_here).sum())
    writer.put(f"{line}/token", row, decode(found.column("token"), form)[is_here])
    writer.put(f"{line}/available_us", row, times_us(found, "available_time")[is_here])


def _put_fields(writer: Writer, source: Source, buckets: Array, rows: Rows, domain: Domain) -> None:
    """Write a group's model-ready features; every history row must have them."""
    layout = FeatureLayout.of(domain)
    found = source.rows(["instance_id", *layout.columns], buckets)
    row, is_here = rows.find(_ints(found, "instance_id"))
    if len(np.unique(row)) != len(rows.row):
        raise InputError(
            f"{source.table.name} has features of {len(np.unique(row))} of {len(rows.row)} events "
            "of the histories; build the streams of all days again"
        )
    made = arrays(found, layout).take(np.flatnonzero(is_here))
    writer.put("ids", row, made.ids)
    writer.put("numbers", row, made.numbers)


def _put_items(writer: Writer, source: Source, line: str, width: int) -> None:
    """Write a line's item tokens, sorted by (item, available); their sums in a second pass."""
    check(source.opened, source.table.name, TokenFormat("float32", width))
    keys = ["item_id", "available_time", "decayed_count"]
    parts = [pa.Table.from_batches([batch]) for batch in source.batches(keys)]
    empty = pa.schema([source.table.schema.field(name) for name in keys]).empty_table()
    found = pa.concat_tables([empty, *parts])
    item_id, available_us = _ints(found, "item_id"), times_us(found, "available_time")
    order = np.lexsort((available_us, item_id))
    item_ids, offsets = segments_of(item_id[order])
    count = found.column("decayed_count").to_numpy()[order]
    # The sums' values follow; broadcast, they take no memory until then.
    sums = np.broadcast_to(np.float32(0), (len(order), width))
    _allocate_items(writer, line, ItemArrays(item_ids, offsets, available_us[order], sums, count))
    row = np.empty(len(order), np.int64)
    row[order] = np.arange(len(order))
    at = 0
    for batch in source.batches(["item_id", "decayed_sum"]):
        here = row[at : at + len(batch)]
        if not np.array_equal(batch.column("item_id").to_numpy(), item_id[at : at + len(batch)]):
            raise AssertionError("the scan's order changed between two passes")
        sums = decode(batch.column("decayed_sum"), TokenFormat("float32", width))
        writer.put(f"{line}/item_sum", here, sums)
        at += len(batch)


def _allocate_items(writer: Writer, line: str, items: ItemArrays) -> None:
    for name, values in zip(ITEM_ARRAYS, vars(items).values(), strict=True):
        writer.allocate(f"{line}/{name}", values.shape, values.dtype)
        writer.put(f"{line}/{name}", np.arange(len(values)), values)


def _ints(rows: pa.Table, name: str) -> Array:
    return np.asarray(rows.column(name).to_numpy())
