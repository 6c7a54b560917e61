"""Raw events -> instances: each rule by a row that breaks it, labels, days, keys, and an oracle."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import xxhash
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from pipelines import tables
from pipelines.days import Days, to_us
from pipelines.domain import Domain, parse
from pipelines.errors import InputError
from pipelines.instances import checked, days_in, instances
from pipelines.keys import key_id
from pipelines.raw_values import moment, text

JANUARY = Days(date(2026, 1, 1), date(2026, 2, 1))
NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)
CLICK = {"name": "click", "column": "click"}
ITEM = {"name": "item", "column": "i", "side": "item"}


def shop(
    *,
    label: Sequence[dict[str, Any]] = (CLICK,),
    feature: Sequence[dict[str, Any]] = (ITEM,),
    columns: dict[str, str] | None = None,
    **more: Any,
) -> Domain:
    """A domain of user u, item i and time t."""
    keys = {"user": "u", "item": "i", "time": "t"} | (columns or {})
    given = {"name": "shop", "source": {"path": "x"}, "columns": keys}
    return parse(given | {"label": list(label), "feature": list(feature)} | more)


def built(events: DataFrame, domain: Domain, days: Days = JANUARY) -> list[dict[str, Any]]:
    """The instances in the table's order."""
    found = instances(events, domain, days, run="r")[0]
    return [row.asDict() for row in found.orderBy(*tables.TEMPORAL).collect()]


def rules(events: DataFrame, domain: Domain, days: Days = JANUARY) -> dict[int, str | None]:
    """The event's column `n` -> the rule it breaks."""
    rejected = instances(events, domain, days, run="r")[1].collect()
    broken = {json.loads(row["raw"])["n"]: row["rule"] for row in rejected}
    return {row["n"]: broken.get(row["n"]) for row in events.collect()}


def test_each_rule_is_broken_by_the_row_that_breaks_it(spark: SparkSession) -> None:
    domain = shop(
        columns={"time_unit": "iso"},
        label=[
            CLICK | {"time_column": "known"},
            {"name": "like", "column": "stars", "at_least": 4},
        ],
        feature=[ITEM, {"name": "price", "column": "price", "kind": "number"}],
        limits={"latest": "2026-01-20"},
    )
    at, later = "2026-01-02T12:00:00Z", "2026-01-02T12:00:01Z"
    wanted: list[tuple[str | None, tuple[str | None, ...]]] = [
        (None, ("ann", "a", at, "1", later, "5", "9.5")),
        (None, ("ann", "b", at, "0", at, None, None)),  # known at once; nothing else is needed
        (None, ("ann", "c", at, None, "", "", " ")),
        ("null_user", (None, "a", at, "1", later, "5", "1")),
        ("null_user", (" ", "a", at, "1", later, "5", "1")),
        ("null_item", ("ann", "", at, "1", later, "5", "1")),
        ("bad_time", ("ann", "d", None, "1", later, "5", "1")),
        ("bad_time", ("ann", "d", "yesterday", "1", later, "5", "1")),
        ("bad_time", ("ann", "d", "2026-02-30T00:00:00Z", "1", later, "5", "1")),
        ("bad_time", ("ann", "d", "12:30", "1", later, "5", "1")),  # of no day
        ("future", ("ann", "d", "2026-01-20T00:00:00Z", "0", None, "5", "1")),
        ("bad_label:click", ("ann", "d", at, "2", later, "5", "1")),
        ("bad_label:click", ("ann", "d", at, "yes", later, "5", "1")),
        ("bad_label:click", ("ann", "d", at, "NaN", later, "5", "1")),
        ("bad_label:like", ("ann", "d", at, "1", later, "five", "1")),
        ("bad_label:like", ("ann", "d", at, "1", later, "-inf", "1")),
        ("bad_label_time:click", ("ann", "d", at, "1", "soon", "5", "1")),
        (
            "label_before_event:click",
            ("ann", "d", at, "1", "2026-01-02T11:59:59.999999Z", "5", "1"),
        ),
        ("bad_number:price", ("ann", "d", at, "1", later, "5", "cheap")),
        ("not_finite:price", ("ann", "d", at, "1", later, "5", "NaN")),
        ("not_finite:price", ("ann", "d", at, "1", later, "5", "Infinity")),
        ("duplicate", ("ann", "a", at, "1", later, "5", "9.5")),
    ]
    rows = [(n, *row) for n, (_, row) in enumerate(wanted)]
    columns = "u string, i string, t string, click string, known string, stars string, price string"
    found = rules(spark.createDataFrame(rows, f"n int, {columns}"), domain)
    twins = {0, len(rows) - 1}  # the same row twice: either is the one that is kept
    assert {found.pop(n) for n in twins} == {None, "duplicate"}
    assert found == {n: rule for n, (rule, _) in enumerate(wanted) if n not in twins}


