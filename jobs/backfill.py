"""Holes and stale days: found, planned and written, in any order; days that are right stay."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import date
from functools import partial
from multiprocessing import get_context
from typing import Any, Literal

from tqdm import tqdm

from jobs import build_instances, build_samples, build_streams, raw_log, token_steps
from jobs.backfill_plan import Step, TokenPlan, as_text, estimate, notes, plan, token_plan
from jobs.day_states import GROUPS, Group, asked, states_of
from jobs.events import open_events
from jobs.future import latest_of, without_future
from jobs.parent import end_with_parent
from jobs.spark import session
from jobs.spark_faults import explained
from jobs.token_states import token_states
from jobs.token_steps import OURS, Work
from pipelines import delta, lines, raw_files
from pipelines.days import Days
from pipelines.domain import Domain
from pipelines.domain import load as load_domain
from pipelines.errors import InputError, RetryableError

log = logging.getLogger(__name__)

JOBS: Mapping[str, Any] = {
    "instances": build_instances,
    "streams": build_streams,
    "samples": build_samples,
}
Part = Literal["instances", "streams", "samples", "tokens"]
ALL: tuple[Part, ...] = ("instances", "streams", "samples", "tokens")


@dataclass(frozen=True, kw_only=True)
class Args(build_instances.Args):
    """Find the days of a domain's instances, streams, histories, samples and tokens that are
    missing or stale (also because their events came late or changed), say what would be written,
    and write it; days that are right are never touched.

    Tokens are those of a frozen compressor version (--compressor-version). Instance tokens are
    written in any order; item tokens sum up all days before theirs, so they come last, oldest
    first, from the first day whose tokens change. A step that fails does not keep the others from
    being done. Run it again to go on: what is there is found, so nothing is done twice.
    """

    tables: tuple[Part, ...] = ALL
    """Which: instances, streams (both orders and histories), samples, tokens (instance tokens and
    item tokens; needs --compressor-version)."""
    compressor_version: str = ""
    """Whose tokens: a frozen version, or a frozen line (its newest version); empty: no tokens."""
    order: Literal["oldest", "newest"] = "oldest"
    """Which days first."""
    days_at_once: int = 1
    """Days a step may write in one commit, where they lie next to each other."""
    workers: int = 1
    """Steps at once, each with a Spark session (tokens: weights) of its own."""
    device: str = "auto"
    """Of tokens: cpu, cuda, or auto: cuda where there is one."""

    def __post_init__(self) -> None:
        if min(self.days_at_once, self.workers) < 1:
            raise InputError(
                f"--days-at-once and --workers must be at least 1, got {self.days_at_once} and "
                f"{self.workers}"
            )
        has_tokens = "tokens" in self.tables
        if bool(self.compressor_version) != has_tokens and self.tables != ALL:
            raise InputError(
                "--tables with tokens needs --compressor-version, and the other way round; got "
                f"--tables {' '.join(self.tables)}"
            )

    @property
    def groups(self) -> list[Group]:
        """What Spark builds of what was asked for."""
        return [group for group in GROUPS if group in self.tables]


Outcome = tuple[Step, Exception | None]
Failed = tuple[Step, Exception]


def main(args: Args) -> dict[str, Any]:
    domain = load_domain(args.domain)
    delta.check_features(args.lake, *(make(domain) for made in GROUPS.values() for make in made))
    version = frozen_version(args, domain)
    marks = marks_of(args, domain)
    days = asked(args.lake, domain, args.start, args.end, marks)
    states = states_of(args.lake, domain, days, marks)
    steps, without = plan(states, args.groups, args.days_at_once)
    tokens = TokenPlan()
    if version is not None:
        (of_line,) = token_states(args.lake, domain, [version], days).values()
        rewritten = {day for step in steps if "streams" in step.why for day in step.days}
        tokens = token_plan(of_line, rewritten, args.days_at_once)
    if args.order == "newest":
        steps.reverse()
        tokens = tokens._replace(steps=tokens.steps[::-1])
    parts = (steps, tokens.steps, tokens.sums)
    every = [step for part in parts for step in part]
    guess = estimate(args.lake, domain, every, version)
    said = notes(without, tokens, version)
    sys.stdout.write(as_text(domain, days, parts, guess, said))
    result: dict[str, Any] = {
        "domain": domain.name,
        "days": str(days),
        "steps": [
            {
                "days": str(step.days),
                "start": str(step.days.start),
                "end": str(step.days.end),
                "why": dict(step.why),
            }
            for step in every
        ],
        "without_instances": [str(day) for day in without],
        "without_streams": [str(day) for day in tokens.without],
        "estimate": guess._asdict(),
    }
    if args.dry_run or not every:
        return result
    failed = run_all(args, steps, tokens, version)
    errors: dict[str, str] = {}
    for step, error in failed:  # what failed first of some days kept the rest of them back
        errors.setdefault(str(step.days), str(error))
    result |= {"failed": errors}
    sys.stdout.write(f"{len(every) - len(failed)} of {len(every)} steps done\n")
    if failed:
        _raise_for(failed, len(every))
    return result


def frozen_version(args: Args, domain: Domain) -> Mapping[str, Any] | None:
    """The row of the version whose tokens are asked for; InputError for one of a streaming line."""
    if not args.compressor_version:
        return None
    row = lines.find(args.lake, args.compressor_version)
    name, line = row["compressor_version"], row["compressor_line"]
    if row["domain"] != domain.name:
        raise InputError(f"version {name} compresses domain {row['domain']!r}, not {domain.name!r}")
    if row["protocol"] == "streaming":
        raise InputError(
            f"{name} is of the streaming line {line}, which has walked "
            f"{Days(row['start'], row['end'])}: its tokens are written once, as each day is "
            "walked, and only go forward. To go on: iat train-compressor "
            f"--domain {args.domain} --lake {args.lake} --parent {line}. For tokens of other "
            "days: train a version with --protocol frozen, and backfill that"
        )
    return row


def marks_of(args: Args, domain: Domain) -> Mapping[date, str] | None:
    """What the raw log holds of each day: files that are new or changed are looked into, unless
    instances are not asked for."""
    latest = latest_of(without_future(domain, args.end))
    if "instances" not in args.tables:
        found = raw_files.known(args.lake, domain)
        return found.marks(latest) if found else None
    with explained(f"looking into the log of {domain.name}"):
        log = open_events(session(args.master), domain, args.lake, **_of_raw(args))
        commit = None if args.dry_run else {"job": "backfill", "domain": domain.name}
        return raw_log.looked(log, args.lake, domain, commit=commit).marks(latest)


def _of_raw(args: Args) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ("data", "limit_users", "limit_days", "seed")}


def run_all(
    args: Args, steps: Sequence[Step], tokens: TokenPlan, version: Mapping[str, Any] | None
) -> list[Failed]:
    """Every step; those that failed, with why. Tokens come after what they are made of."""
    failed: list[Failed] = []
    num_steps = len(steps) + len(tokens.steps) + len(tokens.sums)
    with tqdm(total=num_steps, desc=f"backfill of {args.domain}", unit="step") as bar:

        def note(outcomes: Iterable[tuple[Step, Exception | None]]) -> None:
            for step, error in outcomes:
                bar.update()
                if error is not None:
                    log.warning("%s failed: %s", step.days, error)
                    failed.append((step, error))

        note(_outcomes(args, steps))
        if version is not None and num_steps > len(steps):
            work = Work(args.domain, args.lake, version["compressor_version"], args.device)
            with token_steps.pool(args.workers) as pool:
                ready, held = _held_back(failed, tokens.steps)
                note(held)
                write = token_steps.write
                note(_in_pool({pool.submit(write, work, step.days): step for step in ready}))
                note(_summed(pool, work, tokens.sums, failed))
    return failed


def _held_back(failed: Sequence[Failed], steps: Sequence[Step]) -> tuple[list[Step], list[Failed]]:
    """Steps whose streams are written, and the others."""
    bad = {day for step, _ in failed if "streams" in step.why for day in step.days}
    ready = [step for step in steps if bad.isdisjoint(step.days)]
    error = RetryableError("their streams were not written")
    return ready, [(step, error) for step in steps if not bad.isdisjoint(step.days)]


def _summed(
    pool: Executor, work: Work, steps: Sequence[Step], failed: Sequence[Failed]
) -> Iterator[Outcome]:
    """One after the other, up to the first day whose tokens were not written."""
    bad = {"streams", "tokens"}
    until = min((step.days.start for step, _ in failed if bad & {*step.why}), default=date.max)
    for step in steps:
        error: Exception | None = RetryableError(f"tokens from {until} on were not written")
        if step.days.end <= until:
            error = _ended(partial(_sum_up, pool, work, step.days))
            until = step.days.start if error else until
        yield step, error


def _sum_up(pool: Executor, work: Work, days: Days) -> Exception | None:
    return pool.submit(token_steps.sum_up, work, days).result()


def _outcomes(args: Args, steps: Sequence[Step]) -> Iterator[Outcome]:
    """Steps as they end, with what they failed with."""
    if args.workers == 1:
        for step in steps:
            yield step, _outcome(args, step)
        return
    with ProcessPoolExecutor(args.workers, get_context("spawn"), end_with_parent) as pool:
        yield from _in_pool({pool.submit(_outcome, args, step): step for step in steps})


def _in_pool(running: Mapping[Future[Exception | None], Step]) -> Iterator[Outcome]:
    for future in as_completed(running):
        yield running[future], _ended(future.result)


def _ended(result: Callable[[], Exception | None]) -> Exception | None:
    """What a worker's step failed with, or that the worker was ended."""
    try:
        return result()
    except BrokenProcessPool as error:
        return RetryableError(f"a worker was ended: {error}")


def _outcome(args: Args, step: Step) -> Exception | None:
    return token_steps.caught(lambda: run_step(args, step))


def run_step(args: Args, step: Step) -> None:
    """The jobs of one step; what they print for people goes to the log's stream."""
    given: dict[str, Any] = {name: getattr(args, name) for name in ("domain", "lake", "master")} | {
        "start": step.days.start,
        "end": step.days.end,
    }
    for group in step.why:
        module = JOBS[group]
        more = _of_raw(args) if group == "instances" else {}
        with contextlib.redirect_stdout(sys.stderr):
            module.main(module.Args(**given, **more))


def _raise_for(failed: Sequence[Failed], num_steps: int) -> None:
    step, error = failed[0]
    message = (
        f"{len(failed)} of {num_steps} steps failed, the first {step.days}: {error}\n"
        "The others are done; run it again to go on"
    )
    kinds = [kind for kind in OURS if any(isinstance(error, kind) for _, error in failed)]
    raise kinds[0](message)
