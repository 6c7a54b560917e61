"""A small log in two states, and the lakes that undisturbed jobs make of it, one after another."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

from pipelines import delta, tables
from pipelines.days import Days
from pipelines.domain import Domain
from pipelines.tables import Table
from tests.jobs.test_build_jobs import Row, Shop, row, us

DAYS = Days(date(2026, 1, 1), date(2026, 1, 4))
EACH = (
    "build-instances", "build-streams", "build-samples", "train-compressor", "write-tokens",
    "forget",
)  # fmt: skip
"""Jobs that write; `build` and `backfill` run several of them."""
MORE = "negatives = {per_positive = 1}\nlimits = {max_quarantined_share = 0.9}"
UNTOLD = ("run", "artifact", "metrics", "input_versions", "config")
"""Columns that say which run wrote a row and from where, not what it holds."""


def log_rows(state: str) -> list[Row]:
    """The log before and after its days changed: events gone, new and altered, some that break a
    rule, and a last day that was empty."""
    draw = random.Random(7)
    found = [
        row(f"user{draw.randrange(6)}", str(draw.randrange(9)), us(day, n), clicked=n % 2)
        for day in DAYS
        for n in range(14)
    ]
    if state == "old":
        return [r for r in found if r["shown_at"] < us(DAYS.end - timedelta(days=1))]
    kept = [r | {"price": 9.0} if n % 5 == 0 else r for n, r in enumerate(found) if n % 7]
    broken = [row(None, "1", us(day, 90)) for day in DAYS]
    return [*kept, *broken, row("late", "3", us(DAYS.start, 50))]


STATES = {
    "write-tokens": ("new", "frozen"),
    "backfill tokens": ("new", "frozen"),
    "forget": ("frozen", "forgot"),
}
"""The lakes that a job meets, and leaves when nothing disturbs it: `old` and `new` for others."""
FROZEN, FORGOTTEN = "frozen", "user3"
"""A compressor line, and the user whom `forget` is about."""


def targets(domain: Domain) -> dict[str, tuple[Table, ...]]:
    """The tables that each job replaces."""
    instances = (tables.quarantine(domain), tables.instances(domain))
    streams = (tables.temporal_order(domain), tables.user_order(domain), tables.histories(domain))
    samples = (tables.ranker_samples(domain),)
    tokens = (tables.instance_tokens(domain.name), tables.item_tokens(domain.name))
    return {
        "build-instances": instances,
        "build-streams": streams,
        "build-samples": samples,
        "build": (*instances, *streams, *samples),
        "backfill": (*instances, *streams, *samples),
        "train-compressor": (*tokens, tables.compressor_versions()),
        "write-tokens": tokens,
        "backfill tokens": tokens,
        "forget": (*instances, *streams, *samples, *tokens, tables.forgotten(domain)),
    }


@dataclass(frozen=True)
class World:
    """Folders with both logs and with the lakes: `old` and `new` of the two logs; `frozen`, that
    and a frozen compressor's tokens; `forgot`, that without a user."""

    folder: Path

    def shop(self, state: str) -> Shop:
        return Shop(self.folder / state)

    def lake(self, state: str) -> Path:
        return self.folder / "lakes" / state

    def write_logs(self) -> None:
        for state in ("old", "new"):
            self.shop(state).write(log_rows(state), more=MORE)

    @property
    def domain(self) -> Domain:
        return self.shop("new").domain

    def before(self, job: str) -> Path:
        """The lake whose tables are there when the job replaces them."""
        return self.lake(STATES.get(job, ("old", "new"))[0])

    def after(self, job: str) -> Path:
        """The lake that is right when the job is done."""
        return self.lake(STATES.get(job, ("old", "new"))[1])

    def start(self, job: str, lake: Path) -> None:
        """The lake that a job meets: what it reads is there, what it replaces is of before."""
        replaced = targets(self.domain)
        for table in {t.name: t for of in replaced.values() for t in of}.values():
            is_replaced = table in replaced[job]
            source = (self.before(job) if is_replaced else self.after(job)) / table.name
            is_needed = is_replaced or job not in ("build", "backfill", EACH[0])
            if is_needed and source.exists():
                shutil.copytree(source, lake / table.name)


def held(lake: Path, table: Table, version: int | None = None) -> Counter[tuple[str, str]]:
    """(day, row as text) and how often it is there, without what says which run wrote it."""
    if not delta.exists(str(lake), table):
        return Counter()
    columns = [name for name in table.schema.names if name not in UNTOLD]
    rows = delta.read(str(lake), table, columns=columns, version=version).to_pylist()
    return Counter((str(r.get("event_date")), str(r)) for r in rows)


def days_of(rows: Counter[tuple[str, str]]) -> dict[str, frozenset[tuple[str, int]]]:
    """What is held of each day that has any."""
    found: dict[str, set[tuple[str, int]]] = {}
    for (day, text), times in rows.items():
        found.setdefault(day, set()).add((text, times))
    return {day: frozenset(of) for day, of in found.items()}


def half_days(lake: Path, table: Table, before: Path, after: Path) -> list[str]:
    """What any version of a table since the lake before has shown a reader of a day that is neither
    the day before nor the right one; and versions that do not read at all."""
    found: list[str] = []
    if not delta.exists(str(lake), table):
        return found
    allowed = [days_of(held(of, table)) for of in (before, after)]
    met = delta.open_table(str(before), table).version() if delta.exists(str(before), table) else 0
    for version in range(met, delta.open_table(str(lake), table).version() + 1):
        try:
            shown = days_of(held(lake, table, version))
        except Exception as error:
            found.append(f"{table.name} version {version} does not read: {error}")
            continue
        for day, rows in shown.items():
            if all(of.get(day, frozenset()) != rows for of in allowed):
                found.append(f"{table.name} version {version}: half of {day}")
    return found
