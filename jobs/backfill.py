"""Holes and stale days: found, planned and written, in any order; days that are right stay."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import date, timedelta
from multiprocessing import get_context
from typing import Any, Literal, NamedTuple

from tqdm import tqdm

from jobs import build_instances, build_samples, build_streams, raw_log
from jobs.day_states import GROUPS, Group, Size, States, asked, mean_day, states_of
from jobs.events import open_events
from jobs.future import latest_of, without_future
from jobs.parent import end_with_parent
from jobs.spark import session
from jobs.spark_faults import explained
from pipelines import delta, raw_files, tables
from pipelines.days import Days
from pipelines.domain import Domain
from pipelines.domain import load as load_domain
from pipelines.errors import CheckFailedError, InputError, RetryableError
from pipelines.written import MISSING

log = logging.getLogger(__name__)

JOBS: Mapping[Group, tuple[str, Any]] = {
    "instances": ("build-instances", build_instances),
    "streams": ("build-streams", build_streams),
    "samples": ("build-samples", build_samples),
}
OURS = (InputError, CheckFailedError, RetryableError)
"""What a step may fail with while the others go on; the first kind met is the command's."""


@dataclass(frozen=True, kw_only=True)
class Args(build_instances.Args):
    """Find the days of a domain's instances, streams, histories and samples that are missing or
    stale (also because their events came late or changed), say what would be written, and write
    it; days that are right are never touched.

    A step that fails does not keep the others from being done. Run it again to go on: what is
    there is found, so nothing is done twice.
    """

    groups: tuple[Group, ...] = tuple(GROUPS)
    """Which tables: instances, streams (both orders and histories), samples."""
    order: Literal["oldest", "newest"] = "oldest"
    """Which days first."""
    days_at_once: int = 1
    """Days a step may write in one commit, where they lie next to each other."""
    workers: int = 1
    """Steps at once, each with a Spark session of its own."""

    def __post_init__(self) -> None:
        if min(self.days_at_once, self.workers) < 1:
            raise InputError(
                f"--days-at-once and --workers must be at least 1, got {self.days_at_once} and "
                f"{self.workers}"
            )


class Step(NamedTuple):
    """Some days, and which groups of tables are written for them, in order."""

    days: Days
    why: Mapping[Group, str]
    """By group."""


class Estimate(NamedTuple):
    """What a plan will write, by the mean of the days that are there and the last run of each job;
    None where there is neither."""

    rows: float | None
    bytes: float | None
    seconds: float | None


def main(args: Args) -> dict[str, Any]:
    domain = load_domain(args.domain)
    delta.check_features(args.lake, *(make(domain) for made in GROUPS.values() for make in made))
    marks = marks_of(args, domain)
    days = asked(args.lake, domain, args.start, args.end, marks)
    states = states_of(args.lake, domain, days, marks)
    steps, without = plan(states, args.groups, args.days_at_once)
    if args.order == "newest":
        steps.reverse()
    guess = estimate(args.lake, domain, steps)
    sys.stdout.write(as_text(domain, days, steps, without, guess))
    result: dict[str, Any] = {
        "domain": domain.name,
        "days": str(days),
        "steps": [{"days": str(step.days), "why": dict(step.why)} for step in steps],
        "without_instances": [str(day) for day in without],
        "estimate": guess._asdict(),
    }
    if args.dry_run or not steps:
        return result
    failed = run_all(args, steps)
    result |= {"failed": {str(step.days): str(error) for step, error in failed}}
    sys.stdout.write(f"{len(steps) - len(failed)} of {len(steps)} steps done\n")
    if failed:
        _raise_for(failed, len(steps))
    return result


def marks_of(args: Args, domain: Domain) -> Mapping[date, str] | None:
    """What the raw log holds of each day: files that are new or changed are looked into, unless
    instances are not asked for."""
    latest = latest_of(without_future(domain))
    if "instances" not in args.groups:
        found = raw_files.known(args.lake, domain)
        return found.marks(latest) if found else None
    with explained(f"looking into the log of {domain.name}"):
        log = open_events(session(args.master), domain, args.lake, **_of_raw(args))
        commit = None if args.dry_run else {"job": "backfill", "domain": domain.name}
        return raw_log.looked(log, args.lake, domain, commit=commit).marks(latest)


def _of_raw(args: Args) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ("data", "limit_users", "limit_days", "seed")}


def plan(
    states: States, groups: Sequence[Group], days_at_once: int = 1
) -> tuple[list[Step], list[date]]:
    """Steps, oldest first, and days of which nothing can be made because they have no instances.

    What is made of a day's instances is written again whenever they are.
    """
    steps: list[Step] = []
    without: list[date] = []
    for day in states["instances"]:
        why = {group: reason for group in groups if (reason := states[group][day])}
        if "instances" in why:
            why = {group: why.get(group, "instances rewritten") for group in groups}
        elif why and states["instances"][day] == MISSING:
            without.append(day)
            continue
        if not why:
            continue
        last = steps[-1] if steps else None
        is_next = last is not None and last.days.end == day and len(last.days) < days_at_once
        if last is not None and is_next and last.why == why:
            steps[-1] = Step(Days(last.days.start, day + timedelta(days=1)), why)
        else:
            steps.append(Step(Days(day, day + timedelta(days=1)), why))
    return steps, without


