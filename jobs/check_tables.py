"""Do the tables hold what they should? Every expectation, day by day, without Spark."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from jobs import progress
from pipelines import delta, lines, quality, tables
from pipelines.days import Days
from pipelines.domain import Domain
from pipelines.domain import load as load_domain
from pipelines.errors import CheckFailedError, InputError
from pipelines.quality import Finding, Limits, Profile
from pipelines.tables import Table
from pipelines.token_format import CODEC_KEY, WIDTH_KEY, declared

MOST_SHOWN = 40
"""Findings that are printed; --json holds all."""
Part = Literal["instances", "streams", "samples", "tokens"]
ALL: tuple[Part, ...] = ("instances", "streams", "samples", "tokens")


@dataclass(frozen=True, kw_only=True)
class Args:
    """Check a domain's tables: unique keys; the order inside each file; the same instances in both
    streams, histories and samples; labels not before their event; every event's token, of the
    declared width and finite; and what a day has in common with the seven days before it.

    Exit code 1 where a row breaks a rule, where a feature has gone missing, and past --max-drift.
    Other changes against the week before are warnings: a log may change for good reasons. Reads
    one day of one table at a time; a table that is not there yet is not judged.
    """

    domain: str
    """Name of a domain that comes with the toolkit, or a FILE.toml."""
    lake: str
    """Root folder or object-store URI of the Delta tables."""
    start: date | None = None
    """First day (UTC); empty: the instances' first."""
    end: date | None = None
    """The day after the last; empty: the instances' end."""
    tables: tuple[Part, ...] = ALL
    """Which: instances (with quarantine), streams (both orders and histories; drift), samples,
    tokens (instance tokens and item tokens; days whose training a line has refused)."""
    warn_drift: float = Limits().warn_drift
    """Warn where a feature's values are further than this (Jensen-Shannon, bits, 0 to 1) from those
    of the week before."""
    max_drift: float = Limits().max_drift
    """Fail where they are further than this; 1: never."""
    warn_nulls: float = Limits().warn_nulls
    """Warn where the share of missing values changed by more than this."""
    warn_norm: float = Limits().warn_norm
    """Warn where the day's median norm of tokens is this share outside those of the week before."""

    def __post_init__(self) -> None:
        _ = self.limits
        if not self.tables:
            raise InputError(f"--tables needs at least one of {', '.join(ALL)}")

    @property
    def limits(self) -> Limits:
        return Limits(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Limits)})


class Found(NamedTuple):
    """A finding and where it was made."""

    table: str
    day: date | None
    line: str | None
    finding: Finding

    def as_row(self) -> dict[str, Any]:
        held = dataclasses.asdict(self.finding)
        is_warning = held.pop("is_warning")
        where = {"table": self.table, "day": self.day, "line": self.line}
        return where | {"level": "warning" if is_warning else "failed"} | held


class Reader:
    """One table at one version: the files of each day (and line)."""

    def __init__(self, lake: str, table: Table, version: int | None = None) -> None:
        self.table = table
        self.opened = delta.open_table(lake, table, version)
        dataset = delta.files(self.opened)
        self.schema: pa.Schema = dataset.schema
        self.files: dict[tuple[str | None, date], list[ds.Fragment]] = defaultdict(list)
        for file in dataset.get_fragments():
            of = ds.get_partition_keys(file.partition_expression)
            self.files[of.get("compressor_line"), of["event_date"]].append(file)

    @cached_property
    def lines(self) -> dict[str | None, Days]:
        """The days of each compressor line, from its first to its last."""
        found: dict[str | None, list[date]] = defaultdict(list)
        for line, day in self.files:
            found[line].append(day)
        return {
            line: Days(min(days), max(days) + timedelta(days=1)) for line, days in found.items()
        }

    def each_file(
        self, day: date, columns: Sequence[str], line: str | None = None
    ) -> Iterator[pa.Table]:
        held = [name for name in columns if name in self.schema.names]
        for file in self.files.get((line, day), []):
            yield ds.Scanner.from_fragment(file, schema=self.schema, columns=held).to_table()

    def rows(self, day: date, columns: Sequence[str], line: str | None = None) -> pa.Table:
        held = pa.schema([self.schema.field(c) for c in columns if c in self.schema.names])
        return pa.concat_tables([held.empty_table(), *self.each_file(day, columns, line)])


