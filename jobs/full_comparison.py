"""All arms of the comparison over several seeds, many processes on one GPU (or a few on a CPU);
both windows, with intervals."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from tqdm import tqdm

from compressor.configs import SourceConfig, TrainingConfig
from compressor.data import DAY_US
from downstream.configs import RankerConfig, RankerTraining
from downstream.data import RankerData
from downstream.index_arrays import ItemArrays, LineArrays
from downstream.user_index import IndexStore, UserIndex
from jobs import comparison
from jobs.comparison import LINES, Arm, Predictions
from pipelines import tables
from pipelines.domain import Domain
from pipelines.features import FeatureLayout, arrays, times_us
from pipelines.splits import users_kept

log = logging.getLogger(__name__)

FROZEN_COMPRESSOR, FROZEN_TEST = 0.45, 0.85
WINDOWS = {"last 15% of time": (0.85, 1.0), "the 15% before": (0.70, 0.85)}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one comparison runs."""

    domain: Domain
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    protocol: str = "streaming"
    ranker: str = "transformer"
    user_share: float = 1.0
    user_seed: int = 0
    device: str = "cpu"
    source: SourceConfig = field(default_factory=SourceConfig)
    compressor: TrainingConfig = field(default_factory=TrainingConfig)
    config: RankerConfig = field(default_factory=RankerConfig)
    training: RankerTraining = field(default_factory=RankerTraining)
    threads: int = 1


class Workspace:
    """One process's data: stream rows of all users and of the ranker's, the index, the samples."""

    def __init__(self, plan: Plan, rows: pa.Table, scratch: Path) -> None:
        torch.set_num_threads(plan.threads)
        self.plan, self.scratch = plan, scratch
        self.rows = rows
        user_id = rows.column("user_id").to_numpy()
        self.own = (
            rows
            if plan.user_share >= 1
            else rows.filter(pa.array(users_kept(user_id, plan.user_share, plan.user_seed)))
        )
        days = times_us(rows, "event_time") // DAY_US
        self.days = range(int(days.min()), int(days.max()) + 1)
        self._samples: RankerData | None = None

    @property
    def frozen_at(self) -> int | None:
        return self.border(FROZEN_COMPRESSOR) if self.plan.protocol == "frozen" else None

    def border(self, share: float) -> int:
        return self.days.start + round(len(self.days) * share)

    def line(self, name: str, seed: int) -> dict[str, Any]:
        """Make a line's tokens and keep them on disk for the arms that read them."""
        plan, line = self.plan, LINES[name]
        rows = self.rows if line.is_all_users else self.own
        data, vocabulary = comparison.stream_of(rows, plan.domain, plan.device)
        training = replace(plan.compressor, seed=seed)
        made = comparison.make_line(
            line,
            data,
            plan.domain,
            vocabulary,
            self.days,
            plan.source,
            training,
            plan.device,
            frozen_at=self.frozen_at,
        )
        if line.is_all_users and plan.user_share < 1:
            made = comparison.restrict(
                made, users_kept(data.user_id[data.events], plan.user_share, plan.user_seed)
            )
        tokens = made.tokens
        np.savez(
            self.scratch / f"{name}-{seed}.npz",
            token=tokens.token,
            available=tokens.available_us,
            **{f"item_{k}": v for k, v in vars_of(tokens.items).items()},
        )
        return {
            "line": name,
            "seed": seed,
            "source_auc": made.source_auc,
            "seconds": made.seconds,
            "drift": made.drift,
        }

    def arm(self, chosen: Arm, seed: int) -> Predictions:
        """Train one arm with one seed; reads its line's tokens of the same seed."""
        plan, data = self.plan, self.samples()
        if chosen.line:
            with np.load(self.scratch / f"{chosen.line}-{seed}.npz") as held:
                items = ItemArrays(
                    **{
                        k.removeprefix("item_"): held[k]
                        for k in held.files
                        if k.startswith("item_")
                    }
                )
                line = LineArrays(held["token"], held["available"], items)
            data = data.with_store(comparison.store_of(data.store, line))
        training = replace(plan.training, seed=seed)
        frozen = plan.protocol == "frozen"
        days = range(self.border(FROZEN_COMPRESSOR), self.days.stop) if frozen else self.days
        test_from = self.border(FROZEN_TEST) if frozen else None
        return comparison.run_arm(
            chosen, data, plan.ranker, plan.config, training, days, test_from=test_from
        )

    def samples(self) -> RankerData:
        if self._samples is None:
            plan = self.plan
            store = IndexStore(index_of(self.own, plan.domain), None, plan.device)
            self._samples = RankerData.load(
                samples_of(self.own, plan.domain), plan.domain, store, fields=True
            )
        return self._samples


