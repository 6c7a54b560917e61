"""Spark, the newest K events: a window of samples and events together, and `collect_list`.

Events are numbered as they go by, samples take the number of the last event before them, and the
list is of a range of numbers: a frame of rows would count the samples in between, and one of a
user's whole past would be as many lists as events, each as long as the past.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pyspark.sql import Window
from pyspark.sql import functions as F  # noqa: N812

from benchmarks.contest.spark_asof import so_far, together
from benchmarks.contest.world import World


def ready(world: World, length: int) -> Callable[[Path], None]:
    rows = together(world).withColumn("number", F.sum("is_event").over(so_far()))
    newest = (
        Window.partitionBy("user_id").orderBy("number").rangeBetween(1 - length, Window.currentRow)
    )
    found = rows.withColumn("events", F.collect_list("event").over(newest)).where("is_event = 0")
    label = F.transform(
        "events",
        lambda e: F.when(
            e["label_buy"].isNotNull() & (e["label_time_buy"] < F.col("at")), e["label_buy"] + 1
        ).otherwise(0),
    )
    token = F.transform("events", lambda e: F.when(e["available_time"] < F.col("at"), e["token"]))
    found = found.select(
        "sample_id", *(F.col(f"events.{name}") for name in ("event_time", "f_a", "f_b")),
        label.alias("label_buy"), token.alias("token"),
    )  # fmt: skip
    return lambda out: found.write.option("compression", "lz4_raw").parquet(str(out))
