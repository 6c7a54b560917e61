"""polars: `join_asof` for the newest event; for more, the rows before it, by their number.

The file's rows are in order of (user, event_time, instance_id), so the newest K are the K rows that
end where `join_asof` points: ranges of numbers, exploded, and gathered from the events in memory, a
batch of samples at a time. Columns shifted K times beside each event hold K times the events, and
an inner join with a rank holds every user's whole past for each sample: neither fits.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import polars as pl

from benchmarks.contest.world import BATCH, World, batches

LABEL = (
    pl.when(pl.col("label_buy").is_not_null() & (pl.col("label_time_buy") < pl.col("as_of")))
    .then(pl.col("label_buy") + 1)
    .otherwise(0)
    .alias("label_buy")
)
TOKEN = pl.when(pl.col("available_time") < pl.col("as_of")).then(pl.col("token")).alias("token")
WRITTEN = ("sample_id", "event_time", "f_a", "f_b", LABEL, TOKEN)
SAMPLES_A_FILE = 4 * BATCH


def ready(world: World, length: int) -> Callable[[Path], None]:
    return (
        (lambda out: _newest(world, out))
        if length == 1
        else (lambda out: _rows(world, length, out))
    )


def _newest(world: World, out: Path) -> None:
    samples = pl.scan_parquet(world.samples).sort("user_id", "as_of")
    events = pl.scan_parquet(world.events).with_columns(at=pl.col("event_time"))
    samples.join_asof(
        events, left_on="as_of", right_on="at", by="user_id", strategy="backward",
        allow_exact_matches=False, check_sortedness=False,
    ).select(*WRITTEN).collect().write_parquet(out, compression="lz4")  # fmt: skip


def _rows(world: World, length: int, out: Path) -> None:
    out.mkdir()
    events = pl.read_parquet(world.events)
    keys = events.select("user_id", "event_time").with_row_index("last")
    keys = keys.with_columns(pl.col("last").cast(pl.Int64))
    keys = keys.with_columns(first=pl.col("last").first().over("user_id"))
    placed = (
        pl.read_parquet(world.samples)
        .sort("user_id", "as_of")
        .join_asof(
            keys, left_on="as_of", right_on="event_time", by="user_id", strategy="backward",
            allow_exact_matches=False, check_sortedness=False,
        )
        .drop_nulls("last")
        .sort("sample_id")
    )  # fmt: skip
    for some in batches(len(placed), SAMPLES_A_FILE):
        start = pl.max_horizontal("first", pl.col("last") + 1 - length)
        wanted = (
            placed[some]
            .select("sample_id", "as_of", row=pl.int_ranges(start, pl.col("last") + 1))
            .explode("row")
        )
        found = pl.concat(
            [wanted.drop("row"), events[wanted["row"]].drop("user_id")], how="horizontal"
        )
        found.select(*WRITTEN).write_parquet(out / f"{some.start}.parquet", compression="lz4")
