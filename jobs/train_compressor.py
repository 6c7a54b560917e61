"""Train a source model on a range of days; in the streaming protocol, walk the days and write each
day's tokens once."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from compressor import data as streams
from compressor import predictions, versions
from compressor.configs import SourceConfig, TrainingConfig
from compressor.data import DAY_US, StreamData
from compressor.export import TokenWriter
from compressor.gate import DayFigures, Gate, RefusedError
from compressor.nn.embedding import Vocabulary
from compressor.training import checkpoint, metrics
from compressor.versions import Version
from compressor.walk import DayResult, Trainer, fit, walk, window_start
from jobs import ledger, progress
from jobs.repeated import as_args, repeated
from pipelines import delta, forgotten, lines, manifests, tables
from pipelines.approvals import APPROVED
from pipelines.days import Days, as_date, as_number
from pipelines.domain import Domain
from pipelines.domain import load as load_domain
from pipelines.errors import InputError
from pipelines.manifests import Manifest
from pipelines.names import checked_line
from pipelines.splits import users_kept

log = logging.getLogger(__name__)

FLUSH_DAYS = 30
ABOUT_PLACE = ("domain", "lake", "line", "manifest", "device", "dry_run")
"""Arguments that say where and on what, never what is read or trained."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Train the compressor on a domain's stream.

    streaming: for each day predict it with yesterday's weights, train on it and on replayed
    earlier days, write its
    tokens once. A run that was killed goes on at the last day it wrote. frozen: train on all the
    days, write no token
    (`iat write-tokens` does), so that a ranker of later days meets a compressor that never saw its
    labels.
    """

    domain: str
    """Name of a domain that comes with the toolkit, or a FILE.toml."""
    lake: str
    """Root folder of the Delta tables."""
    order: Literal["temporal", "user"] = "user"
    """temporal: rows predicted alone; user: with the user's earlier tokens through SIT."""
    protocol: Literal["streaming", "frozen"] = "streaming"
    """Which rule keeps later labels out of the tokens that rows read."""
    start: date | None = None
    """First day (UTC); empty: the stream's first."""
    end: date | None = None
    """The day after the last; empty: the stream's end."""
    line: str = ""
    """Name of the compressor line; empty: the order."""
    parent: str = ""
    """Version to go on from (its line's next days); empty: from scratch."""
    window: int = 0
    """Days before each day that it reads, as context and for replay, so that a day costs a day
    however old the line is (streaming); 0: all. A line keeps the window it was begun with."""
    untrained: bool = False
    """Write tokens of a compressor that never learns: the control of every comparison."""
    user_share: float = 1.0
    """Train on this share of users (by hash); tokens are written for all."""
    user_seed: int = 0
    """Which users the share keeps."""
    epochs: int = 8
    """Passes over the days, at most (frozen)."""
    seed: int = 0
    """Of initial weights and batches."""
    manifest: Path | None = None
    """Repeat the run of this manifest (next to a version's weights): its arguments, over the table
    version it read. Written to --line; empty: its line with -again behind it."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    dry_run: bool = False
    """Say what would be trained and written, and stop."""

    def __post_init__(self) -> None:
        if not 0 < self.user_share <= 1:
            raise InputError(f"--user-share must be above 0 and at most 1, got {self.user_share}")
        if self.window < 0 or (self.window and (self.protocol == "frozen" or self.parent)):
            raise InputError(
                f"--window is a number of days for a new streaming line, got {self.window}: a "
                "frozen run reads all its days, and a line that goes on keeps its parent's window"
            )
        if self.line:
            checked_line(self.line)
        if APPROVED in (self.line, self.parent):
            raise InputError(
                f"{APPROVED!r} names whichever line is approved, and `iat walk-compressor` goes "
                "on with that; here name a line"
            )


def main(args: Args) -> dict[str, Any]:
    return run_judged(args)


def run_judged(
    args: Args, gate: Gate | None = None, told: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The command; with a `gate`, which raises where a day must not be trained on, each day is a
    version of its own. `told` goes into the versions' metrics.

    RefusedError: nothing of that day has been written."""
    domain = load_domain(args.domain)
    held, digest = repeated(args.manifest, args.lake, "train-compressor", domain)
    if held is not None:
        given = {name: getattr(args, name) for name in ABOUT_PLACE if name != "line"}
        kept = as_args(held.args)
        line = args.line or f"{held.more['line']}-again"
        args = Args(**given, **kept, line=line)
    with (
        ledger.job(args.lake, "train-compressor", args) as run,
        forgotten.kept_out(args.lake, domain) as gone,
    ):
        result = train(args, domain, run, gone, held, digest, gate, told or {})
        run.add(rows=result["rows"], num_bytes=result["tokens"] * 2 * result["width"])
    return result


