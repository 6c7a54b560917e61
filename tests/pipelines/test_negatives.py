"""Sampled negatives: which they may be, what they carry, how often, and an oracle in Python."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
import xxhash
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from pipelines.days import Days
from pipelines.domain import Domain, parse
from pipelines.histories import histories
from pipelines.instances import instances
from pipelines.negatives import num_draws, with_negatives
from pipelines.temporal_order import model_ready

MORNING = datetime(2026, 1, 2, 8, tzinfo=UTC)
WEEK = Days(date(2026, 1, 1), date(2026, 1, 8))
SCHEMA = "u string, i string, t timestamp, basket string, brand string, store string, paid double"
Row = dict[str, Any]


def shop(*, per_positive: int = 2, seed: int = 17) -> Domain:
    """Purchases: an item and its brand, the request's store, the price paid, a second label."""
    return parse(
        {
            "name": "shop",
            "source": {"path": "x"},
            "columns": {"user": "u", "item": "i", "time": "t", "request": "basket"},
            "label": [
                {"name": "buy", "always": 1},
                {"name": "dear", "column": "paid", "at_least": 5},
            ],
            "feature": [
                {"name": "item", "column": "i", "side": "item"},
                {"name": "brand", "column": "brand", "side": "item"},
                {"name": "store", "column": "store"},
                {"name": "user", "column": "u", "side": "user"},
                {"name": "paid", "column": "paid", "kind": "number", "known": "after"},
                {"name": "bag", "column": "store", "side": "item", "known": "after"},
            ],
            "negatives": {"per_positive": per_positive, "seed": seed},
        }
    )


def purchases(seed: int, num_users: int, num_days: int) -> list[tuple[Any, ...]]:
    """Baskets of a few items of 30, low numbers more often; an item has one brand."""
    draw = random.Random(seed)
    rows = []
    for day in range(num_days):
        for user in range(num_users):
            at = MORNING + timedelta(days=day, minutes=draw.randrange(600))
            basket, store = f"{user}-{day}", f"s{draw.randrange(3)}"
            for item in sorted({int(30 * draw.random() ** 2) for _ in range(draw.randint(1, 4))}):
                paid = draw.choice([1.0, 9.0, None])
                rows.append((f"u{user}", f"i{item}", at, basket, f"b{item % 7}", store, paid))
    return rows


def sampled(
    spark: SparkSession, rows: Sequence[tuple[Any, ...]], domain: Domain, *, num_tasks: int = 2
) -> DataFrame:
    events = spark.createDataFrame(list(rows), SCHEMA).repartition(num_tasks)
    return with_negatives(instances(events, domain, WEEK, run="r")[0], domain)


def by_id(frame: DataFrame) -> dict[int, Row]:
    rows = [row.asDict() for row in frame.collect()]
    found = {row["instance_id"]: row for row in rows}
    assert len(found) == len(rows)
    return found


@pytest.fixture(scope="module")
def log() -> list[tuple[Any, ...]]:
    return purchases(seed=3, num_users=40, num_days=2)


@pytest.fixture(scope="module")
def found(spark: SparkSession, log: list[tuple[Any, ...]]) -> dict[int, Row]:
    return by_id(sampled(spark, log, shop()))


def test_each_positive_has_its_negatives_which_the_user_did_not_take_that_day(
    found: dict[int, Row], log: list[tuple[Any, ...]]
) -> None:
    taken, sold = defaultdict(set), defaultdict(set)
    for user, item, at, *_ in log:
        taken[user, at.date()].add(item)
        sold[at.date()].add(item)
    drawn = defaultdict(list)
    for row in found.values():
        if row["is_sampled"]:
            assert row["item_key"] in sold[row["event_date"]]
            assert row["item_key"] not in taken[row["user_key"], row["event_date"]]
            drawn[row["request_key"]].append(row["item_key"])
    baskets = Counter(row[3] for row in log)
    assert {basket: len(items) for basket, items in drawn.items()} == {
        basket: 2 * num_items for basket, num_items in baskets.items()
    }
    alone = [items for basket, items in drawn.items() if baskets[basket] == 1]
    assert alone
    assert all(len(set(items)) == 2 for items in alone)


def test_a_negative_is_its_positives_request_with_another_events_item(
    found: dict[int, Row], log: list[tuple[Any, ...]]
) -> None:
    brands = {row[1]: row[4] for row in log}
    requests = {row["request_id"]: row for row in found.values() if not row["is_sampled"]}
    for row in found.values():
        if not row["is_sampled"]:
            continue
        positive = requests[row["request_id"]]
        same = ("user_id", "user_key", "event_time", "event_date", "f_store", "f_user")
        assert [row[name] for name in same] == [positive[name] for name in same]
        assert row["f_item"] == row["item_key"]
        assert row["f_brand"] == brands[row["item_key"]]
        assert row["label_buy"] == 0
        assert row["label_time_buy"] == positive["label_time_buy"]
        missing = ("f_paid", "f_bag", "label_dear", "label_time_dear")
        assert [row[name] for name in missing] == [None] * 4


def test_the_real_instances_stay_as_they_were(
    spark: SparkSession, found: dict[int, Row], log: list[tuple[Any, ...]]
) -> None:
    events = spark.createDataFrame(log, SCHEMA)
    real = by_id(instances(events, shop(), WEEK, run="r")[0])
    assert {key: row for key, row in found.items() if not row["is_sampled"]} == real


def test_neither_the_order_of_the_log_nor_its_partitions_matter(
    spark: SparkSession, found: dict[int, Row], log: list[tuple[Any, ...]]
) -> None:
    assert by_id(sampled(spark, log[::-1], shop(), num_tasks=5)) == found


