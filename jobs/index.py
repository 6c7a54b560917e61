"""Keep a user index on disk as its tables are: built once, then extended by changed days."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import tyro

from downstream.index_arrays import Meta
from downstream.user_index import UserIndex
from jobs import ledger
from pipelines.days import Days
from pipelines.domain import Domain
from pipelines.domain import load as load_domain
from pipelines.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Args:
    """Bring the user index in a folder up to its tables; build it if there is none.

    Run it after each day's tokens: it reads the days that changed since, late ones among them, and
    no others. Whoever has the index open keeps what was opened.
    """

    domain: str
    """Name of a domain that comes with the toolkit, or a FILE.toml."""
    lake: str
    """Root folder or object-store URI of the Delta tables."""
    index: Path
    """The index's folder."""
    line: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Compressor line whose tokens it holds; may be given several times. Of an index that is there:
    those it was built with."""
    fields: bool = False
    """Hold all logged fields too, for rankers that read them end to end."""
    start: date | None = None
    """First day (UTC) that it must hold; empty: the tables' first."""
    end: date | None = None
    """The day after the last; empty: all there are."""
    dry_run: bool = False
    """Say what is there, and stop."""


def main(args: Args) -> dict[str, Any]:
    domain = load_domain(args.domain)
    before = held(args.index, domain, args.line, has_fields=args.fields)
    days = None
    if args.start or args.end:
        days = Days(args.start or date.min, args.end or date.max)
    with ledger.job(args.lake, "index", args) as run:
        after = before
        if not args.dry_run:
            opened = UserIndex.extended(
                args.lake, domain, args.index, days=days, lines=args.line, fields=args.fields
            )
            after = opened.meta
            run.add(rows=len(opened))
            run.inputs |= after.tables
    result = {
        "domain": domain.name,
        "index": str(args.index),
        "was": "there" if args.dry_run and before else what_was_done(before, after),
        "rows": after.num_rows if after else 0,
        "lines": sorted(after.lines) if after else [],
        "tables": dict(after.tables) if after else {},
    }
    sys.stdout.write(as_text(result))
    return result


def held(
    folder: Path, domain: Domain, lines: tuple[str, ...] = (), *, has_fields: bool = False
) -> Meta | None:
    """What the index in a folder says of itself (None: there is none); InputError where it cannot
    become one of the domain as it is now, with these lines and fields."""
    if not folder.exists():
        return None
    meta = Meta.read(folder)
    if meta.domain != domain.name:
        raise InputError(f"the index in {folder} is of {meta.domain}, not of {domain.name}")
    wanted = [f.stream_column for f in domain.side_features]
    if meta.side != wanted:
        raise InputError(
            f"the index in {folder} was built with side information {meta.side}, and {domain.name} "
            f"now has {wanted}; give --index another folder"
        )
    missing = sorted({*lines} - {*meta.lines})
    if missing or (has_fields and not meta.has_fields):
        what = f"line {', '.join(missing)}" if missing else "all logged fields"
        raise InputError(
            f"the index in {folder} was built without {what}, and an index keeps what it was built "
            "with; give --index another folder"
        )
    return meta


def what_was_done(before: Meta | None, after: Meta | None) -> str:
    """In a word."""
    if after is None:
        return "missing"
    if before is None or not after.generation:
        return "unchanged" if before == after else "built"
    return "unchanged" if before.generation == after.generation else "extended"


def as_text(result: Mapping[str, Any]) -> str:
    """What is there now, for people."""
    lines = ", ".join(result["lines"]) or "none"
    return (
        f"{result['domain']}: index {result['was']} in {result['index']}: "
        f"{result['rows']:,d} rows, lines: {lines}\n"
    )