def train(
    args: Args,
    domain: Domain,
    run: ledger.Run,
    gone: Collection[int],
    held: Manifest | None,
    digest: str,
    gate: Gate | None,
    told: Mapping[str, Any],
) -> dict[str, Any]:
    """`gone`: users of whom nothing is read; `held`: the manifest of a run to repeat, and the
    digest of what it read."""
    device = device_of(args.device)
    newest, parent = _parents(args)
    order = parent["order"] if parent else args.order
    line = args.line or (parent["compressor_line"] if parent else order)
    _check_owner(args.lake, line, domain)
    stream = tables.stream(domain, order)
    start = args.start or (parent["end"] if parent else None)
    if held is None:
        days, version = delta.days_of(args.lake, stream, start, args.end)
    else:
        days, version = held.span, held.tables[stream.name]
    first = parent["start"] if parent else days.start
    training = TrainingConfig(seed=args.seed, epochs=args.epochs, window_days=_window(args, parent))
    # A walk that goes on needs earlier days too: as context and for replay.
    since = as_date(window_start(as_number(days.start), training, as_number(first)))
    planned = Version(
        line=line,
        name="",
        parent=parent["compressor_version"] if parent else "",
        domain=domain.name,
        protocol=args.protocol,
        start=first,
        end=days.end,
        config=SourceConfig(order=order),
        training=training,
        input_versions={stream.name: version},
        user_share=args.user_share,
        user_seed=args.user_seed,
        is_trained=not args.untrained or _has_learned(parent),
    )
    read = Days(since, days.end)
    held_version = _interrupted(args.lake, stream, planned, days, read)
    if newest and parent != newest and held_version is None:
        parent = newest  # its line is another run's by now
    if parent and days.start != parent["end"]:
        raise InputError(
            f"{parent['compressor_version']} has learned {parent['start']} to {parent['end']}, so "
            f"its line goes on with --start {parent['end']}, not {days.start}"
        )
    rows = delta.read(args.lake, stream, read, version=version)
    rows = forgotten.without(rows, gone)
    log.info("%s: %d rows of %s for %s", stream.name, len(rows), read, days)
    summary = {"line": line, "days": str(days), "rows": len(rows), "tokens": 0}
    if args.dry_run:
        return {**summary, "width": planned.config.bottleneck}
    manifest = manifest_of(args, domain, days, planned, parent, held)
    found = manifests.digest(rows)
    manifests.check_digest(found, digest)
    place = versions.line_folder(args.lake, line).absolute()
    manifests.register(args.lake, manifest, str(place))
    vocabulary = streams.vocabulary_of(rows, domain)
    trainer, vocabulary, planned, done = _begin(
        args, domain, planned, days, held_version, vocabulary, device
    )
    summary["width"] = planned.config.bottleneck
    data = streams.load(rows, domain, vocabulary, device)
    commit = ledger.commit_of(run, domain, planned.input_versions, seed=str(args.seed))

    def save(version: Version, figures: Mapping[str, Any]) -> None:
        figures = {**figures, **told}
        place = versions.save(args.lake, version, trainer, vocabulary, figures, commit)
        manifests.write(place, manifest, found)

    if args.protocol == "frozen":
        figures = _frozen(trainer, data, days, args)
        name = f"{line}@{days.end}"
        save(replace(planned, name=name), figures)
        return {**summary, "version": name, **figures}
    if done == days.end:
        log.info("%s is written up to %s: nothing is left to do", line, days.end)
        name = _day_version(line, done)
        return {**summary, "version": name, **json.loads(lines.find(args.lake, name)["metrics"])}
    writer = TokenWriter(args.lake, domain, line, data, planned.config.bottleneck, commit)
    left = Days(done, days.end)
    try:
        summary |= _streaming(trainer, data, left, args, writer, planned, save, gate)
    except RefusedError:
        manifests.release(args.lake, manifest.name)  # nothing was made of what it pins
        raise
    run.outputs |= writer.written
    return summary


