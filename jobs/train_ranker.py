"""Train one arm of one ranker on a range of days: predictions, metrics and weights in a folder."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from compressor.training import checkpoint, metrics
from downstream import saved
from downstream.configs import RankerConfig, RankerTraining, arm
from downstream.data import RankerData, with_shuffled_tokens
from downstream.samples import Array
from downstream.streaming import RankerTrainer, fit, walk
from downstream.user_index import IndexStore, UserIndex
from jobs import ledger
from jobs.index import held as held_index
from jobs.repeated import as_args, repeated
from jobs.train_compressor import device_of
from pipelines import delta, forgotten, manifests, tables
from pipelines.days import Days, as_number
from pipelines.domain import Domain
from pipelines.domain import load as load_domain
from pipelines.errors import InputError
from pipelines.manifests import Manifest
from pipelines.tables import UTC_TIME

log = logging.getLogger(__name__)

FIRST_DAY = date(1, 1, 1)
ABOUT_PLACE = ("domain", "lake", "out", "index", "manifest", "device", "dry_run")
"""Arguments that say where and on what, never what is read or trained."""
SAVE_DAYS = 30
"""A streaming run that was killed goes on from at most this many days before."""
TEST_SHARE = 0.15


@dataclass(frozen=True, kw_only=True)
class Args:
    """Train a ranker and predict every row before training on it.

    streaming: each day is predicted with yesterday's weights, then trained on; a run that was
    killed goes on where it last saved. frozen: fit on [start, test-start), then predict
    [test-start, end). Writes OUT/predictions.parquet, OUT/metrics.json, OUT/model and
    OUT/manifest.json, by which --manifest repeats the run and vacuum keeps what it read.
    """

    domain: str
    """Name of a domain that comes with the toolkit, or a FILE.toml."""
    lake: str
    """Root folder of the Delta tables."""
    out: str
    """Folder for predictions, metrics and weights."""
    ranker: str = "din"
    """din or transformer."""
    arm: str = "base"
    """none, base, end-to-end, tokens, match (tokens and item tokens), tokens-only, tokens-din or
    tokens-unlabelled."""
    line: str = ""
    """Compressor line whose tokens the arm reads."""
    shuffled: bool = False
    """Control: deal each day's tokens out again among that day's events."""
    protocol: Literal["streaming", "frozen"] = "streaming"
    """Which rule keeps later labels out of predictions."""
    start: date | None = None
    """First day of samples (UTC); empty: the table's first."""
    end: date | None = None
    """The day after the last; empty: the table's end."""
    test_start: date | None = None
    """frozen: the first predicted day; empty: the last 15% of days."""
    user_share: float = 1.0
    """Rank this share of users (by hash)."""
    user_seed: int = 0
    """Which users the share keeps."""
    index: str = ""
    """Folder of an index to extend by what the tables have gained, or to make and keep; empty: made
    for this run."""
    manifest: Path | None = None
    """Repeat the run of this OUT/manifest.json: its arguments, over the table versions it read."""
    seed: int = 0
    """Of initial weights and batches."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    dry_run: bool = False
    """Say what would be trained, and stop."""

    def __post_init__(self) -> None:
        config = arm(self.arm)
        if config.branch == "tokens" and not self.line:
            raise InputError(f"--arm {self.arm} reads tokens; say of which --line")
        if self.shuffled and config.branch != "tokens":
            raise InputError(f"--shuffled needs an arm that reads tokens, got {self.arm}")
        if not 0 < self.user_share <= 1:
            raise InputError(f"--user-share must be above 0 and at most 1, got {self.user_share}")
        if self.protocol == "streaming" and self.test_start is not None:
            raise InputError("--test-start is for --protocol frozen; streaming predicts every day")


@dataclass(frozen=True, slots=True)
class Run:
    """What one training run gave."""

    trainer: RankerTrainer
    score_n: Array
    """By sample; NaN where not predicted."""
    seconds: float


def main(args: Args) -> dict[str, Any]:
    domain = load_domain(args.domain)
    if args.manifest and args.index:
        raise InputError("--manifest builds the index it needs: leave --index out")
    held, digest = repeated(args.manifest, args.lake, "train-ranker", domain)
    if held is not None:
        given = {name: getattr(args, name) for name in ABOUT_PLACE}
        args = Args(**given, **as_args(held.args))
    days, version = sample_days(args, domain, held)
    if args.dry_run:
        return {"domain": domain.name, "arm": args.arm, "days": str(days), "out": args.out}
    with ledger.job(args.lake, "train-ranker", args) as row, tempfile.TemporaryDirectory() as temp:
        index = user_index(args, domain, days, Path(temp) / "index", held)
        samples = tables.ranker_samples(domain)
        rows = delta.read(args.lake, samples, days, version=version)
        rows = forgotten.without(rows, forgotten.ids(args.lake, domain))
        manifest = manifest_of(args, domain, days, index, {samples.name: version})
        if held is not None and held != manifest:
            raise InputError(
                f"--manifest {args.manifest}: the ranker's own settings have changed since it was "
                "written; train without --manifest"
            )
        found = manifests.digest(rows, *index_arrays(index))
        manifests.check_digest(found, digest)
        out = str(Path(args.out).absolute())
        manifests.register(args.lake, manifest, out)
        data = load_data(args, domain, days, index, rows)
        config, training = arm(args.arm), RankerTraining(seed=args.seed)
        result = run(
            data,
            args.ranker,
            config,
            training,
            days,
            test_start=test_start(args, days),
            shuffled=args.shuffled,
            progress=Path(args.out) / "progress",
        )
        report = write(args, domain, data, result, days, manifest, found)
        row.add(rows=result.trainer.num_rows)
        row.figures |= report["metrics"]
        row.inputs |= report["input_versions"]
    sys.stdout.write(as_text(report))
    return report


def manifest_of(
    args: Args, domain: Domain, days: Days, index: UserIndex, samples: Mapping[str, int]
) -> Manifest:
    """What the run reads, and how."""
    resolved = replace(args, start=days.start, end=days.end, test_start=test_start(args, days))
    meta = index.meta
    more = {
        "index": {"days": meta.days, "lines": [*meta.lines], "fields": meta.has_fields},
        "config": asdict(arm(args.arm)),
        "training": asdict(RankerTraining(seed=args.seed)),
    }
    return Manifest.of(
        "train-ranker", resolved, ABOUT_PLACE, domain=domain.name,
        config=ledger.file_of(domain), code=ledger.code_version(),
        tables={**meta.tables, **samples}, days=[str(days.start), str(days.end)],
        user_share=args.user_share, user_seed=args.user_seed, more=more,
    )  # fmt: skip


def index_arrays(index: UserIndex) -> list[Array]:
    """All arrays of an index, in an order that is the same each time, however it was extended."""
    index = index.compacted()
    found = [index.users.key, index.users.count]
    found += [index.arrays[name] for name in sorted(index.arrays)]
    for line in sorted(index.lines):
        held, items = index.lines[line], index.lines[line].items
        found += [held.token, held.available_us, items.segments.key, items.segments.count]
        found += [items.available_us, items.decayed_sum, items.decayed_count]
    return found


def sample_days(args: Args, domain: Domain, held: Manifest | None = None) -> tuple[Days, int]:
    """The days asked for, within those that the table holds, and its version."""
    table = tables.ranker_samples(domain)
    opened = delta.open_table(args.lake, table, held.tables[table.name] if held else None)
    found = sorted(date.fromisoformat(str(part["event_date"])) for part in opened.partitions())
    if not found:
        raise InputError(f"{table.name} is empty; run `iat build-samples` first")
    days = Days(args.start or found[0], args.end or date.fromordinal(found[-1].toordinal() + 1))
    return days, opened.version()


def test_start(args: Args, days: Days) -> date | None:
    """Frozen: the first day to predict; streaming: None."""
    if args.protocol == "streaming":
        return None
    default = days.start.toordinal() + round(len(days) * (1 - TEST_SHARE))
    found = args.test_start or date.fromordinal(default)
    if not days.start < found < days.end:
        raise InputError(f"--test-start must lie inside {days}, got {found}")
    return found


def user_index(
    args: Args, domain: Domain, days: Days, temporary: Path, held: Manifest | None
) -> UserIndex:
    """Everything before the days' end, as a manifest pins it where there is one."""
    if held is not None:
        of = held.more["index"]
        before = Days(*map(date.fromisoformat, of["days"])) if of["days"] else None
        return UserIndex.build(
            args.lake, domain, temporary, days=before, lines=of["lines"], fields=of["fields"],
            versions=held.tables,
        )  # fmt: skip
    folder = Path(args.index) if args.index else temporary
    lines, has_fields = (args.line,) if args.line else (), arm(args.arm).branch == "fields"
    held_index(folder, domain, lines, has_fields=has_fields)
    before = Days(FIRST_DAY, days.end)
    return UserIndex.extended(
        args.lake, domain, folder, days=before, lines=lines, fields=has_fields
    )


