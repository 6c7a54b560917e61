"""Bring a streaming compressor line up to a day, over every day that is ready: what a daily run
calls, in whatever order days were built."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import date, timedelta
from typing import Any, Literal, NamedTuple

from compressor.gate import TRAILING_DAYS, DayFigures, GateLimits, RefusedError, why_refused
from jobs import check_tables, ledger, train_compressor
from jobs.day_states import States, states_of
from pipelines import approvals, delta, lines, tables
from pipelines.approvals import APPROVED
from pipelines.days import Days
from pipelines.domain import Domain
from pipelines.domain import load as load_domain
from pipelines.errors import InputError
from pipelines.quality import Limits
from pipelines.written import MISSING

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Args(GateLimits):
    """Walk a streaming line forward, a day at a time: predict the day with yesterday's weights,
    train on it, write its tokens once.

    A day is walked once its stream is there, holds what `iat check` asks of it, and every day
    before it has been walked; the line stops at the first that is not, says which and why, and
    leaves with 0. So days may be built in any order, and the line ends up the same: a run of an old
    day walks on through the later ones that wait for it. Run twice, or two at once, it leaves the
    same tables.

    A day whose AUC, log loss or training loss is out of line with the week before is not trained
    on: yesterday's weights write its tokens, and `iat check` fails for it. Until three days of the
    week before have figures, only a loss that is not finite is refused.
    """

    domain: str
    """Name of a domain that comes with the toolkit, or a FILE.toml."""
    lake: str
    """Root folder of the Delta tables."""
    line: str = APPROVED
    """The line; approved: the domain's approved one or, before there is any, one begun now."""
    start: date | None = None
    """First day that the caller asks for: of these days the result tells, walked now or before."""
    end: date | None = None
    """The day after the last that the caller asks for; all that are ready are walked in any
    case."""
    begin: date | None = None
    """First day (UTC) of a line begun now."""
    order: Literal["temporal", "user"] = "user"
    """Of a line begun now, which is called DOMAIN-ORDER."""
    window: int = 0
    """Of a line begun now: days before each day that it reads; 0: all."""
    seed: int = 0
    """Of initial weights and batches of a line begun now."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    dry_run: bool = False
    """Say where the line is and what it would walk, and stop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start and self.end and self.start >= self.end:
            raise InputError(f"--start {self.start} must be before --end {self.end}")


class Line(NamedTuple):
    """A line and where it has come."""

    name: str
    first: date
    """Its first day."""
    end: date
    """The first day that it has not walked."""
    is_new: bool
    is_approved: bool
    """Or named, so that this command approves nothing."""


def main(args: Args) -> dict[str, Any]:
    domain = load_domain(args.domain)
    line = line_of(args, domain)
    walked: list[date] = []
    refused: dict[str, str] = {}
    waits = ""
    days = Days(line.end, max(line.end, args.end or line.end, latest(args.lake, domain)))
    states = states_of(args.lake, domain, days, None) if len(days) else {}
    for day in days:
        waits = why_waiting(args.lake, domain, day, states)
        if waits or args.dry_run:
            break
        if why := walk_day(args, domain, line, day):
            refused[str(day)] = why
        walked.append(day)
        line = line._replace(end=day + timedelta(days=1), is_new=False)
        if not line.is_approved:
            line = approved_first(args.lake, domain, line)
    # A run that is repeated tells of the days that it was asked for, walked then or now.
    asked = Days(args.start, args.end) if args.start and args.end else ()
    held = [day for day in asked if line.first <= day < line.end]
    result = {
        "domain": domain.name,
        "line": line.name,
        "first": str(line.first),
        "days": [str(day) for day in sorted({*held, *walked})],
        "walked": [str(day) for day in walked],
        "end": str(line.end),
        "refused": refused,
        "waits": waits,
    }
    sys.stdout.write(as_text(result))
    return result


def latest(lake: str, domain: Domain) -> date:
    """The day after the last of the streams; without any the first of all dates."""
    table = tables.user_order(domain)
    if not delta.exists(lake, table):
        return date.min
    return train_compressor.stream_days(lake, table).end


