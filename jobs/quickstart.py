"""The whole chain on a real log in one command: raw events, Delta tables, compressors, tokens, rankers, leak proof, report."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from deltalake import DeltaTable
from tqdm import tqdm

from compressor import versions
from compressor.data import DAY_US
from downstream.configs import RankerConfig, RankerTraining
from downstream.data import RankerData
from downstream.user_index import IndexStore, UserIndex
from jobs import comparison, report, subprocesses, train_compressor, verify
from jobs.comparison import QUICK_ARMS, Predictions
from jobs.train_compressor import device_of, stream_days
from pipelines import delta, sources, tables
from pipelines.days import Days, as_date, as_number
from pipelines.domain import Domain
from pipelines.domain import load as load_domain
from pipelines.errors import InputError, RetryableError
from pipelines.features import FeatureLayout

log = logging.getLogger(__name__)

NEEDED_BYTES = 2 * 2**30
TEST_SHARE = 0.3
"""The table reads the last of the days; all of them are predicted before they are trained on."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """See on a real log what instance tokens add to a strong ranker, measured on this machine.

    Builds the lake (Spark, Delta), walks the days with three compressors (temporal order, user order, untrained), writes
    their tokens, trains a ranker per arm on the same samples, checks for leaks, and writes report.html.
    """

    domain: str = "grocery"
    """Name of a domain that comes with the toolkit, or a FILE.toml."""
    lake: str = "lake/quickstart"
    """Root folder of the Delta tables; what an earlier quickstart left there is replaced."""
    data: Path | None = None
    """Folder of a log that cannot be downloaded (MovieLens)."""
    households: int = 60
    """Users to keep, a seeded random sample; 0: all."""
    days: int = 0
    """Keep the first days of the log; 0: all."""
    out: Path = Path("report")
    """Folder for report.html and report.json."""
    ranker: Literal["din", "transformer"] = "din"
    """How the ranker reads the hand-made sequence."""
    master: str = "local[*]"
    """Spark master."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    seed: int = 0
    """Of the sample, initial weights and batches."""
    full: bool = False
    """The whole log, all arms, both protocols, 5 seeds, the ranker on 40% of users: for a GPU."""
    dry_run: bool = False
    """Say what would be done, and stop."""

    def __post_init__(self) -> None:
        if self.households < 0 or self.days < 0:
            raise InputError("--households and --days must not be negative")


@dataclass
class Clock:
    """Seconds by step, in order."""

    steps: list[dict[str, Any]] = field(default_factory=list)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        log.info("%s ...", name)
        yield
        self.steps.append({"step": name, "seconds": time.perf_counter() - started})
        log.info("%s: %.0f s", name, self.steps[-1]["seconds"])


