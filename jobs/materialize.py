"""Ranker samples with their users' pasts written out: wide Parquet, for who has no index."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
from pyspark.sql import DataFrame
from pyspark.sql.functions import lit

from jobs import ledger
from jobs.spark import SparkTables, session
from jobs.spark_faults import explained as spark_explained
from pipelines import delta, forgotten, tables
from pipelines import materialized as pasts
from pipelines.days import Days
from pipelines.domain import Domain
from pipelines.domain import load as load_domain
from pipelines.errors import InputError, RetryableError
from pipelines.names import checked_line
from pipelines.token_format import TokenFormat, check, declare, of_line

log = logging.getLogger(__name__)

FILE_BYTES = 2**30
"""About as much of a day, before it is compressed, is one file and one task."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Write, for each ranker sample of some days, the newest events of its user strictly before it,
    with the tokens of a compressor line, as `iat fetch` shows them: a table `materialized/DOMAIN`.

    For those who want wide Parquet. Training here needs none of it: it fetches the same rows, bit
    for bit, from an index that is LENGTH times smaller. Days are replaced whole.
    """

    domain: str
    """Name of a domain that comes with the toolkit, or a FILE.toml."""
    lake: str
    """Root folder or object-store URI of the Delta tables."""
    line: str
    """Compressor line whose tokens to write."""
    length: int = 256
    """Events of each sample, the newest ones; all of a table have one length."""
    start: date | None = None
    """First day (UTC); empty: the samples' first."""
    end: date | None = None
    """The day after the last; empty: the samples' end."""
    master: str = "local[*]"
    """Spark master: local[*], spark://HOST:PORT, ..."""
    dry_run: bool = False
    """Say what would be written, and stop."""

    def __post_init__(self) -> None:
        checked_line(self.line)
        if not 1 <= self.length <= 1 << 16:
            raise InputError(f"--length must be from 1 to 65536, got {self.length}")


@dataclass(frozen=True)
class Source:
    """What a run reads: days of samples, and the versions of its tables."""

    domain: Domain
    days: Days
    form: TokenFormat
    versions: Mapping[str, int]

    @classmethod
    def of(cls, args: Args) -> Source:
        domain = load_domain(args.domain)
        samples, histories = tables.ranker_samples(domain), tables.histories(domain)
        table, tokens = tables.materialized(domain), tables.instance_tokens(domain.name)
        delta.check_features(args.lake, samples, histories, table)
        days, version = delta.days_of(args.lake, samples, args.start, args.end)
        opened = delta.open_table(args.lake, tokens)
        form = of_line(
            opened, tokens.name, args.line,
            delta.scan(
                opened, tokens, ["token"], ds.field("compressor_line") == args.line
            ).to_batches(),
        )  # fmt: skip
        if delta.exists(args.lake, table):
            check(delta.open_table(args.lake, table), table.name, form, length=args.length)
        versions = {
            samples.name: version,
            histories.name: delta.open_table(args.lake, histories).version(),
            tokens.name: opened.version(),
        }
        return cls(domain, days, form, versions)


def main(args: Args) -> dict[str, Any]:
    source = Source.of(args)
    domain, days = source.domain, source.days
    samples, table = tables.ranker_samples(domain), tables.materialized(domain)
    by_day = delta.num_rows(args.lake, samples, days, version=source.versions[samples.name])
    row_bytes = args.length * (source.form.num_bytes + 4 * (1 + len(domain.side_features)))
    result: dict[str, Any] = {
        "domain": domain.name,
        "line": args.line,
        "days": str(days),
        "length": args.length,
        "codec": source.form.codec,
        "width": source.form.width,
        "input_versions": dict(source.versions),
        "rows": sum(by_day.values()),
    }
    if args.dry_run:
        sys.stdout.write(
            f"{domain.name}: would write {result['rows']:,d} samples of {days} with "
            f"{args.length} events each, {result['rows'] * row_bytes / 1e9:,.2f} GB before they "
            "are compressed\n"
        )
        return result
    doing = f"materializing samples of {domain.name}"
    with ledger.job(args.lake, "materialize", args) as run, spark_explained(doing):
        commit = ledger.commit_of(run, domain, source.versions, line=args.line)
        files_per_day = -(-max(by_day.values(), default=0) * row_bytes // FILE_BYTES) or 1
        with forgotten.kept_out(args.lake, domain) as gone:
            declare(args.lake, table, source.form, length=args.length)
            lake = SparkTables(session(args.master), args.lake)
            try:
                written = lake.replace(
                    table, _gathered(lake, source, args, forgotten.is_other(gone)), days,
                    commit=commit, line=args.line, files_per_day=files_per_day,
                    unfold=partial(_unfolded, source=source, args=args),
                )  # fmt: skip
            except RetryableError as error:
                raise explained(error, source, args) from error
        run.outputs[table.name] = written
        result["rows"] = _num_rows(args.lake, table, days, args.line, written)
        run.add(rows=result["rows"])
    sys.stdout.write(
        f"{domain.name}, {days}: {result['rows']:,d} samples with up to {args.length} events each, "
        f"tokens {source.form} of line {args.line}\n"
    )
    return result


def _gathered(lake: SparkTables, source: Source, args: Args, kept: str) -> DataFrame:
    domain, versions = source.domain, source.versions
    samples, histories = tables.ranker_samples(domain), tables.histories(domain)
    tokens = tables.instance_tokens(domain.name)
    past = Days(date.min, source.days.end)
    return pasts.gathered(
        lake.read(samples, source.days, version=versions[samples.name]).where(kept),
        lake.read(histories, past, version=versions[histories.name]),
        lake.read(tokens, past, line=args.line, version=versions[tokens.name]),
        domain,
        length=args.length,
        form=source.form,
    )


def _unfolded(rows: DataFrame, *, source: Source, args: Args) -> DataFrame:
    found = pasts.unfolded(rows, source.domain, length=args.length, form=source.form)
    return found.withColumn("compressor_line", lit(args.line))


def _num_rows(lake: str, table: tables.Table, days: Days, line: str, version: int) -> int:
    """Rows of a line, from the table's log."""
    actions = delta.open_table(lake, table, version).get_add_actions(flatten=True)
    return sum(
        action["num_records"]
        for action in pa.table(actions).to_pylist()
        if action["partition.compressor_line"] == line and action["partition.event_date"] in days
    )


def explained(error: RetryableError, source: Source, args: Args) -> Exception:
    """Rows that Spark refused, as a person can act on it."""
    text, name = str(error), source.domain.name
    if pasts.TWICE in text:
        return InputError(
            f"{pasts.TWICE}: build the streams of {name} again, or write line {args.line} again "
            "(`iat check` names the rows)"
        )
    if pasts.OTHER_FORMAT in text:
        return InputError(
            f"instance_tokens/{name} declares {source.form} and line {args.line} has tokens of "
            "another number of bytes; write the line again, or to another lake"
        )
    return error
