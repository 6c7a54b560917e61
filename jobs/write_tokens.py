"""Tokens of some days by a trained version: the frozen protocol's second half, and backfills of
old days."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np
from tqdm import tqdm

from compressor import data as streams
from compressor import versions
from compressor.export import TokenWriter
from compressor.walk import DayResult
from jobs import ledger
from jobs.train_compressor import FLUSH_DAYS, day_range, device_of, stream_days
from pipelines import delta, forgotten, tables
from pipelines.days import Days
from pipelines.domain import load as load_domain
from pipelines.errors import InputError

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Args:
    """Write the instance tokens and item tokens of some days with a trained version's weights.

    The days become the whole content of the version's line for them; running it twice leaves the
    same tables. Item
    tokens of a day sum up earlier days: write days in order, or all later ones again.
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
    row = versions.find(args.lake, args.version)
    if row["protocol"] == "streaming":
        raise InputError(
            f"version {row['compressor_version']} is of a streaming line, whose tokens were "
            f"written as its days passed; "
            "write-tokens is for frozen versions. Train one with --protocol frozen"
        )
    stream = tables.user_order(domain) if row["order"] == "user" else tables.temporal_order(domain)
    found = stream_days(args.lake, stream)
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
        trainer, vocabulary, version = versions.load(
            args.lake, args.version, domain, device_of(args.device)
        )
        stream_version = delta.open_table(args.lake, stream).version()
        commit = ledger.commit_of(run, domain, {stream.name: stream_version})
        num_tokens = 0
        writer = None
        for chunk in tqdm(list(days.chunks(FLUSH_DAYS)), desc="tokens", unit="month"):
            rows = delta.read(args.lake, stream, chunk, version=stream_version)
            rows = forgotten.without(rows, gone)
            data = streams.load(rows, domain, vocabulary, device_of(args.device))
            items = writer.items if writer else None
            writer = TokenWriter(
                args.lake,
                domain,
                version.line,
                data,
                version.config.bottleneck,
                commit,
                items=items,
            )
            for day in day_range(chunk):
                event_row = data.events[data.day[data.events] == day]
                empty = np.zeros(0, np.int64)
                writer.add(
                    DayResult(
                        day,
                        empty,
                        empty.astype(np.float32),
                        event_row,
                        trainer.tokens(data, event_row),
                        float("nan"),
                    )
                )
            writer.flush(chunk, frozen_version=version.name)
            num_tokens += writer.num_tokens
            run.outputs |= writer.written
        run.add(rows=num_tokens, num_bytes=num_tokens * 2 * version.config.bottleneck)
    log.info("%d tokens of %s in %s", num_tokens, domain.name, days)
    return {**summary, "tokens": num_tokens}
