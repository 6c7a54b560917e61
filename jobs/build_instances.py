"""Raw events -> instances, with sampled negatives where the domain asks for them; rejected events
-> quarantine with their reason."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

from pyspark import StorageLevel
from pyspark.sql import DataFrame
from pyspark.sql import functions as F  # noqa: N812

from jobs import ledger
from jobs.events import open_events
from jobs.spark import SparkTables, session
from pipelines import tables
from pipelines.days import Days
from pipelines.domain import Domain
from pipelines.domain import load as load_domain
from pipelines.errors import CheckFailedError, InputError
from pipelines.instances import accepted, checked, extent, rejected
from pipelines.negatives import with_negatives

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Args:
    """Build a domain's instances from its raw events: the days asked for, whole, in one commit.

    Events that break a rule go to quarantine/DOMAIN with the rule; past limits.max_quarantined_share
    of the events the job fails with the counts (exit 1) and leaves the instances as they were.
    """

    domain: str
    """Name of a domain that comes with the toolkit, or a FILE.toml."""
    lake: str
    """Root folder or object-store URI of the Delta tables."""
    start: date | None = None
    """First day (UTC); empty: the log's first."""
    end: date | None = None
    """The day after the last; empty: the log's end (later than tomorrow is the future)."""
    data: Path | None = None
    """Folder of a public log that does not come as a package (MovieLens)."""
    limit_users: int | None = None
    """Keep a seeded sample of so many users of a public log."""
    limit_days: int | None = None
    """Keep the first days of a public log."""
    seed: int = 0
    """Of that sample, and of the synthetic world."""
    master: str = "local[*]"
    """Spark master: local[*], spark://HOST:PORT, ..."""
    dry_run: bool = False
    """Say what would be built, and stop."""


def main(args: Args) -> dict[str, Any]:
    domain = load_domain(args.domain)
    with ledger.job(args.lake, "build-instances", args) as run:
        spark = session(args.master)
        events, place = open_events(
            spark, domain, args.lake,
            data=args.data, limit_users=args.limit_users, limit_days=args.limit_days,
            seed=args.seed,
        )  # fmt: skip
        if args.end is None:
            domain = _without_future(domain)
        days, num_events = asked_days(events, domain, args.start, args.end)
        result = {"domain": domain.name, "source": place, "days": str(days), "events": num_events}
        if not args.dry_run:
            log.info("instances of %s in %s, from %s", domain.name, days, place)
            lake = SparkTables(spark, args.lake)
            commit = ledger.commit_of(run, domain, {"source": place})
            result |= build(lake, events, domain, days, commit=commit, run=run.run)
            run.add(rows=result["instances"])
    sys.stdout.write(as_text(result))
    return result


def build(
    lake: SparkTables,
    events: DataFrame,
    domain: Domain,
    days: Days,
    *,
    commit: Mapping[str, str],
    run: str,
) -> dict[str, Any]:
    """Write quarantine, then instances; returns counts of what was read, kept and rejected."""
    rows = checked(events, domain, days).persist(StorageLevel.MEMORY_AND_DISK)
    try:
        counts = rows.groupBy("rule").count().collect()
        by_rule = {row["rule"]: int(row["count"]) for row in counts}
        num_kept = by_rule.pop(None, 0)
        num_rejected = sum(by_rule.values())
        lake.replace(tables.quarantine(domain), rejected(rows, run=run), days, commit=commit)
        check_share(domain, by_rule, num_kept + num_rejected, lake.lake)
        instances = with_negatives(accepted(rows, domain), domain)
        version = lake.replace(tables.instances(domain), instances, days, commit=commit)
    finally:
        rows.unpersist()
    written = lake.read(tables.instances(domain), days, version=version)
    per_day = written.groupBy("event_date").agg(
        F.count("*").alias("rows"), F.count_if("is_sampled").alias("sampled")
    )
    found = per_day.collect()
    return {
        "kept": num_kept,
        "quarantined": num_rejected,
        "rules": dict(sorted(by_rule.items())),
        "instances": sum(row["rows"] for row in found),
        "sampled": sum(row["sampled"] for row in found),
        "empty_days": len(days) - len(found),
        "version": version,
    }


def asked_days(
    events: DataFrame, domain: Domain, start: date | None, end: date | None
) -> tuple[Days, int]:
    """The days to build, within the log; InputError if it has no event in them."""
    found = extent(events, domain).collect()[0]
    first, last = found["first_day"], found["last_day"]
    if first is None:
        raise InputError(
            f"none of the {found['num_events']} events of domain {domain.name!r} has a readable "
            f"time: check [columns] time = {domain.columns.time!r} and "
            f"time_unit = {domain.columns.time_unit!r}"
        )
    days = Days(start or first, end or last + timedelta(days=1))
    if days.end <= first or days.start > last:
        raise InputError(
            f"domain {domain.name!r} has no event in {days}: its log goes from {first} to {last}; "
            "nothing was written"
        )
    return days, int(found["num_events"])


def _without_future(domain: Domain) -> Domain:
    """With no end asked for, a mistyped year must not make the log a century long.

    The clock decides only which events are refused as coming from the future.
    """
    if domain.limits.latest:
        return domain
    tomorrow = datetime.now(UTC).date() + timedelta(days=1)
    return replace(domain, limits=replace(domain.limits, latest=tomorrow.isoformat()))


def check_share(domain: Domain, by_rule: Mapping[str, int], num_events: int, lake: str) -> None:
    """CheckFailedError past the share of rejected events that the domain file allows."""
    num_rejected = sum(by_rule.values())
    if num_rejected <= domain.limits.max_quarantined_share * num_events:
        return
    counts = ", ".join(f"{rule} {count}" for rule, count in sorted(by_rule.items()))
    raise CheckFailedError(
        f"{num_rejected} of {num_events} events were rejected ({counts}), above "
        f"limits.max_quarantined_share = {domain.limits.max_quarantined_share}; the instances stay "
        f"as they were. Look at {tables.quarantine(domain).name} in {lake}, then mend the log or "
        "raise the limit",
        {"events": num_events, "quarantined": num_rejected, "rules": dict(by_rule)},
    )


def as_text(result: Mapping[str, Any]) -> str:
    """What was built, for people."""
    head = "{domain}: {events} events in {source}".format(**result)
    if "instances" not in result:
        return f"{head}; would build {result['days']}\n"
    rules = "".join(f"\n  {count} {rule}" for rule, count in result["rules"].items())
    empty = f"; {result['empty_days']} days are empty" if result["empty_days"] else ""
    return (
        f"{head}\n{result['days']}: {result['instances']} instances, {result['sampled']} of them "
        f"sampled negatives; {result['quarantined']} events quarantined{empty}{rules}\n"
    )
