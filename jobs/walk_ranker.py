"""Go on with a ranker by the days that have come: predict each, report progressive metrics, train
on it."""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from compressor.training import metrics
from downstream import saved
from downstream.configs import RankerTraining, arm
from downstream.daily import DailyData, State, Walked, walk_day
from downstream.user_index import IndexStore, UserIndex
from jobs import ledger
from jobs.train_compressor import device_of
from jobs.train_ranker import index_until, predictions, write_whole
from pipelines import delta, forgotten, lines, manifests, tables
from pipelines.days import Days, as_date, as_number
from pipelines.domain import Domain
from pipelines.domain import load as load_domain
from pipelines.errors import InputError
from pipelines.manifests import Manifest
from pipelines.names import checked_line
from pipelines.tables import UTC_TIME
from pipelines.written import last_written

log = logging.getLogger(__name__)

NO_LINE = "none"
"""The folder of a ranker that reads no tokens."""
WEEK = 7
ABOUT_PLACE = ("domain", "lake", "out", "index", "device", "dry_run")
"""Arguments that say where and on what, never what is read or trained."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Predict each new day with yesterday's weights, then train on it (streaming).

    A day is walked once its samples and histories are written and, where the arm reads tokens, its
    line has written those of the day before; the command says what it waits for. The ranker is in
    OUT/LINE: predictions/DAY.parquet, metrics.json (by day and over the week behind it), model,
    state, manifest.json. Predictions are made once: a day that is rebuilt later is not walked
    again, though later days replay it as it is then. Over one day a run or many, the result is the
    same bit for bit.
    """

    domain: str
    """Name of a domain that comes with the toolkit, or a FILE.toml."""
    lake: str
    """Root folder of the Delta tables."""
    out: str
    """Folder with a folder for each compressor line that the ranker has read; none: no tokens."""
    ranker: str = "din"
    """din or transformer."""
    arm: str = "base"
    """none, base, end-to-end, tokens, match (tokens and item tokens), tokens-only, tokens-din or
    tokens-unlabelled."""
    line: str = ""
    """Compressor line whose tokens the arm reads; another line is another ranker, from its first
    day on. Arms without tokens read none."""
    start: date | None = None
    """First day of samples (UTC); empty: the table's first. A ranker keeps the one it was begun
    with."""
    end: date | None = None
    """The day after the last; empty: all that can be walked."""
    window: int | None = None
    """Days before each that are read for replay, so that a day costs a day; 0: all. Empty: what the
    ranker was begun with, which it keeps; of a new one, all."""
    index: str = ""
    """Folder of an index to extend by what the tables have gained, or to make and keep; empty: made
    for this run."""
    seed: int = 0
    """Of initial weights and batches."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    dry_run: bool = False
    """Say which days would be walked, and stop."""

    def __post_init__(self) -> None:
        if self.reads_tokens and not self.line:
            raise InputError(f"--arm {self.arm} reads tokens; say of which --line")
        if self.line:
            checked_line(self.line)
        if self.window is not None and self.window < 0:
            raise InputError(f"--window is a number of days, 0 for all; got {self.window}")

    @property
    def reads_tokens(self) -> bool:
        return arm(self.arm).branch == "tokens"

    @property
    def folder(self) -> Path:
        return Path(self.out, self.line if self.reads_tokens else NO_LINE)


class Plan(NamedTuple):
    """Which days can be walked now, one after the other, and what the one after them waits for."""

    days: Days
    waits: str
    """Empty: for nothing."""


def main(args: Args) -> dict[str, Any]:
    domain = load_domain(args.domain)
    args = args if args.reads_tokens else replace(args, line="")
    if args.dry_run:
        state = begun(args, domain)
        return told(args, domain, state, plan(args, domain, state), state.next_day)
    with locked(args.folder), ledger.job(args.lake, "walk-ranker", args) as run:
        before = state = begun(args, domain)
        planned = plan(args, domain, before)
        write_metrics(args.folder, before)  # of a run that was killed before it did
        for state in walk(args, domain, before, planned.days, run):
            sys.stdout.write(day_text(state.days[-1]))
        result = told(args, domain, state, planned, before.next_day)
    sys.stdout.write(as_text(result))
    return result


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """No other run goes on with the ranker in a folder meanwhile; a lock ends with its process."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another run is at work in %s: waiting, then going on from there", folder)
            fcntl.flock(held, fcntl.LOCK_EX)
        yield