def test_a_rejected_event_keeps_its_raw_row_the_run_and_a_day(spark: SparkSession) -> None:
    rows = [(None, "a", NOON, None), ("ann", "a", None, 1), ("bo", "b", NOON, 0)]
    events = spark.createDataFrame(rows, "u string, i string, t timestamp, click int")
    found = instances(events, shop(), JANUARY, run="run-7")[1]
    assert found.columns == tables.quarantine(shop()).schema.names
    by_rule = {row["rule"]: row for row in found.collect()}
    assert json.loads(by_rule["null_user"]["raw"]) == {
        "u": None,
        "i": "a",
        "t": "2026-01-02T12:00:00.000Z",
        "click": None,
    }
    assert by_rule["null_user"]["event_date"] == NOON.date()
    assert by_rule["bad_time"]["event_date"] == JANUARY.start
    assert {row["run"] for row in by_rule.values()} == {"run-7"}


def test_of_a_repeated_event_one_is_kept_whatever_the_order_of_the_log(spark: SparkSession) -> None:
    domain = shop(feature=[ITEM, {"name": "price", "column": "price", "kind": "number"}])
    rows = [
        ("ann", "a", NOON, 1, 2.0),
        ("ann", "a", NOON, 1, 3.0),
        ("ann", "a", NOON, 0, 2.0),
        ("ann", "a", NOON, 5, 2.0),  # breaks a rule of its own: never the one to keep
        ("ann", "b", NOON, 1, None),
        ("ann", "a", NOON + timedelta(microseconds=1), 1, 2.0),
        ("bo", "a", NOON, 1, 2.0),
    ]
    schema = "u string, i string, t timestamp, click int, price double"
    kept = []
    for order in (rows, rows[::-1], rows[3:] + rows[:3]):
        events = spark.createDataFrame(order, schema).coalesce(1)
        found = [row.asDict() for row in checked(events, domain, JANUARY).collect()]
        broken = sorted(row["rule"] or "" for row in found)
        assert broken == ["", "", "", "", "bad_label:click", "duplicate", "duplicate"]
        kept.append({row["instance_id"]: row for row in found if row["rule"] is None})
    assert kept[0] == kept[1] == kept[2]


def test_a_request_column_tells_rows_of_one_instant_apart(spark: SparkSession) -> None:
    rows = [("ann", "a", NOON, 1, "r1"), ("ann", "a", NOON, 1, "r2"), ("ann", "b", NOON, 1, "r1")]
    events = spark.createDataFrame(rows, "u string, i string, t timestamp, click int, page string")
    found = built(events, shop(columns={"request": "page"}))
    assert len(found) == 3
    assert len({row["request_id"] for row in found}) == 2
    (without,) = {row["request_id"] for row in built(events, shop())}
    assert without not in {row["request_id"] for row in found}


def test_an_event_belongs_to_its_day_in_utc_and_to_no_other_range(spark: SparkSession) -> None:
    rows = [
        (0, "2026-01-01T23:59:59.999999Z"),
        (1, "2026-01-02T00:00:00Z"),
        (2, "2026-01-02"),
        (3, "2026-01-02T23:59:59.999999Z"),
        (4, "2026-01-03T00:00:00Z"),
        (5, "2026-01-03T01:00:00+02:00"),  # 23:00 of the second
        (6, "2026-01-01T20:00:00-04:00"),  # its first instant
        (7, "2026-01-02 08:30:00"),
    ]
    named = [(f"user{n}", "a", at, 1) for n, at in rows]
    events = spark.createDataFrame(named, "u string, i string, t string, click int")
    domain = shop(columns={"time_unit": "iso"})
    found = built(events, domain, Days(date(2026, 1, 2), date(2026, 1, 3)))
    assert sorted(row["user_key"] for row in found) == [f"user{n}" for n in (1, 2, 3, 5, 6, 7)]
    assert {row["event_date"] for row in found} == {date(2026, 1, 2)}


def test_a_range_of_days_is_the_sum_of_its_days(spark: SparkSession) -> None:
    rows = [("ann", f"i{n}", NOON + timedelta(hours=7 * n), n % 3) for n in range(10)]
    events = spark.createDataFrame(rows, "u string, i string, t timestamp, click int")
    days = Days(date(2026, 1, 2), date(2026, 1, 5))
    single = [row for day in days.chunks(1) for row in built(events, shop(), day)]
    assert single == built(events, shop(), days)
    assert len(single) == 6


