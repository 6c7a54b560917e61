"""Tokens of some days by a trained version: the frozen protocol's second half, and backfills of
old days."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, replace
from datetime import date
from functools import lru_cache
from typing import Any

import numpy as np
from tqdm import tqdm

from compressor import data as streams
from compressor import versions
from compressor.export import TokenWriter, sum_stored
from compressor.item_tokens import ItemState
from compressor.nn.embedding import Vocabulary
from compressor.versions import Version
from compressor.walk import DayResult, Trainer
from jobs import ledger
from jobs.train_compressor import FLUSH_DAYS, day_range, device_of, stream_days
from pipelines import delta, forgotten, lines, tables
from pipelines.days import Days
from pipelines.domain import Domain
from pipelines.domain import load as load_domain
from pipelines.errors import InputError

log = logging.getLogger(__name__)

Loaded = tuple[Trainer, Vocabulary, Version]


@dataclass(frozen=True, kw_only=True)
class Args:
    """Write the instance tokens and item tokens of some days with a trained version's weights.

    The days become the whole content of the version's line for them; running it twice leaves the
    same tables. Item tokens of a day sum up earlier days: those of later days are stale then, and
    `iat backfill --compressor-version` sums them up again.
    """

    domain: str
    """Name of a domain that comes with the toolkit, or a FILE.toml."""
    lake: str
    """Root folder of the Delta tables."""
    version: str
    """Compressor version, or a line (its newest version)."""
    start: date | None = None
    """First day (UTC); empty: the stream's first."""
    end: date | None = None
    """The day after the last; empty: the stream's end."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    dry_run: bool = False
    """Say what would be written, and stop."""


def main(args: Args) -> dict[str, Any]:
    domain = load_domain(args.domain)
    row = lines.find(args.lake, args.version)
    if row["protocol"] == "streaming":
        raise InputError(
            f"version {row['compressor_version']} is of a streaming line, whose tokens were "
            f"written as its days passed; "
            "write-tokens is for frozen versions. Train one with --protocol frozen"
        )
    found = stream_days(args.lake, tables.stream(domain, row["order"]))
    days = Days(args.start or found.start, args.end or found.end)
    summary = {
        "line": row["compressor_line"],
        "version": row["compressor_version"],
        "days": str(days),
        "width": row["width"],
    }
    if args.dry_run:
        log.info("would write tokens of %s with %s", days, row["compressor_version"])
        return {**summary, "tokens": 0}
    with (
        ledger.job(args.lake, "write-tokens", args) as run,
        forgotten.kept_out(args.lake, domain) as gone,
    ):
        trained_by = lines.trained_by(args.lake, row["compressor_version"])
        loaded = versions.load(args.lake, args.version, domain, device_of(args.device))
        writing = _Writing(args, domain, loaded, trained_by, run, gone)
        num_tokens = 0
        items: ItemState | None = None
        for chunk in tqdm(list(days.chunks(FLUSH_DAYS)), desc="tokens", unit="month"):
            writer = writing.writer(chunk, items)
            writer.flush(chunk, frozen_version=writing.version.name)
            items = writer.items
            num_tokens += writer.num_tokens
            run.outputs |= writer.written
        run.add(rows=num_tokens, num_bytes=num_tokens * 2 * writing.version.config.bottleneck)
    log.info("%d tokens of %s in %s", num_tokens, domain.name, days)
    return {**summary, "tokens": num_tokens}


def write_alone(args: Args, days: Days) -> None:
    """Instance tokens of days of a frozen version (by its name), in one commit, and no item tokens:
    in any order and at once, for they depend on no other day."""
    domain = load_domain(args.domain)
    told = replace(args, start=days.start, end=days.end)
    with (
        ledger.job(args.lake, "write-tokens", told) as run,
        forgotten.kept_out(args.lake, domain) as gone,
    ):
        trained_by = lines.trained_by(args.lake, args.version)
        loaded = _loaded(args, trained_by)
        writing = _Writing(args, domain, loaded, trained_by, run, gone)
        writer = writing.writer(days, None)
        writer.flush_alone(days, frozen_version=writing.version.name)
        run.outputs |= writer.written
        run.add(
            rows=writer.num_tokens,
            num_bytes=writer.num_tokens * 2 * writing.version.config.bottleneck,
        )


def sum_up(args: Args, days: Days) -> None:
    """Item tokens of days of a frozen version (by its name) from its stored instance tokens, in one
    commit: oldest days first, for each day sums up those before it."""
    domain, told = load_domain(args.domain), replace(args, start=days.start, end=days.end)
    row = lines.find(args.lake, args.version)
    table, source = tables.item_tokens(domain.name), tables.instance_tokens(domain.name)
    with (
        ledger.job(args.lake, "sum-item-tokens", told) as run,
        forgotten.kept_out(args.lake, domain) as gone,
    ):
        at = delta.open_table(args.lake, source).version()
        trained_by = lines.trained_by(args.lake, args.version)
        commit = ledger.commit_of(run, domain, {source.name: at}, trained_by=trained_by)
        rows, run.outputs[table.name] = sum_stored(
            args.lake, domain, row["compressor_line"], row["compressor_version"], days,
            width=row["width"], tokens_version=at, gone=gone, commit=commit,
        )  # fmt: skip
        run.add(rows=rows, num_bytes=rows * 4 * row["width"])


@lru_cache(maxsize=1)
def _loaded(args: Args, trained_by: str) -> Loaded:
    """A version's weights, kept for this process's next days; `trained_by`: those of which run."""
    domain = load_domain(args.domain)
    return versions.load(args.lake, args.version, domain, device_of(args.device))


class _Writing:
    """One run's weights over one version of the stream."""

    def __init__(
        self, args: Args, domain: Domain, loaded: Loaded, trained_by: str, run: ledger.Run,
        gone: Collection[int],
    ) -> None:  # fmt: skip
        self.args, self.domain, self.gone = args, domain, gone
        self.trainer, self.vocabulary, self.version = loaded
        self.stream = tables.stream(domain, self.version.config.order)
        self.at = delta.open_table(args.lake, self.stream).version()
        inputs = {self.stream.name: self.at}
        self.commit = ledger.commit_of(run, domain, inputs, trained_by=trained_by)

    def writer(self, days: Days, items: ItemState | None) -> TokenWriter:
        """Holds the tokens of the days, to be flushed."""
        rows = delta.read(self.args.lake, self.stream, days, version=self.at)
        rows = forgotten.without(rows, self.gone)
        data = streams.load(rows, self.domain, self.vocabulary, device_of(self.args.device))
        version = self.version
        writer = TokenWriter(
            self.args.lake, self.domain, version.line, data, version.config.bottleneck,
            self.commit, items=items,
        )  # fmt: skip
        for day in day_range(days):
            event_row = data.events[data.day[data.events] == day]
            token = self.trainer.tokens(data, event_row)
            empty = np.zeros(0, np.int64)
            score = empty.astype(np.float32)
            writer.add(DayResult(day, empty, score, event_row, token, float("nan")))
        return writer
