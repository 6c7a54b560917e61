"""Instances -> temporal-order and user-order streams of the same rows, and histories."""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

from jobs import ledger
from jobs.spark import SparkTables, session
from jobs.spark_faults import explained
from pipelines import delta, forgotten, tables
from pipelines.days import Days
from pipelines.domain import Domain
from pipelines.domain import load as load_domain
from pipelines.histories import histories
from pipelines.temporal_order import temporal_order
from pipelines.user_order import user_order

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Args:
    """Build a domain's temporal-order stream, user-order stream and histories from its instances.

    All three come from one version of the instances, so that both streams hold the same rows. Days
    are replaced whole; as each is sorted, a stream over any days is their merge.
    """

    domain: str
    """Name of a domain that comes with the toolkit, or a FILE.toml."""
    lake: str
    """Root folder or object-store URI of the Delta tables."""
    start: date | None = None
    """First day (UTC); empty: the instances' first."""
    end: date | None = None
    """The day after the last; empty: the instances' end."""
    master: str = "local[*]"
    """Spark master: local[*], spark://HOST:PORT, ..."""
    dry_run: bool = False
    """Say what would be built, and stop."""


def main(args: Args) -> dict[str, Any]:
    domain = load_domain(args.domain)
    source = tables.instances(domain)
    made = (tables.temporal_order(domain), tables.user_order(domain), tables.histories(domain))
    delta.check_features(args.lake, source, *made)
    days, version = delta.days_of(args.lake, source, args.start, args.end)
    result: dict[str, Any] = {
        "domain": domain.name,
        "days": str(days),
        "input_versions": {source.name: version},
    }
    if not args.dry_run:
        doing = f"building streams of {domain.name}"
        with ledger.job(args.lake, "build-streams", args) as run, explained(doing):
            commit = ledger.commit_of(run, domain, result["input_versions"])
            lake = SparkTables(session(args.master), args.lake)
            with forgotten.kept_out(args.lake, domain) as gone:
                found = build(lake, domain, days, version, gone, commit=commit, run=run)
            result |= {"rows": found}
            run.add(rows=result["rows"][tables.user_order(domain).name])
    sys.stdout.write(as_text(result))
    return result


def build(
    lake: SparkTables,
    domain: Domain,
    days: Days,
    version: int,
    gone: Collection[int],
    *,
    commit: Mapping[str, str],
    run: ledger.Run,
) -> dict[str, int]:
    """Replace the days of all three tables; returns the rows that each now has in them.

    `gone`: users who are left out of all of them.
    """
    source, temporal = tables.instances(domain), tables.temporal_order(domain)
    kept = lake.read(source, days, version=version).where(forgotten.is_other(gone))
    ordered = temporal_order(kept, domain)
    written = lake.replace(temporal, ordered, days, commit=commit, read_from=(source, version))
    run.outputs[temporal.name] = written
    # Of the stored rows: as they are, their features need no second hashing.
    ready = lake.read(temporal, days, version=written)
    by_user = (
        (tables.user_order(domain), user_order(ready, domain)),
        (tables.histories(domain), histories(ready, domain)),
    )
    for table, rows in by_user:
        run.outputs[table.name] = lake.replace(
            table, rows, days, commit=commit, read_from=(temporal, written)
        )
    return {
        table.name: sum(
            delta.num_rows(lake.lake, table, days, version=run.outputs[table.name]).values()
        )
        for table in (temporal, *(table for table, _ in by_user))
    }


def as_text(result: Mapping[str, Any]) -> str:
    """What was built, for people."""
    if "rows" not in result:
        return f"{result['domain']}: would build streams and histories of {result['days']}\n"
    lines = [f"{result['domain']}, {result['days']}:"]
    lines += [f"  {name:32s} {rows:>10,d} rows" for name, rows in result["rows"].items()]
    return "\n".join(lines) + "\n"
