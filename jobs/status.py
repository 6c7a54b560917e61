"""A calendar of the lake: which days of which tables are there, missing, or stale."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from itertools import groupby
from typing import Any

from jobs.day_states import asked, states_of
from jobs.future import latest_of, without_future
from jobs.materialized_states import materialized_states
from jobs.token_states import Reasons, token_states
from pipelines import delta, lines, raw_files, tables
from pipelines.days import Days
from pipelines.domain import Domain
from pipelines.domain import load as load_domain
from pipelines.written import MISSING

RIGHT_SIGN, MISSING_SIGN, STALE_SIGN, OUTSIDE = "#", ".", "~", " "


@dataclass(frozen=True, kw_only=True)
class Args:
    """Show which days of a domain's tables, and of the tokens (and materialised samples, if any) of
    each of its compressor lines, are right, missing or stale, month by month.

    A day is stale when the domain file, the toolkit's version, or what it was made of (instances,
    or the raw log as the last build or backfill saw it) have changed since it was written. Known
    from the tables' logs: no data is read. A streaming line begins at its first day.
    """

    domain: str
    """Name of a domain that comes with the toolkit, or a FILE.toml."""
    lake: str
    """Root folder or object-store URI of the Delta tables."""
    start: date | None = None
    """First day (UTC); empty: the instances' first."""
    end: date | None = None
    """The day after the last; empty: the end of the instances or the raw log."""


def main(args: Args) -> dict[str, Any]:
    domain = load_domain(args.domain)
    raw = raw_files.known(args.lake, domain)
    marks = raw.marks(latest_of(without_future(domain, args.end))) if raw else None
    days = asked(args.lake, domain, args.start, args.end, marks)
    built = states_of(args.lake, domain, days, marks)
    shown: dict[str, Reasons] = {group: built[group] for group in built}
    of_lines = token_states(args.lake, domain, lines.newest(args.lake, domain.name), days)
    for line, found in of_lines.items():
        shown |= {f"tokens of {line}": found.tokens, f"item tokens of {line}": found.items}
    for line, states in materialized_states(args.lake, domain, days).items():
        shown[f"materialized of {line}"] = states
    quarantined = quarantined_shares(args.lake, domain, days)
    sys.stdout.write(as_text(domain.name, days, shown, quarantined))
    return {
        "domain": domain.name,
        "days": str(days),
        "tables": {
            group: {
                "right": sum(reason is None for reason in found.values()),
                "again": {str(day): reason for day, reason in found.items() if reason},
            }
            for group, found in shown.items()
        },
        "quarantined": {str(day): share for day, share in quarantined.items()},
    }


def quarantined_shares(lake: str, domain: Domain, days: Days) -> dict[date, float]:
    """Rejected events as a share of the day's, where there is one and the histories, which hold the
    others, have the day."""
    if not all(delta.exists(lake, t(domain)) for t in (tables.quarantine, tables.histories)):
        return {}
    rejected = delta.num_rows(lake, tables.quarantine(domain), days)
    kept = delta.num_rows(lake, tables.histories(domain), days)
    return {day: n / (n + kept[day]) for day, n in rejected.items() if kept.get(day)}


def as_text(
    name: str, days: Days, states: Mapping[str, Reasons], quarantined: Mapping[date, float]
) -> str:
    """One line a group and month; months that are alike all through are one line."""
    told = [f"{name}, {days}: # right, {MISSING_SIGN} missing, {STALE_SIGN} stale"]
    for group, found in states.items():
        reasons = Counter(reason for reason in found.values() if reason)
        more = "".join(f", {count} {reason}" for reason, count in reasons.most_common())
        told.append(f"{group}: {len(found) - reasons.total()} of {len(found)} days right{more}")
        months = [(month, _signs(list(of))) for month, of in groupby(found.items(), _month)]
        for is_right, run in groupby(months, lambda m: set(m[1]) <= {RIGHT_SIGN, OUTSIDE}):
            part = list(run)
            if not is_right:
                told += [f"  {month}  {signs.rstrip()}" for month, signs in part]
            elif len(part) > 1:
                told.append(f"  {part[0][0]} to {part[-1][0]}  all right")
            else:
                told.append(f"  {part[0][0]}  all right")
    if quarantined:
        day, share = max(quarantined.items(), key=lambda item: item[1])
        told.append(f"quarantined: {len(quarantined)} days have some, most {day}: {share:.2%}")
    return "\n".join(told) + "\n"


def _month(item: tuple[date, str | None]) -> str:
    return f"{item[0]:%Y-%m}"


def _signs(of: list[tuple[date, str | None]]) -> str:
    signs = [OUTSIDE] * 31
    for day, reason in of:
        sign = RIGHT_SIGN if reason is None else STALE_SIGN
        signs[day.day - 1] = MISSING_SIGN if reason == MISSING else sign
    return "".join(signs)
