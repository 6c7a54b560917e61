"""A tiny domain and stream in memory: three users, requests with siblings, sampled negatives,
fields known only afterwards."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from compressor import data as streams
from compressor.configs import SourceConfig
from compressor.data import DAY_US, StreamData
from compressor.nn.embedding import Vocabulary
from pipelines import tables
from pipelines.domain import Domain, parse

TINY = {
    "name": "tiny",
    "source": {"path": "x.parquet"},
    "columns": {"user": "u", "item": "i", "time": "t", "request": "r"},
    "label": [{"name": "buy", "always": 1}],
    "negatives": {"per_positive": 2},
    "feature": [
        {"name": "user", "column": "u", "side": "user", "buckets": 64},
        {"name": "item", "column": "i", "side": "item", "buckets": 256},
        {"name": "category", "column": "c", "side": "item", "buckets": 64},
        {
            "name": "tags",
            "column": "g",
            "side": "item",
            "kind": "multi-category",
            "max_length": 3,
            "buckets": 64,
        },
        {"name": "stock", "column": "s", "side": "context", "kind": "number"},
        {"name": "price", "column": "p", "side": "event", "known": "after", "kind": "number"},
        {"name": "coupon", "column": "k", "side": "event", "known": "after", "buckets": 16},
    ],
}


def small_config(**changes: Any) -> SourceConfig:
    values: dict[str, Any] = {
        "embedding": 8,
        "width": 16,
        "num_tokens": 4,
        "depth": 1,
        "bottleneck": 16,
        "sit_layers": 2,
        "heads": 2,
        "context": 16,
        "decoder": 16,
    }
    return SourceConfig(**(values | changes))


def stream_rows(
    domain: Domain, *, num_users: int = 3, num_requests: int = 6, seed: int = 0
) -> pa.Table:
    """Each request: two bought items and two sampled ones at one instant; requests hours to days
    apart."""
    random = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for user in range(1, num_users + 1):
        now = 20_000 * DAY_US + int(random.integers(DAY_US))
        for request in range(num_requests):
            now += int(random.integers(3_600_000_000, DAY_US))
            for candidate in range(4):
                is_sampled = candidate >= 2
                row: dict[str, Any] = {
                    "instance_id": len(rows),
                    "user_id": user,
                    "item_id": int(random.integers(20)),
                    "request_id": user * 1000 + request,
                    "event_time": now,
                    "is_sampled": is_sampled,
                    "f_user": user,
                    "f_stock": float(random.normal()),
                    "f_price": None if is_sampled else float(random.normal()),
                    "f_coupon": 0 if is_sampled else int(random.integers(1, 16)),
                    "f_tags": random.integers(1, 64, random.integers(0, 4)).tolist(),
                    "label_buy": int(not is_sampled),
                    "label_time_buy": now,
                    "event_date": now // DAY_US,
                }
                row |= {"f_item": row["item_id"] + 1, "f_category": row["item_id"] % 5 + 1}
                rows.append(row)
    schema = tables.temporal_order(domain).schema
    columns = {name: pa.array([r[name] for r in rows]) for name in schema.names}
    dates = columns["event_date"].cast(pa.int32())
    return pa.table({**columns, "event_date": dates}).cast(schema)


@pytest.fixture
def tiny() -> Domain:
    return parse(TINY)


@pytest.fixture
def rows(tiny: Domain) -> pa.Table:
    return stream_rows(tiny)


@pytest.fixture
def vocabulary(tiny: Domain, rows: pa.Table) -> Vocabulary:
    return streams.vocabulary_of(rows, tiny)


@pytest.fixture
def data(tiny: Domain, rows: pa.Table, vocabulary: Vocabulary) -> StreamData:
    return streams.load(rows, tiny, vocabulary)
