"""Spark, the newest K events, the better way: events are numbered, samples ask for numbers.

The window of `spark_window.py` makes a list at every event; here a sample's K numbers are exploded
and joined with the events, and only then gathered.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pyspark.sql import functions as F  # noqa: N812

from benchmarks.contest.spark_asof import EVENT, so_far, together, values
from benchmarks.contest.world import World


def ready(world: World, length: int) -> Callable[[Path], None]:
    rows = together(world).withColumn("number", F.sum("is_event").over(so_far()))
    events = rows.where("is_event = 1").select("user_id", "number", "event.*")
    first = F.greatest(F.lit(1), F.col("number") + 1 - length)
    wanted = rows.where("is_event = 0 AND number > 0").select(
        "sample_id", "at", "user_id", F.explode(F.sequence(first, "number")).alias("number")
    )
    found = wanted.join(events, ["user_id", "number"])
    found = found.select("sample_id", "number", *EVENT[:3], *values(F.col("at")))
    # Structs are gathered together, and sorted by their first column.
    gathered = found.groupBy("sample_id").agg(
        F.sort_array(F.collect_list(F.struct("number", *EVENT[:3], "label_buy", "token"))).alias(
            "e"
        )
    )
    lists = (F.col(f"e.{name}") for name in (*EVENT[:3], "label_buy", "token"))
    written = gathered.select("sample_id", *lists)
    return lambda out: written.write.option("compression", "lz4_raw").parquet(str(out))