def line_of(args: Args, domain: Domain) -> Line:
    """The line that is meant; InputError where there is none and no day to begin one at."""
    name = args.line
    if name == APPROVED:
        held = approvals.approved(args.lake, domain)
        # Lines of all domains of a lake are in one table.
        name = held.line if held else f"{domain.name}-{args.order}"
    known = {row["compressor_line"]: row for row in lines.newest(args.lake, domain.name)}
    row = known.get(name)
    is_approved = args.line != APPROVED or held is not None
    if row is not None:
        if row["protocol"] != "streaming":
            raise InputError(
                f"line {name} is frozen: only a streaming line is walked. Its tokens of more days: "
                f"iat backfill --compressor-version {name}"
            )
        return Line(name, row["start"], row["end"], False, is_approved)
    if args.line != APPROVED:
        raise InputError(
            f"{domain.name} has no line called {name!r} in {args.lake}, only: "
            f"{', '.join(known) or 'none'}. iat train-compressor begins one"
        )
    if args.begin is None:
        raise InputError(
            f"no compressor line of {domain.name} is approved in {args.lake}, and there is none "
            f"called {name}: give --begin DAY to begin it, or approve another (iat approve)"
        )
    return Line(name, args.begin, args.begin, True, is_approved)


def approved_first(lake: str, domain: Domain, line: Line) -> Line:
    """The first line of a domain has nothing to be compared with: approved once it has a day."""
    with ledger.job(lake, "approve") as run:
        commit = ledger.commit_of(run, domain, {})
        approvals.approve(lake, domain, line.name, {"first": True}, commit=commit)
    return line._replace(is_approved=True)


def why_waiting(lake: str, domain: Domain, day: date, states: States) -> str:
    """Why a day cannot be walked yet; empty where it can."""
    for group in ("instances", "streams"):
        if reason := states[group][day]:
            return f"{day}: its {group} are {'' if reason == MISSING else 'stale: '}{reason}"
    version = delta.open_table(lake, tables.instances(domain)).version()
    check = check_tables.Check(lake, domain, version, Limits(), ("instances", "streams"))
    check.remember_week(day)
    check.day(day)
    if check.failed:
        return f"{day}: iat check fails: {check.failed[0].finding.says}"
    return ""


def walk_day(args: Args, domain: Domain, line: Line, day: date) -> str:
    """Walk one day; returns why it was not trained on, empty where it was."""
    week = figures_before(args.lake, line.name, day)
    why = ""

    def gate(figures: DayFigures) -> None:
        nonlocal why
        why = why_refused(figures, week, args)
        if why:
            raise RefusedError(why)

    end = day + timedelta(days=1)
    common: dict[str, Any] = {"domain": args.domain, "lake": args.lake, "device": args.device}
    if line.is_new:
        common |= {
            "line": line.name, "order": args.order, "window": args.window, "seed": args.seed
        }  # fmt: skip
    else:
        seed = json.loads(lines.find(args.lake, line.name)["config"])["training"]["seed"]
        common |= {"parent": line.name, "seed": seed}
    given = train_compressor.Args(**common, start=day, end=end)
    try:
        train_compressor.run_judged(given, gate)
    except RefusedError:
        log.warning("%s is not trained on: %s", day, why)
        told = {"refused": why}
        train_compressor.run_judged(replace(given, untrained=True), told=told)
    return why


def figures_before(lake: str, line: str, day: date) -> list[DayFigures]:
    """Of the days of the week before, as far as the line's versions tell."""
    week = Days(day - timedelta(days=TRAILING_DAYS), day)
    # A version that wrote several days tells of all of them, and may end after some.
    found: dict[str, DayFigures] = {}
    for row in lines.ending(lake, line, week):
        for of, figures in json.loads(row["metrics"]).get("by_day", {}).items():
            if date.fromisoformat(of) in week:
                found[of] = DayFigures(**figures)
    return [found[of] for of in sorted(found)]


def as_text(result: Mapping[str, Any]) -> str:
    """Where the line is now, for people."""
    walked = result["walked"]
    told = f"walked {len(walked)} days, {walked[0]} to {walked[-1]}" if walked else "nothing walked"
    out = [f"{result['domain']}: line {result['line']}: {told}; its next day is {result['end']}"]
    out += [f"  {day} was not trained on: {why}" for day, why in result["refused"].items()]
    if result["waits"]:
        out.append(f"  waits for {result['waits']}")
    return "\n".join(out) + "\n"
