"""Tokens and item tokens to Delta: whole days, once, with the moment from which they may be
read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa

from compressor import codecs, item_state, item_tokens
from compressor.data import StreamData
from compressor.walk import DayResult
from pipelines import delta, forgotten, tables
from pipelines.days import Days, as_date, as_number, midnight
from pipelines.domain import Domain
from pipelines.token_format import TokenFormat, declare, decode


@dataclass
class TokenWriter:
    """Gathers the walk's days and writes them, a range of days at a time, as one line's tokens."""

    lake: str
    domain: Domain
    line: str
    data: StreamData
    width: int
    commit: dict[str, str]
    pending: list[DayResult] = field(default_factory=list)
    items: item_tokens.ItemState | None = None
    num_tokens: int = 0
    written: dict[str, int] = field(default_factory=dict)
    """Versions that the last flush made of the tables."""

    def add(self, result: DayResult) -> None:
        self.pending.append(result)

    def flush(self, days: Days, *, frozen_version: str = "") -> None:
        """Replace `days` of this line by what was added since the last flush.

        A streaming line has a version a day, named after the day whose weights wrote it.
        """
        instance, item = (
            make(self.domain.name) for make in (tables.instance_tokens, tables.item_tokens)
        )
        declare(self.lake, instance, TokenFormat("float16", self.width))
        declare(self.lake, item, TokenFormat("float32", self.width))
        if self.items is None:
            self.items = item_state.before(
                self.lake, self.domain.name, self.line, days.start, self.width
            )
        item_parts = [item.schema.empty_table()]
        for result in self.pending:
            self.items, rows = item_tokens.advance(
                self.items, self.data.item_id[result.event_row], result.token, result.day
            )
            version = frozen_version or f"{self.line}@{as_date(result.day)}"
            item_parts.append(item_rows(rows, self.domain, self.line, version, result.day))
        commit = self.flush_alone(days, frozen_version=frozen_version)
        self.written[item.name] = delta.replace(
            self.lake, item, pa.concat_tables(item_parts), days, line=self.line, commit=commit
        )
        item_state.keep(self.lake, self.line, self.items, commit, days.end)

    def flush_alone(self, days: Days, *, frozen_version: str = "") -> dict[str, str]:
        """The same of the instance tokens, and nothing of the item tokens; returns what the commit
        says."""
        instance = tables.instance_tokens(self.domain.name)
        declare(self.lake, instance, TokenFormat("float16", self.width))
        parts = [instance.schema.empty_table()]
        for result in self.pending:
            version = frozen_version or f"{self.line}@{as_date(result.day)}"
            parts.append(self._instance_rows(result, version))
            self.num_tokens += len(result.event_row)
        # A streaming line keeps the weights of its last flushed day.
        kept = frozen_version or f"{self.line}@{as_date(as_number(days.end) - 1)}"
        commit = self.commit | commit_of_line(self.domain, self.line, kept)
        self.written[instance.name] = delta.replace(
            self.lake, instance, pa.concat_tables(parts), days, line=self.line, commit=commit
        )
        self.pending.clear()
        return commit

    def _instance_rows(self, result: DayResult, version: str) -> pa.Table:
        row, count = result.event_row, len(result.event_row)
        columns = {
            "instance_id": self.data.instance_id[row],
            "user_id": self.data.user_id[row],
            "item_id": self.data.item_id[row],
            "event_time": pa.array(self.data.time_us[row], pa.int64()).cast(tables.UTC_TIME),
            "user_bucket": pa.array(np.mod(self.data.user_id[row], tables.NUM_BUCKETS), pa.int32()),
            "compressor_line": pa.array([self.line] * count, pa.string()),
            "compressor_version": pa.array([version] * count, pa.string()),
            "available_time": pa.array(
                [available(self.domain, result.day)] * count, tables.UTC_TIME
            ),
            "token": codecs.encode(result.token),
            "event_date": pa.array([as_date(result.day)] * count, pa.date32()),
        }
        return pa.table(columns).cast(tables.instance_tokens(self.domain.name).schema)


def sum_stored(
    lake: str,
    domain: Domain,
    line: str,
    version: str,
    days: Days,
    *,
    width: int,
    tokens_version: int,
    gone: Collection[int],
    commit: Mapping[str, str],
) -> tuple[int, int]:
    """Replace `days` of a frozen line's item tokens by the sums of its stored instance tokens, day
    after day, on top of the item tokens of the days before; returns (rows, the table's version).

    Args:
        tokens_version: of the table of instance tokens, which is read.
        gone: users whose tokens are left out.
    """
    table, source = tables.item_tokens(domain.name), tables.instance_tokens(domain.name)
    declare(lake, table, TokenFormat("float32", width))
    items = item_state.before(lake, domain.name, line, days.start, width)
    parts = [table.schema.empty_table()]
    names = ["user_id", "event_time", "instance_id", "item_id", "token"]
    for day in map(as_number, days):
        one = Days(as_date(day), as_date(day + 1))
        held = delta.read(lake, source, one, columns=names, line=line, version=tokens_version)
        # In the order in which a stream is summed up.
        held = forgotten.without(held, gone).sort_by([(n, "ascending") for n in names[:3]])
        token = decode(held["token"], TokenFormat("float16", width))
        items, rows = item_tokens.advance(items, held["item_id"].to_numpy(), token, day)
        parts.append(item_rows(rows, domain, line, version, day))
    made = pa.concat_tables(parts)
    said = {**commit, **commit_of_line(domain, line, version)}
    written = delta.replace(lake, table, made, days, line=line, commit=said)
    item_state.keep(lake, line, items, said, days.end)
    return len(made), written


def commit_of_line(domain: Domain, line: str, version: str) -> dict[str, str]:
    """What a commit of tokens says beside what every commit does."""
    delay = str(domain.tokens.delay_us)
    return {"line": line, "compressor_version": version, "delay_us": delay}


def item_rows(
    rows: item_tokens.ItemRows, domain: Domain, line: str, version: str, day: int
) -> pa.Table:
    """A day's item tokens (days since 1970) as the table declares them."""
    count = len(rows)
    columns = {
        "item_id": rows.item_id,
        "compressor_line": pa.array([line] * count, pa.string()),
        "compressor_version": pa.array([version] * count, pa.string()),
        "available_time": pa.array([available(domain, day)] * count, tables.UTC_TIME),
        "decayed_sum": codecs.encode(rows.decayed_sum, "float32"),
        "decayed_count": pa.array(rows.decayed_count, pa.float32()),
        "event_date": pa.array([as_date(day)] * count, pa.date32()),
    }
    return pa.table(columns).cast(tables.item_tokens(domain.name).schema)


def available(domain: Domain, day: int) -> datetime:
    """From when on tokens of a day (since 1970) may be read."""
    return midnight(as_date(day + 1)).astimezone(UTC) + timedelta(
        microseconds=domain.tokens.delay_us
    )
