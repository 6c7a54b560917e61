"""A day costs a day: the time and the bytes read to build a day of a lake that holds 60.

`make bench ONLY=day_cost`: a seeded log of one Parquet file a day is built day by day, as a
schedule would, in one Spark session, each day walked by a compressor line and indexed. Its last ten
days take turns with days 2 to 11 of a second lake, so that both meet the same machine and the same
warm Java. Flat means that they take, and read, at most 1.2 times what those do.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from downstream.user_index import UserIndex
from jobs import build_instances, build_samples, build_streams, ledger, train_compressor
from jobs.spark import session
from pipelines.days import Days, midnight, to_us
from pipelines.domain import load

FIRST = date(2026, 1, 1)
BAR = 1.2
UNITS = ("s", "core s", "bytes read")
WINDOW = 3
"""Days before each that the compressor line reads."""
TURNS = 10
"""Days of each lake that are compared."""
DOMAIN = """
name = "days"
source = {path = "log"}
columns = {user = "user", item = "item", time = "at", time_unit = "us"}
[[label]]
name = "click"
column = "click"
[[feature]]
name = "item"
column = "item"
side = "item"
[[feature]]
name = "brand"
column = "brand"
side = "item"
[[feature]]
name = "price"
column = "price"
kind = "number"
"""


def write_day(folder: Path, day: date, num_events: int, num_users: int) -> None:
    """One day's events as one file of the log."""
    draw = np.random.default_rng(day.toordinal())
    item = draw.zipf(1.3, num_events) % 5000
    table = {
        "user": draw.integers(0, num_users, num_events),
        "item": item,
        "brand": item % 97,
        "price": draw.lognormal(size=num_events),
        "click": draw.integers(0, 2, num_events),
        "at": to_us(midnight(day)) + np.sort(draw.integers(0, 86_400_000_000, num_events)),
    }
    pq.write_table(pa.table(table), folder / f"{day}.parquet")


def read_so_far(pids: list[int]) -> int:
    """Bytes that processes have read, from files, pipes and caches alike."""
    lines = [Path(f"/proc/{pid}/io").read_text().splitlines()[0] for pid in pids]
    return sum(int(line.removeprefix("rchar: ")) for line in lines)


def core_s_so_far(pids: list[int]) -> float:
    """Seconds that cores have worked for processes: what else a machine does is not in them."""
    stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(ticks) for stat in stats for ticks in stat[11:13]) / os.sysconf("SC_CLK_TCK")


def measured(pids: list[int], work: Callable[[], Any]) -> tuple[float, float, int]:
    """As UNITS."""
    read, core_s, started = read_so_far(pids), core_s_so_far(pids), time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        work()
    wall_s = time.perf_counter() - started
    return wall_s, core_s_so_far(pids) - core_s, read_so_far(pids) - read


@dataclass(frozen=True)
class Schedule:
    """A log that gains a day at a time, and the lake of the days so far."""

    root: Path
    num_events: int
    num_users: int
    pids: list[int]

    def begin(self) -> None:
        (self.root / "log").mkdir(parents=True)
        (self.root / "days.toml").write_text(DOMAIN)

    def day(self, number: int) -> dict[str, tuple[float, float, int]]:
        """What each part of the next day cost, by its name."""
        day = FIRST + timedelta(days=number)
        write_day(self.root / "log", day, self.num_events, self.num_users)
        file, lake = str(self.root / "days.toml"), str(self.root / "lake")
        only: dict[str, Any] = {
            "domain": file, "lake": lake, "start": day, "end": day + timedelta(days=1)
        }  # fmt: skip
        line = only | ({"parent": "user"} if number else {"window": WINDOW}) | {"device": "cpu"}
        index = partial(UserIndex.extended, lake, load(file), self.root / "index", lines=["user"])
        work: dict[str, Callable[[], Any]] = {
            "instances": partial(build_instances.main, build_instances.Args(**only)),
            "streams and histories": partial(build_streams.main, build_streams.Args(**only)),
            "samples": partial(build_samples.main, build_samples.Args(**only)),
            "tokens": partial(train_compressor.main, train_compressor.Args(**line)),
            "user index": partial(index, days=Days(FIRST, day + timedelta(days=1))),
        }
        costs = {name: measured(self.pids, do) for name, do in work.items()}
        told = ", ".join(f"{name} {cost[0]:.1f} s" for name, cost in costs.items())
        sys.stderr.write(f"{self.root.name} {day}: {told}\n")
        return costs


def run(num_days: int, num_events: int, num_users: int, root: Path) -> list[dict[str, Any]]:
    """Every day through every job; the rows of the benchmark."""
    spark = session("local[2]", memory="2g")
    jvm: Any = spark.sparkContext._jvm
    pids = [os.getpid(), int(jvm.java.lang.ProcessHandle.current().pid())]
    old, young = (Schedule(root / name, num_events, num_users, pids) for name in ("old", "young"))
    for schedule, alone in ((old, num_days - TURNS), (young, 1)):
        schedule.begin()
        for number in range(alone):
            schedule.day(number)
    pairs = []
    for turn in range(TURNS):
        both = [(old, num_days - TURNS + turn), (young, 1 + turn)]
        costs = {s.root: s.day(number) for s, number in (both if turn % 2 else both[::-1])}
        pairs.append((costs[old.root], costs[young.root]))
    return [row for name in pairs[0][0] for row in rows_of(name, pairs)]


def rows_of(
    name: str, pairs: Sequence[tuple[dict[str, tuple[float, float, int]], ...]]
) -> list[dict[str, Any]]:
    """What the old lake's days cost over what the young one's do, in medians."""
    made = []
    for place, unit in enumerate(UNITS):
        late, early = (statistics.median(pair[of][name][place] for pair in pairs) for of in (0, 1))
        made.append(
            {
                "name": f"{name}, {unit} a day", "value": late, "unit": unit,
                "against": f"days 2 to {TURNS + 1}", "ratio": late / early, "bar": BAR,
                "met": late / early <= BAR, "machine": ledger.machine(),
            }
        )  # fmt: skip
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--days", type=int, default=60)
    parser.add_argument("--events", type=int, default=5_000, help="a day")
    parser.add_argument("--users", type=int, default=1_000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.days <= TURNS:
        parser.error(f"--days must be more than {TURNS}: the last {TURNS} are compared")
    with tempfile.TemporaryDirectory() as folder:
        rows = run(args.days, args.events, args.users, Path(folder))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    for row in rows:
        value = f"{row['value']:.2f}" if row["unit"] != UNITS[-1] else f"{row['value'] / 1e6:.1f} M"
        sys.stdout.write(
            f"{row['name']:38s} {value:>9s}  {row['ratio']:.2f} x {row['against']}"
            f"{'' if row['met'] else '   MISSES ' + str(row['bar'])}\n"
        )


if __name__ == "__main__":
    main()
