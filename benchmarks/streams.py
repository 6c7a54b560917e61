"""Building streams in Spark, against the least that such a job can do; and with a heavy user.

`make bench ONLY=streams`: instances of 20 features are made into the temporal-order stream, the
user-order stream and histories by the job, which hashes and scales every feature, checks, and
commits to Delta; and the three tables' columns, their features hashed already, are read in time
order and written by a bare `repartition` + `sortWithinPartitions` + `write` of Parquet. They take
turns in one session. Then the job alone, over as many instances of which one user has 1%.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from benchmarks.fetch_gpu import row
from benchmarks.lakes import spread
from jobs import build_streams
from jobs.spark import session
from pipelines import delta, tables
from pipelines.days import Days, midnight, to_us
from pipelines.domain import Domain
from pipelines.domain import load as load_domain
from pipelines.tables import Table
from pipelines.user_order import with_bucket

FIRST = date(2026, 1, 1)
DAY_US = 86_400_000_000
NUM_DAYS, NUM_CATEGORIES, NUM_NUMBERS = 10, 14, 6
USERS_SHARE = 50
"""Instances a user has, on average."""
HEAVY = 0.01
MOST, MOST_SKEWED = 1.3, 1.5
"""Times the bare job, and times the even log."""


def domain_text() -> str:
    """A domain of 20 features: the first five are the item's, the last numbers."""
    text = (
        'name = "streams"\nsource = {path = "log"}\n'
        'columns = {user = "user", item = "item", time = "at"}\n'
        '[[label]]\nname = "click"\ncolumn = "click"\ndelay = "1h"\n'
    )
    for at in range(NUM_CATEGORIES):
        side = "item" if at < 5 else "context"
        text += f'[[feature]]\nname = "c{at}"\ncolumn = "c{at}"\nside = "{side}"\n'
    for at in range(NUM_NUMBERS):
        text += f'[[feature]]\nname = "n{at}"\ncolumn = "n{at}"\nkind = "number"\n'
    return text


def write_instances(lake: str, domain: Domain, num: int, heavy: float) -> None:
    """`num` instances of random users, a share of them by one user; a day at a time."""
    table, draw = tables.instances(domain), np.random.default_rng(0)
    words = pa.array([f"value {at}" for at in range(1000)])
    sizes = np.diff(np.linspace(0, num, NUM_DAYS + 1).astype(int))
    first = np.concatenate([[0], np.cumsum(sizes)])
    for number, size in enumerate(tqdm(sizes, "instances", unit="day")):
        day = FIRST + timedelta(days=number)
        user = draw.integers(1, max(2, num // USERS_SHARE), size)
        user[draw.random(size) < heavy] = 0
        time_us = to_us(midnight(day)) + draw.integers(0, DAY_US, size)
        known: dict[str, Any] = {
            "event_date": pa.repeat(day, size),
            "user_id": pa.array(spread(user)),
            "instance_id": pa.array(spread(first[number] + np.arange(size))),
            "request_id": pa.array(spread(first[number] + np.arange(size))),
            "item_id": pa.array(spread(draw.zipf(1.3, size) % 100_000)),
            "event_time": pa.array(time_us),
            "is_sampled": pa.repeat(False, size),
            "label_click": pa.array(draw.integers(0, 2, size).astype(np.int8)),
            "label_time_click": pa.array(time_us + 3_600_000_000),
        }
        columns = {}
        for field in table.schema:
            if field.name in known:
                column = known[field.name]
            elif pa.types.is_floating(field.type):
                column = pa.array(draw.standard_normal(size, np.float32))
            else:
                column = words.take(pa.array(draw.zipf(1.2, size) % len(words)))
            columns[field.name] = column.cast(field.type)
        days = Days(day, day + timedelta(days=1))
        delta.replace(lake, table, pa.table(columns), days, commit={"job": "bench"})


def bare(spark: Any, lake: str, made: list[Table], folder: Path) -> None:
    """Rows in time order, hashed already, a day a task: sorted anew and written."""
    for table in made:
        rows = spark.read.format("delta").load(delta.uri(lake, made[0]))
        if "user_bucket" in table.schema.names:
            rows = with_bucket(rows, tables.NUM_BUCKETS)
        rows = rows.select(*table.schema.names)
        order = dict.fromkeys((*table.partition_by, *table.sort_by))
        arranged = rows.repartition(NUM_DAYS, "event_date").sortWithinPartitions(*order)
        place = folder / table.name
        arranged.write.partitionBy("event_date").parquet(str(place))
    shutil.rmtree(folder)


def seconds(do: Callable[[], Any]) -> float:
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        do()
    return time.perf_counter() - started


def run(folder: Path, num: int, turns: int) -> Iterator[dict[str, Any]]:
    """The rows of the benchmark."""
    (folder / "streams.toml").write_text(domain_text())
    domain = load_domain(str(folder / "streams.toml"))
    even, skewed = str(folder / "even"), str(folder / "skewed")
    write_instances(even, domain, num, 0.0)
    write_instances(skewed, domain, num, HEAVY)
    made = [tables.temporal_order(domain), tables.user_order(domain), tables.histories(domain)]
    spark = session()

    def job(lake: str) -> float:
        args = build_streams.Args(domain=str(folder / "streams.toml"), lake=lake)
        return seconds(lambda: build_streams.main(args))

    job(even)  # once, so that Java is warm and there is something to read for the bare job
    taken: dict[str, list[float]] = {"ours": [], "bare": [], "skewed": []}
    for _ in range(turns):
        taken["bare"].append(seconds(lambda: bare(spark, even, made, folder / "bare")))
        taken["ours"].append(job(even))
        taken["skewed"].append(job(skewed))
    sys.stderr.write(f"seconds in turns: {json.dumps(taken)}\n")
    best = {name: min(values) for name, values in taken.items()}
    ours = best["ours"]
    name = f"streams of {num / 1e6:g} M instances"
    yield row(name, ours, "s", "bare write", ours / best["bare"], most=MOST)
    yield row(
        f"{name}, a user with {HEAVY:.0%}", best["skewed"], "s", "even users",
        best["skewed"] / ours, most=MOST_SKEWED,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--instances", type=int, default=10_000_000)
    parser.add_argument("--turns", type=int, default=1, help="of each; the best counts")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = list(run(Path(folder), args.instances, args.turns))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    for found in rows:
        missed = f"   MISSES {found['bar']}" if found["met"] is False else ""
        sys.stdout.write(
            f"{found['name']:44s} {found['value']:>8.1f} {found['unit']:3s} "
            f"{found['ratio']:>6.2f} x {found['against']}{missed}\n"
        )


if __name__ == "__main__":
    main()