DAY_LATER, HOUR_LATER = NOON + timedelta(days=1), NOON + timedelta(hours=1)
LATER = {"time_column": "later"}
NEVER = {"time_column": "never"}
LABELS: list[tuple[dict[str, Any], int | None, datetime | None]] = [
    ({"column": "one"}, 1, NOON),
    ({"column": "zero"}, 0, NOON),
    ({"column": "none"}, None, None),
    ({"always": 1}, 1, NOON),
    ({"column": "one", "delay": "1h"}, 1, HOUR_LATER),
    ({"column": "one", "delay": "1d", "window": "1d"}, 1, DAY_LATER),
    ({"column": "one", "delay": "2d", "window": "1d"}, None, None),
    ({"column": "stars", "at_least": 3.5}, 1, NOON),
    ({"column": "stars", "at_least": 4}, 0, NOON),
    ({"column": "one", "time_column": "t"}, 1, NOON),
    ({"column": "one"} | LATER, 1, HOUR_LATER),
    ({"column": "none"} | LATER, None, None),
    ({"column": "zero", "window": "1d"} | NEVER, 0, DAY_LATER),
    ({"column": "one", "window": "1h"} | LATER, 1, HOUR_LATER),
    ({"column": "one", "window": "59m"} | LATER, None, None),
]


def test_a_label_is_known_within_its_window_or_unknown(spark: SparkSession) -> None:
    names = [f"x{n}" for n in range(len(LABELS))]
    labels = [spec | {"name": name} for name, (spec, _, _) in zip(names, LABELS, strict=True)]
    events = spark.createDataFrame(
        [("ann", "a", NOON, 1.0, 0.0, None, 3.5, HOUR_LATER, None)],
        "u string, i string, t timestamp, one double, zero double, none double, stars double, "
        "later timestamp, never timestamp",
    )
    found = instances(events, shop(label=labels), JANUARY, run="r")[0]
    values = found.select(*(f"label_{name}" for name in names)).collect()[0]
    times = found.select(*(F.unix_micros(f"label_time_{name}") for name in names)).collect()[0]
    known = [at and to_us(at) for _, _, at in LABELS]
    assert list(zip(values, times, strict=True)) == [
        (value, at) for (_, value, _), at in zip(LABELS, known, strict=True)
    ]


def test_fields_become_text_lists_and_numbers(spark: SparkSession) -> None:
    fields = {
        "whole": ({"column": "whole"}, "7"),  # as a whole number, whatever the file made of it
        "blank": ({"column": "blank"}, None),
        "flag": ({"column": "flag"}, "true"),
        "tags": ({"column": "tags", "kind": "multi-category"}, ["01 red", "10"]),
        "path": ({"column": "path", "kind": "sequence", "separator": "."}, ["a", "b", "a"]),
        "none": ({"column": "blank", "kind": "sequence"}, None),
        "codes": ({"column": "codes", "kind": "multi-category"}, ["3", "4"]),
        "price": ({"column": "price", "kind": "number"}, 9.5),
        "yes": ({"column": "flag", "kind": "number"}, 1.0),
        "hour": ({"derive": "hour"}, "12"),
        "weekday": ({"derive": "weekday"}, "4"),  # the second of January 2026 is a Friday
        "month": ({"derive": "month", "kind": "number"}, 1.0),
        "day": ({"derive": "day-of-year"}, "2"),
    }
    domain = shop(feature=[spec | {"name": name} for name, (spec, _) in fields.items()])
    events = spark.createDataFrame(
        [("ann", 5, NOON, 1, 7.0, " ", True, "01 red| |10", "a.b.a", [3.0, None, 4.0], "9.5")],
        "u string, i int, t timestamp, click int, whole double, blank string, flag boolean, "
        "tags string, path string, codes array<double>, price string",
    )
    (row,) = built(events, domain)
    assert {name: row[f"f_{name}"] for name in fields} == {n: v for n, (_, v) in fields.items()}


def test_a_time_is_read_in_its_unit(spark: SparkSession) -> None:
    written: list[tuple[Any, str, object]] = [
        ("s", "bigint", 1_767_355_200),
        ("s", "double", 1_767_355_200.0),
        ("s", "string", " 1767355200 "),
        ("ms", "bigint", 1_767_355_200_000),
        ("us", "bigint", 1_767_355_200_000_000),
        ("us", "string", "1767355200000000"),
        ("timestamp", "timestamp", NOON),
        ("timestamp", "timestamp_ntz", NOON.replace(tzinfo=None)),
        ("iso", "string", "2026-01-02T12:00:00Z"),
        ("iso", "string", "2026-01-02 12:00:00"),
    ]
    schema = ", ".join(f"t{n} {kind}" for n, (_, kind, _) in enumerate(written))
    frame = spark.createDataFrame([tuple(value for _, _, value in written)], schema)
    read = [
        F.unix_micros(moment(F.col(field.name), field.dataType, unit, "t"))
        for field, (unit, _, _) in zip(frame.schema, written, strict=True)
    ]
    assert list(frame.select(*read).collect()[0]) == [to_us(NOON)] * len(written)


