"""What a user would pick instead of the user index, on the same data in the same run.

`make bench ONLY=contestants`: the job and its files are in `benchmarks/contest/world.py`, each way
to do it is a file beside that one, run in a process of its own, and polars and Feast in an
environment of their own. Before a figure counts, the answer is compared with ours, and ours with
one found an event at a time. Memory is what a process and its children (Java too) hold, the most
seen 20 times a second: anonymous memory, which no page cache can give back, and all that is
resident. Whoever takes longer than --limit seconds, or more than --memory, is measured on a world
of a tenth of the size, or of a hundredth, beside ours on that one.

Ours hands out tensors, and so does the padded copy; the others write Parquet, which a trainer has
yet to read: `ours, written` does that too. Files have just been written, and are read from the page
cache as far as memory goes; with --from-disk, from the disk, as data larger than memory are.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.contest import world as contest
from benchmarks.contest.world import Answer, World
from jobs import ledger
from jobs.setup import PYTHON, ROOT
from jobs.setup_apart import Environment

BENCH = Environment("bench", "polars and Feast, for benchmarks,")
LENGTHS = (1, 50, 256)
SMALLER = (1, 10, 100)
"""By how much the world is, for who cannot finish in the one before."""
TIMES = "3"
"""How often a quick answer is given at most."""
NUM_CHECKED, NUM_PLAIN = 2000, 40
"""Samples whose answers are compared with ours; and ours with a plain search."""
MB = 1e6


@dataclass(frozen=True)
class Contestant:
    """One way to do the job."""

    module: str
    label: str
    lengths: tuple[int, ...]
    python: Path = PYTHON
    prepares: tuple[str, ...] = ()
    """Modules whose preparation it needs, the last of which made what it keeps."""
    is_of_length: bool = False
    """Its preparation is of one length only."""
    writes: bool = True
    """It writes its answer; else it is asked for what it would hand out."""


OURS = Contestant("ours", "ours", LENGTHS, prepares=("ours",), writes=False)
CONTESTANTS = (
    OURS,
    Contestant("ours_written", "ours, written", LENGTHS, prepares=("ours",)),
    Contestant(
        "padded",
        "padded copy",
        LENGTHS,
        prepares=("ours", "padded"),
        is_of_length=True,
        writes=False,
    ),
    Contestant("polars_joins", "polars", (1, 50), BENCH.python),
    Contestant("duckdb_sql", "DuckDB", (1, 50)),
    Contestant("spark_asof", "Spark last()", (1,)),
    Contestant("spark_window", "Spark collect_list", (1, 50)),
    Contestant("spark_rows", "Spark join of rows", (50,)),
    Contestant("feast_retrieval", "Feast", (1,), BENCH.python, ("feast_retrieval",)),
)


@dataclass(frozen=True)
class Phase:
    """What a process said and used."""

    seconds: float = 0.0
    anonymous: int = 0
    resident: int = 0
    failure: str = ""

    @classmethod
    def together(cls, phases: Sequence[Phase]) -> Phase:
        """One after the other."""
        return cls(
            sum(p.seconds for p in phases),
            max(p.anonymous for p in phases),
            max(p.resident for p in phases),
            next((p.failure for p in phases if p.failure), ""),
        )


@dataclass(frozen=True)
class Result:
    """One contestant at one length in one world."""

    num_samples: int
    preparing: Phase
    answering: Phase
    num_bytes: int = 0
    """That it wrote: what it prepared and its answer."""
    failure: str = ""
    """Why its figures do not count."""

    @property
    def speed(self) -> float:
        return self.num_samples / self.answering.seconds

    @property
    def figures(self) -> dict[str, tuple[float, str, bool]]:
        """(value, unit, whether more is better) by name."""
        return {
            "speed": (self.speed, "samples/s", True),
            "one pass, with preparation": (
                self.preparing.seconds + self.answering.seconds, "s", False,
            ),
            "memory to answer": (self.answering.anonymous / MB, "MB", False),
            "memory, with preparation": (
                max(self.preparing.anonymous, self.answering.anonymous) / MB, "MB", False,
            ),
            "written": (self.num_bytes / MB, "MB", False),
        }  # fmt: skip


@dataclass(frozen=True)
class Limit:
    """What a phase may take, of seconds and of bytes of anonymous memory."""

    seconds: float
    memory: float
    is_from_disk: bool = False
    """No file is in the page cache when an answer begins, which is given once."""


class Contest:
    """A world, and what was prepared in it so far."""

    def __init__(self, world: World, limit: Limit) -> None:
        self.world, self.limit = world, limit
        self.out = world.folder / "out"
        self.prepared: dict[str, Phase] = {}
        self.expected: dict[int, Answer] = {}
        num = self.num_samples = len(world.asked()[0])
        draw = np.random.default_rng(1)
        self.checked = np.sort(draw.choice(num, min(num, NUM_CHECKED), replace=False))
        np.save(world.folder / "checked.npy", self.checked)

    def described(self, length: int) -> str:
        """The job, in a few words."""
        millions = pq.ParquetFile(self.world.events).metadata.num_rows / 1e6
        place = ", from disk" if self.limit.is_from_disk else ""
        return f"newest {length} of {self.num_samples:,} samples, {millions:g} M events{place}"

    def result(self, contestant: Contestant, length: int) -> Result:
        """Prepares, answers, and is checked."""
        preparing, num_bytes = Phase(), 0
        if contestant.prepares:
            preparing = self._prepared(contestant, length)
            num_bytes = size_of(self.world.prepared(contestant.prepares[-1]))
        answering = Phase()
        if not preparing.failure:
            answering = self._phase(contestant, "answer", length)
        failure = preparing.failure or answering.failure
        num_bytes += size_of(self.out)
        if not failure:
            failure = self._check(contestant, length)
        remove(self.out)
        if contestant.is_of_length:
            remove(self.world.prepared(contestant.module))
            self.prepared.pop(contestant.module)
        return Result(self.num_samples, preparing, answering, num_bytes, failure)

    def _prepared(self, contestant: Contestant, length: int) -> Phase:
        """All that it needs, whoever made it."""
        for name in contestant.prepares:
            if name not in self.prepared:
                maker = next(c for c in CONTESTANTS if c.module == name)
                self.prepared[name] = self._phase(maker, "prepare", length)
        return Phase.together([self.prepared[name] for name in contestant.prepares])

    def _phase(self, contestant: Contestant, phase: str, length: int) -> Phase:
        words = [contestant.module, phase, str(self.world.folder), str(length), str(self.out)]
        words.append("1" if self.limit.is_from_disk else TIMES)
        if self.limit.is_from_disk and phase == "answer":
            evict(self.world.folder)
        command = [str(contestant.python), "-m", "benchmarks.contest.worker", *words]
        return measured(command, self.world.folder, self.limit)

    def _check(self, contestant: Contestant, length: int) -> str:
        """What is wrong with its answer, if anything."""
        if not contestant.writes:
            asked = self._phase(contestant, "check", length)
            if asked.failure:
                return asked.failure
        found = contest.read_answer(self.out, self.checked, length)
        if contestant is OURS:
            some = self.checked[:: max(1, len(self.checked) // NUM_PLAIN)]
            plain = contest.plain_answer(self.world, some, length)
            wrong = contest.read_answer(self.out, some, length).differs(plain)
            if wrong:
                raise AssertionError(f"ours is wrong, newest {length}: {wrong}")
            self.expected[length] = found
        wrong = found.differs(self.expected[length])
        return f"another answer: {wrong}" if wrong else ""


def measured(command: Sequence[str], folder: Path, limit: Limit) -> Phase:
    """Runs a worker; it and all that it started are ended when it takes more than the limit."""
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    said, errors = folder / "said", folder / "errors"
    environment = os.environ | {"TMPDIR": str(scratch), "TQDM_DISABLE": "1"}
    anonymous, resident, failure, started = 0, 0, "", time.monotonic()
    with said.open("w") as out, errors.open("w") as err:
        worker = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
            start_new_session=True,
        )  # fmt: skip
        try:
            while worker.poll() is None and not failure:
                held = [memory_of(pid) for pid in tree_of(worker.pid)]
                anonymous = max(anonymous, sum(of[0] for of in held))
                resident = max(resident, sum(of[1] for of in held))
                if time.monotonic() - started > limit.seconds:
                    failure = f"not in {limit.seconds:g} s"
                elif anonymous > limit.memory:
                    failure = f"not in {limit.memory / 1e9:.1f} GB"
                with suppress(subprocess.TimeoutExpired):
                    worker.wait(0.05)
        finally:
            # Again, for what was being started while the others were ended.
            while left := tree_of(worker.pid)[0 if worker.poll() is None else 1 :]:
                for pid in left:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                time.sleep(0.05)
            remove(scratch)
    if failure:
        return Phase(0, anonymous, resident, failure)
    if worker.returncode:
        last = (errors.read_text().strip().splitlines() or ["no message"])[-1]
        return Phase(0, anonymous, resident, f"failed ({worker.returncode}): {last[:200]}")
    lines = said.read_text().splitlines()
    return Phase(float(lines[-1]) if lines else 0.0, anonymous, resident)


def tree_of(pid: int) -> list[int]:
    """The first process of a session, then all that live in it or have been started from it."""
    started_by: dict[int, list[int]] = {}
    found = [pid]
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            child, words = int(stat.parent.name), stat.read_text().rpartition(")")[2].split()
            state, parent, session = words[0], int(words[1]), int(words[3])
            if state == "Z" or child == pid:
                continue
            if session == pid:
                found.append(child)
            else:
                started_by.setdefault(parent, []).append(child)
    for one in found:
        found += started_by.get(one, [])
    return found


def memory_of(pid: int) -> tuple[int, int]:
    """Bytes (anonymous, resident) that a process holds; none once it has ended."""
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        held = {x.split(":")[0]: int(x.split()[1]) * 1024 for x in lines if x.endswith(" kB")}
        return held.get("RssAnon", 0) + held.get("RssShmem", 0), held.get("VmRSS", 0)
    return 0, 0


def evict(folder: Path) -> None:
    """Takes a folder's files out of the page cache."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def size_of(place: Path) -> int:
    """Bytes of a file, or of all files in a folder; 0 where there is none."""
    files = place.rglob("*") if place.is_dir() else [place]
    return sum(file.stat().st_size for file in files if file.is_file())