def manifest_of(
    args: Args,
    domain: Domain,
    days: Days,
    planned: Version,
    parent: Mapping[str, Any] | None,
    held: Manifest | None,
) -> Manifest:
    """What the run reads, and how; InputError if it is no longer what the held one says."""
    weights = Path(parent["artifact"]) / checkpoint.TENSORS if parent else None
    found = Manifest.of(
        "train-compressor",
        replace(args, start=days.start, end=days.end, parent=planned.parent), ABOUT_PLACE,
        domain=domain.name, config=ledger.file_of(domain), code=ledger.code_version(),
        tables=planned.input_versions, days=[str(days.start), str(days.end)],
        user_share=args.user_share, user_seed=args.user_seed,
        more={
            "line": held.more["line"] if held else planned.line,
            "parent": manifests.digest_of_file(weights) if weights else "",
            "config": asdict(planned.config),
            "training": asdict(planned.training),
        },
    )  # fmt: skip
    if held is not None and held != found:
        raise InputError(
            f"--manifest {args.manifest}: the compressor's own settings, or its parent's weights, "
            "have changed since it was written; train without --manifest"
        )
    return found


def _parents(args: Args) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The row of the version that --parent names, and of the one to go on from: of a line that has
    come further, the version whose days ended at --start."""
    if not args.parent:
        return None, None
    row = before = lines.find(args.lake, args.parent)
    if args.protocol == "frozen" or row["protocol"] == "frozen":
        raise InputError(
            f"--parent {args.parent}: a frozen line is a line of one version; only a streaming "
            "line goes on"
        )
    is_line = args.parent == row["compressor_line"]
    if is_line and args.start and args.start < row["end"]:
        the_day_before = Days(args.start - timedelta(days=1), args.start)
        before = next(iter(lines.ending(args.lake, args.parent, the_day_before)), row)
    return row, before


def _has_learned(parent: Mapping[str, Any] | None) -> bool:
    """Whether the weights that a run goes on with have ever learned."""
    return parent is not None and bool(
        checkpoint.meta(Path(parent["artifact"]))["version"]["is_trained"]
    )


def _check_owner(lake: str, line: str, domain: Domain) -> None:
    """InputError where the line is another domain's: their versions would replace each other."""
    others = {row["domain"] for row in lines.of_line(lake, line)} - {domain.name}
    if others:
        raise InputError(
            f"line {line} of {lake} is of domain {', '.join(others)}: give {domain.name} a line of "
            "its own (--line NAME)"
        )


def _window(args: Args, parent: Mapping[str, Any] | None) -> int:
    """Days before each that the line reads: of its first run, for all that go on from it."""
    if parent is None:
        return args.window
    return int(json.loads(parent["config"])["training"].get("window_days", 0))


def _begin(
    args: Args,
    domain: Domain,
    planned: Version,
    days: Days,
    held: Version | None,
    vocabulary: Vocabulary,
    device: str,
) -> tuple[Trainer, Vocabulary, Version, date]:
    """Where the run starts: the first day it has not written, and the weights as of then."""
    name = held.name if held else args.parent
    if not name:
        trainer = Trainer.create(planned.config, planned.training, domain, vocabulary, device)
        return trainer, vocabulary, planned, days.start
    trainer, vocabulary, old = versions.load(args.lake, name, domain, device, newer=vocabulary)
    planned = replace(planned, config=old.config, training=old.training)
    if held is None:
        return trainer, vocabulary, planned, days.start
    log.info("going on at %s, where an earlier run of the same command stopped", held.end)
    return trainer, vocabulary, planned, held.end


def _interrupted(
    lake: str, stream: tables.Table, planned: Version, days: Days, read: Days
) -> Version | None:
    """The newest version that a run of the very same command left, done or not, over the same
    rows: the stream's days that it read are what they were, whatever has come of others."""
    if planned.protocol != "streaming":
        return None
    found = [
        version
        for version in versions.within(lake, planned.line, days)
        if replace(version, input_versions=planned.input_versions).is_same_run(planned)
        and _is_unchanged(lake, stream, version, planned, read)
    ]
    return max(found, key=lambda version: version.end, default=None)


def _is_unchanged(lake: str, stream: tables.Table, then: Version, now: Version, read: Days) -> bool:
    """Whether nobody has written the days since."""
    read_then, reads_now = (version.input_versions[stream.name] for version in (then, now))
    if read_then == reads_now:
        return True
    changed = delta.days_changed(delta.open_table(lake, stream, reads_now), read_then)
    return changed is not None and not any(day in read for day in changed)


def _day_version(line: str, end: date) -> str:
    """The name of a streaming version: its last day's."""
    return f"{line}@{as_date(as_number(end) - 1)}"