def estimate(lake: str, domain: Domain, steps: Sequence[Step]) -> Estimate:
    """Rows and bytes of all tables written; seconds as if one step followed another."""
    rows = size = seconds = 0.0
    pace = _seconds_a_row(lake)
    is_known = is_paced = True
    for group, made in GROUPS.items():
        num_days = sum(len(step.days) for step in steps if group in step.why)
        if not num_days:
            continue
        found: list[Size | None] = [mean_day(lake, make(domain)) for make in made]
        sizes = [x for x in found if x is not None]
        is_known &= len(sizes) == len(found)
        rows += num_days * sum(x.rows for x in sizes)
        size += num_days * sum(x.bytes for x in sizes)
        is_paced &= is_known and JOBS[group][0] in pace
        if is_paced:
            seconds += num_days * max(x.rows for x in sizes) * pace[JOBS[group][0]]
    return Estimate(
        rows if is_known else None, size if is_known else None, seconds if is_paced else None
    )


def _seconds_a_row(lake: str) -> dict[str, float]:
    """Of the last run of each job that was done, from the ledger."""
    table = tables.job_reports()
    if not delta.exists(lake, table):
        return {}
    found: dict[str, float] = {}
    reports = delta.read(lake, table, columns=["job", "started", "report"])
    for row in reports.sort_by("started").to_pylist():
        report = json.loads(row["report"])
        if report["status"] == "done" and report["rows"]:
            found[row["job"]] = report["wall_s"] / report["rows"]
    return found


def as_text(
    domain: Domain, days: Days, steps: Sequence[Step], without: Sequence[date], guess: Estimate
) -> str:
    """The plan, for people; steps alike and next to each other in one line."""
    num_days = sum(len(step.days) for step in steps)
    lines = [f"{domain.name}, {days}: {num_days} of {len(days)} days to write, {len(steps)} steps"]
    for step in _alike(steps):
        words = ", ".join(f"{group} ({reason})" for group, reason in step.why.items())
        lines.append(f"  {_span(step.days)}: {words}")
    if without:
        lines.append(
            f"  {len(without)} days have no instances and are left out: add instances to --groups"
        )
    if steps:
        parts = [
            f"{guess.rows:,.0f} rows" if guess.rows is not None else "rows unknown",
            f"{guess.bytes / 1e6:,.1f} MB" if guess.bytes is not None else "size unknown",
            f"{guess.seconds:,.0f} s" if guess.seconds is not None else "time unknown",
        ]
        lines.append(f"  about {', '.join(parts)} (by the days and runs that are there)")
    return "\n".join(lines) + "\n"


def _alike(steps: Sequence[Step]) -> list[Step]:
    """Steps next to each other and for the same reasons as one."""
    found: list[Step] = []
    for step in sorted(steps, key=lambda step: step.days.start):
        if found and found[-1].days.end == step.days.start and found[-1].why == step.why:
            found[-1] = Step(Days(found[-1].days.start, step.days.end), step.why)
        else:
            found.append(step)
    return found


def _span(days: Days) -> str:
    last = days.end - timedelta(days=1)
    return str(last) if len(days) == 1 else f"{days.start} to {last}"


def run_all(args: Args, steps: Sequence[Step]) -> list[tuple[Step, Exception]]:
    """Every step; those that failed, with why."""
    failed: list[tuple[Step, Exception]] = []
    for step, error in tqdm(
        _outcomes(args, steps), total=len(steps), desc=f"backfill of {args.domain}", unit="step"
    ):
        if error is not None:
            log.warning("%s failed: %s", step.days, error)
            failed.append((step, error))
    return failed


def _outcomes(args: Args, steps: Sequence[Step]) -> Iterator[tuple[Step, Exception | None]]:
    """Steps as they end, with what they failed with."""
    if args.workers == 1:
        for step in steps:
            yield step, _outcome(args, step)
        return
    context = get_context("spawn")
    with ProcessPoolExecutor(args.workers, context, end_with_parent) as pool:
        running = {pool.submit(_outcome, args, step): step for step in steps}
        for future in as_completed(running):
            try:
                yield running[future], future.result()
            except BrokenProcessPool as error:
                yield running[future], RetryableError(f"a worker was ended: {error}")


def _outcome(args: Args, step: Step) -> Exception | None:
    try:
        run_step(args, step)
    except OURS as error:
        return error
    except OSError as error:
        return RetryableError(str(error))
    return None


def run_step(args: Args, step: Step) -> None:
    """The jobs of one step; what they print for people goes to the log's stream."""
    given: dict[str, Any] = {name: getattr(args, name) for name in ("domain", "lake", "master")} | {
        "start": step.days.start,
        "end": step.days.end,
    }
    for group in step.why:
        _, module = JOBS[group]
        more = _of_raw(args) if group == "instances" else {}
        with contextlib.redirect_stdout(sys.stderr):
            module.main(module.Args(**given, **more))


def _raise_for(failed: Sequence[tuple[Step, Exception]], num_steps: int) -> None:
    step, error = failed[0]
    message = (
        f"{len(failed)} of {num_steps} steps failed, the first {step.days}: {error}\n"
        "The others are done; run it again to go on"
    )
    kinds = [kind for kind in OURS if any(isinstance(error, kind) for _, error in failed)]
    raise kinds[0](message)
