"""Is a day in the raw log yet? What a schedule waits for; without Spark, so that it may be asked
every minute."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
from deltalake.exceptions import DeltaError

from jobs.future import latest_of as latest_day
from jobs.future import without_future
from pipelines import column_facts, sources
from pipelines.column_facts import quoted
from pipelines.days import Days, as_number, midnight
from pipelines.domain import Domain
from pipelines.domain import load as load_domain
from pipelines.errors import CheckFailedError, InputError

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
DAY_US = 86_400_000_000
UNITS_US = {"s": 1_000_000, "ms": 1_000, "us": 1}


@dataclass(frozen=True, kw_only=True)
class Args:
    """Say whether the raw log has come to the last of the days asked for: exit 1 while it has not.

    It has once it holds an event of that day or of a later one; with --closed, once it holds one of
    a later day, so that the day is over. A public log's file is made below the lake first, as
    `iat build` makes it. Only the column of times is read.
    """

    domain: str
    """Name of a domain that comes with the toolkit, or a FILE.toml."""
    lake: str
    """Root folder or object-store URI of the Delta tables."""
    start: date | None = None
    """First day (UTC)."""
    end: date | None = None
    """The day after the last."""
    closed: bool = False
    """Wait for an event after the days, not only of the last of them."""
    data: Path | None = None
    """Folder of a public log that does not come as a package (MovieLens)."""
    limit_users: int | None = None
    """As `iat build`'s."""
    limit_days: int | None = None
    """As `iat build`'s."""
    seed: int = 0
    """As `iat build`'s."""


def main(args: Args) -> dict[str, Any]:
    if not args.start or not args.end:
        raise InputError("say which days are waited for: --start DAY --end DAY")
    domain, days = load_domain(args.domain), Days(args.start, args.end)
    since = days.end if args.closed else date.fromordinal(days.end.toordinal() - 1)
    latest = latest_of(args, domain)
    has_come = latest is not None and latest >= midnight(since)
    result = {
        "domain": domain.name,
        "days": str(days),
        "arrived": has_come,
        "latest": str(latest) if latest else None,
    }
    sys.stdout.write(as_text(result))
    if not has_come:
        raise CheckFailedError(
            f"the log of {domain.name} has no event at or after {since} yet; its latest is of "
            f"{latest or 'no readable time'}",
            result,
        )
    return result


def latest_of(args: Args, domain: Domain) -> datetime | None:
    """The latest event time of the log that is not of the future; None where there is none."""
    if domain.source.reader:
        place = str(
            sources.prepare(
                domain, args.lake, data=args.data, limit_users=args.limit_users, seed=args.seed,
                days=args.limit_days,
            )
        )  # fmt: skip
    else:
        path = domain.source.path
        place = path if "://" in path else str((domain.folder / path).absolute())
        if "://" not in place and not Path(place).exists():
            return None
    # A mistyped year is no sign that the log has come so far.
    future_us = as_number(latest_day(without_future(domain, None))) * DAY_US
    try:
        with duckdb.connect() as connection:
            column_facts.view(connection, place)
            found = connection.execute(
                f"SELECT max(us) FROM (SELECT {time_us(connection, domain)} AS us FROM log) "
                f"WHERE us < {future_us}"
            ).fetchall()
    except (duckdb.Error, DeltaError) as error:
        raise InputError(
            f"[source] of domain {domain.name!r}: {place}: {str(error).splitlines()[0]}"
        ) from error
    us = found[0][0]
    return None if us is None else EPOCH + timedelta(microseconds=int(us))


def time_us(connection: duckdb.DuckDBPyConnection, domain: Domain) -> str:
    """SQL of an event's time in microseconds since 1970; null where it reads as none."""
    name, unit = quoted(domain.columns.time), domain.columns.time_unit
    if unit in UNITS_US:
        return f"TRY_CAST({name} AS DOUBLE) * {UNITS_US[unit]}"
    (kind,) = connection.execute(f"SELECT any_value(typeof({name})) FROM log").fetchall()[0]
    is_zoned = kind == "TIMESTAMP WITH TIME ZONE"
    return f"epoch_us({name if is_zoned else f'TRY_CAST({name} AS TIMESTAMP)'})"


def as_text(result: Mapping[str, Any]) -> str:
    """One line for people."""
    has = "has come to" if result["arrived"] else "has not come to the end of"
    latest = result["latest"] or "no readable time"
    return (
        f"the log of {result['domain']} {has} {result['days']}: its latest event is of {latest}\n"
    )
