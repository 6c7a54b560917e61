"""All arms of the comparison over several seeds: many at once on one GPU, on several, or on a CPU.

Everything that is finished lies in a folder, whole or not at all: a run that is cut, by its limit
or by a kill, goes on from there, and a report can be made of what is there. Compressor lines are
bound by the host, so each has a process; a ranker's steps are captured, so many arms share a
process and the data in it, each on its own stream.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tqdm import tqdm

from compressor.configs import SourceConfig, TrainingConfig
from compressor.data import DAY_US
from compressor.training import metrics
from downstream.configs import RankerConfig, RankerTraining
from downstream.data import RankerData
from downstream.index_arrays import load
from downstream.samples import Samples
from jobs import comparison, prepared
from jobs.comparison import BASE, LINES, Arm, Predictions, SplitBy
from jobs.gang import Gang, News, Runner, Task, gpus
from jobs.parent import end_with_parent
from pipelines import manifests
from pipelines.domain import Domain
from pipelines.errors import InputError
from pipelines.features import times_us
from pipelines.splits import users_kept

log = logging.getLogger(__name__)

FROZEN_COMPRESSOR, FROZEN_TEST = 0.45, 0.85
SPARSE = 0.25
"""A window with under this part of the rows that its share of the log promises is remarked on."""
SMALL = 100_000
"""Samples under which intervals are drawn sooner than processes for it are started."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one comparison runs."""

    domain: Domain
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    protocol: str = "streaming"
    split_by: SplitBy = "days"
    """What the protocol's borders and the windows are shares of."""
    ranker: str = "din"
    user_share: float = 1.0
    user_seed: int = 0
    device: str = "cpu"
    source: SourceConfig = field(default_factory=SourceConfig)
    compressor: TrainingConfig = field(default_factory=TrainingConfig)
    config: RankerConfig = field(default_factory=RankerConfig)
    training: RankerTraining = field(default_factory=RankerTraining)
    threads: int = 1
    """Of each process's arithmetic on a CPU."""

    @property
    def windows(self) -> dict[str, tuple[float, float]]:
        """Shares of the log, first and last, by name."""
        what = "time" if self.split_by == "days" else "rows"
        if self.protocol == "frozen":
            return {f"test: last 15% of {what}": (FROZEN_TEST, 1.0)}
        return {f"last 15% of {what}": (0.85, 1.0), "the 15% before": (0.70, 0.85)}

    def settings(self) -> dict[str, Any]:
        """What every result of one folder shares: all but which arms and seeds, and where."""
        shared: tuple[str, ...] = ("protocol", "ranker", "user_share", "user_seed")
        # Streaming runs are the same whatever the windows that they are judged on.
        shared += ("split_by",) if self.protocol == "frozen" else ()
        configs = ("source", "compressor", "config", "training")
        found = {name: getattr(self, name) for name in shared}
        found |= {name: asdict(getattr(self, name)) for name in configs}
        return found | {"domain": self.domain.name}


@dataclass(frozen=True, kw_only=True)
class Crew:
    """How many run at once, on each GPU or on the CPU."""

    line_processes: int = 1
    """Processes for compressor lines alone; 0: the arms' processes make them."""
    arm_processes: int = 1
    arms_at_once: int = 1
    """Arms that train in one process."""


