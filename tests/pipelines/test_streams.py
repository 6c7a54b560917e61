"""Streams, histories and samples: the same rows, model-ready, and the buckets that Python finds."""

from __future__ import annotations

import heapq
import math
import random
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import xxhash
from pyspark.sql import DataFrame, SparkSession

from jobs.spark import SparkTables
from pipelines import delta, tables
from pipelines.days import Days
from pipelines.domain import Feature, parse
from pipelines.features import FeatureLayout, arrays
from pipelines.histories import histories
from pipelines.instances import instances
from pipelines.negatives import with_negatives
from pipelines.samples import ranker_samples
from pipelines.temporal_order import model_ready, temporal_order
from pipelines.user_order import user_order

MORNING = datetime(2026, 1, 2, 8, tzinfo=UTC)
DAYS = Days(date(2026, 1, 2), date(2026, 1, 5))
SCHEMA = (
    "u string, i string, t timestamp, brand string, tags string, path string, price double, "
    "paid double"
)
DOMAIN = parse(
    {
        "name": "shop",
        "source": {"path": "x"},
        "columns": {"user": "u", "item": "i", "time": "t"},
        "label": [{"name": "buy", "always": 1, "delay": "1h"}],
        "negatives": {"per_positive": 1},
        "feature": [
            {"name": "item", "column": "i", "side": "item", "buckets": 1024},
            {"name": "brand", "column": "brand", "side": "item", "buckets": 16},
            {"name": "tags", "column": "tags", "kind": "multi-category", "max_length": 2},
            {"name": "path", "column": "path", "kind": "sequence", "max_length": 2,
             "table": "item", "buckets": 1024},
            {"name": "price", "column": "price", "kind": "number", "center": 3, "scale": 2},
            {"name": "gain", "column": "price", "kind": "number", "transform": "log"},
            {"name": "paid", "column": "paid", "kind": "number", "known": "after"},
        ],
    }
)  # fmt: skip


def bucket(feature: Feature, value: str | None) -> int:
    """The documented formula, in Python."""
    if value is None:
        return 0
    named = f"{feature.embedding_table}\x1f{value}".encode()
    hashed = xxhash.xxh64_intdigest(named, seed=42)
    signed = hashed - 2**64 if hashed >= 2**63 else hashed
    return signed % (feature.buckets - 1) + 1  # Python's % is never negative, as pmod


def of(name: str) -> Feature:
    return next(feature for feature in DOMAIN.features if feature.name == name)


def log(num_events: int = 120) -> list[tuple[Any, ...]]:
    """Three days of a few users, with instants shared by several rows and fields left out."""
    draw = random.Random(2)
    rows = []
    for n in range(num_events):
        at = MORNING + timedelta(days=draw.randrange(3), minutes=draw.randrange(20))
        tags = draw.choice([None, "red", "red|blue|green"])
        path = draw.choice([None, "i1", "i1|i2|i3"])
        number = draw.choice([None, -1.5, 0.0, 8.25])
        item = f"i{draw.randrange(9)}"
        rows.append((f"u{n % 7}", item, at, draw.choice(["b", None]), tags, path, number, number))
    return rows


@pytest.fixture(scope="module")
def made(spark: SparkSession) -> DataFrame:
    events = spark.createDataFrame(log(), SCHEMA)
    rows = with_negatives(instances(events, DOMAIN, DAYS, run="r")[0], DOMAIN).persist()
    assert rows.count() > 200
    return rows