def load_data(
    args: Args, domain: Domain, days: Days, index: UserIndex, rows: pa.Table
) -> RankerData:
    """Samples of the days on the device, over an index of everything before their end."""
    has_fields = arm(args.arm).branch == "fields"
    store = IndexStore(index, args.line or None, device_of(args.device))
    data = RankerData.load(
        rows,
        domain,
        store,
        fields=has_fields,
        user_share=args.user_share,
        user_seed=args.user_seed,
    )
    if not len(data):
        raise InputError(
            f"ranker_samples/{domain.name} has no row of the chosen users in {days}; "
            "widen --start, --end or --user-share"
        )
    log.info("%d samples in %s, %d events in the index", len(data), days, len(store))
    return data


def run(
    data: RankerData,
    ranker: str,
    config: RankerConfig,
    training: RankerTraining,
    days: Days,
    *,
    test_start: date | None = None,
    shuffled: bool = False,
    progress: Path | None = None,
) -> Run:
    """Train and predict over prepared data: streaming, or frozen where `test_start` is given.

    `progress`: a folder in which a streaming run keeps what it needs to go on after a kill.
    """
    started = time.perf_counter()
    torch.set_float32_matmul_precision("high")
    if shuffled:
        data = data.with_store(with_shuffled_tokens(data.store, training.seed))
    trainer = RankerTrainer.create(ranker, config, training, data)
    score_n = np.full(len(data), np.nan, np.float32)
    first, end = as_number(days.start), as_number(days.end)
    if test_start is None:
        settings = [ranker, asdict(config), asdict(training), first, len(data), shuffled]
        _walk(trainer, data, range(first, end), score_n, progress, json.dumps(settings))
    else:
        border = as_number(test_start)
        epochs = fit(trainer, data, range(first, border))
        for epoch in tqdm(epochs, total=training.epochs, desc=f"{ranker} frozen", unit="epoch"):
            log.info("pass %d: loss %.4f, held out %.4f", *epoch[:3])
        sample, score = trainer.predict(data, data.of_days(border, end))
        score_n[sample] = score
    return Run(trainer, score_n, time.perf_counter() - started)


