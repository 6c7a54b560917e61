"""A sample's past written out, on rows that fit on the screen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession

from pipelines.domain import parse
from pipelines.materialized import OTHER_FORMAT, TWICE, materialized
from pipelines.token_format import TokenFormat

DOMAIN = parse(
    {
        "name": "shop",
        "source": {"path": "x"},
        "columns": {"user": "u", "item": "i", "time": "t"},
        "label": [{"name": "buy", "column": "b"}],
        "feature": [{"name": "item", "column": "i", "side": "item", "buckets": 64}],
    }
)
FORM = TokenFormat("float16", 1)
Rows = list[tuple[Any, ...]]


def half(value: float) -> bytearray:
    return bytearray(np.float16(value).tobytes())


def written_out(spark: SparkSession, samples: Rows, happened: Rows, published: Rows) -> DataFrame:
    """Of one user, three events back; times are seconds."""
    time = "timestamp_seconds({0}) AS {0}"
    return materialized(
        spark.createDataFrame(samples, "instance_id long, as_of long").selectExpr(
            "instance_id", "7L AS user_id", "1L AS item_id", "1L AS request_id",
            time.format("as_of"), "false AS is_sampled", "DATE'1970-01-01' AS event_date",
        ),
        spark.createDataFrame(
            happened,
            "instance_id long, event_time long, f_item int, label_buy byte, label_time_buy long",
        ).selectExpr(
            "7L AS user_id", "instance_id", "f_item", "label_buy",
            *map(time.format, ("event_time", "label_time_buy")),
        ),
        spark.createDataFrame(
            published, "instance_id long, available_time long, token binary"
        ).selectExpr("7L AS user_id", "instance_id", time.format("available_time"), "token"),
        DOMAIN,
        length=3,
        form=FORM,
    )  # fmt: skip


def test_a_sample_reads_what_had_happened_was_published_and_known_before_it(
    spark: SparkSession,
) -> None:
    """5 and 4 happen at one instant, 3 is asked of as it happens."""
    happened: Rows = [  # instance, second, item, bought, when that is known
        (1, 10, 11, 1, 20),
        (5, 20, 15, 0, 40),
        (4, 20, 14, 1, 30),
        (3, 30, 13, 1, 90),
    ]
    published: Rows = [(1, 20, half(1.5)), (4, 25, half(4.0)), (3, 95, half(3.0))]  # none of 5
    samples: Rows = [(100, 10), (101, 20), (102, 30), (3, 30), (103, 91), (104, 99)]
    found = written_out(spark, samples, happened, published)
    read = {
        row["instance_id"]: (
            [float(np.frombuffer(token, np.float16)[0]) for token in row["token"]],
            "".join("#" if here else "." for here in row["mask"]),
            "".join("#" if here else "." for here in row["token_mask"]),
            row["gap_s"],
            row["f_item"],
            row["label_buy"],
        )
        for row in found.collect()
    }
    assert read == {
        100: ([0, 0, 0], "...", "...", [0, 0, 0], [0, 0, 0], [0, 0, 0]),
        101: ([0, 0, 0], "..#", "...", [0, 0, 10], [0, 0, 11], [0, 0, 0]),
        102: ([1.5, 4, 0], "###", "##.", [20, 10, 10], [11, 14, 15], [2, 0, 0]),
        3: ([1.5, 4, 0], "###", "##.", [20, 10, 10], [11, 14, 15], [2, 0, 0]),
        103: ([4, 0, 0], "###", "#..", [71, 71, 61], [14, 15, 13], [2, 1, 2]),
        104: ([4, 0, 3], "###", "#.#", [79, 79, 69], [14, 15, 13], [2, 1, 2]),
    }


@pytest.mark.parametrize(
    ("events", "tokens", "says"),
    [([2, 1, 1], [], TWICE), ([1], [b"12", b"34"], TWICE), ([1], [b"123"], OTHER_FORMAT)],
)
def test_rows_that_no_index_would_take_end_the_run(
    spark: SparkSession, events: list[int], tokens: list[bytes], says: str
) -> None:
    happened: Rows = [(instance, 10, 1, 1, 20) for instance in events]
    published: Rows = [(1, 20, bytearray(token)) for token in tokens]
    with pytest.raises(PySparkException, match=says):
        written_out(spark, [(9, 30)], happened, published).collect()