def test_another_seed_draws_others(
    spark: SparkSession, found: dict[int, Row], log: list[tuple[Any, ...]]
) -> None:
    other = by_id(sampled(spark, log, shop(seed=18)))
    drawn = [{k for k, row in each.items() if row["is_sampled"]} for each in (found, other)]
    assert len(drawn[0] & drawn[1]) < 0.3 * len(drawn[0])


def test_a_days_negatives_depend_on_that_day_alone(
    spark: SparkSession, found: dict[int, Row], log: list[tuple[Any, ...]]
) -> None:
    second = MORNING.date() + timedelta(days=1)
    alone = by_id(sampled(spark, [row for row in log if row[2].date() == second], shop()))
    assert alone == {key: row for key, row in found.items() if row["event_date"] == second}


def test_over_a_day_an_item_is_drawn_as_often_as_it_was_taken(spark: SparkSession) -> None:
    """Each user takes one item: only those of the item itself pass it over, 1 in 10 at most."""
    draw = random.Random(5)
    items = [f"i{draw.choices(range(20), weights=range(20, 0, -1))[0]}" for _ in range(3000)]
    rows = [(f"u{n}", item, MORNING, f"r{n}", "b", "s", 1.0) for n, item in enumerate(items)]
    drawn = sampled(spark, rows, shop(per_positive=1)).where("is_sampled")
    counts = dict(map(tuple, drawn.groupBy("item_key").count().collect()))
    taken = Counter(items)
    total = len(items)
    for item, num_taken in taken.items():
        expected = sum(
            num * num_taken / (total - num) for other, num in taken.items() if other != item
        )
        assert abs(counts[item] - expected) < 5 * expected**0.5, item


def test_a_day_with_too_few_other_items_gives_fewer(spark: SparkSession) -> None:
    def row(user: str, item: str, day: int = 0) -> tuple[Any, ...]:
        return (user, item, MORNING + timedelta(days=day), f"{user}-{day}", "b", "s", 1.0)

    rows = [row("ann", "a"), row("ann", "b"), row("bo", "b"), row("cy", "c", 1), row("cy", "d", 1)]
    drawn = sampled(spark, rows, shop()).where("is_sampled").select("user_key", "item_key")
    assert [tuple(each) for each in drawn.collect()] == [("bo", "a")]


def test_only_positives_of_the_main_task_get_negatives(spark: SparkSession) -> None:
    domain = shop(per_positive=1)
    real = instances(spark.createDataFrame(purchases(1, 6, 1), SCHEMA), domain, WEEK, run="r")[0]
    label = F.when(F.col("user_key") == "u0", 0).when(F.col("user_key") != "u1", 1).cast("tinyint")
    drawn = with_negatives(real.withColumn("label_buy", label), domain).where("is_sampled")
    users = {row["user_key"] for row in drawn.collect()}
    assert users
    assert users.isdisjoint({"u0", "u1"})


def test_histories_never_hold_a_negative(spark: SparkSession, log: list[tuple[Any, ...]]) -> None:
    rows = sampled(spark, log, shop())
    kept = histories(model_ready(rows, shop()), shop())
    assert (
        kept.select("instance_id")
        .exceptAll(rows.where("not is_sampled").select("instance_id"))
        .isEmpty()
    )
    assert kept.count() == len(log)


def test_a_domain_without_negatives_keeps_its_rows(spark: SparkSession) -> None:
    domain = parse(
        {
            "name": "shop",
            "source": {"path": "x"},
            "columns": {"user": "u", "item": "i", "time": "t"},
            "label": [{"name": "buy", "always": 1}],
            "feature": [{"name": "item", "column": "i", "side": "item"}],
        }
    )
    real = spark.range(1)
    assert with_negatives(real, domain) is real


def hash_of(*values: str | int | bool, small: int | None = None) -> int:
    """xxhash64 over several values as Spark defines it: each hash is the seed of the next.

    `small` is hashed first, as the 4 bytes of an int.
    """
    found = 42 if small is None else xxhash.xxh64_intdigest(small.to_bytes(4, "little"), seed=42)
    for value in values:
        if isinstance(value, str):
            data = value.encode()
        else:
            data = int(value).to_bytes(4 if isinstance(value, bool) else 8, "little", signed=True)
        found = xxhash.xxh64_intdigest(data, seed=found)
    return found - 2**64 if found >= 2**63 else found


def oracle(real: Sequence[Row], domain: Domain) -> dict[int, str]:
    """Id of a negative -> its item: every day shuffled by hash, successors first."""
    assert domain.negatives
    seed, wanted = domain.negatives.seed, domain.negatives.per_positive
    reach = num_draws(wanted)
    found = {}
    for day in {row["event_date"] for row in real}:
        of_day = [row for row in real if row["event_date"] == day]
        of_day.sort(key=lambda row: hash_of(row["instance_id"], small=seed))
        for place, row in enumerate(of_day):
            own = {r["item_key"] for r in of_day if r["user_key"] == row["user_key"]}
            before = of_day[max(0, place - reach) : place][::-1]
            draws = [r["item_key"] for r in of_day[place + 1 : place + 1 + reach] + before]
            fit = [item for item in dict.fromkeys(draws) if item not in own][:wanted]
            at = int(row["event_time"].timestamp()) * 1_000_000 + row["event_time"].microsecond
            for item in fit:
                keys = ("shop", row["user_key"], item, row["request_key"], at, True)
                found[hash_of(*keys, row["instance_id"])] = item
    return found


def test_an_oracle_in_plain_python_draws_the_same(found: dict[int, Row]) -> None:
    real = [row for row in found.values() if not row["is_sampled"]]
    drawn = {key: row["item_key"] for key, row in found.items() if row["is_sampled"]}
    assert drawn == oracle(real, shop())