def main(args: Args) -> dict[str, Any]:
    domain = load_domain(args.domain)
    days, version = delta.days_of(args.lake, tables.instances(domain), args.start, args.end)
    check = Check(args.lake, domain, version, args.limits, args.tables, days)
    bar = progress.bar(len(days), desc=f"check of {domain.name}", unit="day")
    check.remember_week(days.start)
    for day in days:
        check.day(day)
        bar.update()
    bar.close()
    failed = check.failed
    result = {
        "domain": domain.name,
        "days": str(days),
        "tables": {r.table.name: r.opened.version() for r in check.readers},
        "limits": dataclasses.asdict(args.limits),
        "passed": not failed,
        "failed": len(failed),
        "warnings": len(check.found) - len(failed),
        "findings": [each.as_row() for each in check.found],
    }
    sys.stdout.write(as_text(result))
    if failed:
        first = failed[0].as_row()
        raise CheckFailedError(
            f"{len(failed)} expectations do not hold, the first in {first['table']} on "
            f"{first['day']}: {first['says']}",
            result,
        )
    return result


class Check:
    """Goes over the days in order, keeping what the trailing week is remembered by."""

    def __init__(
        self,
        lake: str,
        domain: Domain,
        version: int,
        limits: Limits,
        parts: Collection[Part] = ALL,
        days: Days | None = None,
    ) -> None:
        """`days`: those that will be checked; None: any."""
        self.lake, self.domain, self.limits = lake, domain, limits
        self.days = days or Days(date.min, date.max)
        self.refusals: dict[str, dict[date, str]] = {}
        self.found: list[Found] = []

        def opened(part: Part, table: Table) -> Reader | None:
            return Reader(lake, table) if part in parts and delta.exists(lake, table) else None

        self.instances = Reader(lake, tables.instances(domain), version)
        self.temporal = opened("streams", tables.temporal_order(domain))
        self.user = opened("streams", tables.user_order(domain))
        self.histories = opened("streams", tables.histories(domain))
        self.samples = opened("samples", tables.ranker_samples(domain))
        self.quarantine = opened("instances", tables.quarantine(domain))
        self.tokens = opened("tokens", tables.instance_tokens(domain.name))
        self.items = opened("tokens", tables.item_tokens(domain.name))
        self.profiles: dict[str, dict[date, Profile]] = defaultdict(dict)
        self.norms: dict[str, dict[date, float]] = defaultdict(dict)
        for reader in (self.tokens, self.items):
            if reader is not None and declared(reader.opened) is None:
                says = (
                    f"the table declares no {CODEC_KEY} and {WIDTH_KEY}, which say how to read it"
                )
                self._add(reader, None, [Finding("codec", says, 1, [])])

    @property
    def readers(self) -> list[Reader]:
        made = (
            self.instances, self.temporal, self.user, self.histories, self.samples,
            self.quarantine, self.tokens, self.items,
        )  # fmt: skip
        return [reader for reader in made if reader is not None]

    @property
    def failed(self) -> list[Found]:
        return [each for each in self.found if not each.finding.is_warning]

    def remember_week(self, day: date) -> None:
        """Keeps how the days before the first that is checked are spread."""
        for before in Days(day - timedelta(days=quality.TRAILING_DAYS), day):
            self.remember(before)

    def day(self, day: date) -> None:
        instances = self._rows(self.instances, day)
        for reader in (self.temporal, self.user, self.samples):
            if reader is not None:
                self._same_ids(reader, day, "instances", instances, self._rows(reader, day))
        if self.quarantine is not None:
            self._rows(self.quarantine, day)
        real = instances.filter(pc.invert(instances["is_sampled"]))
        if self.histories is not None:
            self._same_ids(
                self.histories, day, "real events", real, self._rows(self.histories, day)
            )
        for reader, key, what in (
            (self.tokens, "instance_id", "events' tokens"),
            (self.items, "item_id", "items' tokens"),
        ):
            for line in _lines(reader, day):
                assert reader is not None  # it has a line
                rows = self._rows(reader, day, line)
                missing = quality.differing("coverage", what, real, rows, key)
                self._add(reader, day, missing, line)
        for line in _lines(self.tokens, day):
            assert self.tokens is not None  # it has a line
            if line not in self.refusals:
                self.refusals[line] = _refusals(self.lake, line, self.days)
            if why := self.refusals[line].get(day):
                says = f"not trained on, so that yesterday's weights wrote its tokens: {why}"
                self._add(self.tokens, day, [Finding("refused", says, 1, [])], line)
        self._week(day)

    def _week(self, day: date) -> None:
        """What is told of a day by the week before it, and of its vectors."""
        before = {name: _before(held, day) for name, held in self.profiles.items()}
        norms = {line: _before(held, day) for line, held in self.norms.items()}
        self.found += self.remember(day)
        for name, held in self.profiles.items():
            if self.temporal is not None and day in held:
                bad = quality.moved(name, held[day], before.get(name, []), self.limits)
                self._add(self.temporal, day, bad)
        for line, medians in self.norms.items():
            if self.tokens is not None and day in medians:
                bad = quality.norm_moved(medians[day], norms.get(line, []), self.limits)
                self._add(self.tokens, day, bad, line)

    def remember(self, day: date) -> list[Found]:
        """Keeps how the day's real events and its tokens' norms are spread, for the days after it;
        returns which of its vectors are broken."""
        if self.temporal is not None:
            self._remember_values(self.temporal, day)
        bad: list[Found] = []
        for reader, key, column in (
            (self.tokens, "instance_id", "token"),
            (self.items, "item_id", "decayed_sum"),
        ):
            form = declared(reader.opened) if reader is not None else None
            for line in _lines(reader, day):
                if reader is None or form is None:
                    continue
                rows = reader.rows(day, [key, column], line)
                found, norms = quality.wrong_vectors(rows, column, form, [key])
                bad += [Found(reader.table.name, day, line, each) for each in found]
                if reader is self.tokens and len(norms):
                    self.norms[line][day] = float(np.median(norms))
        return bad

    def _remember_values(self, stream: Reader, day: date) -> None:
        # A feature of the clock moves with it.
        features = {f.stream_column: f for f in self.domain.features if f.derive is None}
        names = [*features, *(f"label_{label.name}" for label in self.domain.labels)]
        rows = stream.rows(day, [*names, "is_sampled", "user_id", "request_id"])
        rows = rows.filter(pc.invert(rows["is_sampled"]))
        for name in names:
            if name in rows.column_names and len(rows):
                self.profiles[name][day] = quality.profile(rows, name, features.get(name))

    def _rows(self, reader: Reader, day: date, line: str | None = None) -> pa.Table:
        """The keys of a day, whose files and rows have been checked."""
        table = reader.table
        time = next((c for c in ("event_time", "as_of") if c in table.schema.names), "")
        labels = [c for c in table.schema.names if c.startswith(("label_", "label_time_"))]
        key = [c for c in table.key if c not in table.partition_by]
        wanted = dict.fromkeys([*key, *table.sort_by, time, *labels, "item_id", "is_sampled"])
        columns = [c for c in wanted if c in table.schema.names]
        parts = []
        for file in reader.each_file(day, columns, line):
            self._add(reader, day, quality.unsorted(file, table.sort_by), line)
            parts.append(file)
        empty = pa.schema([table.schema.field(c) for c in columns]).empty_table()
        rows = pa.concat_tables([part.cast(empty.schema) for part in [empty, *parts]])
        self._add(reader, day, quality.repeated(rows, key), line)
        if time:
            self._add(reader, day, quality.of_another_day(rows, time, day), line)
        if labels:
            self._add(reader, day, quality.wrong_labels(rows, self.domain, time), line)
        return rows

    def _same_ids(
        self, reader: Reader, day: date, what: str, wanted: pa.Table, got: pa.Table
    ) -> None:
        self._add(reader, day, quality.differing("same rows", what, wanted, got, "instance_id"))

    def _add(
        self, reader: Reader, day: date | None, found: Sequence[Finding], line: str | None = None
    ) -> None:
        self.found += [Found(reader.table.name, day, line, each) for each in found]


