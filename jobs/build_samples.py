"""Instances -> ranker samples: who asked, when, about what; they point to the past."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc

from jobs import build_streams, ledger
from jobs.spark import SparkTables, session
from jobs.spark_faults import explained
from pipelines import delta, forgotten, tables
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
            ready = model_ready(instances, domain)
            written = lake.replace(table, ranker_samples(ready, domain), days, commit=commit)
        run.outputs[table.name] = written
        is_sampled = delta.read(args.lake, table, days, columns=["is_sampled"], version=written)
        result |= {
            "rows": len(is_sampled),
            "sampled": pc.sum(is_sampled["is_sampled"]).as_py() or 0,
        }
        run.add(rows=result["rows"])
    sys.stdout.write(
        f"{domain.name}, {days}: {result['rows']} ranker samples, {result['sampled']} of them "
        "sampled negatives\n"
    )
    return result