def begun(args: Args, domain: Domain) -> State:
    """The ranker in the folder, or one that has seen no day; InputError where the folder's is
    another one."""
    place = args.folder / "state"
    held = State.load(place) if place.exists() else None
    given = settings_of(args, domain, held)
    if held is None:
        return State(settings=given, next_day=as_number(date.fromisoformat(given["start"])))
    differing = [
        _difference(name, held.settings.get(name), value)
        for name, value in given.items()
        if held.settings.get(name) != value
    ]
    if differing:
        raise InputError(
            f"{args.folder} holds a ranker of other settings ({'; '.join(differing)}), and a "
            "ranker keeps those that it was begun with: ask for them, or give another --out"
        )
    return held


def _difference(name: str, there: Any, asked: Any) -> str:
    if isinstance(there, dict) and isinstance(asked, dict):
        parts = {k for k in {*there, *asked} if there.get(k) != asked.get(k)}
        return f"{name}: other {', '.join(sorted(parts))}"
    return f"{name}: {there} there, {asked} asked for"


def settings_of(args: Args, domain: Domain, held: State | None) -> dict[str, Any]:
    """What makes it this ranker and no other."""
    kept = held.settings if held else {}
    start = str(args.start) if args.start else kept.get("start") or str(first_day(args, domain))
    window = args.window if args.window is not None else kept.get("window", 0)
    settings = {
        "domain": domain.name,
        "ranker": args.ranker,
        "arm": args.arm,
        "line": args.line,
        "seed": args.seed,
        "start": start,
        "window": window,
        "config": asdict(arm(args.arm)),
        "training": asdict(RankerTraining(seed=args.seed)),
        "label": domain.label.name,
        "delay_us": domain.tokens.delay_us,
        "features": ledger.features_of(domain),
    }
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def first_day(args: Args, domain: Domain) -> date:
    table = tables.ranker_samples(domain)
    written = last_written(args.lake, table)
    if not written:
        raise InputError(f"{table.name} has no days; run `iat build-samples` first")
    return min(written)


def plan(args: Args, domain: Domain, state: State) -> Plan:
    """From the tables' logs alone."""
    samples, histories = (
        last_written(args.lake, make(domain)) for make in (tables.ranker_samples, tables.histories)
    )
    tokens_end = end_of_tokens(args, domain)
    start = day = as_date(state.next_day)
    end = args.end or max([*samples, day - timedelta(days=1)]) + timedelta(days=1)
    waits = ""
    while day < end:
        if day not in samples:
            waits = "its samples are not written (iat build-samples)"
        elif day not in histories:
            waits = "its histories are not written (iat build-streams)"
        elif tokens_end is not None and tokens_end < day:
            waits = (
                f"line {args.line} has tokens up to {tokens_end - timedelta(days=1)} and not of "
                f"the day before (iat train-compressor --parent {args.line})"
            )
        if waits:
            break
        day += timedelta(days=1)
    return Plan(Days(start, day), waits)


def end_of_tokens(args: Args, domain: Domain) -> date | None:
    """The day after the last of which a streaming line has written tokens; None: nothing to wait
    for."""
    if not args.line:
        return None
    row = lines.find(args.lake, args.line)
    if row["compressor_line"] != args.line or row["domain"] != domain.name:
        raise InputError(
            f"--line {args.line} must be a line of {domain.name}; it is version "
            f"{row['compressor_version']} of line {row['compressor_line']}, of {row['domain']}"
        )
    return None if row["protocol"] == "frozen" else row["end"]