def _lines(reader: Reader | None, day: date) -> list[str]:
    """Compressor lines that have begun by a day and go on after it."""
    found = reader.lines if reader is not None else {}
    return [line for line, days in found.items() if line is not None and day in days]


def _refusals(lake: str, line: str, days: Days) -> dict[date, str]:
    """Days that a line did not train on, and why, by what its versions say."""
    told = ((row["end"], json.loads(row["metrics"])) for row in lines.ending(lake, line, days))
    return {end - timedelta(days=1): of["refused"] for end, of in told if "refused" in of}


def _before(held: dict[date, Any], day: date) -> list[Any]:
    """What is held of the week before a day; older days are forgotten."""
    for old in [each for each in held if each < day - timedelta(days=quality.TRAILING_DAYS)]:
        del held[old]
    return [held[each] for each in sorted(held) if each < day]


def as_text(result: Mapping[str, Any]) -> str:
    """Findings for people, those that fail first; the first of them with their rows."""
    names = ", ".join(f"{name} @ {version}" for name, version in result["tables"].items())
    lines = [f"{result['domain']}, {result['days']}: {names}"]
    findings = sorted(result["findings"], key=lambda row: row["level"])
    for row in findings[:MOST_SHOWN]:
        where = " ".join(str(row[word]) for word in ("table", "day", "line") if row[word])
        lines.append(f"{row['level']:7s}  {where}: {row['says']} ({row['rule']})")
        lines += ["         " + _as_words(bad) for bad in row["rows"]]
    if len(findings) > MOST_SHOWN:
        lines.append(f"... and {len(findings) - MOST_SHOWN} more (--json FILE holds all)")
    lines.append(f"{result['failed']} failed, {result['warnings']} warnings")
    return "\n".join(lines) + "\n"


def _as_words(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in row.items())
