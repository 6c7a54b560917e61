"""Instances -> ranker samples: who asked, when, about what; they point to the past."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from typing import Any

import pyarrow.dataset as ds

from jobs import build_streams, ledger
from jobs.spark import SparkTables, session
from jobs.spark_faults import explained
from pipelines import delta, forgotten, tables
from pipelines.days import Days
from pipelines.domain import load as load_domain
from pipelines.samples import ranker_samples
from pipelines.temporal_order import model_ready

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Args(build_streams.Args):
    """Build a domain's ranker samples from its instances: a pointer (user, as_of) and the target's
    features known at the request, with labels and when each became known."""


def main(args: Args) -> dict[str, Any]:
    domain = load_domain(args.domain)
    source, table = tables.instances(domain), tables.ranker_samples(domain)
    delta.check_features(args.lake, source, table)
    days, version = delta.days_of(args.lake, source, args.start, args.end)
    result: dict[str, Any] = {
        "domain": domain.name,
        "days": str(days),
        "input_versions": {source.name: version},
    }
    if args.dry_run:
        sys.stdout.write(f"{domain.name}: would build ranker samples of {days}\n")
        return result
    doing = f"building ranker samples of {domain.name}"
    with ledger.job(args.lake, "build-samples", args) as run, explained(doing):
        lake = SparkTables(session(args.master), args.lake)
        commit = ledger.commit_of(run, domain, result["input_versions"])
        with forgotten.kept_out(args.lake, domain) as gone:
            instances = lake.read(source, days, version=version).where(forgotten.is_other(gone))
            samples = ranker_samples(model_ready(instances, domain), domain)
            written = lake.replace(table, samples, days, commit=commit, read_from=(source, version))
        run.outputs[table.name] = written
        result |= {
            "rows": sum(delta.num_rows(args.lake, table, days, version=written).values()),
            "sampled": num_sampled(args.lake, table, days, written),
        }
        run.add(rows=result["rows"])
    sys.stdout.write(
        f"{domain.name}, {days}: {result['rows']} ranker samples, {result['sampled']} of them "
        "sampled negatives\n"
    )
    return result


def num_sampled(lake: str, table: tables.Table, days: Days, version: int) -> int:
    """Sampled negatives among the days' rows; one column is read, and never held whole."""
    opened, kept = delta.open_table(lake, table, version), ds.field("is_sampled")
    return int(delta.scan(opened, table, ["is_sampled"], kept, days=days).count_rows())