def walk(args: Args, domain: Domain, state: State, days: Days, run: ledger.Run) -> Iterator[State]:
    """The state after each of the days, which is then on disk with all that the day gave; the next
    day starts from what is there."""
    if not days:
        return
    torch.set_float32_matmul_precision("high")
    config, training = arm(args.arm), RankerTraining(seed=args.seed)
    has_fields = config.branch == "fields"
    table = tables.ranker_samples(domain)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(args.index) if args.index else Path(temporary, "index")
        index = index_until(args.lake, domain, place, days.end, args.line, has_fields=has_fields)
        version = delta.open_table(args.lake, table).version()
        since = date.fromisoformat(state.settings["start"])
        asked = Days(since, days.end)
        manifest = manifest_of(args, domain, asked, index, {table.name: version})
        manifests.register(args.lake, manifest, str(args.folder.absolute()), is_newest_alone=True)
        manifests.write(args.folder, manifest, digest="")
        run.inputs |= manifest.tables
        gone = forgotten.ids(args.lake, domain)

        def read(day: int) -> pa.Table:
            only = Days(as_date(day), as_date(day + 1))
            return forgotten.without(delta.read(args.lake, table, only, version=version), gone)

        store = IndexStore(index, args.line or None, device_of(args.device))
        daily = DailyData(read, domain, store, fields=has_fields)
        for _ in days:
            walked = walk_day(
                args.ranker, config, training, state, daily,
                first_day=as_number(since), window=state.settings["window"],
            )  # fmt: skip
            run.add(rows=walked.state.num_rows - state.num_rows if walked else 0)
            leave(args, domain, state, walked, manifest)
            state = State.load(args.folder / "state")
            yield state


def leave(
    args: Args, domain: Domain, before: State, walked: Walked | None, manifest: Manifest
) -> None:
    """Write what a day gave: its predictions first, and the state, which names the next day, after
    all that must be there with it. A run that is killed before that makes the day again, the same.
    """
    number = before.next_day
    named = {name: before.settings[name] for name in ("domain", "ranker", "arm", "line", "seed")}
    named |= {"protocol": "streaming"}
    rows = EMPTY.replace_schema_metadata({"iat": json.dumps(named)})
    said: dict[str, Any] = {"day": str(as_date(number)), "samples": 0, "loss": None, "steps": 0}
    if walked is not None:
        data, result = walked.data, walked.result
        score_n = np.full(len(data), np.nan, np.float32)
        score_n[result.sample] = result.score
        rows = predictions(data, score_n, named)
        num_samples = int(data.pieces.size[data.of_days(number, number + 1)].sum())
        said |= {"samples": num_samples, "loss": finite(result.loss), "steps": result.num_steps}
    write_predictions(predicted(args.folder, as_date(number)), rows)
    since = max(as_number(date.fromisoformat(before.settings["start"])), number - WEEK + 1)
    days = Days(as_date(since), as_date(number + 1))
    week = pa.concat_tables([pq.read_table(predicted(args.folder, day)) for day in days])
    said |= {**figures(rows), "week": {"start": str(days.start), **figures(week)}}
    after = walked.state if walked is not None else before
    after = replace(after, next_day=number + 1, days=[*before.days, said])
    if walked is not None:
        about = {**named, "settings": before.settings, "day": said, "manifest": manifest.name}
        place = args.folder / "model"
        saved.save(place, args.ranker, walked.trainer, walked.data, domain, about)
    after.save(args.folder / "state")
    write_metrics(args.folder, after)


EMPTY = pa.table(
    {
        "instance_id": pa.array([], pa.int64()),
        "user_id": pa.array([], pa.int64()),
        "as_of": pa.array([], UTC_TIME),
        "label": pa.array([], pa.float32()),
        "score": pa.array([], pa.float32()),
    }
)
"""The predictions of a day without samples."""


def predicted(folder: Path, day: date) -> Path:
    return folder / "predictions" / f"{day}.parquet"


