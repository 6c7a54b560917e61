"""The whole chain on a real log in one command: raw events, Delta tables, compressors, tokens,
rankers, leak proof, report."""

from __future__ import annotations

import functools
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import torch
from deltalake import DeltaTable

from compressor.configs import SourceConfig
from downstream.configs import RankerConfig, RankerTraining
from downstream.data import RankerData
from downstream.user_index import IndexStore, UserIndex
from jobs import compare, comparison, ledger, progress, report, train_compressor, verify
from jobs.comparison import LINES, QUICK_ARMS, Arm, Predictions
from jobs.parent import end_with_parent
from jobs.token_figures import token_figures
from jobs.train_compressor import device_of
from pipelines import delta, tables
from pipelines.days import as_date, as_number
from pipelines.domain import Domain
from pipelines.domain import load as load_domain
from pipelines.errors import InputError, RetryableError
from pipelines.features import FeatureLayout

log = logging.getLogger(__name__)

NEEDED_BYTES = 2 * 2**30
TEST_SHARE = 0.3
"""The table reads the last of the days; all of them are predicted before they are trained on."""
PROTOCOLS: tuple[Literal["streaming", "frozen"], ...] = ("streaming", "frozen")
MARK = ".iat-quickstart"
"""In a lake that a quickstart made, and may therefore replace."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """See on a real log what instance tokens add to a strong ranker, measured on this machine.

    Builds the lake (Spark, Delta), walks the days with three compressors (temporal order, user
    order, untrained), writes their tokens, trains a ranker per arm on the same samples, proves on
    a sample of rows that nothing was read from the future, and writes report.html.
    """

    domain: str = "grocery"
    """Name of a domain that comes with the toolkit, or a FILE.toml."""
    lake: str = "lake/quickstart"
    """Folder of the Delta tables; what an earlier quickstart left there is replaced."""
    data: Path | None = None
    """Folder of a public log that does not come as a package (MovieLens)."""
    households: int = 60
    """Users to keep of a public log, a seeded random sample; 0: all."""
    days: int = 0
    """Keep the first days of a public log; 0: all."""
    out: Path = Path("report")
    """Folder for report.html."""
    ranker: Literal["din", "transformer"] = "din"
    """How the ranker reads the hand-made sequence."""
    master: str = "local[*]"
    """Spark master."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    workers: int = 0
    """Processes that train at the same time; 0: one a core (at most 8), or 4 on a GPU."""
    seed: int = 0
    """Of the sample, initial weights and batches."""
    full: bool = False
    """The whole log, every arm and control, both protocols, several seeds: for a GPU."""
    built: bool = False
    """--full: the lake's streams are there already (iat build)."""
    dry_run: bool = False
    """Say what would be done, and stop."""

    def __post_init__(self) -> None:
        for name in ("households", "days", "workers"):
            if getattr(self, name) < 0:
                raise InputError(f"--{name} must not be negative, got {getattr(self, name)}")


@dataclass
class Clock:
    """Seconds by step, in order."""

    steps: list[dict[str, Any]] = field(default_factory=list)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        log.info("== %s", name)
        yield
        self.steps.append({"step": name, "seconds": time.perf_counter() - started})