def remove(place: Path) -> None:
    shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)


Told = tuple[Contest, int, Contestant, Result]


def run(
    folder: Path, num_events: int, num_samples: int, zipf: float, limit: Limit,
    names: Sequence[str], lengths: Sequence[int],
) -> Iterator[Told]:  # fmt: skip
    """Every contestant at every length, ours first; who does not finish, in a smaller world too."""
    contests: dict[int, Contest] = {}
    for length in lengths:
        left = [c for c in CONTESTANTS[1:] if length in c.lengths and c.module in names]
        for size in SMALLER:
            if size > 1 and not left:
                break
            if size not in contests:
                place, sizes = folder / f"{size}", (num_events // size, num_samples // size)
                contests[size] = Contest(contest.write_world(place, *sizes, zipf=zipf), limit)
            held, late = contests[size], []
            for contestant in (OURS, *left):
                result = held.result(contestant, length)
                sys.stderr.write(f"{time.strftime('%H:%M:%S')} {length} {contestant.label}\n")
                if contestant is OURS and result.failure:
                    raise SystemExit(f"ours, {held.described(length)}: {result.failure}")
                yield held, length, contestant, result
                if result.failure.startswith("not in"):
                    late.append(contestant)
            left = late


def rows_of(told: Sequence[Told]) -> list[dict[str, Any]]:
    """Each figure of ours over each other's, where the others' count."""
    rows = []
    ours = {(held, length): r for held, length, c, r in told if c is OURS}
    for held, length, contestant, result in told:
        mine, where = ours[held, length], held.described(length)
        if contestant is OURS:
            continue
        for name, (value, unit, is_more) in mine.figures.items():
            ratio = is_met = None
            if not result.failure and (other := result.figures[name][0]):
                ratio = value / other
            if ratio is not None and contestant.module != "ours_written":
                is_met = ratio >= 1 if is_more else ratio <= 1
            rows.append(
                {
                    "name": f"{name}, {where}", "value": round(value, 3), "unit": unit,
                    "against": contestant.label + (result.failure and f": {result.failure}"),
                    "ratio": ratio, "bar": None if is_met is None else 1.0,
                    "met": is_met, "machine": ledger.machine(),
                }
            )  # fmt: skip
    return rows


def table(told: Sequence[Told]) -> Iterator[str]:
    """A line a result, under a heading for each length and world."""
    ours, heading = OURS, ""
    speed = 1.0
    for held, length, contestant, result in told:
        here = held.described(length)
        if here != heading:
            heading = here
            yield ""
            yield (
                f"{here:50s}{'samples/s':>11s}{'ours x':>9s}{'prepare s':>11s}"
                f"{'memory MB':>11s}{'resident':>10s}{'preparing':>11s}{'written MB':>12s}"
            )
        if contestant is ours:
            speed = result.speed
        if result.failure:
            yield f"  {contestant.label:48s}{result.failure}"
            continue
        before, now = result.preparing, result.answering
        yield (
            f"  {contestant.label:48s}{result.speed:>11,.0f}{speed / result.speed:>9.1f}"
            f"{before.seconds:>11.1f}{now.anonymous / MB:>11,.0f}{now.resident / MB:>10,.0f}"
            f"{before.anonymous / MB:>11,.0f}{result.num_bytes / MB:>12,.0f}"
        )


def lost(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The figures in which ours is not the better one, a line for each contestant and length."""
    missed: dict[str, list[str]] = {}
    for row in rows:
        if row["met"] is False:
            name, _, where = row["name"].rpartition(", newest")
            missed.setdefault(f"newest{where}, {row['against']}", []).append(
                f"{name} {row['ratio']:.3g} x"
            )
    yield "ours loses to:" if missed else "ours loses to none"
    for who, figures in missed.items():
        yield f"  {who}: {'; '.join(figures)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=2_000_000)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--zipf", type=float, default=1.0, help="exponent of events over users")
    parser.add_argument("--limit", type=float, default=60, help="seconds for one contestant")
    half = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2e9
    parser.add_argument("--memory", type=float, default=half, help="GB for one (half of all)")
    parser.add_argument("--folder", type=Path, help="where the world is made (a temporary one)")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--from-disk", action="store_true", help="nothing is in the page cache")
    names = [c.module for c in CONTESTANTS[1:]]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="beside ours")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if any(c.python != PYTHON for c in CONTESTANTS if c.module in args.only):
        BENCH.set_up()
    limit = Limit(args.limit, args.memory * 1e9, args.from_disk)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        told = list(
            run(
                Path(folder), args.events, args.samples, args.zipf, limit, args.only,
                args.lengths,
            )
        )  # fmt: skip
        rows, lines = rows_of(told), list(table(told))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    sys.stdout.write("\n".join([*lines, "", *lost(rows)]) + "\n")


if __name__ == "__main__":
    main()