def test_a_number_that_is_no_time_is_null_and_never_an_error(spark: SparkSession) -> None:
    whole = spark.createDataFrame([(2**63 - 1,), (-(2**63),), (10**12,)], "t bigint")
    written = spark.createDataFrame([("1e30",), ("soon",), ("",), ("NaN",)], "t string")
    for frame in (whole, written):
        read = moment(F.col("t"), frame.schema["t"].dataType, "s", "t")
        assert [row[0] for row in frame.select(read).collect()] == [None] * frame.count()


def test_a_key_is_the_same_text_whatever_type_the_file_gave_it(spark: SparkSession) -> None:
    for kind, value in (("int", 12), ("bigint", 12), ("double", 12.0), ("string", "12")):
        frame = spark.createDataFrame([(value,)], f"k {kind}")
        written = text(F.col("k"), frame.schema["k"].dataType, "k")
        assert frame.select(written).collect()[0][0] == "12"
    odd = spark.createDataFrame([(0.5,), (math.nan,), (None,)], "k double")
    written = text(F.col("k"), odd.schema["k"].dataType, "k")
    assert [row[0] for row in odd.select(written).collect()] == ["0.5", None, None]


def test_raw_names_never_meet_ours(spark: SparkSession) -> None:
    domain = shop(
        columns={"user": "event_time", "item": "raw", "time": "a.b"},
        label=[{"name": "click", "column": "rule"}],
        feature=[{"name": "item", "column": "instance id`", "side": "item"}],
    )
    schema = "event_time string, raw string, `a.b` timestamp, rule int, `instance id``` string"
    events = spark.createDataFrame([("ann", "a", NOON, 1, "x")], schema)
    (row,) = built(events, domain)
    assert (row["user_key"], row["item_key"], row["f_item"]) == ("ann", "a", "x")


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (
            {"columns": {"user": "usr"}},
            r"'usr' \(did you mean 'user'\?\).*The events have: user, i",
        ),
        ({"label": [{"name": "x", "column": "clicks"}]}, r"'clicks' \(did you mean 'click'\?\)"),
        ({"columns": {"user": "tags"}}, r"columns\.user needs single values.*array<string>"),
        ({"columns": {"time": "i"}}, r'columns\.time: its column is string.*set time_unit = "iso"'),
        ({"columns": {"time": "click"}}, r'is int, .*set time_unit = "s", "ms" or "us"'),
        ({"columns": {"time_unit": "s"}}, r'is timestamp.*set time_unit = "timestamp"'),
        ({"feature": [{"name": "n", "column": "t", "kind": "number"}]}, "'n' needs numbers"),
    ],
)
def test_a_column_that_cannot_serve_is_refused_at_once(
    spark: SparkSession, changed: dict[str, Any], says: str
) -> None:
    schema = "user string, i string, t timestamp, click int, tags array<string>"
    events = spark.createDataFrame([], schema)
    columns = {"user": "user"} | changed.pop("columns", {})
    with pytest.raises(InputError, match=says):
        instances(events, shop(columns=columns, **changed), JANUARY, run="r")


def test_what_a_file_holds_of_a_day_is_the_same_in_whatever_order(
    spark: SparkSession, tmp_path: Path
) -> None:
    times = [NOON, None, NOON + timedelta(days=3), NOON, datetime(2126, 1, 1, tzinfo=UTC)]
    rows = [(f"ann{n}", "a", at, 1) for n, at in enumerate(times)]
    found = []
    for name, order in (("one", rows), ("two", rows[::-1]), ("other", [*rows[:-1], rows[0]])):
        events = spark.createDataFrame(order, "u string, i string, t timestamp, click int")
        events.coalesce(1).write.parquet(str(tmp_path / name))
        held = days_in(spark.read.parquet(str(tmp_path / name)), shop()).collect()
        assert {tmp_path.name in row["file"] for row in held} == {True}
        found.append({row["event_date"]: (row["num_events"], row["content"]) for row in held})
    one, two, other = found
    assert one == two
    counts = {day: n for day, (n, _) in one.items()}
    future = date(2126, 1, 1)
    assert counts == {date(2026, 1, 2): 2, date(2026, 1, 5): 1, None: 1, future: 1}
    # An event more than once is another content than once.
    assert {day for day in one if one[day] != other.get(day)} == {date(2026, 1, 2), future}