def _frozen(trainer: Trainer, data: StreamData, days: Days, args: Args) -> dict[str, Any]:
    span = day_range(days)
    kept = users_kept(data.user_id, args.user_share, args.user_seed)
    figures: dict[str, Any] = {}
    if not args.untrained:
        steps = fit(trainer, data, span, kept=kept)
        passes = list(tqdm(steps, total=args.epochs, desc="epochs", unit="epoch"))
        best = [each for each in passes if each.is_best][-1]
        figures |= {"loss": best.loss, "held_out_loss": best.held_out_loss, "passes": len(passes)}
    return figures


def _streaming(
    trainer: Trainer,
    data: StreamData,
    days: Days,
    args: Args,
    writer: TokenWriter,
    planned: Version,
    save: Callable[[Version, Mapping[str, Any]], None],
    gate: Gate | None,
) -> dict[str, Any]:
    results: list[DayResult] = []
    kept = users_kept(data.user_id, args.user_share, args.user_seed)
    bar = progress.bar(len(days), desc=f"compressor {planned.line}", unit="day")
    first_day = as_number(planned.start)
    for chunk in days.chunks(FLUSH_DAYS if gate is None else 1):
        by_day: dict[str, Any] = {}
        for result in days_of_walk(
            trainer,
            data,
            chunk,
            kept=kept,
            untrained=args.untrained,
            first_day=first_day,
        ):
            found = day_figures(data, result)
            if gate is not None:
                gate(found)
            by_day[str(as_date(result.day))] = found._asdict()
            writer.add(result)
            results.append(result)
            bar.update()
        writer.flush(chunk)
        for result in results[-len(chunk) :]:
            predictions.save(args.lake, planned.line, data, result)
        done = replace(planned, name=_day_version(planned.line, chunk.end), end=chunk.end)
        is_last = chunk.end == days.end
        figures = {"by_day": by_day, **(source_metrics(data, results) if is_last else {})}
        save(done, figures)
    bar.close()
    return {"version": done.name, "tokens": writer.num_tokens, **figures}


def days_of_walk(
    trainer: Trainer,
    data: StreamData,
    days: Days,
    *,
    kept: np.ndarray[Any, Any],
    untrained: bool,
    first_day: int,
) -> Iterator[DayResult]:
    """The walk over `days`, training on the kept users alone; an untrained compressor only
    predicts and writes."""
    return walk(
        trainer,
        data,
        list(day_range(days)),
        first_day=first_day,
        kept=kept,
        is_training=not untrained,
    )


def source_metrics(data: StreamData, results: list[DayResult]) -> dict[str, Any]:
    """Progressive metrics of the source model itself over the walked days."""
    row = np.concatenate([r.row for r in results])
    score = np.concatenate([r.score for r in results])
    label = data.tensors.label_N.cpu().numpy()[row]
    known = ~np.isnan(label)
    return {"source_auc": float(metrics.auc(label[known], score[known]))}


def day_figures(data: StreamData, result: DayResult) -> DayFigures:
    """What the walk of one day tells of it, by the labels that it may train on: those known by the
    day's end."""
    label, label_time = (
        t.cpu().numpy()[result.row] for t in (data.tensors.label_N, data.tensors.label_time_N)
    )
    known = ~np.isnan(label) & (label_time < (result.day + 1) * DAY_US)
    label, logit = label[known], result.score[known].astype(np.float64)
    positives = int((label == 1).sum())
    return DayFigures(
        float(metrics.auc(label, logit)),
        float(np.logaddexp(0, np.where(label == 1, -logit, logit)).mean())
        if len(label)
        else np.nan,
        result.loss,
        positives,
        len(label) - positives,
    )


def stream_days(lake: str, table: tables.Table) -> Days:
    """The days that a table holds, from its partitions alone."""
    parts = delta.open_table(lake, table).partitions()
    found = sorted(str(p["event_date"]) for p in parts)
    if not found:
        raise InputError(f"{table.name} is empty; build the streams first")
    return Days(
        date.fromisoformat(found[0]),
        date.fromordinal(date.fromisoformat(found[-1]).toordinal() + 1),
    )


def day_range(days: Days) -> range:
    """Days since 1970."""
    return range(as_number(days.start), as_number(days.end))


def device_of(name: str) -> str:
    """auto: the GPU where there is one. A GPU that was asked for and is not there is an error."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError("--device cuda needs a CUDA GPU and PyTorch sees none; use --device cpu")
    if not name.startswith(("cpu", "cuda")):
        raise InputError(f"--device must be cpu, cuda or auto, got {name!r}")
    return name
