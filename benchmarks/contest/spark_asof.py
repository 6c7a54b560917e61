"""Spark, the newest event: samples and events in one table, `last(ignorenulls)` over the user.

A sample comes before the events of its own instant, so that they are its future.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pyspark.sql import Column, DataFrame, Window, WindowSpec
from pyspark.sql import functions as F  # noqa: N812

from benchmarks.contest.world import World
from jobs.spark import session

EVENT = ("event_time", "f_a", "f_b", "label_buy", "label_time_buy", "token", "available_time")


def ready(world: World, length: int) -> Callable[[Path], None]:
    if length != 1:
        raise ValueError(f"only the newest event can be had so: length {length}")
    rows = together(world)
    newest = F.last("event", ignorenulls=True).over(so_far())
    found = rows.withColumn("event", newest).where("is_event = 0")
    found = found.select("sample_id", "at", "event.*")
    found = found.select("sample_id", "event_time", "f_a", "f_b", *values(F.col("at")))
    return lambda out: found.write.option("compression", "lz4_raw").parquet(str(out))


def so_far() -> WindowSpec:
    """All of a user's rows up to each; there is a session by now."""
    in_order = Window.partitionBy("user_id").orderBy("at", "is_event", "instance_id")
    return in_order.rowsBetween(Window.unboundedPreceding, Window.currentRow)


def together(world: World) -> DataFrame:
    """Samples and events, an event in a struct of its own that samples lack."""
    spark = session()
    events = spark.read.parquet(str(world.events)).select(
        F.lit(None).cast("long").alias("sample_id"), "user_id", F.col("event_time").alias("at"),
        F.lit(1).alias("is_event"), "instance_id", F.struct(*EVENT).alias("event"),
    )  # fmt: skip
    samples = spark.read.parquet(str(world.samples)).select(
        "sample_id", "user_id", F.col("as_of").alias("at"), F.lit(0).alias("is_event")
    )
    return events.unionByName(samples, allowMissingColumns=True)


def values(as_of: Column) -> tuple[Column, Column]:
    """The label and the token of an event as they were known at a moment."""
    is_known = F.col("label_buy").isNotNull() & (F.col("label_time_buy") < as_of)
    return (
        F.when(is_known, F.col("label_buy") + 1).otherwise(0).cast("int").alias("label_buy"),
        F.when(F.col("available_time") < as_of, F.col("token")).alias("token"),
    )