def _walk(
    trainer: RankerTrainer,
    data: RankerData,
    days: range,
    score_n: Array,
    progress: Path | None,
    settings: str,
) -> None:
    """The walk, saved now and then; a run of the same settings goes on where it was."""
    start = days.start
    if progress is not None and progress.exists():
        tensors, meta = checkpoint.load(progress)
        if meta["settings"] != settings:
            raise InputError(
                f"{progress} holds a run of other settings; remove it, or give another --out"
            )
        score_n[:] = tensors.pop("score_n").numpy()
        trainer.restore(tensors)
        trainer.num_steps, trainer.num_rows = meta["num_steps"], meta["num_rows"]
        start = meta["next_day"]
        log.info("going on at day %d of %d", start - days.start, len(days))
    bar = tqdm(range(start, days.stop), initial=start - days.start, total=len(days), unit="day")
    for day in bar:
        for result in walk(trainer, data, range(day, day + 1), first_day=days.start):
            score_n[result.sample] = result.score
            bar.set_postfix(loss=f"{result.loss:.4f}", refresh=False)
        is_due = (day + 1 - days.start) % SAVE_DAYS == 0
        if progress is not None and is_due and day + 1 < days.stop:
            tensors = {**trainer.state(), "score_n": torch.from_numpy(score_n)}
            meta = {"settings": settings, "next_day": day + 1}
            meta |= {"num_steps": trainer.num_steps, "num_rows": trainer.num_rows}
            checkpoint.save(progress, tensors, meta)