def crew_of(device: str) -> Crew:
    """As many as a machine carries. On a GPU a compressor step is bound by its launches, a core
    each; where NVIDIA's MPS runs, so that processes share the GPU instead of taking turns, six do
    183 steps/s and a dozen 238 (H100; 67 without). Arms overlap on it, which eight do about as well
    as more."""
    cpus, num_devices = os.cpu_count() or 1, max(1, len(gpus(device)))
    if not device.startswith("cuda"):
        return Crew(line_processes=0, arm_processes=cpus)
    lines = min(8, max(1, cpus // num_devices // 2))
    return Crew(line_processes=lines, arm_processes=1, arms_at_once=8)


class Results:
    """What is finished, in a folder; each line and each arm appears whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def claim(self, plan: Plan, digest: str) -> None:
        """Make the folder this plan's, over rows of this digest; one that holds results of another
        plan, or over other rows, is refused."""
        _claim(self.folder, plan.settings() | {"digest": digest})

    def path(self, task: Task) -> Path:
        kind = {"line": "lines", "arm": "arms"}[task.kind]
        name = "".join(c if c.isalnum() else "-" for c in task.name)
        # Names that differ in signs alone stay apart.
        digest = hashlib.sha256(task.name.encode()).hexdigest()[:6]
        return self.folder / kind / f"{name}.{digest}.{task.seed}"

    def has(self, task: Task) -> bool:
        return self.path(task).is_dir()

    def write(self, task: Task, held: prepared.Arrays, about: dict[str, Any]) -> None:
        text = np.frombuffer(json.dumps(about).encode(), np.uint8)
        prepared.save(self.path(task), {**held, "about": text})

    def about(self, task: Task) -> dict[str, Any]:
        """What is said of a finished line or arm."""
        held = load(self.path(task), "about")
        found: dict[str, Any] = json.loads(held.tobytes())
        return found

    def predictions(self, task: Task) -> Predictions:
        held, about = prepared.opened(self.path(task)), self.about(task)
        return Predictions(
            held["sample"], held["score"], about["seconds"], about["num_rows"], seed=task.seed
        )


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Write down what a folder is of; one that is of something else is refused."""
    wanted = json.loads(json.dumps(settings, default=str))
    path = folder / "settings.json"
    if path.exists():
        held = json.loads(path.read_text())
        differing = [k for k in wanted if held.get(k) != wanted[k]]
        if differing:
            raise InputError(
                f"{folder} is of a run with other {', '.join(differing)}; remove it, or give "
                "another folder"
            )
    folder.mkdir(parents=True, exist_ok=True)
    _write_text(path, json.dumps(wanted, indent=1))


def _write_text(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text)
    part.replace(path)


def prepare(plan: Plan, rows: pa.Table, folder: Path) -> None:
    """What workers map into memory: the ranker's samples and index, and the streams of its users
    and of all."""
    whose = {"domain": plan.domain.name, "rows": len(rows)}
    _claim(folder, whose | {"user_share": plan.user_share, "user_seed": plan.user_seed})
    own = rows
    if plan.user_share < 1:
        user_id = rows.column("user_id").to_numpy()
        own = rows.filter(pa.array(users_kept(user_id, plan.user_share, plan.user_seed)))
    days = times_us(rows, "event_time") // DAY_US
    span = np.array([days.min(), days.max() + 1])
    device = plan.device
    built: dict[str, Callable[[], prepared.Arrays]] = {
        "samples": lambda: {**prepared.ranker_arrays(own, plan.domain, device), "days": span}
    }
    lines = [LINES[a.line] for a in plan.arms if a.line]
    if any(line.is_all_users for line in lines):
        built["all"] = lambda: prepared.stream_arrays(rows, plan.domain)
    if any(not line.is_all_users for line in lines):
        built["own"] = lambda: prepared.stream_arrays(own, plan.domain)
    with ThreadPoolExecutor(len(built)) as pool:
        list(pool.map(lambda name: prepared.once(folder / name, built[name]), built))


class Workspace:
    """One process's data, read from the prepared folder as it is needed."""

    def __init__(self, plan: Plan, folder: Path, data: Path | None = None) -> None:
        self.plan, self.results = plan, Results(folder)
        self.data_folder = data or folder / "data"
        self.held = prepared.opened(self.data_folder / "samples")
        self.days = range(*map(int, self.held["days"]))
        self._samples: RankerData | None = None
        self._streams: dict[str, Any] = {}
        self._loading = threading.Lock()

    def border(self, share: float) -> int:
        samples = prepared.samples_held(self.held)
        return comparison.border(samples, self.days, share, self.plan.split_by)

    def run(self, task: Task) -> None:
        """Make a line or an arm and keep it in the folder."""
        if task.kind == "line":
            self._line(task)
        else:
            self._arm(task)

    def _line(self, task: Task) -> None:
        plan, line = self.plan, LINES[task.name]
        whose = "all" if line.is_all_users else "own"
        with self._loading:
            if whose not in self._streams:
                held = prepared.opened(self.data_folder / whose)
                self._streams[whose] = prepared.stream(held, plan.device)
                self._settle()
        data, vocabulary = self._streams[whose]
        made = comparison.make_line(
            line,
            data,
            plan.domain,
            vocabulary,
            self.days,
            plan.source,
            replace(plan.compressor, seed=task.seed),
            plan.device,
            frozen_at=self.border(FROZEN_COMPRESSOR) if plan.protocol == "frozen" else None,
        )
        if line.is_all_users and plan.user_share < 1:
            made = comparison.restrict(
                made, users_kept(data.user_id[data.events], plan.user_share, plan.user_seed)
            )
        about = {
            "line": task.name,
            "seed": task.seed,
            "source_auc": made.source_auc,
            "seconds": made.seconds,
            "drift": made.drift,
        }
        self.results.write(task, prepared.line_arrays(made.tokens), about)

    def _arm(self, task: Task) -> None:
        """Train one arm with one seed; it reads its line's tokens of the same seed."""
        plan, data = self.plan, self.samples()
        chosen = next(a for a in plan.arms if a.name == task.name)
        if chosen.line:
            held = prepared.opened(self.results.path(Task("line", chosen.line, task.seed)))
            data = data.with_store(comparison.store_of(data.store, prepared.line(held)))
        frozen = plan.protocol == "frozen"
        days = range(self.border(FROZEN_COMPRESSOR), self.days.stop) if frozen else self.days
        found = comparison.run_arm(
            chosen,
            data,
            plan.ranker,
            plan.config,
            replace(plan.training, seed=task.seed),
            days,
            test_from=self.border(FROZEN_TEST) if frozen else None,
        )
        about = {"seconds": found.seconds, "num_rows": found.num_rows}
        self.results.write(task, {"sample": found.sample, "score": found.score}, about)

    def _settle(self) -> None:
        """What one thread has put on the device is there for the others too."""
        if self.plan.device.startswith("cuda"):
            torch.cuda.synchronize()

    def samples(self) -> RankerData:
        with self._loading:
            if self._samples is None:
                self._samples = prepared.ranker(self.held, self.plan.domain, self.plan.device)
                self._settle()
            return self._samples


def _runner(plan: Plan, folder: Path, data: Path) -> Runner:
    """What a worker process does with tasks."""
    torch.set_num_threads(plan.threads)
    torch.set_float32_matmul_precision("high")
    return Workspace(plan, folder, data).run


def _gang(plan: Plan, folder: Path, data: Path, crew: Crew) -> Gang:
    gang = Gang(_runner, (plan, folder, data))
    both = ("arm",) if crew.line_processes else ("line", "arm")
    for gpu in gpus(plan.device):
        for _ in range(crew.line_processes):
            gang.start(gpu, ("line",), 1)
        for _ in range(crew.arm_processes):
            gang.start(gpu, both, crew.arms_at_once)
    return gang


def run(
    plan: Plan,
    load_rows: Callable[[], pa.Table],
    folder: Path,
    *,
    crew: Crew | None = None,
    limit_s: float | None = None,
    data: Path | None = None,
    digest: str = "",
) -> dict[str, Any]:
    """All lines, arms and seeds that the folder does not hold yet, each arm as soon as its line is
    there; returns the report's sections.

    Args:
        data: a folder for what is prepared of the rows, which comparisons of other protocols or
            settings may share; by default inside `folder`.
        limit_s: seconds after which no result is waited for and the report is made of what is
            there, which takes up to a minute more.
        digest: that the rows must have (`manifests.digest`); empty: any.
    """
    started = time.perf_counter()
    results = Results(folder)
    data = data or folder / "data"
    rows = load_rows()
    read = manifests.digest(rows)
    manifests.check_digest(read, digest)
    results.claim(plan, read)
    prepare(plan, rows, data)
    del rows
    log.info("data prepared in %.0f s", time.perf_counter() - started)
    lines, arms = tasks_of(plan)
    waiting = [task for task in lines if not results.has(task)]
    blocked = [task for task in arms if not results.has(task)]
    has_time = limit_s is None or time.perf_counter() - started < limit_s
    if (waiting or blocked) and has_time:
        crew = crew or crew_of(plan.device)
        _run_tasks(plan, results, data, waiting, blocked, crew, started, limit_s)
    report = report_of(plan, folder, data)
    report |= {"seconds": time.perf_counter() - started, "digest": read}
    _write_text(folder / "report.json", json.dumps(report, indent=1))
    return report


def tasks_of(plan: Plan) -> tuple[list[Task], list[Task]]:
    """Lines and arms, seed by seed, so that what a cut run leaves is whole seeds; in a seed the
    slowest first."""
    wanted = {a.line for a in plan.arms if a.line}
    order = sorted(wanted, key=lambda n: (not LINES[n].is_trained, not LINES[n].is_all_users, n))
    lines = [Task("line", name, seed) for seed in plan.seeds for name in order]
    return lines, [Task("arm", a.name, seed) for seed in plan.seeds for a in plan.arms]


def _run_tasks(
    plan: Plan,
    results: Results,
    data: Path,
    waiting: list[Task],
    blocked: list[Task],
    crew: Crew,
    started: float,
    limit_s: float | None,
) -> None:
    line_of = {a.name: a.line for a in plan.arms}

    def is_open(task: Task) -> bool:
        name = line_of[task.name]
        return not name or results.has(Task("line", name, task.seed))

    gang, judge = _gang(plan, results.folder, data, crew), _Judge(plan, results, data)
    bar = tqdm(
        total=len(waiting) + len(blocked),
        desc=f"{plan.domain.name} {plan.protocol}",
        unit="run",
        mininterval=5,
    )
    news: list[News] = []
    try:
        while True:
            opened = [task for task in blocked if is_open(task)]
            blocked = [task for task in blocked if task not in opened]
            waiting += opened
            gang.give(waiting)
            # Judged after work is handed out: it takes as long as a good many steps.
            for item in news:
                _tell(judge, *item)
            if not gang.num_running:
                break
            left_s = float("inf") if limit_s is None else started + limit_s - time.perf_counter()
            if left_s <= 0:
                log.warning("%d runs are left at the limit of %.0f s", bar.total - bar.n, limit_s)
                break
            news = gang.news(min(5.0, left_s), waiting)
            bar.update(len(news))
    finally:
        gang.end()
        bar.close()


def _tell(judge: _Judge, task: Task, error: str | None) -> None:
    if error is None:
        log.info("%s", judge.line(task))
    else:
        log.error("%s seed %d failed: %s", task.name, task.seed, error)


class _Judge:
    """A line of text on what has just been finished."""

    def __init__(self, plan: Plan, results: Results, data: Path) -> None:
        self.plan, self.results = plan, results
        self.scored = Scored.opened(data)

    def line(self, task: Task) -> str:
        about = self.results.about(task)
        if task.kind == "line":
            return (
                f"line {task.name} seed {task.seed}: source AUC {about['source_auc']:.4f}, "
                f"{about['seconds']:.0f} s"
            )
        values = [self._auc(task, *shares) for shares in self.plan.windows.values()]
        text = f"{task.name} seed {task.seed}: {about['seconds']:.0f} s"
        base = Task("arm", BASE, task.seed)
        for place, (name, value) in enumerate(zip(self.plan.windows, values, strict=True)):
            text += f"; {name} AUC {value:.4f}"
            if task.name != BASE and self.results.has(base):
                theirs = self._auc(base, *list(self.plan.windows.values())[place])
                text += f" ({1e3 * (value - theirs):+.2f}e-3)"
        return text

    def _auc(self, task: Task, first: float, last: float) -> float:
        inside = self.scored.inside(first, last, self.plan.split_by)
        score = comparison.scores_of(self.results.predictions(task), len(self.scored))
        inside &= ~np.isnan(score)
        return metrics.auc(self.scored.samples.label[inside], score[inside])


@dataclass(frozen=True)
class Scored:
    """What metrics read of the samples: nothing that is on a device."""

    samples: Samples
    days: range

    @classmethod
    def opened(cls, data: Path) -> Scored:
        """The prepared samples."""
        held = prepared.opened(data / "samples")
        return cls(prepared.samples_held(held), range(*map(int, held["days"])))

    def __len__(self) -> int:
        return len(self.samples)

    def inside(self, first: float, last: float, by: SplitBy) -> comparison.Array:
        """Samples of a window, label known."""
        return comparison.window(self.samples, self.days, first, last, by)


def report_of(
    plan: Plan, folder: Path, data: Path | None = None, *, bootstraps: int = 200
) -> dict[str, Any]:
    """The report's sections of whatever a folder holds: arms over the seeds that are finished."""
    results, scored = Results(folder), Scored.opened(data or folder / "data")
    lines, arms = tasks_of(plan)
    found = {
        a.name: [results.predictions(t) for t in arms if t.name == a.name and results.has(t)]
        for a in plan.arms
    }
    found = {name: by_seed for name, by_seed in found.items() if by_seed}
    missing = [f"{task.name} seed {task.seed}" for task in (*lines, *arms) if not results.has(task)]
    report: dict[str, Any] = {
        "domain": plan.domain.name,
        "protocol": plan.protocol,
        "ranker": plan.ranker,
        "seeds": len(plan.seeds),
        "user_share": plan.user_share,
        "samples": len(scored),
        "lines": [results.about(task) for task in lines if results.has(task)],
        "missing": missing,
        "settings": {
            "ranker": asdict(plan.config),
            "training": asdict(plan.training),
            "source": asdict(plan.source),
            "compressor": asdict(plan.compressor),
        },
        "windows": {},
    }
    wanted = []
    for name, shares in plan.windows.items():
        inside = scored.inside(*shares, plan.split_by)
        promised = (shares[1] - shares[0]) * np.count_nonzero(~np.isnan(scored.samples.label))
        if inside.sum() < SPARSE * promised:
            log.warning(
                "%s: %d labelled rows, where an even log has %.0f; --split-by rows cuts by rows",
                name,
                inside.sum(),
                promised,
            )
        held = comparison.on_window(found, scored.samples, inside)
        wanted += [(name, a, held.of(a), bootstraps) for a in plan.arms if a.name in found]
    if len(scored) < SMALL:
        rows = list(map(_row, wanted))
    else:
        context = get_context("spawn")
        with ProcessPoolExecutor(os.cpu_count() or 1, context, end_with_parent) as pool:
            rows = list(pool.map(_row, wanted))
    report["windows"] = {
        name: [row for (of, *_), row in zip(wanted, rows, strict=True) if of == name]
        for name in plan.windows
    }
    return report


def _row(wanted: tuple[str, Arm, comparison.WindowScores, int]) -> dict[str, Any]:
    _, of, held, bootstraps = wanted
    return comparison.arm_row(of.name, held, beside=of.beside, bootstraps=bootstraps)


def print_windows(report: dict[str, Any]) -> str:
    """The comparison as plain text, one table per window."""
    out = [
        f"{report['domain']}, {report['protocol']}, {report['ranker']}, {report['seeds']} seeds, "
        f"{report['samples']} samples, {report['seconds']:.0f} s"
    ]
    if report["missing"]:
        out.append(f"  not there: {', '.join(report['missing'])}")
    out += [
        f"  source {x['line']} seed {x['seed']}: AUC {x['source_auc']:.4f}, {x['seconds']:.0f} s"
        for x in sorted(report["lines"], key=lambda x: (x["line"], x["seed"]))
    ]
    for name, rows in report["windows"].items():
        out.append(f"{name}: {rows[0]['num_rows'] if rows else 'no'} rows")
        for row in rows:
            diff = _thousandths(row) if "diff_auc" in row else ""
            gauc = f"{1e3 * row['diff_gauc']:+6.2f}" if "diff_gauc" in row else ""
            loss = f"{1e3 * row['diff_logloss']:+6.2f}" if "diff_logloss" in row else ""
            out.append(
                f"  {row['name']:50s} AUC {row['auc']:.4f} [{row['auc_low']:.4f}, "
                f"{row['auc_high']:.4f}]  d1e-3 {diff:26s} GAUC {row['gauc']:.4f} {gauc} LL "
                f"{row['logloss']:.4f} {loss} {row['seconds']:.0f}s"
            )
            for other, found in row.get("beside", {}).items():
                out.append(f"    over {other}: {_thousandths(found)}")
    return "\n".join(out)


def _thousandths(row: Mapping[str, float]) -> str:
    value, low, high = (1e3 * row[name] for name in ("diff_auc", "diff_low", "diff_high"))
    return f"{value:+6.2f} [{low:+.2f}, {high:+.2f}]"