# An oracle in plain Python: the same rules written apart, over a log full of faults.


def spark_hash(*values: str | int | bool) -> int:
    """xxhash64 over several values as Spark defines it: each hash is the seed of the next."""
    found = 42
    for value in values:
        if isinstance(value, str):
            data = value.encode()
        else:
            data = int(value).to_bytes(4 if isinstance(value, bool) else 8, "little", signed=True)
        found = xxhash.xxh64_intdigest(data, seed=found)
    return found - 2**64 if found >= 2**63 else found


def oracle(log: Sequence[dict[str, Any]], days: Days) -> tuple[dict[int, Any], list[str]]:
    """Instance id -> its values, and the rules broken, sorted."""
    kept: dict[int, Any] = {}
    broken: list[str] = []
    for event in log:
        at = event["t"]
        if (at.date() if at else days.start) not in days:
            continue
        if not event["u"]:
            broken.append("null_user")
        elif not event["i"]:
            broken.append("null_item")
        elif at is None:
            broken.append("bad_time")
        elif event["click"] not in (None, 0, 1):
            broken.append("bad_label:click")
        elif event["known"] is not None and event["known"] < at:
            broken.append("label_before_event:click")
        elif event["price"] is not None and not math.isfinite(event["price"]):
            broken.append("not_finite:price")
        else:
            request = event["page"] or str(to_us(at))
            key = spark_hash("shop", event["u"], event["i"], request, to_us(at), False)
            if key in kept:
                broken.append("duplicate")
                continue
            known = event["known"] or at + timedelta(days=2)
            is_known = event["click"] is not None and known <= at + timedelta(days=2)
            kept[key] = {
                "user_id": key_id(event["u"]),
                "item_id": key_id(event["i"]),
                "request_id": spark_hash(event["u"], request),
                "event_us": to_us(at),
                "event_date": at.date(),
                "f_price": event["price"],
                "label_click": event["click"] if is_known else None,
                "known_us": to_us(known) if is_known else None,
            }
    return kept, sorted(broken)


def faulty_log(seed: int, num_events: int) -> list[dict[str, Any]]:
    """Events in which repeats differ in nothing, so that it does not matter which is kept."""
    draw = random.Random(seed)
    log = []
    for n in range(num_events):
        at = NOON + timedelta(minutes=draw.randrange(4 * 1440), microseconds=draw.randrange(3))
        late = draw.choice(
            [timedelta(0), timedelta(hours=5), timedelta(days=3), timedelta(hours=-1)]
        )
        log.append(
            {
                "n": n,
                "u": draw.choice(["ann", "bo", "cy", "ann", "bo", None, ""]),
                "i": draw.choice([*"abcdefgh", None]),
                "t": draw.choice([at, at, at, at, None]),
                "page": draw.choice([None, "p1", "p2"]),
                "click": draw.choice([0, 1, 1, None, 2]),
                "known": draw.choice([None, at + late]),
                "price": draw.choice([None, 1.25, -3.0, math.nan, math.inf]),
            }
        )
    return log + draw.sample(log, num_events // 5)


def test_an_oracle_in_plain_python_agrees(spark: SparkSession) -> None:
    log = faulty_log(seed=1, num_events=900)
    domain = shop(
        columns={"request": "page"},
        label=[CLICK | {"time_column": "known", "window": "2d"}],
        feature=[ITEM, {"name": "price", "column": "price", "kind": "number"}],
    )
    days = Days(date(2026, 1, 3), date(2026, 1, 6))
    schema = (
        "n int, u string, i string, t timestamp, page string, click int, known timestamp, "
        "price double"
    )
    events = spark.createDataFrame(log, schema).repartition(3)
    rows = checked(events, domain, days).select(
        "*",
        F.unix_micros("event_time").alias("event_us"),
        F.unix_micros("label_time_click").alias("known_us"),
    )
    found = [row.asDict() for row in rows.collect()]
    kept, broken = oracle(log, days)
    assert len(kept) > 50
    assert {row["rule"] for row in found} == {None, *broken}
    assert sorted(row["rule"] for row in found if row["rule"]) == broken
    instances_found = {row["instance_id"]: row for row in found if row["rule"] is None}
    assert instances_found.keys() == kept.keys()
    for key, wanted in kept.items():
        assert {name: instances_found[key][name] for name in wanted} == wanted