def write_predictions(path: Path, rows: pa.Table) -> None:
    """On the disk, not only on its way there."""

    def write(part: Path) -> None:
        pq.write_table(rows, part)
        with part.open("rb") as file:
            os.fsync(file.fileno())

    path.parent.mkdir(exist_ok=True)
    write_whole(path, write)


def write_metrics(folder: Path, state: State) -> None:
    """metrics.json says what the state does."""
    path = folder / "metrics.json"
    told = {"settings": state.settings, "days": state.days}
    text = json.dumps(told, indent=1, sort_keys=True) + "\n"
    if state.days and not (path.exists() and path.read_text() == text):
        write_whole(path, lambda part: part.write_text(text))


def figures(rows: pa.Table) -> dict[str, Any]:
    """Progressive metrics of predictions; None where a class is absent."""
    user, label, score = (rows.column(name).to_numpy() for name in ("user_id", "label", "score"))
    known = ~np.isnan(label)
    user, label, score = user[known], label[known], score[known]
    found = {
        "auc": metrics.auc(label, score),
        "gauc": metrics.gauc(user, label, score),
        "log_loss": metrics.log_loss(label, score),
        "normalised_entropy": metrics.normalised_entropy(label, score),
    }
    counts = {"predicted": len(rows), "labelled": len(label)}
    return counts | {name: finite(value) for name, value in found.items()}


def finite(value: float) -> float | None:
    """As JSON has it."""
    return float(value) if math.isfinite(value) else None


def manifest_of(
    args: Args, domain: Domain, days: Days, index: UserIndex, samples: Mapping[str, int]
) -> Manifest:
    """What the run reads. Of the runs before it nothing is pinned any more."""
    meta = index.meta
    more = {
        "place": str(args.folder.absolute()),
        "index": {"days": meta.days, "lines": [*meta.lines], "fields": meta.has_fields},
        "config": asdict(arm(args.arm)),
        "training": asdict(RankerTraining(seed=args.seed)),
    }
    return Manifest.of(
        "walk-ranker", args, ABOUT_PLACE, domain=domain.name, config=ledger.file_of(domain),
        code=ledger.code_version(), tables={**meta.tables, **samples},
        days=[str(days.start), str(days.end)], user_share=1.0, user_seed=0, more=more,
    )  # fmt: skip


def told(args: Args, domain: Domain, state: State, planned: Plan, first: int) -> dict[str, Any]:
    """What --json writes."""
    return {
        "domain": domain.name,
        "ranker": args.ranker,
        "arm": args.arm,
        "line": args.line,
        "folder": str(args.folder),
        "days": [str(day) for day in planned.days],
        "metrics": list(state.days[len(state.days) - (state.next_day - first) :]),
        "week": state.days[-1]["week"] if state.days else None,
        "next_day": str(as_date(state.next_day)),
        "waits": planned.waits or None,
    }


def day_text(said: Mapping[str, Any]) -> str:
    return f"{said['day']}  {figures_text(said)}\n"


def figures_text(said: Mapping[str, Any]) -> str:
    auc, loss = said["auc"], said["log_loss"]
    if not said["predicted"]:
        return "nothing predicted"
    return "AUC {}  LogLoss {}  of {} labelled, {} predicted".format(
        "-" if auc is None else f"{auc:.4f}",
        "-" if loss is None else f"{loss:.4f}",
        said["labelled"],
        said["predicted"],
    )


def as_text(result: Mapping[str, Any]) -> str:
    """The trailing week and what is next, for people."""
    head = "{domain} · {ranker} · {arm} · {folder}".format(**result)
    num = len(result["days"])
    said = [f"{head}: {num or 'no'} day{'s' * (num != 1)} walked"]
    if result["week"]:
        said.append(f"week since {result['week']['start']}: {figures_text(result['week'])}")
    waits = f" waits: {result['waits']}" if result["waits"] else ""
    said.append(f"next: {result['next_day']}{waits}")
    return "\n".join(said) + "\n"
