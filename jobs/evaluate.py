"""Metrics of prediction files over a window of days, and each one's difference to the first."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from compressor.training import metrics
from downstream.samples import Array
from pipelines.days import midnight
from pipelines.errors import InputError

COLUMNS = ("instance_id", "user_id", "as_of", "label", "score")
HEADS = {"auc": "AUC", "gauc": "GAUC", "log_loss": "LogLoss", "normalised_entropy": "NE"}


@dataclass(frozen=True, kw_only=True)
class Args:
    """Print AUC, GAUC, LogLoss and normalised entropy with 95% intervals over users.

    Files of the same ranker, arm and line but other seeds are one row (means over seeds). Every
    other row's difference to the first is paired: same rows, same resampled users and seeds.
    """

    predictions: tuple[Path, ...]
    """predictions.parquet of `iat train-ranker`, or the folder predictions of `iat walk-ranker`;
    the base first."""
    start: date | None = None
    """First day of the window (UTC); empty: all."""
    end: date | None = None
    """The day after the window's last; empty: all."""
    bootstraps: int = 200
    """Resamples behind each interval."""
    seed: int = 0
    """Of the resamples."""

    def __post_init__(self) -> None:
        if not self.predictions:
            raise InputError("--predictions needs at least one file")
        if self.bootstraps < 1:
            raise InputError(f"--bootstraps must be at least 1, got {self.bootstraps}")


class Scored(NamedTuple):
    """One file's rows inside the window with a known label, by instance_id."""

    name: str
    seed: int
    instance_id: Array
    user_id: Array
    label: Array
    score: Array


def main(args: Args) -> dict[str, Any]:
    files = [read(path, args.start, args.end) for path in args.predictions]
    report = compare(files, num=args.bootstraps, seed=args.seed)
    report["window"] = [str(args.start or ""), str(args.end or "")]
    sys.stdout.write(as_text(report))
    return report


def read(path: Path, start: date | None = None, end: date | None = None) -> Scored:
    """A prediction file, or a folder of them (a day each), cut to the window."""
    try:
        files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        rows = pa.concat_tables([pq.read_table(file) for file in files])
    except FileNotFoundError as error:
        raise InputError(f"no predictions at {path}; `iat train-ranker` writes them") from error
    except pa.ArrowInvalid as error:
        raise InputError(f"{path} is not a Parquet file: {error}") from error
    missing = [name for name in COLUMNS if name not in rows.column_names]
    if missing:
        raise InputError(
            f"{path} lacks {', '.join(missing)}; predictions need {', '.join(COLUMNS)}"
        )
    kept = pc.invert(pc.is_nan(rows.column("label")))
    if start is not None:
        kept = pc.and_(kept, pc.greater_equal(rows.column("as_of"), pa.scalar(midnight(start))))
    if end is not None:
        kept = pc.and_(kept, pc.less(rows.column("as_of"), pa.scalar(midnight(end))))
    rows = rows.filter(kept).sort_by("instance_id")
    named = json.loads((rows.schema.metadata or {}).get(b"iat", b"{}"))
    parts = [named[k] for k in ("ranker", "arm", "line", "protocol") if named.get(k)]
    arrays = {name: rows.column(name).to_numpy() for name in COLUMNS if name != "as_of"}
    return Scored(" ".join(parts) or str(path), int(named.get("seed", 0)), **arrays)


def compare(files: Sequence[Scored], *, num: int = 200, seed: int = 0) -> dict[str, Any]:
    """Metrics of every arm on the rows that all files have; differences to the first arm."""
    shared = files[0].instance_id
    for file in files[1:]:
        shared = np.intersect1d(shared, file.instance_id, assume_unique=True)
    if not len(shared):
        raise InputError(
            "the files share no labelled row in the window; widen --start and --end, or give "
            "files of the same samples"
        )
    at = [np.searchsorted(file.instance_id, shared) for file in files]
    user, label = files[0].user_id[at[0]], files[0].label[at[0]]
    arms: dict[str, dict[int, Array]] = {}
    for file, place in zip(files, at, strict=True):
        if not np.array_equal(file.label[place], label):
            raise InputError(f"{file.name} has other labels than {files[0].name} on shared rows")
        if file.seed in arms.setdefault(file.name, {}):
            raise InputError(f"{file.name} with seed {file.seed} is given twice")
        arms[file.name][file.seed] = file.score[place]
    base_name, base = next(iter(arms.items()))
    rows = []
    for name, scores in arms.items():
        row: dict[str, Any] = {"name": name, "seeds": sorted(scores)}
        drawn = [
            metrics.user_bootstrap(user, label, s, metrics.METRICS, num, seed)
            for s in scores.values()
        ]
        for metric in metrics.METRICS:
            mean = np.mean([found[metric] for found in drawn], axis=0)
            row[metric] = dict(zip(("value", "low", "high"), map(float, mean), strict=True))
        paired = sorted(set(scores) & set(base))
        if name != base_name and paired:
            ours, theirs = (np.stack([of[s] for s in paired]) for of in (scores, base))
            row["paired_seeds"] = paired
            row["difference"] = {
                metric: metrics.paired_difference(
                    user, label, ours, theirs, metric, num, seed
                )._asdict()
                for metric in metrics.METRICS
            }
        rows.append(row)
    return {
        "num_rows": len(shared),
        "num_users": len(np.unique(user)),
        "base": base_name,
        "arms": rows,
    }


def as_text(report: Mapping[str, Any]) -> str:
    """The comparison for people: differences in 1e-3."""
    lines = [f"{report['num_rows']} rows of {report['num_users']} users; base: {report['base']}"]
    for row in report["arms"]:
        lines.append(f"{row['name']} ({len(row['seeds'])} seed{'s' * (len(row['seeds']) > 1)})")
        for metric, head in HEADS.items():
            x = row[metric]
            text = f"  {head:8s} {x['value']:.4f} [{x['low']:.4f}, {x['high']:.4f}]"
            if "difference" in row:
                d = {k: 1e3 * v for k, v in row["difference"][metric].items()}
                text += f"   {d['value']:+.2f} [{d['low']:+.2f}, {d['high']:+.2f}] e-3"
            lines.append(text)
    return "\n".join(lines) + "\n"
