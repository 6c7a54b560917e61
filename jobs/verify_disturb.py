"""A small lake in which each ranker row has a past of its own, and a future changed at random.

Every row gets a copy of its user (and of its candidate item) under a new id, so that one build and
one fetch serve all rows, each cut at its own as_of. What was known strictly before is kept to the
bit. The rest is changed, deleted, or joined by new rows, some at as_of itself and of the very item
that the row asks about.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from jobs.oracle import Sample
from pipelines import delta, tables, token_format
from pipelines.domain import Domain
from pipelines.features import times_us
from pipelines.tables import UTC_TIME, Table

Array = npt.NDArray[Any]

DAY_US = 86_400_000_000
LATER_US = 30 * DAY_US
DELETED_SHARE = 1 / 3
NUM_BUCKETS = 16
NUM_INSERTED = 3
"""New events per row: at as_of, a microsecond later, some days later."""
INSERTED = -2
"""In place of an old instance id."""
COMMIT = {"job": "verify"}


@dataclass(frozen=True)
class Disturbed:
    """Row k asks for user k and item k; `instance_of` [new instance id] gives the old id."""

    user_id: Array
    item_id: Array
    instance_of: Array
    summary: str
    """How much of the small lake is not what it was."""


@dataclass(frozen=True)
class Clones:
    """Rows of a table copied for the ranker rows that need them."""

    rows: pa.Table
    k: Array
    cut_us: Array

    @classmethod
    def of(cls, rows: pa.Table, key: str, wanted: Array, as_of_us: Array) -> Clones:
        """For each k, the rows whose `key` is wanted[k]."""
        rows = rows.sort_by(key)
        keys = np.asarray(rows.column(key).to_numpy(), np.int64)
        start = np.searchsorted(keys, wanted)
        count = np.searchsorted(keys, wanted, side="right") - start
        k = np.repeat(np.arange(len(wanted)), count)
        within = np.arange(len(k)) - np.repeat(np.cumsum(count) - count, count)
        return cls(rows.take(pa.array(start[k] + within)), k, as_of_us[k])


def disturb(lake: str, to: str, domain: Domain, line: str, sample: Sample, seed: int) -> Disturbed:
    """Write the lake `to`: histories, instance tokens and item tokens of the sampled rows."""
    random = np.random.default_rng(seed)
    as_of_us = sample.ints("as_of_us")
    histories = tables.histories(domain)
    past = _rows(lake, histories, ds.field("user_id").isin(pa.array(sample.ints("user_id"))))
    clones = Clones.of(past, "user_id", sample.ints("user_id"), as_of_us)
    events, old_id = _disturbed_histories(clones, domain, sample, random)
    _write(to, histories, events)
    num_tokens = _disturb_tokens(lake, to, domain, line, events, old_id, random)
    num_items = _disturb_items(lake, to, domain, line, sample, random)
    numbers = np.arange(len(sample))
    summary = (
        f"changed or new: {int(events['is_future'].sum())} of {len(old_id)} events, {num_tokens} "
        f"tokens, {num_items} item tokens"
    )
    return Disturbed(numbers, numbers, old_id, summary)


def _disturbed_histories(
    clones: Clones, domain: Domain, sample: Sample, random: np.random.Generator
) -> tuple[dict[str, Any], Array]:
    """Columns of the new histories, and the old instance id of each new one."""
    num_old, num_samples = len(clones.k), len(sample)
    source = np.concatenate([np.arange(num_old), np.full(NUM_INSERTED * num_samples, -1)])
    k = np.concatenate([clones.k, np.repeat(np.arange(num_samples), NUM_INSERTED)])
    cut_us = sample.ints("as_of_us")[k]
    is_new = source < 0
    row = np.maximum(source, 0)

    def column(name: str, fill: int = 0) -> Array:
        if not num_old:
            return np.full(len(k), fill, np.int64)
        values = pc.fill_null(clones.rows.column(name), fill).to_numpy()
        return np.where(is_new, fill, np.asarray(values, np.int64)[row])

    time_us = times_us(clones.rows, "event_time")[row] if num_old else cut_us.copy()
    is_future = is_new | (time_us >= cut_us)
    later = cut_us + random.integers(0, LATER_US, len(k))
    offsets = np.tile(np.array([0, 1, DAY_US])[:NUM_INSERTED], num_samples)
    time_us = np.where(is_future, later, time_us)
    time_us[is_new] = cut_us[is_new] + offsets
    # The row's own item at a moment that must not be seen would show in every match feature.
    own_item = sample.ints("item_id")[k]
    is_own = is_new | (random.random(len(k)) < 0.5)
    other = random.integers(0, 2**62, len(k))
    old_instance = np.where(is_new, INSERTED, column("instance_id"))
    columns: dict[str, Any] = {
        "user_id": k,
        "user_bucket": k % NUM_BUCKETS,
        "item_id": np.where(is_future, np.where(is_own, own_item, other), column("item_id")),
        "request_id": np.where(is_future, other, column("request_id")),
        "event_time": time_us,
    }
    for feature in domain.side_features:
        own = sample.ints(f"bucket_{feature.name}")[k]
        noise = random.integers(0, feature.buckets, len(k))
        changed = np.where(is_own, own, noise)
        columns[feature.stream_column] = np.where(is_future, changed, column(feature.stream_column))
    for label in domain.labels:
        name, time_name = f"label_{label.name}", f"label_time_{label.name}"
        known_us = np.where(is_new, cut_us, _times(clones.rows, time_name, row, cut_us))
        is_late = is_future | (known_us >= cut_us)
        columns[name] = np.where(is_late, random.integers(0, 2, len(k)), column(name))
        columns[time_name] = np.where(is_late, np.maximum(later, time_us), known_us)
        nulls = ~is_late & _nulls(clones.rows, name, row)
        columns[f"{name}_null"] = nulls
    kept = ~is_future | is_new | (random.random(len(k)) >= DELETED_SHARE)
    columns = {name: values[kept] for name, values in columns.items()}
    columns["is_future"], columns["cut_us"] = is_future[kept], cut_us[kept]
    # New ids rank as the old ones did: ties of one instant keep their order.
    order = np.lexsort((k[kept], old_instance[kept]))
    new_id = np.empty(len(order), np.int64)
    new_id[order] = np.arange(len(order))
    columns["instance_id"] = new_id
    return columns, old_instance[kept][order]


def _disturb_tokens(
    lake: str, to: str, domain: Domain, line: str, events: dict[str, Any], old_id: Array,
    random: np.random.Generator,
) -> int:  # fmt: skip
    """Tokens of the new histories; one not readable before as_of is changed, removed or new.

    Returns how many of them are changed or new.
    """
    table = tables.instance_tokens(domain.name)
    own = old_id[events["instance_id"]]
    wanted = np.unique(own[own != INSERTED])
    rows = _rows(
        lake,
        table,
        (ds.field("compressor_line") == line) & ds.field("instance_id").isin(pa.array(wanted)),
    ).sort_by("instance_id")
    ids = np.asarray(rows.column("instance_id").to_numpy(), np.int64)
    place = np.searchsorted(ids, own).clip(max=max(0, len(ids) - 1))
    has_token = ids[place] == own if len(ids) else np.zeros(len(own), bool)
    available_us = _times(rows, "available_time", place, events["cut_us"])
    is_late = ~has_token | events["is_future"] | (available_us >= events["cut_us"])
    later = events["cut_us"] + random.integers(0, LATER_US, len(own)) * random.integers(
        0, 2, len(own)
    )
    kept = ~is_late | (random.random(len(own)) >= DELETED_SHARE)
    form = token_format.declared(delta.open_table(lake, table))
    num_bytes = form.num_bytes if form else len(rows.column("token")[0].as_py()) if len(rows) else 2
    noise = _noise(random, len(own), num_bytes, form.codec if form else "float16")
    old = rows.column("token").to_pylist()
    token = [noise[i] if is_late[i] else old[place[i]] for i in np.flatnonzero(kept)]
    columns = {
        name: events[name][kept]
        for name in ("user_id", "item_id", "user_bucket", "event_time", "instance_id")
    }
    columns |= {
        "compressor_line": [line] * len(token),
        "compressor_version": ["disturbed"] * len(token),
        "available_time": np.where(is_late, later, available_us)[kept],
        "token": token,
    }
    if form:
        token_format.declare(to, table, form)
    _write(to, table, columns)
    return int((is_late & kept).sum())


def _disturb_items(
    lake: str, to: str, domain: Domain, line: str, sample: Sample, random: np.random.Generator
) -> int:
    """Item tokens under the rows' own item ids; those of as_of's day and later are changed.

    Returns how many are changed or new.
    """
    table = tables.item_tokens(domain.name)
    own = ds.field("item_id").isin(pa.array(sample.ints("item_id")))
    rows = _rows(lake, table, (ds.field("compressor_line") == line) & own)
    as_of_us = sample.ints("as_of_us")
    clones = Clones.of(rows, "item_id", sample.ints("item_id"), as_of_us)
    num_old, num_samples = len(clones.k), len(sample)
    k = np.concatenate([clones.k, np.repeat(np.arange(num_samples), 2)])
    cut_us = as_of_us[k]
    is_new = np.arange(len(k)) >= num_old
    row = np.where(is_new, 0, np.arange(len(k)))
    available_us = _times(clones.rows, "available_time", row, cut_us)
    day = np.where(is_new, cut_us // DAY_US, _days(clones.rows, row, cut_us))
    is_late = is_new | (available_us >= cut_us) | (day >= cut_us // DAY_US)
    later = cut_us + random.integers(0, LATER_US, len(k))
    later[is_new] = cut_us[is_new] + np.tile([0, 1], num_samples)
    kept = ~is_late | is_new | (random.random(len(k)) >= DELETED_SHARE)
    form = token_format.declared(delta.open_table(lake, table))
    found = clones.rows.column("decayed_sum").to_pylist()
    num_bytes = form.num_bytes if form else len(found[0]) if found else 4
    noise = _noise(random, len(k), num_bytes, "float32")
    counts = clones.rows.column("decayed_count").to_numpy() if num_old else np.ones(1)
    columns = {
        "item_id": k[kept],
        "compressor_line": [line] * int(kept.sum()),
        "compressor_version": ["disturbed"] * int(kept.sum()),
        "available_time": np.where(is_late, later, available_us)[kept],
        "decayed_sum": [noise[i] if is_late[i] else found[i] for i in np.flatnonzero(kept)],
        "decayed_count": np.where(is_late, random.uniform(1, 9, len(k)), counts[row])[kept],
    }
    if form:
        token_format.declare(to, table, form)
    columns["event_date"] = np.where(is_late, later // DAY_US, day)[kept]
    _write(to, table, columns)
    return int((is_late & kept).sum())


def _rows(lake: str, table: Table, kept: ds.Expression) -> pa.Table:
    found = delta.scan(delta.open_table(lake, table), table, table.schema.names, kept)
    return found.to_table().cast(table.schema)


def _write(lake: str, table: Table, columns: dict[str, Any]) -> None:
    """The columns as the whole table; null where a `<column>_null` says so."""
    if "event_date" not in columns:
        columns = columns | {"event_date": columns["event_time"] // DAY_US}
    made = []
    for name in table.schema.names:
        kind, values = table.schema.field(name).type, columns[name]
        mask = columns.get(f"{name}_null")
        if kind == UTC_TIME:
            made.append(pa.array(np.asarray(values, np.int64)).cast(UTC_TIME))
        elif kind == pa.date32():
            made.append(pa.array(np.asarray(values, np.int32)).cast(kind))
        else:
            made.append(pa.array(values, mask=mask).cast(kind))
    delta.replace(lake, table, pa.Table.from_arrays(made, schema=table.schema), None, commit=COMMIT)


def _times(rows: pa.Table, name: str, row: Array, empty: Array) -> Array:
    """A time column at some rows, null read as never; `empty` for a table without rows."""
    return times_us(rows, name)[row] if len(rows) else empty.copy()


def _days(rows: pa.Table, row: Array, cut_us: Array) -> Array:
    if not len(rows):
        return cut_us // DAY_US
    days = rows.column("event_date").cast(pa.int32()).to_numpy()
    return np.asarray(days, np.int64)[row]


def _nulls(rows: pa.Table, name: str, row: Array) -> Array:
    if not len(rows):
        return np.zeros(len(row), bool)
    return np.asarray(rows.column(name).is_null().to_numpy())[row]


def _noise(random: np.random.Generator, num: int, num_bytes: int, codec: str) -> list[bytes]:
    """Random vectors, far from any real token, as stored bytes."""
    kind = token_format.CODECS[codec]
    values = random.normal(0, 50, (num, num_bytes // kind.itemsize)).astype(kind)
    return [bytes(value) for value in values]