def main(args: Args) -> dict[str, Any]:
    # Before it is a Path, which makes a local folder of any URI.
    if "://" in args.lake:
        raise InputError(f"the quickstart writes to a local folder; got {args.lake}")
    domain = load_domain(args.domain)
    command = build_command(args, domain)
    if args.dry_run:
        arms = "\n  ".join(arm.name for arm in QUICK_ARMS)
        sys.stdout.write(f"would run {shlex.join(command)}\nand compare:\n  {arms}\n")
        return {"domain": domain.name, "lake": args.lake, "arms": [arm.name for arm in QUICK_ARMS]}
    if args.full:
        return _full(args, domain, command)
    _check_disk(args.lake)
    _fresh(Path(args.lake))
    clock = Clock()
    with ledger.job(args.lake, "quickstart", args) as run:
        with clock.step("Spark: raw log -> instances, streams, histories, samples on Delta"):
            # A small log is done before Java's second compiler pays back what it takes.
            _run(
                command, SPARK_SUBMIT_OPTS="-XX:TieredStopAtLevel=1 -XX:ReservedCodeCacheSize=240m"
            )
        compared = _compare(args, domain, clock)
        with clock.step("leak proof: SQL over the instances, then a disturbed future"):
            proof = verify.verify(domain, args.lake, "user", num_samples=100, seed=args.seed)
        found = compared | {
            "lake": [lake_row(args.lake, table) for table in tables_of(domain)],
            "checks": proof["checks"],
            "timings": clock.steps,
        }
        run.add(rows=found["settings"]["samples"])
        run.figures |= {arm["name"]: arm["auc"] for arm in found["arms"]}
    args.out.mkdir(parents=True, exist_ok=True)
    report.write_report(args.out / "report.html", found)
    sys.stdout.write(as_text(found, proof, args.out / "report.html"))
    return found


def build_command(args: Args, domain: Domain) -> list[str]:
    """The command line that builds the lake; Spark's Java ends with it."""
    command = ["iat", "build", "--domain", args.domain, "--lake", args.lake]
    if args.data:
        command += ["--data", str(args.data)]
    if domain.source.reader and args.households and not args.full:
        command += ["--limit-users", str(args.households)]
    if domain.source.reader and args.days:
        command += ["--limit-days", str(args.days)]
    return [*command, "--seed", str(args.seed), "--master", args.master]


def _full(args: Args, domain: Domain, command: list[str]) -> dict[str, Any]:
    """The lake, then `iat compare` in both protocols; a run that was cut goes on with --built.

    Groceries: the ranker sees 40% of households and 5 seeds; the others are the compressor's alone.
    """
    if not args.built:
        _check_disk(args.lake)
        _fresh(Path(args.lake))
        _run(command)
    share, seeds = (0.4, 5) if domain.name == "grocery" else (1.0, 3)
    found: dict[str, Any] = {}
    for protocol in PROTOCOLS:
        found[protocol] = compare.main(
            compare.Args(
                domain=args.domain, lake=args.lake, out=args.out / domain.name / protocol,
                protocol=protocol, ranker=args.ranker, seeds=seeds, user_share=share,
                device=args.device,
            )
        )  # fmt: skip
    return found


def _run(command: list[str], **environment: str) -> None:
    log.info("$ %s", shlex.join(command))
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", *command[1:]],
        check=False,
        env=environment | os.environ,
    )
    if done.returncode == 2:
        raise InputError(f"{shlex.join(command)} refused its input, see above")
    if done.returncode:
        raise RetryableError(f"{shlex.join(command)} ended with {done.returncode}, see above")


