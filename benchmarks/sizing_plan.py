"""From what an instance costs to what a day costs: the formulas and tables of docs/sizing.md.

`make bench ONLY=sizing_plan` prints the tables from benchmarks/sizing.json, the rows of the last
full run of benchmarks/sizing.py; with ARGS='--write' it puts them into docs/sizing.md, which a test
compares. `--instances`, `--features` and the others are your own log's.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from compressor.configs import TrainingConfig
from downstream.index_files import ROWS_AT_ONCE
from jobs.spark import ROWS_PER_FILE
from pipelines.tables import NUM_BUCKETS

HERE = Path(__file__).parent
ROWS, PAGE = HERE / "sizing.json", HERE.parent / "docs" / "sizing.md"
TABLES = ("instances", "temporal_order", "user_order", "histories", "ranker_samples")
CHECKPOINT_COMMITS = 10
"""Delta's default: a checkpoint, which names every file of the table, after so many commits."""
HOUR = 3600.0
MOST_HELD = 4_000_000
"""Events of a day's bucket that fit into any machine's memory."""
STEP_S = 0.046
"""Of the compressor's training on an H100, as the README has it; no GPU is measured here."""


@dataclass(frozen=True)
class Measured:
    """The rows of a run: what an instance costs."""

    rows: Sequence[Mapping[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Measured:
        return cls(json.loads(path.read_text()))

    @cached_property
    def values(self) -> dict[tuple[str, int, int], float]:
        return {(r["name"], r["instances"], r["features"]): r["value"] for r in self.rows}

    @cached_property
    def features(self) -> int:
        """Of the log that all sizes were measured on."""
        return min(int(row["features"]) for row in self.rows)

    def sizes(self, name: str) -> list[int]:
        """Instances that a cost was measured of, fewest first."""
        return sorted({size for n, size, f in self.values if n == name and f == self.features})

    def cost(self, name: str, features: int | None = None) -> float:
        """Of an instance among many; for another number of features, by what one more of them cost
        where a wider log was measured."""
        base = self.further(name)[-1] if _has_fixed_part(name) else self.last(name)
        wider = [(size, f) for n, size, f in self.values if n == name and f > self.features]
        if features is None or features == self.features or not wider:
            return base
        size, wide = wider[0]
        more = self.values[name, size, wide] - self.values[name, size, self.features]
        return base + (features - self.features) * more / (wide - self.features)

    def last(self, name: str) -> float:
        """Of the most instances measured."""
        return self.values[name, self.sizes(name)[-1], self.features]

    def further(self, name: str) -> list[float]:
        """What each further instance costs from one size to the next: what is fixed (Spark's first
        job, an import, a commit) is in no difference."""
        sizes = self.sizes(name)
        totals = [size * self.values[name, size, self.features] for size in sizes]
        steps = zip(sizes, sizes[1:], totals, totals[1:], strict=False)
        return [(after - before) / (to - since) for since, to, before, after in steps] or [
            self.last(name)
        ]


def _has_fixed_part(name: str) -> bool:
    return name.endswith(("core s a million", "memory a row"))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A log, and how long what is made of it is kept."""

    instances: int
    """A day."""
    features: int
    events_of_user: int = 5
    """Instances of a user a day, in the mean over all users of the index."""
    instances_of_item: int = 100
    """A day, in the mean over the items that occur on it."""
    events_of_file: int = 1_000_000
    """Events in a file of the raw log."""
    index_days: int = 60
    """Days of the past in the user index."""
    kept_days: int = 365
    """Days that the lake keeps."""
    window_h: float = 4.0
    """Hours in which a day's work must be done."""


def files(plan: Plan) -> int:
    """Of one table, a day."""
    return math.ceil(plan.instances / ROWS_PER_FILE)


def table_bytes(m: Measured, plan: Plan, name: str) -> float:
    """Of one table, a day."""
    features = None if name == "instance_tokens" else plan.features
    return m.cost(f"{name}, bytes", features) * plan.instances


def shuffled(m: Measured, plan: Plan, name: str) -> float:
    """Bytes that Spark moves to make a day of one table."""
    return m.cost(f"{name}, shuffled", plan.features) * plan.instances


def core_s(m: Measured, plan: Plan, name: str) -> float:
    """Seconds of one core to make a day of one table."""
    return m.cost(f"{name}, core s a million", plan.features) * plan.instances / 1e6


def token_core_s(m: Measured, plan: Plan) -> float:
    """Seconds of one core to write a day's tokens."""
    return m.cost("tokens, core s a million") * plan.instances / 1e6


def training_steps(plan: Plan) -> float:
    """Of the streaming protocol, a day: units are users' days, replayed ones among them."""
    training = TrainingConfig()
    units = plan.instances / plan.events_of_user * (1 + training.replay)
    return units / training.batch_units


def index_events(plan: Plan) -> int:
    return plan.instances * plan.index_days


def index_bytes(m: Measured, plan: Plan) -> float:
    """Of the user index with one line's tokens, on disk and in the page cache."""
    users = plan.instances / plan.events_of_user
    of_event = m.cost("index, bytes of an event") * index_events(plan)
    return of_event + m.cost("index, bytes of a user") * users


def buckets(plan: Plan) -> int:
    """User buckets with which the index's builder holds no more than MOST_HELD events at a time."""
    return max(NUM_BUCKETS, math.ceil(plan.instances / MOST_HELD))


def index_memory(m: Measured, plan: Plan, num_buckets: int) -> float:
    """Bytes that the index's builder holds: parts of a day, at least one bucket whole."""
    at_once = max(min(plan.instances, ROWS_AT_ONCE), plan.instances / num_buckets)
    return m.cost("index, memory a row at once") * at_once


def log_bytes(m: Measured, plan: Plan, name: str) -> float:
    """That one day's commit adds to a table's log."""
    return m.cost(f"{name}, log of a commit") + files(plan) * m.cost(f"{name}, log of a file")


def checkpoint_bytes(m: Measured, plan: Plan) -> float:
    """Of a table's newest checkpoint, once the lake is `kept_days` old."""
    return m.cost("checkpoint, bytes of a file") * files(plan) * plan.kept_days


def all_checkpoints_bytes(m: Measured, plan: Plan) -> float:
    """Of all checkpoints of a table by then: each names all files so far, and none is dropped as
    long as the log is kept."""
    return checkpoint_bytes(m, plan) * plan.kept_days / CHECKPOINT_COMMITS / 2


def raw_log_files(plan: Plan) -> int:
    return math.ceil(plan.instances / plan.events_of_file) * plan.kept_days


def item_state_bytes(m: Measured, plan: Plan) -> float:
    """Of the newest row of each item, if a day's items are all there are: vector and count in
    float32, id and day in int64."""
    items = plan.instances / plan.instances_of_item
    return items * (4 * m.cost("tokens, width") + 20)


@dataclass(frozen=True)
class Stop:
    """What one process or one task has to hold or do, and what is taken to be too much."""

    what: str
    where: str
    need: Callable[[Measured, Plan], float]
    limit: float
    unit: str
    instead: str


MACHINE, DISK = 512e9, 8e12
STOPS = (
    Stop(
        "a day of `instances` is one Spark task", "`pipelines/instances.py` `checked`",
        lambda m, p: core_s(m, p, "instances") / HOUR, 4.0, "h",
        "split the task by a hash of instance_id (sampled negatives need the whole day)",
    ),
    Stop(
        "that task's local disk: its shuffle and what it spills", "as above",
        lambda m, p: shuffled(m, p, "instances")
        + m.cost("instances, spilled", p.features) * p.instances, DISK, "bytes",
        "as above; until then executors with that much disk",
    ),
    Stop(
        "a day of any other table is one task (here: the slowest)",
        "`jobs/spark.py` `replace`: no job passes files_per_day",
        lambda m, p: max(core_s(m, p, name) for name in TABLES[1:]) / HOUR, 4.0, "h",
        "pass files_per_day: user-major tables are then split by user, as they must be",
    ),
    Stop(
        "a day of the stream in one process (training; with --window W, W + 1 days)",
        "`jobs/train_compressor.py`",
        lambda m, p: m.cost("training, memory a row") * p.instances, MACHINE, "bytes",
        "a share of the users, by bucket, in each process",
    ),
    Stop(
        "a day of the stream in one process (tokens; give --start and --end of one day, or it "
        "reads 30)", "`jobs/write_tokens.py`",
        lambda m, p: m.cost("tokens, memory a row") * p.instances, MACHINE, "bytes",
        "a predicate by bucket for each process's write",
    ),
    Stop(
        "the index on one machine's disk", "`downstream/index_build.py`",
        lambda m, p: index_bytes(m, p), DISK, "bytes",
        "fewer days, or an index for each share of the buckets",
    ),
    Stop(
        f"one of {NUM_BUCKETS} buckets of a day, which the index's builder holds",
        "`pipelines/tables.py` NUM_BUCKETS",
        lambda m, p: index_memory(m, p, NUM_BUCKETS), MACHINE, "bytes",
        "NUM_BUCKETS as above, before the first day is built",
    ),
    Stop(
        "every item's newest token in one process", "`compressor/item_state.py`",
        item_state_bytes, MACHINE, "bytes", "a share of the items in each process",
    ),
    Stop(
        "the raw log's files as Python rows, at every build", "`jobs/raw_log.py`",
        lambda m, p: m.cost("raw_files, memory of a file") * raw_log_files(p), 64e9, "bytes",
        "larger files",
    ),
    Stop(
        "every file of a table in one process, at every look", "`pipelines/delta.py`",
        lambda m, p: m.cost("open table, memory of a file") * files(p) * p.kept_days, 64e9,
        "bytes", "fewer days in the lake",
    ),
)  # fmt: skip


def most_instances(m: Measured, plan: Plan, stop: Stop) -> float:
    """A day at which the limit is met; every need grows in proportion."""
    large = replace(plan, instances=10**10)
    return 10**10 * stop.limit / stop.need(m, large)


def measured_tables(m: Measured) -> str:
    """What each table costs an instance."""
    kinds = ("key", "label", "token", "category", "number")
    head = ["table", "bytes", *kinds, "files a day", "rows/s, a core", "shuffled", "spilled"]
    head += ["log of a commit", "of a file"]
    lines = []
    for name in (*TABLES, "instance_tokens"):
        here = {n for n, *_ in m.values if n.startswith(f"{name}, ")}
        each = [f"{name}, bytes of a {kind}" for kind in kinds]
        cells = [_plain(m.cost(n)) if n in here else "" for n in each]
        is_spark = name in TABLES
        rate = 1e6 / (
            m.cost(f"{name}, core s a million") if is_spark else m.cost("tokens, core s a million")
        )
        moved = [m.cost(f"{name}, {x}") for x in ("shuffled", "spilled")] if is_spark else []
        lines.append(
            [
                f"`{name}`", _plain(m.cost(f"{name}, bytes")), *cells,
                _plain(m.cost(f"{name}, files a day")), f"{round(rate, -2):,.0f}",
                *(map(_plain, moved) if moved else ("", "")),
                f"{m.cost(f'{name}, log of a commit'):,.0f}",
                f"{m.cost(f'{name}, log of a file'):,.0f}",
            ]
        )  # fmt: skip
    return _table(head, lines)


OTHERS = {
    "log, bytes": "raw log, an event",
    "instances job, core s a million": "`build-instances`, a million instances: time of one core",
    "streams job, core s a million": "`build-streams`, a million",
    "ranker_samples job, core s a million": "`build-samples`, a million",
    "tokens, core s a million": "`write-tokens`, a million",
    "walk with training, core s a million": "`train-compressor`, a million (a line's first day)",
    "index, core s a million": "index build, a million events",
    "instances job, memory of Java": "`build-instances`, Spark's memory",
    "streams job, memory of Java": "`build-streams`, Spark's memory",
    "training, memory a row": "`train-compressor`, memory for an instance read",
    "tokens, memory a row": "`write-tokens`, memory for an instance read",
    "index, memory a row at once": "index build, memory for a row that it holds (as it was before)",
    "index, memory of a user and day": "index build, memory for a user's day, all days at once",
    "index, bytes of an event": "index, an event with its token",
    "index, bytes of a user": "index, a user",
    "item_tokens, bytes of an item and day": "`item_tokens`, an item on a day",
    "checkpoint, bytes of a file": "Delta checkpoint, a file of the table",
    "open table, s a million files": "opening a table of a million files",
    "open table, memory of a file": "an open table, memory for a file",
    "read commits, s a million": "reading the history of a table, a million commits",
    "raw_files, s a million files": "`raw_files` read and written, a million files of the raw log",
    "raw_files, memory of a file": "that, memory for a file",
}


def measured_rest(m: Measured) -> str:
    units = {row["name"]: row["unit"] for row in m.rows}
    lines = []
    for name, what in ((n, w) for n, w in OTHERS.items() if n in units):
        value, unit = m.cost(name), units[name]
        shown = _bytes(value) if unit == "bytes at most" else f"{_plain(value)} {unit}"
        lines.append([what, shown, _count(m.sizes(name)[-1])])
    return _table(["what", "measured", "of so many"], lines)


def not_constant(m: Measured) -> str:
    """Costs an instance that are not the same at the sizes measured, and what each further instance
    costs."""
    lines = []
    for name in dict.fromkeys(row["name"] for row in m.rows):
        sizes = m.sizes(name)
        values = [m.values[name, size, m.features] for size in sizes]
        is_asked = _has_fixed_part(name) or (", bytes" in name and max(values) > 1.2 * min(values))
        if len(values) == 3 and is_asked and name != "weights, bytes":
            lines.append([name, *map(_plain, values), *map(_plain, m.further(name))])
    small, middle, large = (_count(size) for size in m.sizes("log, bytes"))
    steps = [f"each further one, {small} to {middle}", f"{middle} to {large}"]
    return _table(["cost", f"of {small}", f"of {middle}", f"of {large}", *steps], lines)


PLANS = tuple(Plan(instances=n, features=f) for n in (10**8, 10**10) for f in (22, 400))


def _per_plan(plans: Iterable[Plan], lines: Mapping[str, Callable[[Plan], str]]) -> str:
    plans = list(plans)
    head = ["", *(f"{_count(p.instances)} x {p.features}" for p in plans)]
    return _table(head, [[what, *(made(plan) for plan in plans)] for what, made in lines.items()])


def a_day(m: Measured, plans: Sequence[Plan] = PLANS) -> str:
    """Bytes, files, shuffle and cores of a day."""
    every = (*TABLES, "instance_tokens")
    lines: dict[str, Callable[[Plan], str]] = {
        f"`{name}`": lambda p, name=name: _bytes(table_bytes(m, p, name))  # type: ignore[misc]
        for name in every
    }
    lines |= {
        "**bytes a day, all tables**": lambda p: _bytes(sum(table_bytes(m, p, n) for n in every)),
        "files a day, each table": lambda p: f"{files(p):,}",
        "shuffled, all tables": lambda p: _bytes(sum(shuffled(m, p, n) for n in TABLES)),
        "core hours of Spark": lambda p: _hours(sum(core_s(m, p, n) for n in TABLES)),
        "cores for those in 4 h, day split into tasks": lambda p: (
            f"{math.ceil(sum(core_s(m, p, n) for n in TABLES) / HOUR / p.window_h):,}"
        ),
        "hours with one task a day and table (the code now)": lambda p: _hours(
            sum(core_s(m, p, n) for n in TABLES)
        ),
        "core hours of tokens on CPU, small compressor": lambda p: (
            _hours(token_core_s(m, p)) if p.features == m.features else "not measured"
        ),
        "steps to train on the day, and as much of days before": lambda p: (
            f"{training_steps(p):,.0f}"
        ),
        f"at {STEP_S * 1e3:.0f} ms each (README, H100)": lambda p: _hours(
            STEP_S * training_steps(p)
        ),
        "lake after 365 days": lambda p: _bytes(
            p.kept_days * sum(table_bytes(m, p, n) for n in every)
        ),
    }
    return _per_plan(plans, lines)


def a_lake(m: Measured, plans: Sequence[Plan] = PLANS) -> str:
    """The index, buckets and Delta's logs: no feature counts here but those of the item."""
    name = "instances"
    lines: dict[str, Callable[[Plan], str]] = {
        "events in the index (60 days)": lambda p: _count(index_events(p)),
        "index with one line's tokens": lambda p: _bytes(index_bytes(m, p)),
        "index build, one core": lambda p: _hours(
            m.cost("index, core s a million") * index_events(p) / 1e6
        ),
        "user buckets (NUM_BUCKETS)": lambda p: f"{buckets(p):,}",
        "memory of its build with so many": lambda p: _bytes(index_memory(m, p, buckets(p))),
        f"with {NUM_BUCKETS}, as set now": lambda p: _bytes(index_memory(m, p, NUM_BUCKETS)),
        "a day's entry in a table's log": lambda p: _bytes(log_bytes(m, p, name)),
        "files of a table after 365 days": lambda p: f"{files(p) * p.kept_days:,}",
        "its newest checkpoint by then": lambda p: _bytes(checkpoint_bytes(m, p)),
        "its log by then, all checkpoints": lambda p: _bytes(
            all_checkpoints_bytes(m, p) + p.kept_days * log_bytes(m, p, name)
        ),
        "opening it by then": lambda p: (
            f"{m.cost('open table, s a million files') * files(p) * p.kept_days / 1e6:.2f} s"
        ),
        "files of the raw log, 1 M events each": lambda p: f"{raw_log_files(p):,}",
        "looking them over, at each build": lambda p: (
            f"{m.cost('raw_files, s a million files') * raw_log_files(p) / 1e6:.1f} s"
        ),
        "newest item tokens, in memory": lambda p: _bytes(item_state_bytes(m, p)),
    }
    return _per_plan([p for p in plans if p.features == plans[0].features], lines)


def stops(m: Measured, plan: Plan = PLANS[0]) -> str:
    """Where the code stops, the first to stop first."""
    lines = []
    for stop in sorted(STOPS, key=lambda each: most_instances(m, plan, each)):
        show = _bytes if stop.unit == "bytes" else lambda h: f"{h:,.1f} h"
        needs = [show(stop.need(m, replace(plan, instances=n))) for n in (10**8, 10**10)]
        most = most_instances(m, plan, stop)
        lines.append(
            [stop.what, stop.where, *needs, f"{show(stop.limit)}: {_count(most)}", stop.instead]
        )
    head = ["what", "where", "at 10^8", "at 10^10", "limit, met at", "instead"]
    return _table(head, lines)


PARTS: Mapping[str, Callable[[Measured], str]] = {
    "tables": measured_tables,
    "rest": measured_rest,
    "not constant": not_constant,
    "a day": a_day,
    "a lake": a_lake,
    "stops": stops,
}


def written_into(page: str, m: Measured) -> str:
    """The page with each part between its marks made anew."""
    for name, made in PARTS.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        if page.count(begin) != 1 or page.count(end) != 1:
            raise ValueError(f"the page needs the marks {begin.strip()!r} and {end!r}, once each")
        before, _, rest = page.partition(begin)
        page = before + begin + made(m) + end + rest.partition(end)[2]
    return page


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _plain(value: float) -> str:
    if value >= 1e6:
        return f"{value:,.0f}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _bytes(value: float) -> str:
    for size, unit in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:,.{0 if value / size >= 10 else 1}f} {unit}"
    return f"{value:.0f} B"


def _hours(seconds: float) -> str:
    hours = seconds / HOUR
    return f"{hours:,.{0 if hours >= 10 else 1}f} h"


def _count(number: float) -> str:
    """Two digits and a power of ten; the power alone where that is all."""
    power = math.floor(math.log10(number) + 1e-9)
    return f"10^{power}" if number == 10**power else f"{number / 10**power:.1f} x 10^{power}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--instances", type=int, nargs="+", help="a day")
    parser.add_argument("--features", type=int, nargs="+", default=[22])
    parser.add_argument("--write", action="store_true", help="into docs/sizing.md")
    args = parser.parse_args()
    m = Measured.read(args.rows)
    if args.write:
        PAGE.write_text(written_into(PAGE.read_text(), m))
    elif args.instances:
        plans = [Plan(instances=n, features=f) for n in args.instances for f in args.features]
        sys.stdout.write(f"{a_day(m, plans)}\n{a_lake(m, plans)}")
    else:
        sys.stdout.write("\n".join(made(m) for made in PARTS.values()))


if __name__ == "__main__":
    main()
