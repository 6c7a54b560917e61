"""Raw events -> instances, with sampled negatives where the domain asks for them; rejected events
-> quarantine with their reason."""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from pyspark import StorageLevel
from pyspark.sql import DataFrame
from pyspark.sql import functions as F  # noqa: N812

from jobs import ledger, raw_log
from jobs.events import open_events
from jobs.future import latest_of, without_future
from jobs.spark import SparkTables, session
from jobs.spark_faults import explained
from jobs.spark_progress import task_bar
from pipelines import delta, forgotten, tables, written
from pipelines.days import Days
from pipelines.domain import Domain
from pipelines.domain import load as load_domain
from pipelines.errors import CheckFailedError, InputError
from pipelines.instances import accepted, checked, rejected
from pipelines.negatives import with_negatives
from pipelines.places import shown
from pipelines.raw_files import RawFiles

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Args:
    """Build a domain's instances from its raw events: the days asked for, whole, in one commit.

    Events that break a rule go to quarantine/DOMAIN with the rule. Past
    limits.max_quarantined_share of the days' events (of the log's, for those that have no day) the
    job fails with the counts (exit 1) and leaves the instances as they were.
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
    # The domain file's own words are what a commit is of; the clock below never enters it.
    given = domain
    delta.check_features(args.lake, tables.instances(domain))
    doing = f"building instances of {domain.name}"
    with ledger.job(args.lake, "build-instances", args) as run, explained(doing):
        spark = session(args.master)
        raw = open_events(
            spark, domain, args.lake,
            data=args.data, limit_users=args.limit_users, limit_days=args.limit_days,
            seed=args.seed,
        )  # fmt: skip
        domain = without_future(domain, args.end)
        commit = ledger.commit_of(run, given, {"source": shown(raw.place)})
        found = raw_log.looked(raw, args.lake, domain, commit=None if args.dry_run else commit)
        days = asked_days(found, args.lake, domain, args.start, args.end)
        result: dict[str, Any] = {
            "domain": domain.name,
            "source": shown(raw.place),
            "days": str(days),
            "events": found.num_events,
        }
        if not args.dry_run:
            log.info("instances of %s in %s, from %s", domain.name, days, shown(raw.place))
            lake = SparkTables(spark, args.lake)
            events = raw.read(found.files_of(days, latest_of(domain)))
            marks = found.marks(latest_of(domain))
            commit |= {"raw": json.dumps({str(d): marks[d] for d in days if d in marks})}
            result |= build(lake, events, domain, days, found.num_events, commit=commit, run=run)
            result |= {"changed_days": changed_days(args.lake, domain, marks)}
            run.add(rows=result["instances"])
    sys.stdout.write(as_text(result))
    return result


def build(
    lake: SparkTables,
    events: DataFrame,
    domain: Domain,
    days: Days,
    num_events: int,
    *,
    commit: Mapping[str, str],
    run: ledger.Run,
) -> dict[str, Any]:
    """Write quarantine, then instances; returns counts of what was kept and rejected.

    `num_events` is of the whole log. Events of forgotten users go nowhere; they are counted.
    """
    with forgotten.kept_out(lake.lake, domain) as gone:
        return _build(lake, events, domain, days, num_events, gone, commit=commit, run=run)


def _build(
    lake: SparkTables,
    events: DataFrame,
    domain: Domain,
    days: Days,
    num_events: int,
    gone: Collection[int],
    *,
    commit: Mapping[str, str],
    run: ledger.Run,
) -> dict[str, Any]:
    met = checked(events, domain, days).withColumn("is_gone", F.expr(forgotten.is_theirs(gone)))
    # A day is one block: kept in memory too, one that does not fit would be read back as a whole.
    met = met.persist(StorageLevel.DISK_ONLY)
    rows = met.where(~F.col("is_gone"))
    has_day = F.to_date("event_time").eqNullSafe(F.col("event_date"))
    try:
        with task_bar(lake.spark, f"events of {domain.name}"):
            found = met.groupBy("rule", has_day.alias("has_day"), "is_gone").count().collect()
        counted = [row for row in found if not row["is_gone"]]
        num_kept = sum(row["count"] for row in counted if row["rule"] is None)
        rules: Counter[str] = Counter()
        for row in counted:
            if row["rule"] is not None:
                rules[row["rule"]] += row["count"]
        num_dayless = sum(row["count"] for row in counted if not row["has_day"])
        quarantine = tables.quarantine(domain)
        bad = rejected(rows, run=run.run)
        run.outputs[quarantine.name] = lake.replace(quarantine, bad, days, commit=commit)
        check_share(
            domain, rules, lake.lake, num_kept=num_kept, num_dayless=num_dayless,
            num_events=num_events,
        )  # fmt: skip
        instances = with_negatives(accepted(rows, domain), domain)
        version = lake.replace(tables.instances(domain), instances, days, commit=commit)
        run.outputs[tables.instances(domain).name] = version
    finally:
        met.unpersist()
    per_day = delta.num_rows(lake.lake, tables.instances(domain), days, version=version)
    num_instances = sum(per_day.values())
    return {
        "kept": num_kept,
        "quarantined": sum(rules.values()),
        "rules": dict(sorted(rules.items())),
        "forgotten": sum(row["count"] for row in found if row["is_gone"]),
        "instances": num_instances,
        "sampled": num_instances - num_kept,
        "empty_days": len(days) - len(per_day),
        "version": version,
    }


def asked_days(
    files: RawFiles, lake: str, domain: Domain, start: date | None, end: date | None
) -> Days:
    """The days to build: within the log, or days of the instances that the log no longer has;
    InputError if there is neither."""
    if not files.num_events:
        if domain.source.only:
            kept = "; ".join(f"{c} of {', '.join(v)}" for c, v in domain.source.only.items())
            raise InputError(
                f"the log of domain {domain.name!r} has no event with {kept}: check `only` in "
                "[source]"
            )
        raise InputError(f"the log of domain {domain.name!r} is empty: it has no event at all")
    found = files.days(latest_of(domain))
    if not found:
        raise InputError(
            f"none of the {files.num_events} events of domain {domain.name!r} has a readable "
            f"time: check [columns] time = {domain.columns.time!r} and "
            f"time_unit = {domain.columns.time_unit!r}"
        )
    first, last = found[0], found[-1]
    start, end = start or first, end or last + timedelta(days=1)
    if start < end and not (start <= last and end > first):
        found = sorted({*found, *written.last_written(lake, tables.instances(domain))})
    if start >= end or end <= found[0] or start > found[-1]:
        raise InputError(
            f"domain {domain.name!r} has no event in [{start}, {end}): its log goes from {first} "
            f"to {last} (--end is the day after the last); nothing was written"
        )
    return Days(start, end)


def changed_days(lake: str, domain: Domain, marks: Mapping[date, str]) -> list[str]:
    """Days of the instances of which the raw log now holds something else than when they were
    built."""
    found = written.last_written(lake, tables.instances(domain))
    return [str(d) for d, last in sorted(found.items()) if last.mark(d) != marks.get(d, "")]


def check_share(
    domain: Domain,
    rules: Mapping[str, int],
    lake: str,
    *,
    num_kept: int,
    num_dayless: int,
    num_events: int,
) -> None:
    """CheckFailedError past the share of rejected events that the domain file allows.

    Events without a day are met by every run, whatever its days: they count against the whole log.
    """
    limit = domain.limits.max_quarantined_share
    num_rejected = sum(rules.values())
    num_here = num_kept + num_rejected - num_dayless
    if num_rejected - num_dayless <= limit * num_here and num_dayless <= limit * num_events:
        return
    counts = ", ".join(f"{rule} {count}" for rule, count in sorted(rules.items()))
    raise CheckFailedError(
        f"of {num_here} events {num_rejected - num_dayless} were rejected, and of the log's "
        f"{num_events} events {num_dayless} have no day ({counts}): more than "
        f"limits.max_quarantined_share = {limit}. The instances stay as they were. Look at "
        f"{tables.quarantine(domain).name} in {lake}, then mend the log or raise the limit",
        {"events": num_here, "quarantined": num_rejected, "rules": dict(sorted(rules.items()))},
    )


def as_text(result: Mapping[str, Any]) -> str:
    """What was built, for people."""
    head = "{domain}: {events} events in {source}".format(**result)
    if "instances" not in result:
        return f"{head}; would build {result['days']}\n"
    rules = "".join(f"\n  {count} {rule}" for rule, count in result["rules"].items())
    empty = f"; {result['empty_days']} days are empty" if result["empty_days"] else ""
    if result["forgotten"]:
        empty += f"; {result['forgotten']} events of forgotten users left out"
    changed = result["changed_days"]
    again = (
        f"\n{len(changed)} days built earlier have changed in the log since ({changed[0]} the "
        "first): iat backfill builds them again"
        if changed
        else ""
    )
    return (
        f"{head}\n{result['days']}: {result['instances']} instances, {result['sampled']} of them "
        f"sampled negatives; {result['quarantined']} events quarantined{empty}{rules}{again}\n"
    )
