"""Tokens and item tokens to Delta: whole days, once, with the moment from which they may be
read."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa

from compressor import codecs, item_state, item_tokens
from compressor.data import StreamData
from compressor.walk import DayResult
from pipelines import delta, tables
from pipelines.days import Days, as_date, as_number, midnight
from pipelines.domain import Domain
from pipelines.token_format import TokenFormat, declare


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
        instance = tables.instance_tokens(self.domain.name)
        item = tables.item_tokens(self.domain.name)
        declare(self.lake, instance, TokenFormat("float16", self.width))
        declare(self.lake, item, TokenFormat("float32", self.width))
        if self.items is None:
            self.items = item_state.before(
                self.lake, self.domain.name, self.line, days.start, self.width
            )
        token_parts, item_parts = [instance.schema.empty_table()], [item.schema.empty_table()]
        for result in self.pending:
            version = frozen_version or f"{self.line}@{as_date(result.day)}"
            token_parts.append(self._instance_rows(result, version))
            item_parts.append(self._item_rows(result, version))
            self.num_tokens += len(result.event_row)
        # A streaming line keeps the weights of its last flushed day.
        kept = frozen_version or f"{self.line}@{as_date(as_number(days.end) - 1)}"
        commit = {**self.commit, "line": self.line, "compressor_version": kept}
        for table, parts in ((instance, token_parts), (item, item_parts)):
            self.written[table.name] = delta.replace(
                self.lake, table, pa.concat_tables(parts), days, line=self.line, commit=commit
            )
        item_state.keep(self.lake, self.line, self.items, commit, days.end)
        self.pending.clear()

    def _available(self, day: int) -> datetime:
        return midnight(as_date(day + 1)).astimezone(UTC) + timedelta(
            microseconds=self.domain.tokens.delay_us
        )

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
            "available_time": pa.array([self._available(result.day)] * count, tables.UTC_TIME),
            "token": codecs.encode(result.token),
            "event_date": pa.array([as_date(result.day)] * count, pa.date32()),
        }
        return pa.table(columns).cast(tables.instance_tokens(self.domain.name).schema)

    def _item_rows(self, result: DayResult, version: str) -> pa.Table:
        assert self.items is not None  # flush reads it first
        self.items, rows = item_tokens.advance(
            self.items, self.data.item_id[result.event_row], result.token, result.day
        )
        count = len(rows.item_id)
        columns = {
            "item_id": rows.item_id,
            "compressor_line": pa.array([self.line] * count, pa.string()),
            "compressor_version": pa.array([version] * count, pa.string()),
            "available_time": pa.array([self._available(result.day)] * count, tables.UTC_TIME),
            "decayed_sum": codecs.encode(rows.decayed_sum, "float32"),
            "decayed_count": pa.array(rows.decayed_count, pa.float32()),
            "event_date": pa.array([as_date(result.day)] * count, pa.date32()),
        }
        return pa.table(columns).cast(tables.item_tokens(self.domain.name).schema)