def vars_of(items: ItemArrays) -> dict[str, Any]:
    return {
        name: getattr(items, name)
        for name in ("item_ids", "offsets", "available_us", "decayed_sum", "decayed_count")
    }


def samples_of(rows: pa.Table, domain: Domain) -> pa.Table:
    """Stream rows as ranker samples: the columns of that table, event_time as as_of."""
    names = ["as_of" if name == "event_time" else name for name in rows.schema.names]
    table = tables.ranker_samples(domain)
    return (
        rows.rename_columns(names)
        .select(table.schema.names)
        .sort_by([(c, "ascending") for c in table.sort_by])
    )


def index_of(rows: pa.Table, domain: Domain) -> UserIndex:
    """An index in memory of the rows' events, with all logged fields."""
    events = rows.filter(pc.invert(rows.column("is_sampled")))
    events = events.sort_by([(c, "ascending") for c in ("user_id", "event_time", "instance_id")])
    side = {
        f.stream_column: events.column(f.stream_column).to_numpy() for f in domain.side_features
    }
    labels = {
        x.name: (
            pc.fill_null(events.column(f"label_{x.name}"), -1).to_numpy(),
            times_us(events, f"label_time_{x.name}"),
        )
        for x in domain.labels
    }
    index = UserIndex.from_arrays(
        user_id=events.column("user_id").to_numpy(),
        event_time_us=times_us(events, "event_time"),
        item_id=events.column("item_id").to_numpy(),
        instance_id=events.column("instance_id").to_numpy(),
        side=side,
        labels=labels,
    )
    found = arrays(events, FeatureLayout.of(domain))
    return replace(index, arrays={**index.arrays, "ids": found.ids, "numbers": found.numbers})


_workspace: Workspace | None = None


def _start(plan: Plan, load_rows: Callable[[], pa.Table], scratch: Path) -> None:
    global _workspace
    _workspace = Workspace(plan, load_rows(), scratch)


def _line(name: str, seed: int) -> dict[str, Any]:
    assert _workspace is not None
    return _workspace.line(name, seed)


def _arm(chosen: Arm, seed: int) -> Predictions:
    assert _workspace is not None
    return _workspace.arm(chosen, seed)


