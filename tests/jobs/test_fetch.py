from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from jobs.fetch import Args, main
from pipelines import delta, tables, token_format
from pipelines.days import Days, to_us
from pipelines.domain import load
from pipelines.errors import InputError
from pipelines.keys import key_id
from pipelines.token_format import TokenFormat

DOMAIN = """
name = "shop"
source = {path = "x"}
columns = {user = "u", item = "i", time = "t"}
[[label]]
name = "buy"
column = "buy"
[[feature]]
name = "brand"
column = "brand"
side = "item"
"""
NOON = datetime(2026, 3, 2, 12, tzinfo=UTC)
COMMIT = {"job": "test"}


@pytest.fixture
def args(tmp_path: Path) -> dict[str, Any]:
    """A lake in which user ann has an event an hour, the last at noon, some with tokens."""
    lake, file = str(tmp_path / "lake"), tmp_path / "shop.toml"
    file.write_text(DOMAIN)
    domain = load(str(file))
    times = [NOON - timedelta(days=1), NOON - timedelta(hours=2), NOON - timedelta(hours=1), NOON]
    num = len(times)
    rows = {
        "instance_id": list(range(num)),
        "user_id": [key_id("ann")] * num,
        "item_id": [70 + i for i in range(num)],
        "request_id": list(range(num)),
        "event_time": times,
        "is_sampled": [False] * num,
        "user_bucket": [0] * num,
        "f_brand": [3] * num,
        "label_buy": [1, 0, 1, 1],
        "label_time_buy": [NOON - timedelta(1), NOON - timedelta(minutes=1), NOON, NOON],
        "event_date": [t.date() for t in times],
        "user_key": ["ann"] * num,
        "item_key": [f"item{i}" for i in range(num)],
        "request_key": ["r"] * num,
        "compressor_line": ["main"] * num,
        "compressor_version": ["v"] * num,
        "available_time": [NOON - timedelta(hours=12), NOON, NOON, NOON],
        "token": token_format.encode(np.full((num, 4), 0.5)),
    }
    days = Days(times[0].date(), NOON.date() + timedelta(days=1))

    def write(table: tables.Table, kept: slice, **changed: Any) -> None:
        columns = {n: (rows | changed)[n] for n in table.schema.names}
        made = pa.table(
            {n: pa.array(c[kept], table.schema.field(n).type) for n, c in columns.items()}
        )
        line = "main" if "compressor_line" in columns else None
        delta.replace(lake, table, made, days, commit=COMMIT, line=line)

    write(tables.histories(domain), slice(None))
    write(tables.instances(domain), slice(None), f_brand=["Acme"] * num)
    token_format.declare(lake, tables.instance_tokens("shop"), TokenFormat("float16", 4))
    write(tables.instance_tokens("shop"), slice(0, 2))
    return {"domain": str(file), "lake": lake, "user": "ann", "as_of": "2026-03-02T12:00"}


def test_a_user_is_shown_as_a_ranker_of_that_moment_reads_it(
    args: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    found = main(Args(**args, line="main"))
    assert [e["item"] for e in found["events"]] == ["item0", "item1", "item2"]
    assert [e["token"] for e in found["events"]] == ["read", "later", "none"]
    assert [e["labels"]["buy"] for e in found["events"]] == ["positive", "negative", "unknown"]
    assert found["events"][0]["values"] == {"f_brand": "Acme"}
    assert found["events"][0]["buckets"] == {"f_brand": 3}
    assert capsys.readouterr().out.splitlines()[1:] == [
        "event time           ago   item   token  brand  buy",
        "2026-03-01T12:00:00  1.0d  item0  1.000  Acme   positive",
        "2026-03-02T10:00:00  2.0h  item1  later  Acme   negative",
        "2026-03-02T11:00:00  1.0h  item2  none   Acme   unknown",
        "3 events, 1 tokens of line main (norms shown, width 4)",
    ]


def test_a_moment_may_name_its_own_zone_and_a_line_is_optional(args: dict[str, Any]) -> None:
    found = main(Args(**args | {"as_of": "2026-03-02T14:00:01+02:00", "length": 1}))
    assert found["as_of"] == "2026-03-02T12:00:01+00:00"
    assert [e["item"] for e in found["events"]] == ["item3"]
    assert found["token_width"] == 0


def test_who_is_not_there_is_said_to_be_so(
    args: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(Args(**args | {"user": "bob"}, line="main"))["events"] == []
    assert "not in shop by then" in capsys.readouterr().out
    main(Args(**args | {"as_of": "2026-03-01T12:00"}, line="main"))
    assert "no event before then" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"as_of": "yesterday"}, "--as-of must be ISO 8601.*'yesterday'"),
        ({"length": 0}, "--length must be at least 1, got 0"),
        ({"line": "mian"}, "no tokens of line 'mian'; lines there: main"),
        ({"lake": "/nowhere"}, "has no table histories/shop"),
    ],
)
def test_what_cannot_be_fetched_says_why(
    args: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        main(Args(**args | change))


def test_keys_are_hashed_as_spark_hashes_them(spark: SparkSession) -> None:
    keys = ["", "1", "ann", "Zoë Ω 漢字", "x" * 31, "x" * 32, "x" * 1000]
    rows = spark.createDataFrame([(key,) for key in keys], "key string")
    found = {row[0]: row[1] for row in rows.select("key", F.xxhash64("key")).collect()}
    assert found == {key: key_id(key) for key in keys}


def test_moments_are_exact(args: dict[str, Any]) -> None:
    made = Args(**args | {"as_of": "2026-03-02T12:00:00.000001"})
    assert to_us(made.moment) == to_us(NOON) + 1
