"""Schedules of faults, drawn from a seed: what is killed when, which two run at once, in which
order days come, how small the disk is and how wrong the clock; and what the tables then hold."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from pipelines.days import Days
from pipelines.tables import Table
from tests.faults.workers import Kind, Pool, Worker
from tests.faults.world import DAYS, EACH, FORGOTTEN, FROZEN, World, half_days, held, targets

JOBS = (*EACH, *EACH, "build", "backfill", "backfill tokens")
"""Those that run several of the others less often: they take as long as three."""
ALONE = ("train-compressor", "write-tokens", "forget")
"""Their days follow one another, or they have none."""
FAULTS = ("kill", "kill", "race", "order", "disk", "clock")
"""Kills twice as often as the others."""
MOMENTS = ("any time", "before a commit", "after a commit")
DONE, RETRY = 0, 3
TIMEOUT_S = 240.0
MIB = 2**20
Command = tuple[str, Days]


@dataclass
class Outcome:
    """What a schedule did to the tables; all zero is right."""

    name: str
    hit: int = 0
    """Faults that met a command at work."""
    lost: int = 0
    duplicated: int = 0
    leaked: int = 0
    """Rows that no undisturbed run writes, and days that a reader could have seen half written."""
    told: list[str] = field(default_factory=list)

    @property
    def is_right(self) -> bool:
        return not (self.lost or self.duplicated or self.leaked or self.told)


def run(
    seed: int,
    world: World,
    pool: Pool,
    *,
    jobs: Sequence[str] = JOBS,
    faults: Sequence[str] = FAULTS,
) -> Outcome:
    """One schedule, drawn from its seed."""
    draw = random.Random(seed)
    job, fault = draw.choice(jobs), draw.choice(faults)
    if job in ALONE and fault == "order":
        fault = "kill"
    outcome = Outcome(f"seed {seed}: {fault}, {job}")
    with _lake(small=fault == "disk") as lake:
        world.start(job, lake)
        schedule = Schedule(draw, world, pool, job, lake, outcome)
        getattr(schedule, f"with_{fault}")()
        schedule.finish()
        for table in targets(world.domain)[job]:
            # Item tokens sum up the days before theirs: out of order they are right in the end.
            is_whole = (job, fault) != ("backfill tokens", "order") or "item_id" not in table.key
            _judge(outcome, world, job, lake, table, is_whole=is_whole)
    return outcome


def _judge(
    outcome: Outcome, world: World, job: str, lake: Path, table: Table, *, is_whole: bool
) -> None:
    """`is_whole`: whether its days are right or as before at every moment."""
    wanted = held(world.after(job), table)
    try:
        found = held(lake, table)
    except Exception as error:
        outcome.told.append(f"{table.name} does not read: {error}")
        outcome.lost += wanted.total()
        return
    outcome.lost += sum(row not in found for row in wanted)
    outcome.duplicated += sum(n > wanted[row] for row, n in found.items() if row in wanted)
    outcome.leaked += sum(row not in wanted for row in found)
    if is_whole and "event_date" in table.schema.names:
        half = half_days(lake, table, world.before(job), world.after(job))
        outcome.leaked += len(half)
        outcome.told += half


class Schedule:
    """Commands on one lake, and what is done to them."""

    def __init__(
        self, draw: random.Random, world: World, pool: Pool, job: str, lake: Path, outcome: Outcome
    ) -> None:
        self.draw, self.world, self.pool, self.job = draw, world, pool, job
        self.lake, self.outcome = lake, outcome
        self.kind: Kind = "torch" if job in (*ALONE, "backfill tokens") else "spark"
        self.left: list[Command] = self.commands()
        """What has not been seen to end well, in order."""

    def commands(self) -> list[Command]:
        """The job's commands: all days at once, or two parts of them."""
        last = DAYS.end - timedelta(days=1)
        if self.job == "forget":
            return [(self.job, DAYS)]
        if self.job == "train-compressor" or self.draw.random() < 0.5:
            return [(self.job, Days(DAYS.start, last)), (self.job, Days(last, DAYS.end))]
        return [(self.job, DAYS)]

    def argv(self, command: Command) -> list[str]:
        job, days = command
        shop = self.world.shop("new")
        given = [job.split()[0], "--domain", shop.file, "--lake", str(self.lake)]
        if job == "forget":
            return [*given, "--user", FORGOTTEN]
        given += ["--start", str(days.start), "--end", str(days.end)]
        if job == "train-compressor":
            parent = [] if days.start == DAYS.start else ["--parent", "user"]
            return [*given, "--device", "cpu", *parent]
        if job == "write-tokens":
            return [*given, "--device", "cpu", "--version", FROZEN]
        if job == "backfill tokens":
            of = ["--tables", "tokens", "--compressor-version", FROZEN]
            return [*given, "--device", "cpu", *of]
        return [*given, "--master", "local[2]"]

    def with_kill(self) -> None:
        """SIGKILL, perhaps again in the run after it."""
        for _ in range(self.draw.choice((1, 1, 2))):
            if self.left:
                self._killed(self.left[0])

    def with_race(self) -> None:
        """The same command twice at once, or two on days that overlap; perhaps one is killed."""
        first = self.left[0]
        second = first
        if self.kind == "spark" and self.draw.random() < 0.5:
            second = (self.job, Days(DAYS.start + timedelta(days=1), DAYS.end))
            self.left = [(self.job, DAYS), second]
            first = (self.job, Days(DAYS.start, DAYS.end - timedelta(days=1)))
        workers = [self.pool.take(self.kind) for _ in range(2)]
        for worker, command in zip(workers, (first, second), strict=True):
            worker.give(self.argv(command))
            time.sleep(self.draw.choice((0.0, 0.0, 0.3)))
        if self.draw.random() < 0.3:
            time.sleep(self.draw.uniform(0.0, 3.0))
            workers[0].kill()
        self.outcome.hit += 1
        for worker in workers:
            if worker.process.poll() is None:
                self._said(worker)
            self.pool.give_back(worker)

    def with_order(self) -> None:
        """A day a command, in any order, one of them killed and run again last."""
        days = [(self.job, Days(day, day + timedelta(days=1))) for day in DAYS]
        self.draw.shuffle(days)
        self.left = days
        if self.draw.random() < 0.5:
            self._killed(days[0])
            self.left = [*days[1:], days[0]]
        else:
            self.outcome.hit += 1
        if self.job == "backfill tokens":
            self.left = [*self.left, (self.job, DAYS)]  # item tokens sum up the days before theirs

    def with_disk(self) -> None:
        """A disk that is full half way; then one that is not."""
        used = shutil.disk_usage(self.lake.parent).used
        _resize(self.lake.parent, used + self.draw.randrange(4096, MIB // 4))
        for command in list(self.left):
            worker = self.pool.take(self.kind)
            worker.give(self.argv(command))
            code = self._said(worker, allowed=(DONE, RETRY))
            self.pool.give_back(worker)
            if code != DONE:
                self.outcome.hit += 1
                break
        _resize(self.lake.parent, 64 * MIB)

    def with_clock(self) -> None:
        """Each command on a machine whose clock is wrong by up to a year, or by seconds."""
        for command in list(self.left):
            sign = self.draw.choice((-1, 1))
            skew_s = sign * self.draw.choice((self.draw.randrange(1, 90), 86_400 * 400))
            worker = self.pool.take(self.kind, skew_s=skew_s)
            worker.give(self.argv(command))
            if self._said(worker) == DONE:
                self.left.remove(command)
            self.outcome.hit += 1
            self.pool.drop(worker)
        if self.draw.random() < 0.5:
            self.left = self.commands()  # once more, on a clock that is right

    def finish(self) -> None:
        """What is left, each until it is done, as a scheduler would."""
        for command in self.left:
            for _ in range(6):
                worker = self.pool.take(self.kind)
                worker.give(self.argv(command))
                code = self._said(worker, allowed=(DONE, RETRY))
                self.pool.give_back(worker)
                if code == DONE:
                    break
            else:
                self.outcome.told.append(f"{command[0]} {command[1]} is never done")
        if self.job in ("build", "backfill", "backfill tokens"):
            self._nothing_left()

    def _nothing_left(self) -> None:
        """Every day counts as right."""
        plan = self.lake.parent / "plan.json"
        worker = self.pool.take(self.kind)
        command = ("backfill" if self.job == "build" else self.job, DAYS)
        worker.give([*self.argv(command), "--dry-run", "--json", str(plan)])
        if self._said(worker, allowed=(DONE,)) == DONE:
            steps = json.loads(plan.read_text())["steps"]
            self.outcome.told += [f"{step['days']} is not right: {step['why']}" for step in steps]
        self.pool.give_back(worker)

    def _killed(self, command: Command) -> None:
        worker = self.pool.take(self.kind)
        moment = self.draw.choice(MOMENTS)
        table = self.lake / self.draw.choice(targets(self.world.domain)[self.job]).name
        watched = None if moment == MOMENTS[0] else _Watched(table, moment == MOMENTS[2])
        after_s = self.draw.uniform(0, 4.0) if watched is None else self.draw.uniform(0, 0.02)
        worker.give(self.argv(command))
        until = time.monotonic() + TIMEOUT_S
        while watched is not None and not watched.has_changed() and worker.said.empty():
            if time.monotonic() > until:
                break
            time.sleep(0.001)
        time.sleep(after_s)
        self.outcome.hit += worker.said.empty()
        worker.kill(alone=self.draw.random() < 0.3)
        self.pool.give_back(worker)

    def _said(self, worker: Worker, allowed: Sequence[int] = (DONE, RETRY)) -> int | None:
        code = worker.code(TIMEOUT_S)
        if code is None:
            worker.kill()
        if code not in allowed:
            self.outcome.told.append(f"exit code {code}:\n{worker.tail()}")
        return code


class _Watched:
    """A table's folder: whether a new data file, or a new commit, has appeared."""

    def __init__(self, table: Path, is_commit: bool) -> None:
        self.table, self.pattern = table, "_delta_log/*.json" if is_commit else "*/*.parquet"
        self.is_commit = is_commit
        self.before = self._files()

    def has_changed(self) -> bool:
        return self._files() > self.before

    def _files(self) -> set[Path]:
        lines = "*/event_date=*/*.parquet"  # tokens lie below their line
        return {*self.table.glob(self.pattern), *(() if self.is_commit else self.table.glob(lines))}


@contextmanager
def _lake(*, small: bool) -> Iterator[Path]:
    """An empty folder; a small one is a disk of its own, so that it can be full."""
    folder = Path(tempfile.mkdtemp(prefix="iat-faults-"))
    try:
        if small:
            _mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder))
        (folder / "lake").mkdir()
        yield folder / "lake"
    finally:
        if small:
            subprocess.run(["umount", "-l", str(folder)], check=True)
        shutil.rmtree(folder, ignore_errors=True)


def _resize(folder: Path, size: int) -> None:
    _mount("-o", f"remount,size={size}", str(folder))


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True)


def can_mount() -> bool:
    """Whether this process may make a small disk."""
    try:
        with _lake(small=True):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def total(outcomes: Sequence[Outcome]) -> Counter[str]:
    """Sums over schedules."""
    found: Counter[str] = Counter()
    for outcome in outcomes:
        found += Counter(
            lost=outcome.lost, duplicated=outcome.duplicated, leaked=outcome.leaked, hit=outcome.hit
        )
    return found