def run(
    plan: Plan,
    load_rows: Callable[[], pa.Table],
    scratch: Path,
    *,
    workers: int,
    windows: dict[str, tuple[float, float]] | None = None,
) -> dict[str, Any]:
    """All arms and seeds; lines first, each arm as soon as its line is there. Returns the report's
    sections."""
    started = time.perf_counter()
    wanted = {a.line for a in plan.arms if a.line}
    lines: list[dict[str, Any]] = []
    found: dict[str, dict[int, Predictions]] = {a.name: {} for a in plan.arms}
    scratch.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(
        workers, get_context("spawn"), _start, (plan, load_rows, scratch)
    ) as pool:
        jobs: dict[Future[Any], tuple[str, Any, int]] = {}
        # The slowest first: lines over all users, then the others, then arms.
        for name in sorted(
            wanted, key=lambda n: (not LINES[n].is_trained, not LINES[n].is_all_users, n)
        ):
            jobs |= {pool.submit(_line, name, seed): ("line", name, seed) for seed in plan.seeds}
        for chosen in plan.arms:
            if not chosen.line:
                jobs |= {
                    pool.submit(_arm, chosen, seed): ("arm", chosen, seed) for seed in plan.seeds
                }
        bar = tqdm(
            total=len(wanted) * len(plan.seeds) + len(plan.arms) * len(plan.seeds),
            desc=f"{plan.domain.name} {plan.protocol}",
            unit="run",
        )
        while jobs:
            done, _ = wait(jobs, return_when=FIRST_COMPLETED)
            for future in done:
                kind, what, seed = jobs.pop(future)
                bar.update()
                if kind == "line":
                    lines.append(future.result())
                    log.info("%s", json.dumps(lines[-1]))
                    for chosen in plan.arms:
                        if chosen.line == what:
                            jobs[pool.submit(_arm, chosen, seed)] = ("arm", chosen, seed)
                else:
                    found[what.name][seed] = future.result()
                    log.info("%s seed %d: %.0f s", what.name, seed, found[what.name][seed].seconds)
        bar.close()
    workspace = Workspace(replace(plan, device="cpu"), load_rows(), scratch)
    data = _labels_only(workspace)
    arms = {name: [by_seed[s] for s in plan.seeds] for name, by_seed in found.items()}
    chosen_windows = windows or WINDOWS
    if plan.protocol == "frozen":
        chosen_windows = {"test: last 15% of time": (FROZEN_TEST, 1.0)}
    report: dict[str, Any] = {
        "domain": plan.domain.name,
        "protocol": plan.protocol,
        "ranker": plan.ranker,
        "seeds": len(plan.seeds),
        "user_share": plan.user_share,
        "samples": len(data),
        "lines": lines,
        "settings": {
            "ranker": asdict(plan.config),
            "training": asdict(plan.training),
            "source": asdict(plan.source),
            "compressor": asdict(plan.compressor),
        },
        "windows": {},
    }
    for name, (first, last) in chosen_windows.items():
        inside = comparison.window(data, workspace.days, first, last)
        report["windows"][name] = comparison.summarise(arms, data, inside)
    report["seconds"] = time.perf_counter() - started
    return report


def _labels_only(workspace: Workspace) -> Any:
    """The samples of the workspace without anything on a device: enough for metrics."""
    from downstream.samples import Samples

    samples = Samples.of(samples_of(workspace.own, workspace.plan.domain), workspace.plan.domain)
    return _Scored(samples)


class _Scored:
    """What metrics read of RankerData."""

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)


def print_windows(report: dict[str, Any]) -> str:
    """The comparison as plain text, one table per window."""
    out = [
        f"{report['domain']}, {report['protocol']}, {report['ranker']}, {report['seeds']} seeds, "
        f"{report['samples']} samples, {report['seconds']:.0f} s"
    ]
    out += [
        f"  source {x['line']} seed {x['seed']}: AUC {x['source_auc']:.4f}, {x['seconds']:.0f} s"
        for x in sorted(report["lines"], key=lambda x: (x["line"], x["seed"]))
    ]
    for name, rows in report["windows"].items():
        out.append(f"{name}: {rows[0]['num_rows']} rows")
        for row in rows:
            diff = (
                f"{1e3 * row['diff_auc']:+6.2f} [{1e3 * row['diff_low']:+.2f}, "
                f"{1e3 * row['diff_high']:+.2f}]"
                if "diff_auc" in row
                else ""
            )
            gauc = f"{1e3 * row['diff_gauc']:+6.2f}" if "diff_gauc" in row else ""
            loss = f"{1e3 * row['diff_logloss']:+6.2f}" if "diff_logloss" in row else ""
            out.append(
                f"  {row['name']:44s} AUC {row['auc']:.4f} [{row['auc_low']:.4f}, "
                f"{row['auc_high']:.4f}]  d1e-3 {diff:26s} GAUC {row['gauc']:.4f} {gauc} LL "
                f"{row['logloss']:.4f} {loss} {row['seconds']:.0f}s"
            )
    return "\n".join(out)
