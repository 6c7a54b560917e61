"""The job that contestants do, the files that they do it from, and what the right answer is.

For each sample (user_id, as_of): the user's newest K events strictly before as_of, oldest first,
each with two side columns, a label (0 not known by then, 1 negative, 2 positive) and a token of 64
float16 (missing where it was not published by then). Events of the same instant are in order of
instance_id. Most samples ask at the very moment of an event of theirs, as a ranker's do: who reads
`<=` for `<` is found out.

The same events are on disk twice: as the lake's Delta tables, which our index is built from, and as
one Parquet file (`events`), tokens joined and rows in order of (user, event_time, instance_id),
which spares everyone else that join and that sort. Users are Zipf distributed.

Imports nothing but numpy and pyarrow before it writes a lake: other environments read it too.

Shape legend: Q samples, K newest events, D token width, N events.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

Array = npt.NDArray[Any]

WIDTH, NUM_DAYS, NUM_BUCKETS = 64, 8, 16
FIRST = date(2026, 1, 1)
SECOND_US, DAY_US = 1_000_000, 86_400_000_000
FIRST_US = (FIRST - date(1970, 1, 1)).days * DAY_US
EVENTS_A_USER = 100
UNKNOWN_USERS = 0.01
"""Share of samples whose user has no events."""
BATCH = 4096
"""Samples that a trainer takes at once."""
LINE = "main"
DOMAIN: dict[str, Any] = {
    "name": "contest",
    "source": {"path": "log"},
    "columns": {"user": "user", "item": "item", "time": "at"},
    "label": [{"name": "buy", "column": "buy"}],
    "feature": [{"name": name, "column": name, "side": "item"} for name in "ab"],
}
UTC_TIME = pa.timestamp("us", tz="UTC")
EVENTS = pa.schema(
    {
        "user_id": pa.int64(), "event_time": UTC_TIME, "instance_id": pa.int64(),
        "f_a": pa.int32(), "f_b": pa.int32(),
        "label_buy": pa.int8(), "label_time_buy": UTC_TIME,
        "token": pa.binary(), "available_time": UTC_TIME,
    }
)  # fmt: skip
SAMPLES = pa.schema({"sample_id": pa.int64(), "user_id": pa.int64(), "as_of": UTC_TIME})


@dataclass(frozen=True)
class World:
    """One size of the job in a folder."""

    folder: Path

    @property
    def lake(self) -> str:
        return str(self.folder / "lake")

    @property
    def events(self) -> Path:
        return self.folder / "events.parquet"

    @property
    def samples(self) -> Path:
        return self.folder / "samples.parquet"

    def prepared(self, contestant: str) -> Path:
        """Where a contestant keeps what it made ahead of time."""
        return self.folder / "prepared" / contestant

    def asked(self) -> tuple[Array, Array]:
        """(user_id, as_of_us) of each sample, in order of sample_id."""
        rows = pq.read_table(self.samples)
        # Copies: torch warns of tensors over read-only memory.
        as_of_us = rows["as_of"].cast("int64")
        return rows["user_id"].to_numpy().copy(), as_of_us.to_numpy().copy()


@dataclass(frozen=True)
class Answer:
    """What some samples were given, left-padded; event_time_us is -1 and all else 0 at padding."""

    event_time_us: Array
    """[Q, K]"""
    f_a: Array
    f_b: Array
    label_buy: Array
    token: Array
    """[Q, K, D] as 16-bit words; 0 where there is none."""
    has_token: Array

    @classmethod
    def none(cls, num: int, length: int) -> Answer:
        f_a, f_b, label_buy = np.zeros((3, num, length), np.int64)
        token = np.zeros((num, length, WIDTH), np.uint16)
        has_token = np.zeros((num, length), bool)
        return cls(np.full((num, length), -1), f_a, f_b, label_buy, token, has_token)

    def differs(self, other: Answer) -> str | None:
        """What is not the same, and for how many samples; None: nothing."""
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine.shape != theirs.shape:
                return f"{field.name} is {list(mine.shape)}, not {list(theirs.shape)}"
            is_other = (mine != theirs).reshape(len(mine), -1).any(axis=1)
            if is_other.any():
                return f"{field.name} of {is_other.sum()} of {len(mine)} samples"
        return None


def write_world(
    folder: Path, num_events: int, num_samples: int, *, zipf: float = 1.0, seed: int = 0
) -> World:
    """Draws the events and the samples, and writes them."""
    folder.mkdir(parents=True)
    world, draw = World(folder), np.random.default_rng(seed)
    columns = _events(num_events, max(2, num_events // EVENTS_A_USER), zipf, draw)
    token = draw.standard_normal((num_events, WIDTH), dtype=np.float32).astype("<f2")
    with pq.ParquetWriter(world.events, EVENTS, compression="zstd") as file:
        for start in range(0, num_events, 500_000):
            rows = slice(start, start + 500_000)
            file.write_table(_table({k: v[rows] for k, v in columns.items()}, token[rows], EVENTS))
    _write_samples(world, columns, num_samples, draw)
    _write_lake(world, columns, token)
    return world


def _events(
    num_events: int, num_users: int, zipf: float, draw: np.random.Generator
) -> dict[str, Array]:
    """Columns in order of (user, event_time, instance_id); times are whole seconds, so that some
    are the same. One in ten has no token, one in ten no label."""
    weight = np.arange(1, num_users + 1) ** -zipf
    rank = np.searchsorted(np.cumsum(weight / weight.sum()), draw.random(num_events))
    user_id = (rank.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)).view(np.int64)
    seconds = NUM_DAYS * DAY_US // SECOND_US
    time_us = FIRST_US + draw.integers(0, seconds, num_events) * SECOND_US
    instance_id = draw.permutation(num_events)
    order = np.lexsort((instance_id, time_us, user_id))
    time_us = time_us[order]
    is_published, has_label = draw.random((2, num_events)) < 0.9
    available_us = time_us + draw.integers(1, 3600, num_events) * SECOND_US
    return {
        "user_id": user_id[order],
        "event_time": time_us,
        "instance_id": instance_id[order],
        "f_a": draw.integers(1, 99, num_events),
        "f_b": draw.integers(1, 9999, num_events),
        "label_buy": np.where(has_label, draw.integers(0, 2, num_events), -1),
        "label_time_buy": time_us + draw.integers(1, 48 * 3600, num_events) * SECOND_US,
        "available_time": np.where(is_published, available_us, -1),
    }


def _table(columns: dict[str, Array], token: Array, schema: pa.Schema) -> pa.Table:
    """Columns as a schema has them; null where a label or a publication is -1."""
    made = []
    for field in schema:
        if field.name == "token":
            ends = np.arange(len(token) + 1, dtype=np.int32) * (WIDTH * 2)
            buffers = [None, pa.py_buffer(ends), pa.py_buffer(np.ascontiguousarray(token))]
            encoded = pa.BinaryArray.from_buffers(pa.binary(), len(token), buffers)
            column = pc.if_else(pa.array(columns["available_time"] >= 0), encoded, None)
        else:
            values = columns[field.name]
            is_null = values == -1 if field.name in ("label_buy", "available_time") else None
            column = pa.array(values, mask=is_null).cast(field.type)
        made.append(column)
    return pa.Table.from_arrays(made, schema=schema)


def _write_samples(
    world: World, columns: dict[str, Array], num: int, draw: np.random.Generator
) -> None:
    row = draw.integers(0, len(columns["user_id"]), num)
    is_unknown = draw.random(num) < UNKNOWN_USERS
    shift_us = np.where(draw.random(num) < 0.9, 0, draw.integers(0, DAY_US, num))
    found = {
        "sample_id": np.arange(num),
        "user_id": np.where(is_unknown, 1, columns["user_id"][row]),
        "as_of": columns["event_time"][row] + shift_us,
    }
    pq.write_table(_table(found, np.zeros((0, WIDTH), "<f2"), SAMPLES), world.samples)


def _write_lake(world: World, columns: dict[str, Array], token: Array) -> None:
    """Histories and tokens, a commit a day, as the jobs would write them."""
    from pipelines import delta, tables, token_format
    from pipelines.days import Days
    from pipelines.domain import parse

    domain, commit = parse(DOMAIN), {"job": "contest"}
    histories, tokens = tables.histories(domain), tables.instance_tokens(domain.name)
    token_format.declare(world.lake, tokens, token_format.TokenFormat("float16", WIDTH))
    line = pa.schema([f for f in tokens.schema if f.name.startswith("compressor_")])
    delta.replace(
        world.lake, tables.item_tokens(domain.name),
        tables.item_tokens(domain.name).schema.empty_table(), None, commit=commit,
    )  # fmt: skip
    day = (columns["event_time"] - FIRST_US) // DAY_US
    for number in range(NUM_DAYS):
        at = np.flatnonzero(day == number)
        held = {name: column[at] for name, column in columns.items()}
        held["item_id"] = held["request_id"] = held["instance_id"]
        held["user_bucket"] = held["user_id"] % NUM_BUCKETS
        held["event_date"] = np.full(len(at), (FIRST_US // DAY_US + number), np.int32)
        one = Days(FIRST + timedelta(days=number), FIRST + timedelta(days=number + 1))
        rows = _table(held, token[at], histories.schema)
        delta.replace(world.lake, histories, rows, one, commit=commit)
        named = pa.schema([f for f in tokens.schema if f.name not in line.names])
        rows = _table(held, token[at], named).filter(ds.field("available_time").is_valid())
        for name in line.names:
            rows = rows.append_column(name, pa.repeat(LINE, len(rows)))
        delta.replace(world.lake, tokens, rows, one, commit=commit | {"line": LINE}, line=LINE)


def batches(num: int, size: int = BATCH) -> Iterator[slice]:
    """Samples in order, `size` at a time."""
    return (slice(at, min(at + size, num)) for at in range(0, num, size))


def rows_of(sample_id: Array, answer: Answer) -> pa.Table:
    """An answer as a table, a row an event, as contestants write it."""
    q, k = np.nonzero(answer.event_time_us >= 0)
    token = np.ascontiguousarray(answer.token[q, k])
    ends = np.arange(len(q) + 1, dtype=np.int32) * (WIDTH * 2)
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(token)]
    encoded = pa.BinaryArray.from_buffers(pa.binary(), len(q), buffers)
    return pa.table(
        {
            "sample_id": sample_id[q],
            "event_time": pa.array(answer.event_time_us[q, k]).cast(UTC_TIME),
            **{name: getattr(answer, name)[q, k] for name in ("f_a", "f_b", "label_buy")},
            "token": pc.if_else(pa.array(answer.has_token[q, k]), encoded, None),
        }
    )


def read_answer(place: Path, sample_id: Array, length: int) -> Answer:
    """What a contestant wrote for some samples (ascending), in a file or a folder of files.

    A row is an event, or a sample with a list a column; a sample's events are in their order.
    """
    kept = ds.field("sample_id").isin(pa.array(sample_id))
    rows = ds.dataset(place, format="parquet").to_table(filter=kept).combine_chunks()
    if pa.types.is_list(rows["event_time"].type) or pa.types.is_large_list(rows["event_time"].type):
        parent = pc.list_parent_indices(rows["event_time"])
        flat = {n: pc.list_flatten(rows[n]) for n in rows.column_names if n != "sample_id"}
        rows = pa.table({"sample_id": rows["sample_id"].take(parent), **flat})
    rows = rows.filter(ds.field("event_time").is_valid())
    # A stable sort: who writes a sample's rows apart from each other still keeps their order.
    rows = rows.take(pa.array(np.argsort(rows["sample_id"].to_numpy(), kind="stable")))
    found = Answer.none(len(sample_id), length)
    q = np.searchsorted(sample_id, rows["sample_id"].to_numpy())
    count = np.bincount(q, minlength=len(sample_id))
    if count.max(initial=0) > length:
        raise ValueError(f"{place} holds {count.max()} events of a sample; asked for {length}")
    k = length - count[q] + np.arange(len(q)) - np.concatenate([[0], np.cumsum(count)[:-1]])[q]
    found.event_time_us[q, k] = rows["event_time"].cast(UTC_TIME).cast("int64").to_numpy()
    for name in ("f_a", "f_b", "label_buy"):
        getattr(found, name)[q, k] = rows[name].to_numpy()
    token = rows["token"].combine_chunks().cast(pa.binary())
    is_there = token.is_valid().to_numpy(zero_copy_only=False)
    words = np.frombuffer(b"".join(token.drop_null().to_pylist()), "<u2").reshape(-1, WIDTH)
    found.has_token[q, k] = is_there
    found.token[q[is_there], k[is_there]] = words
    return found


def plain_answer(world: World, sample_id: Array, length: int) -> Answer:
    """The right answer for some samples, an event at a time: slow, and right by reading it."""
    user, as_of = (column[sample_id] for column in world.asked())
    found = Answer.none(len(sample_id), length)
    for q, (user_id, moment) in enumerate(zip(user.tolist(), as_of.tolist(), strict=True)):
        before = (ds.field("user_id") == user_id) & (
            ds.field("event_time") < pa.scalar(moment, UTC_TIME)
        )
        past = ds.dataset(world.events).to_table(filter=before)
        past = past.sort_by([("event_time", "ascending"), ("instance_id", "ascending")])
        past = past.slice(max(0, len(past) - length)).to_pylist()
        for k, row in enumerate(past, start=length - len(past)):
            found.event_time_us[q, k] = us(row["event_time"])
            found.f_a[q, k], found.f_b[q, k] = row["f_a"], row["f_b"]
            if row["label_buy"] is not None and us(row["label_time_buy"]) < moment:
                found.label_buy[q, k] = row["label_buy"] + 1
            if row["token"] is not None and us(row["available_time"]) < moment:
                found.has_token[q, k] = True
                found.token[q, k] = np.frombuffer(row["token"], "<u2")
    return found


def us(moment: Any) -> int:
    """A datetime's microseconds since 1970."""
    return int(pa.scalar(moment, UTC_TIME).cast("int64").as_py())