def _compare(args: Args, domain: Domain, clock: Clock) -> dict[str, Any]:
    """Lines, index, arms: the report without lake, checks and timings."""
    device = device_of(args.device)
    days, _ = delta.days_of(args.lake, tables.ranker_samples(domain))
    span = range(as_number(days.start), as_number(days.end))
    scratch = Path(args.lake) / "scratch"
    workers = args.workers or (4 if device == "cuda" else min(os.cpu_count() or 1, 8))
    runs = _Runs(args, domain, span, scratch, device)
    with clock.step("compressors walk the days and write tokens; a ranker per arm"):
        arms, lines = runs.all(workers)
    data = runs.data(scratch / "index")
    inside = comparison.window(data.samples, span, 1 - TEST_SHARE, 1.0)
    rows = comparison.summarise({a.name: [arms[a.name]] for a in QUICK_ARMS}, data.samples, inside)
    for row, chosen in zip(rows, QUICK_ARMS, strict=True):
        row["bytes_per_instance"] = bytes_per_instance(domain, chosen, data.store)
        row["weekly"] = comparison.weekly_auc(data.samples, arms[chosen.name], span)
    index = UserIndex.open(scratch / "index")
    figures = token_figures(args.lake, domain, index, "user", days)
    shutil.rmtree(scratch)
    tested = as_date(span.start + round(len(span) * (1 - TEST_SHARE)))
    return {
        "domain": domain.name,
        "protocol": "streaming",
        "created_for": f"{days}, table of [{tested}, {days.end})",
        "arms": rows,
        "lines": lines,
        "tokens": figures,
        "settings": {
            "users": len(index.users),
            "events": len(index),
            "samples": len(data),
            "samples in the table": int(inside.sum()),
            "seed": args.seed,
            "ranker": args.ranker,
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "cores": os.cpu_count(),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
    }


@dataclass(frozen=True)
class _Runs:
    """The training runs of a quickstart, one process each at a time."""

    args: Args
    domain: Domain
    span: range
    scratch: Path
    device: str

    def all(self, workers: int) -> tuple[dict[str, Predictions], list[dict[str, Any]]]:
        """Lines first; meanwhile arms without tokens; the others when every line is there."""
        found: dict[str, Predictions] = {}
        lines: list[dict[str, Any]] = []
        names = sorted({a.line for a in QUICK_ARMS if a.line}, key=lambda n: LINES[n].is_trained)
        tokenless = [a for a in QUICK_ARMS if not a.line]
        self.build_index(self.scratch / "histories", [])
        context = get_context("spawn")
        ticks: SimpleQueue[int] = context.SimpleQueue()
        with ProcessPoolExecutor(workers, context, _start_worker, (workers, ticks)) as pool:
            jobs: dict[Future[Any], Arm | str] = {}
            for name in reversed(names):  # the slowest first
                jobs[pool.submit(self.line, name)] = name
            for arm in reversed(tokenless):
                jobs[pool.submit(self.arm, arm, self.scratch / "histories")] = arm
            num_runs = len(names) + len(QUICK_ARMS)
            num_days = num_runs * len(self.span)
            bar = progress.bar(num_days, desc=f"{num_runs} training runs", unit="day")
            while jobs:
                done = wait(jobs, timeout=0.5, return_when=FIRST_COMPLETED).done
                bar.update(progress.count(ticks))
                for future in done:
                    what = jobs.pop(future)
                    if isinstance(what, Arm):
                        found[what.name] = future.result()
                        continue
                    lines.append(future.result())
                    if len(lines) == len(names):
                        index = self.scratch / "index"
                        self.build_index(index, names)
                        rest = [a for a in QUICK_ARMS if a.line]
                        jobs |= {pool.submit(self.arm, arm, index): arm for arm in reversed(rest)}
            bar.close()
        return found, lines

    def build_index(self, folder: Path, lines: list[str]) -> None:
        UserIndex.build(self.args.lake, self.domain, folder, days=None, lines=lines, fields=True)

    def line(self, name: str) -> dict[str, Any]:
        """A compressor line by its own job: tokens to Delta."""
        made, args = LINES[name], self.args
        return train_compressor.main(
            train_compressor.Args(
                domain=args.domain, lake=args.lake, order=made.order, line=name,
                untrained=not made.is_trained, seed=args.seed, device=self.device,
            )
        )  # fmt: skip

    def arm(self, chosen: Arm, folder: Path) -> Predictions:
        """Train and predict one arm over the index in a folder."""
        data = _data(self, folder)
        if chosen.line:
            store = IndexStore(UserIndex.open(folder), chosen.line, self.device)
            data = data.with_store(store)
        training = RankerTraining(seed=self.args.seed)
        return comparison.run_arm(
            chosen, data, self.args.ranker, RankerConfig(), training, self.span
        )

    def data(self, folder: Path) -> RankerData:
        store = IndexStore(UserIndex.open(folder), None, self.device)
        samples = delta.read(self.args.lake, tables.ranker_samples(self.domain))
        return RankerData.load(samples, self.domain, store, fields=True)

    def __hash__(self) -> int:
        return hash((self.args, self.span))


@functools.lru_cache(maxsize=1)
def _data(runs: _Runs, folder: Path) -> RankerData:
    """A worker's samples, loaded once an index."""
    return runs.data(folder)


def _start_worker(workers: int, ticks: SimpleQueue[int]) -> None:
    """A worker process: its share of the cores, no bars of its own."""
    end_with_parent()
    progress.forward_to(ticks)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    logging.getLogger().setLevel(logging.WARNING)


def bytes_per_instance(domain: Domain, chosen: Arm, store: IndexStore) -> float:
    """What a ranker of this arm reads of one past event, in bytes of the index's arrays."""
    if chosen.parts == "none":
        return 0.0
    columns = store.index.arrays
    side = sum(columns[name].itemsize for name in ("event_time_us", *store.index.meta.side))
    side += sum(columns[name].itemsize for name in store.index.meta.label_arrays)
    if chosen.line:
        # float16 values and the time from which they may be read.
        return side + 2.0 * SourceConfig().bottleneck + 8
    if chosen.parts == "end-to-end":
        layout = FeatureLayout.of(domain)
        return side + 4.0 * (layout.num_slots + len(layout.numbers))
    return float(side)


def tables_of(domain: Domain) -> list[tables.Table]:
    """The domain's tables, in the order they are made."""
    return [
        tables.instances(domain),
        tables.quarantine(domain),
        tables.temporal_order(domain),
        tables.user_order(domain),
        tables.histories(domain),
        tables.ranker_samples(domain),
        tables.instance_tokens(domain.name),
        tables.item_tokens(domain.name),
        tables.compressor_versions(),
    ]


def lake_row(lake: str, table: tables.Table) -> dict[str, Any]:
    """Rows, bytes and files of a table's newest version."""
    actions = pa.table(DeltaTable(delta.uri(lake, table)).get_add_actions(flatten=True))
    return {
        "table": table.name,
        "rows": sum(n or 0 for n in actions.column("num_records").to_pylist()),
        "bytes": sum(actions.column("size_bytes").to_pylist()),
        "files": len(actions),
    }


def as_text(found: Mapping[str, Any], proof: Mapping[str, Any], page: Path) -> str:
    """What a person reads at the end: the comparison, the lake, the verdict, where the page is."""
    lines = [report.print_table(found), "", f"{'table':34s} {'rows':>10s} {'MB':>8s} {'files':>6s}"]
    lines += [
        f"{r['table']:34s} {r['rows']:>10,d} {r['bytes'] / 1e6:>8.1f} {r['files']:>6d}"
        for r in found["lake"]
    ]
    seconds = sum(step["seconds"] for step in found["timings"])
    failed = [c["name"] for c in proof["checks"] if c["passed"] is False]
    verdict = f"FAILED: {', '.join(failed)}" if failed else "holds"
    return "\n".join(
        [*lines, "", f"leak proof ({len(proof['checks'])} checks): {verdict}",
         f"{seconds:.0f} s; the pictures are in {page}", ""]
    )  # fmt: skip


def _fresh(lake: Path) -> None:
    """An empty folder for the lake; one that no quickstart made is never removed."""
    if lake.exists() and any(lake.iterdir()) and not (lake / MARK).is_file():
        raise InputError(
            f"{lake} is not empty and was not made by a quickstart; give another --lake, or build "
            f"on it with the single commands (iat --help)"
        )
    if lake.exists():
        shutil.rmtree(lake)
    lake.mkdir(parents=True)
    (lake / MARK).write_text("made by iat quickstart, which may replace this folder\n")


def _check_disk(lake: str) -> None:
    place = Path(lake).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < NEEDED_BYTES:
        raise RetryableError(
            f"{place} has {free / 2**30:.1f} GiB free and the quickstart needs "
            f"{NEEDED_BYTES / 2**30:.0f}; free some, or pass --lake on another disk"
        )