def main(args: Args) -> dict[str, Any]:
    domain = load_domain(args.domain)
    clock = Clock()
    if args.dry_run:
        log.info("would build %s in %s and compare: %s", domain.name, args.lake, "; ".join(a.name for a in QUICK_ARMS))
        return {"domain": domain.name, "lake": args.lake}
    _check_disk(args.lake)
    if args.full:
        from jobs import full

        return full.main(args, domain)
    build_lake(args, domain, clock)
    lines = sorted({a.line for a in QUICK_ARMS if a.line})
    for line in lines:
        with clock.step(f"compressor {line}: walk the days, write tokens"):
            made = comparison.LINES[line]
            order: Literal["temporal", "user"] = "temporal" if made.order == "temporal" else "user"
            train_compressor.main(
                train_compressor.Args(
                    domain=args.domain, lake=args.lake, order=order, line=line, untrained=not made.is_trained, seed=args.seed, device=args.device
                )
            )
    with tempfile.TemporaryDirectory() as temporary, clock.step("user index: tokens and histories by user, memory-mapped"):
        index = UserIndex.build(args.lake, domain, Path(temporary), days=None, lines=lines, fields=True)
        found = _compare(args, domain, index, clock)
    with clock.step("leak proof"):
        proof = verify.verify(domain, args.lake, "user", num_samples=100, seed=args.seed)
    found |= {
        "lake": [lake_row(args.lake, table) for table in tables_of(domain)],
        "checks": [c for c in proof["checks"]],
        "timings": clock.steps,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    report.write_report(args.out / "report.html", found)
    sys.stdout.write(report.print_table(found) + "\n")
    sys.stdout.write(lake_text(found["lake"]))
    sys.stdout.write(f"leak proof: {_verdict(proof)}\nreport: {args.out / 'report.html'}\n")
    return found


def build_lake(args: Args, domain: Domain, clock: Clock) -> None:
    """Raw log -> instances, streams, histories, samples, in a process of its own: the JVM's memory is free again after it."""
    if Path(args.lake).exists():
        shutil.rmtree(args.lake)
    with clock.step("raw events"):
        sources.prepare(domain, args.lake, data=args.data, limit_users=args.households or None, seed=args.seed, days=args.days or None)
    with clock.step("Spark: instances, streams, histories, samples on Delta"):
        subprocesses.build_tables(args)


def _compare(args: Args, domain: Domain, index: UserIndex, clock: Clock) -> dict[str, Any]:
    device = device_of(args.device)
    samples = tables.ranker_samples(domain)
    store = IndexStore(index, None, device)
    days = stream_days(args.lake, samples)
    data = RankerData.load(delta.read(args.lake, samples), domain, store, fields=True)
    span = range(as_number(days.start), as_number(days.end))
    arms: dict[str, list[Predictions]] = {}
    for chosen in tqdm(QUICK_ARMS, desc="arms", unit="arm"):
        with clock.step(f"ranker {chosen.name}"):
            held = data.with_store(IndexStore(index, chosen.line, device)) if chosen.line else data
            training = RankerTraining(seed=args.seed)
            arms[chosen.name] = [comparison.run_arm(chosen, held, args.ranker, RankerConfig(), training, span)]
    inside = comparison.window(data, span, 1 - TEST_SHARE, 1.0)
    rows = comparison.summarise(arms, data, inside)
    for row, chosen in zip(rows, QUICK_ARMS, strict=True):
        row["bytes_per_instance"] = bytes_per_instance(domain, chosen.parts, store, 64)
        row["weekly"] = comparison.weekly_auc(data, arms[chosen.name][0], span)
    tested = as_date(span.start + round(len(span) * (1 - TEST_SHARE)))
    return {
        "domain": domain.name, "protocol": "streaming", "created_for": str(days), "arms": rows,
        "tokens": token_figures(args.lake, domain, index, days),
        "settings": {
            "users": len(index.arrays["user_ids"]), "samples": len(data), "table": f"samples of [{tested}, {days.end})",
            "seed": args.seed, "ranker": args.ranker, "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__,
        },
    }


def bytes_per_instance(domain: Domain, parts: str, store: IndexStore, width: int) -> float:
    """What a ranker of these parts reads of one past event, in bytes."""
    side = 4 * len(domain.side_features) + 8
    layout = FeatureLayout.of(domain)
    return {
        "none": 0.0, "base": side, "tokens": side + 2 * width, "match": side + 2 * width, "tokens-only": side + 2 * width,
        "end-to-end": side + 4 * (layout.num_slots + len(layout.numbers)),
    }[parts]


def token_figures(lake: str, domain: Domain, index: UserIndex, days: Days) -> dict[str, Any]:
    """Norms, drift and coverage of the user-order line, by month."""
    line = index.line("user")
    time_us = index.arrays["event_time_us"]
    month = np.array([str(as_date(int(day)))[:7] for day in np.unique(time_us // DAY_US)])
    month_of = month[np.searchsorted(np.unique(time_us // DAY_US), time_us // DAY_US)]
    norm = np.linalg.norm(line.token.astype(np.float32), axis=1)
    norms = []
    for name in np.unique(month_of):
        p5, p50, p95 = np.quantile(norm[month_of == name], [0.05, 0.5, 0.95])
        norms.append({"month": str(name), "p5": float(p5), "p50": float(p50), "p95": float(p95)})
    return {"norms": norms, "drift": _drift(lake, domain, index, days), "coverage": _coverage(index, line.available_us, month_of)}


def _drift(lake: str, domain: Domain, index: UserIndex, days: Days) -> list[dict[str, Any]]:
    """Mean cosine, by month, of stored tokens and the same events compressed by the line's last version."""
    from compressor import data as streams

    trainer, vocabulary, _ = versions.load(lake, "user", domain, "cpu")
    found = []
    for chunk in days.chunks(30):
        rows = delta.read(lake, tables.user_order(domain), Days(chunk.start, min(chunk.end, chunk.start + timedelta(days=2))))
        if not len(rows):
            continue
        data = streams.load(rows, domain, vocabulary)
        now = trainer.tokens(data, data.events).astype(np.float32)
        place = {int(k): i for i, k in enumerate(index.arrays["instance_id"])}
        stored = index.line("user").token[[place[int(k)] for k in data.instance_id[data.events]]].astype(np.float32)
        cosine = (now * stored).sum(1) / np.maximum(np.linalg.norm(now, axis=1) * np.linalg.norm(stored, axis=1), 1e-6)
        found.append({"month": str(chunk.start)[:7], "cosine": float(cosine.mean())})
    return list({row["month"]: row for row in reversed(found)}.values())[::-1]


def _coverage(index: UserIndex, available_us: Any, month_of: Any) -> list[dict[str, Any]]:
    """Share of the newest 64 events before each event whose token could be read at that moment, by month."""
    offsets, time_us = index.arrays["offsets"], index.arrays["event_time_us"]
    found: dict[str, list[float]] = {}
    random = np.random.default_rng(0)
    for row in random.integers(0, len(time_us), 2000):
        begin = offsets[np.searchsorted(offsets, row, side="right") - 1]
        end = begin + np.searchsorted(time_us[begin:row], time_us[row])
        if end > begin:
            readable = available_us[max(begin, end - 64) : end] < time_us[row]
            found.setdefault(str(month_of[row]), []).append(float(readable.mean()))
    return [{"month": name, "share": float(np.mean(values))} for name, values in sorted(found.items())]


def tables_of(domain: Domain) -> list[tables.Table]:
    """The domain's tables, in the order they are made."""
    by_domain = (tables.instances, tables.quarantine, tables.temporal_order, tables.user_order, tables.histories, tables.ranker_samples)
    return [*(make(domain) for make in by_domain), tables.instance_tokens(domain.name), tables.item_tokens(domain.name)]


def lake_row(lake: str, table: tables.Table) -> dict[str, Any]:
    """Rows, bytes and files of a table's newest version."""
    if not delta.exists(lake, table):
        return {"table": table.name, "rows": 0, "bytes": 0, "files": 0}
    actions = pa.table(DeltaTable(delta.uri(lake, table)).get_add_actions(flatten=True))
    rows = sum(v or 0 for v in actions.column("num_records").to_pylist())
    size = sum(actions.column("size_bytes").to_pylist())
    return {"table": table.name, "rows": rows, "bytes": size, "files": len(actions)}


def lake_text(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'table':34s} {'rows':>10s} {'MB':>8s} {'files':>6s}"]
    lines += [f"{r['table']:34s} {r['rows']:>10,d} {r['bytes'] / 1e6:>8.1f} {r['files']:>6d}" for r in rows]
    return "\n".join(lines) + "\n"


def _verdict(proof: dict[str, Any]) -> str:
    failed = [c["name"] for c in proof["checks"] if c["passed"] is False]
    return f"FAILED: {', '.join(failed)}" if failed else f"{len(proof['checks'])} checks passed"


def _check_disk(lake: str) -> None:
    place = Path(lake).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < NEEDED_BYTES:
        raise RetryableError(f"{place} has {free / 2**30:.1f} GiB free and the quickstart needs {NEEDED_BYTES / 2**30:.0f}; free some, or pass --lake on another disk")
