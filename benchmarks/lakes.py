"""A lake of random histories and tokens, written without Spark as the jobs would write it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines import delta, tables
from pipelines.days import Days, midnight, to_us
from pipelines.domain import Domain, load
from pipelines.token_format import TokenFormat, declare, encode

Array = npt.NDArray[Any]

FIRST = date(2026, 1, 1)
DAY_US = 86_400_000_000
LINE = "bench"
ZIPF = 1.2
NUM_ITEMS = 10_000
PUBLISHED = 0.9
"""The share of tokens that are readable a second after their event; others ten years later."""
DOMAIN = """
name = "bench"
source = {path = "log"}
columns = {user = "user", item = "item", time = "at"}
[[label]]
name = "buy"
column = "buy"
delay = "1h"
[[feature]]
name = "brand"
column = "brand"
side = "item"
[[feature]]
name = "store"
column = "store"
side = "item"
"""


def write(
    folder: Path, num_events: int, *, num_days: int, num_users: int, width: int = 64, seed: int = 0
) -> Domain:
    """Histories and tokens of `num_events` by Zipf-distributed users, in `folder`/lake; a domain
    whose side columns are brand, store and the label buy."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.toml").write_text(DOMAIN)
    domain = load(str(folder / "bench.toml"))
    draw = np.random.default_rng(seed)
    declare(f"{folder}/lake", tables.instance_tokens(domain.name), TokenFormat("float16", width))
    sizes = np.diff(np.linspace(0, num_events, num_days + 1).astype(int))
    first_id = 0
    for number, size in enumerate(sizes):
        day = FIRST + timedelta(days=number)
        events = of_a_day(day, int(size), num_users, first_id, draw)
        write_day(f"{folder}/lake", domain, day, events, width, draw)
        first_id += int(size)
    write_items(f"{folder}/lake", domain, FIRST + timedelta(days=num_days - 1), width, draw)
    return domain


def of_a_day(
    day: date, num: int, num_users: int, first_id: int, draw: np.random.Generator
) -> Mapping[str, Array]:
    """Columns of one day's events, in any order."""
    user = draw.zipf(ZIPF, num) % num_users
    return {
        "user_id": spread(user),
        "event_time": to_us(midnight(day)) + draw.integers(0, DAY_US, num),
        "instance_id": spread(first_id + np.arange(num)),
        "item_id": draw.integers(0, NUM_ITEMS, num),
        "brand": draw.integers(0, 99, num).astype(np.int32),
        "store": draw.integers(0, 99, num).astype(np.int32),
        "buy": draw.integers(0, 2, num).astype(np.int8),
    }


def spread(number: Array) -> Array:
    """Other numbers for other ones, over the whole range, as hashes are."""
    return (number.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)).view(np.int64)


def write_day(
    lake: str, domain: Domain, day: date, events: Mapping[str, Array], width: int,
    draw: np.random.Generator,
) -> None:  # fmt: skip
    """One day of histories and of tokens."""
    days, num = Days(day, day + timedelta(days=1)), len(events["user_id"])
    time_us = pa.array(events["event_time"])
    same: dict[str, Any] = {
        "event_date": pa.repeat(day, num),
        "user_id": pa.array(events["user_id"]),
        "instance_id": pa.array(events["instance_id"]),
        "user_bucket": pa.array((events["user_id"] % tables.NUM_BUCKETS).astype(np.int32)),
        "event_time": time_us.cast(tables.UTC_TIME),
        "item_id": pa.array(events["item_id"]),
        "request_id": pa.array(events["instance_id"]),
    }
    table = tables.histories(domain)
    label_time = pa.array(events["event_time"] + 3_600_000_000).cast(tables.UTC_TIME)
    columns = same | {
        "f_brand": pa.array(events["brand"]),
        "f_store": pa.array(events["store"]),
        "label_buy": pa.array(events["buy"]),
        "label_time_buy": label_time,
    }
    delta.replace(lake, table, _as(table, columns), days, commit={"job": "bench"})
    wait_us = np.where(draw.random(num) < PUBLISHED, 1_000_000, 3650 * DAY_US)
    token = draw.standard_normal((num, width), dtype=np.float32).astype(np.float16)
    table = tables.instance_tokens(domain.name)
    columns = same | {
        "compressor_line": pa.repeat(LINE, num),
        "compressor_version": pa.repeat(f"{LINE}-1", num),
        "available_time": pa.array(events["event_time"] + wait_us).cast(tables.UTC_TIME),
        "token": encode(token, "float16"),
    }
    delta.replace(lake, table, _as(table, columns), days, line=LINE, commit={"job": "bench"})


def write_items(
    lake: str, domain: Domain, day: date, width: int, draw: np.random.Generator
) -> None:
    """One day's item tokens, of all items."""
    columns = {
        "event_date": pa.repeat(day, NUM_ITEMS),
        "item_id": pa.array(np.arange(NUM_ITEMS)),
        "compressor_line": pa.repeat(LINE, NUM_ITEMS),
        "compressor_version": pa.repeat(f"{LINE}-1", NUM_ITEMS),
        "available_time": pa.repeat(pa.scalar(midnight(day + timedelta(days=1))), NUM_ITEMS),
        "decayed_sum": encode(draw.standard_normal((NUM_ITEMS, width)), "float32"),
        "decayed_count": pa.array(draw.random(NUM_ITEMS, np.float32) + 1),
    }
    table, days = tables.item_tokens(domain.name), Days(day, day + timedelta(days=1))
    delta.replace(lake, table, _as(table, columns), days, line=LINE, commit={"job": "bench"})


def _as(table: tables.Table, columns: Mapping[str, pa.Array]) -> pa.Table:
    return pa.table({name: columns[name] for name in table.schema.names}).cast(table.schema)