def write(
    args: Args,
    domain: Domain,
    data: RankerData,
    result: Run,
    days: Days,
    manifest: Manifest,
    digest: str,
) -> dict[str, Any]:
    """OUT/predictions.parquet, OUT/metrics.json, OUT/model, OUT/manifest.json; returns the
    report."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    trainer = result.trainer
    named = {
        "domain": domain.name,
        "ranker": args.ranker,
        "arm": args.arm + ("-shuffled" if args.shuffled else ""),
        "line": args.line,
        "protocol": args.protocol,
        "seed": args.seed,
    }
    rows = predictions(data, result.score_n, named)
    write_whole(out / "predictions.parquet", lambda path: pq.write_table(rows, path))
    label, score = (rows.column(name).to_numpy() for name in ("label", "score"))
    known = ~np.isnan(label)
    found = metrics.user_bootstrap(
        rows.column("user_id").to_numpy()[known], label[known], score[known], metrics.METRICS
    )
    report = {
        **named,
        "days": str(days),
        "num_samples": len(data),
        "num_predicted": len(rows),
        "num_labelled": int(known.sum()),
        "metrics": {name: interval._asdict() for name, interval in found.items()},
        "trained_rows": trainer.num_rows,
        "steps": trainer.num_steps,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "seconds": result.seconds,
        "rows_per_s": trainer.num_rows / result.seconds,
        "config": asdict(trainer.config),
        "training": asdict(trainer.training),
        "input_versions": dict(manifest.tables),
        "manifest": manifest.name,
        "user_share": args.user_share,
        "user_seed": args.user_seed,
    }
    text = json.dumps(report, indent=1, sort_keys=True, default=str)
    write_whole(out / "metrics.json", lambda path: path.write_text(text))
    saved.save(out / "model", args.ranker, trainer, data, domain, report)
    manifests.write(out, manifest, digest)
    shutil.rmtree(out / "progress", ignore_errors=True)
    return report


def write_whole(path: Path, write_to: Callable[[Path], object]) -> None:
    """A file that appears whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_to(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def predictions(data: RankerData, score_n: Array, named: Mapping[str, Any]) -> pa.Table:
    """Predicted samples: instance_id, user_id, as_of, label (NaN: unknown), score."""
    samples, kept = data.samples, np.flatnonzero(~np.isnan(score_n))
    as_of = pa.array(samples.as_of_us[kept]).cast(UTC_TIME)
    columns = {
        "instance_id": samples.instance_id[kept],
        "user_id": samples.user_id[kept],
        "as_of": as_of,
        "label": samples.label[kept],
        "score": score_n[kept],
    }
    return pa.table(columns).replace_schema_metadata({"iat": json.dumps(dict(named))})


def as_text(report: Mapping[str, Any]) -> str:
    """The report for people, a line a metric."""
    head = "{domain} · {ranker} · {arm} · {protocol} · seed {seed}".format(**report)
    lines = [f"{head}: {report['num_predicted']} predictions in {report['days']}"]
    lines += [
        f"  {name:20s} {x['value']:.5f} [{x['low']:.5f}, {x['high']:.5f}]"
        for name, x in report["metrics"].items()
    ]
    return "\n".join([*lines, f"  {report['seconds']:.0f} s, {report['rows_per_s']:.0f} rows/s\n"])