@pytest.fixture(scope="module")
def lake(spark: SparkSession, made: DataFrame, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A lake in which the job's four tables were written from the same instances."""
    lake = str(tmp_path_factory.mktemp("streams") / "lake")
    ready = model_ready(made, DOMAIN)
    wanted = {
        tables.temporal_order(DOMAIN): temporal_order(made, DOMAIN),
        tables.user_order(DOMAIN): user_order(ready, DOMAIN),
        tables.histories(DOMAIN): histories(ready, DOMAIN),
        tables.ranker_samples(DOMAIN): ranker_samples(ready, DOMAIN),
    }
    for table, rows in wanted.items():
        SparkTables(spark, lake).replace(table, rows, DAYS, commit={"job": "test"})
    return lake


def test_fields_are_hashed_and_scaled_as_documented(spark: SparkSession) -> None:
    rows = [
        ("ann", "i1", MORNING, "b", "red|blue|green", "i1|i2|i3", 8.0, 8.0),
        ("ann", "i2", MORNING, None, "red", "i2", -8.0, None),
        ("ann", "i3", MORNING, "é€", None, None, None, 0.0),
    ]
    found = model_ready(
        instances(spark.createDataFrame(rows, SCHEMA), DOMAIN, DAYS, run="r")[0], DOMAIN
    )
    first, second, third = (row.asDict() for row in found.orderBy("item_key").collect())
    for row, item, brand in ((first, "i1", "b"), (second, "i2", None), (third, "i3", "é€")):
        assert row["f_item"] == bucket(of("item"), item)
        assert row["f_brand"] == bucket(of("brand"), brand)
    # A list keeps its first values, a sequence its last.
    assert first["f_tags"] == [bucket(of("tags"), "red"), bucket(of("tags"), "blue")]
    assert first["f_path"] == [bucket(of("path"), "i2"), bucket(of("path"), "i3")]
    # In a shared table the same value is the same bucket; in its own table it is another.
    assert second["f_path"] == [second["f_item"]]
    assert bucket(of("tags"), "i2") != second["f_item"]
    assert (third["f_tags"], third["f_path"]) == ([], [])
    assert (first["f_price"], second["f_price"], third["f_price"]) == (2.5, -5.5, None)
    assert first["f_gain"] == -second["f_gain"] == np.float32(math.log1p(8.0))
    assert (first["f_paid"], second["f_paid"], third["f_paid"]) == (8.0, None, 0.0)


def test_a_bucket_is_never_that_of_a_missing_value(spark: SparkSession) -> None:
    narrow = parse(
        {
            "name": "shop",
            "source": {"path": "x"},
            "columns": {"user": "u", "item": "i", "time": "t"},
            "label": [{"name": "buy", "always": 1}],
            "feature": [{"name": "item", "column": "i", "side": "item", "buckets": 4}],
        }
    )
    rows = [("ann", f"i{n}", MORNING) for n in range(200)]
    events = spark.createDataFrame(rows, "u string, i string, t timestamp")
    found = model_ready(instances(events, narrow, DAYS, run="r")[0], narrow).select("f_item")
    assert {row[0] for row in found.distinct().collect()} == {1, 2, 3}


@pytest.mark.parametrize("days", [DAYS, Days(date(2026, 1, 3), DAYS.end)], ids=str)
def test_both_streams_and_the_samples_hold_exactly_the_instances(
    made: DataFrame, lake: str, days: Days
) -> None:
    wanted = sorted(
        row["instance_id"]
        for row in made.select("instance_id", "event_date").collect()
        if row["event_date"] in days
    )
    for declared in (tables.temporal_order, tables.user_order, tables.ranker_samples):
        rows = delta.read(lake, declared(DOMAIN), days, columns=["instance_id"])
        assert sorted(rows["instance_id"].to_pylist()) == wanted


def test_both_streams_say_the_same_of_a_row(lake: str) -> None:
    order = [("instance_id", "ascending")]
    temporal = delta.read(lake, tables.temporal_order(DOMAIN)).sort_by(order)
    by_user = delta.read(lake, tables.user_order(DOMAIN)).sort_by(order)
    assert by_user.select(temporal.schema.names).to_pylist() == temporal.to_pylist()
    users = zip(by_user["user_id"].to_pylist(), by_user["user_bucket"].to_pylist(), strict=True)
    assert all(bucket == user % tables.NUM_BUCKETS for user, bucket in users)
    layout = FeatureLayout.of(DOMAIN)
    assert arrays(temporal, layout).ids.tolist() == arrays(by_user, layout).ids.tolist()


@pytest.mark.parametrize(
    "declared", [tables.temporal_order, tables.user_order, tables.histories, tables.ranker_samples]
)
def test_each_day_is_one_file_in_the_declared_order(lake: str, declared: Any) -> None:
    table = declared(DOMAIN)
    files = sorted(delta.open_table(lake, table).file_uris())
    assert [Path(file).parent.name for file in files] == [f"event_date={day}" for day in DAYS]
    for file in files:
        rows = pq.ParquetFile(file).read(list(table.sort_by)).to_pylist()
        keys = [tuple(row.values()) for row in rows]
        assert len(keys) > 10
        assert keys == sorted(keys)


def test_a_stream_over_days_is_the_merge_of_its_days(lake: str) -> None:
    table = tables.user_order(DOMAIN)

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in table.sort_by)

    days = [delta.read(lake, table, day).to_pylist() for day in DAYS.chunks(1)]
    merged = list(heapq.merge(*days, key=key))
    assert merged == sorted(delta.read(lake, table, DAYS).to_pylist(), key=key)
    ids = [row["instance_id"] for row in merged]
    users = [row["user_id"] for row in merged]
    assert len(set(ids)) == len(ids)
    assert len([n for n in range(1, len(users)) if users[n] != users[n - 1]]) == len(set(users)) - 1


def test_histories_carry_the_real_events_with_their_item_fields_and_labels(
    made: DataFrame, lake: str
) -> None:
    found = {
        row["instance_id"]: row for row in delta.read(lake, tables.histories(DOMAIN)).to_pylist()
    }
    real = [row.asDict() for row in made.where("not is_sampled").collect()]
    assert found.keys() == {row["instance_id"] for row in real}
    for row in real:
        step = found[row["instance_id"]]
        assert step["f_item"] == bucket(of("item"), row["f_item"])
        assert step["f_brand"] == bucket(of("brand"), row["f_brand"])
        assert (step["label_buy"], step["user_id"]) == (1, row["user_id"])
        assert step["label_time_buy"] - step["event_time"] == timedelta(hours=1)
    names = tables.histories(DOMAIN).schema.names
    assert not {"is_sampled", "f_tags", "f_price", "f_paid"} & set(names)


def test_a_sample_points_to_a_moment_and_never_knows_what_came_after(lake: str) -> None:
    samples = delta.read(lake, tables.ranker_samples(DOMAIN))
    assert "f_paid" not in samples.schema.names
    assert "f_price" in samples.schema.names
    columns = ["instance_id", "event_time", "f_item", "f_tags", "label_buy"]
    stream = delta.read(lake, tables.temporal_order(DOMAIN)).select(columns)
    moments = {row["instance_id"]: row for row in stream.to_pylist()}
    for row in samples.to_pylist():
        same = moments[row["instance_id"]]
        assert row["as_of"] == same["event_time"]
        assert [row[name] for name in columns[2:]] == [same[name] for name in columns[2:]]
