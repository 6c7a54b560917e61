"""Item tokens: per item and day it occurred, the decayed sum and count of all its tokens so far.

The mean of an item as of a day is decayed_sum / decayed_count of its newest row; a token d days
older weighs decay^d. A row holds its own day and days before, so it may be read only from the
midnight after it on (FINDINGS.md section 2, DESIGN.md section 8). Works for any other key (brand,
store) just as well.

Sums are kept as float32, as the table stores them, so that a walk in one process and one that
starts again from the table every day give the same bits.

Shape legend: N events, G (item, day) groups, K items, D token width.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as ds

from pipelines import delta, tables
from pipelines.days import Days
from pipelines.token_format import TokenFormat, check, decode

Array = npt.NDArray[Any]

DECAY = 0.995
"""Per day; FINDINGS.md section 2."""
EPOCH = date(1970, 1, 1)
AT_ONCE = 1 << 18
"""Tokens widened to float64 at a time."""


@dataclass(frozen=True)
class ItemRows:
    """One row per item and day it occurred, cumulative up to and including that day."""

    item_id: Array
    day: Array
    """Days since 1970."""
    decayed_sum: Array
    """[G, D] float32."""
    decayed_count: Array
    """[G] float32."""

    def __len__(self) -> int:
        return len(self.item_id)


@dataclass(frozen=True)
class ItemState:
    """The newest row of every item met so far, sorted by item_id."""

    item_id: Array
    decayed_sum: Array
    decayed_count: Array
    day: Array

    @classmethod
    def empty(cls, width: int) -> ItemState:
        none = np.zeros(0, np.int64)
        return cls(none, np.zeros((0, width), np.float32), np.zeros(0, np.float32), none)

    @classmethod
    def before(cls, lake: str, domain_name: str, line: str, day: date, width: int) -> ItemState:
        """The state at the start of `day`, from the table's rows of earlier days."""
        table = tables.item_tokens(domain_name)
        if not delta.exists(lake, table):
            return cls.empty(width)
        opened = delta.open_table(lake, table)
        form = TokenFormat("float32", width)
        check(opened, table.name, form)
        dataset = delta.files(opened, Days(date.min, day))
        kept = ds.field("compressor_line") == line
        keys = dataset.to_table(["item_id", "event_date"], filter=kept)
        key_item, key_day = keys.column("item_id").to_numpy(), _days(keys.column("event_date"))
        order = np.lexsort((key_day, key_item))
        is_last = np.append(np.diff(key_item[order]) != 0, True)[: len(order)]
        item_id, newest = key_item[order][is_last], key_day[order][is_last]
        total = np.zeros((len(item_id), width), np.float32)
        count = np.zeros(len(item_id), np.float32)
        wanted = ["item_id", "event_date", "decayed_sum", "decayed_count"]
        for batch in dataset.scanner(wanted, filter=kept).to_batches():
            place = np.searchsorted(item_id, batch.column("item_id").to_numpy())
            is_newest = newest[place] == _days(batch.column("event_date"))
            total[place[is_newest]] = decode(batch.column("decayed_sum"), form)[is_newest]
            count[place[is_newest]] = batch.column("decayed_count").to_numpy()[is_newest]
        return cls(item_id, total, count, newest)


def item_token_days(
    item_id: Array, event_day: Array, token: Array, decay: float = DECAY
) -> ItemRows:
    """All rows of events [N] with tokens [N, D] on whole days since 1970, sorted by (item, day).

    Items go forward together, each from its k-th day to the next: as many numpy steps as the item
    with the most days has days.
    """
    _check_decay(decay)
    groups = _Groups.of(item_id, event_day)
    day_sum, count = groups.sums(token)
    item, day = groups.item_id, groups.day
    first = np.flatnonzero(np.append(True, np.diff(item) != 0)[: len(item)])
    num_days = np.diff(np.append(first, len(item)))
    total = day_sum.astype(np.float32)
    total_count = count.astype(np.float32)
    for k in range(1, int(num_days.max(initial=0))):
        at = first[num_days > k] + k
        weight = np.power(decay, (day[at] - day[at - 1]).astype(np.float64))
        total[at] = _add(total[at - 1], weight[:, None], day_sum[at])
        total_count[at] = _add(total_count[at - 1], weight, count[at])
    return ItemRows(item, day, total, total_count)


def advance(
    state: ItemState, item_id: Array, token: Array, day: int, decay: float = DECAY
) -> tuple[ItemState, ItemRows]:
    """The state after one more day's events [N], and that day's rows; days come in order.

    Bit for bit what item_token_days gives for all days at once.
    """
    _check_decay(decay)
    groups = _Groups.of(item_id, np.full(len(item_id), day, np.int64))
    day_sum, count = groups.sums(token)
    place = np.searchsorted(state.item_id, groups.item_id)
    is_old = np.append(state.item_id, 0)[place] == groups.item_id
    is_old &= place < len(state.item_id)
    old = place[is_old]
    if (state.day[old] >= day).any():
        newest = int(state.day[old].max())
        raise ValueError(f"days must come in order: got day {day} after an item's day {newest}")
    weight = np.power(decay, (day - state.day[old]).astype(np.float64))
    total, total_count = day_sum.astype(np.float32), count.astype(np.float32)
    total[is_old] = _add(state.decayed_sum[old], weight[:, None], day_sum[is_old])
    total_count[is_old] = _add(state.decayed_count[old], weight, count[is_old])
    rows = ItemRows(groups.item_id, groups.day, total, total_count)

    stays = np.ones(len(state.item_id), bool)
    stays[old] = False
    merged = np.concatenate([state.item_id[stays], rows.item_id])
    order = np.argsort(merged)
    return (
        ItemState(
            merged[order],
            np.concatenate([state.decayed_sum[stays], total])[order],
            np.concatenate([state.decayed_count[stays], total_count])[order],
            np.concatenate([state.day[stays], rows.day])[order],
        ),
        rows,
    )


@dataclass(frozen=True)
class _Groups:
    """Events grouped by (item, day): group g owns rows order[starts[g]:starts[g + 1]]."""

    item_id: Array
    day: Array
    order: Array
    starts: Array

    @classmethod
    def of(cls, item_id: Array, day: Array) -> _Groups:
        order = np.lexsort((day, item_id))
        item_id = np.asarray(item_id, np.int64)[order]
        day = np.asarray(day, np.int64)[order]
        is_new = np.append(True, (np.diff(item_id) != 0) | (np.diff(day) != 0))[: len(order)]
        first = np.flatnonzero(is_new)
        return cls(item_id[first], day[first], order, np.append(first, len(order)))

    def sums(self, token: Array) -> tuple[Array, Array]:
        """Per group the sum of its tokens [G, D] and their number, in float64."""
        total = np.zeros((len(self.item_id), token.shape[1]))
        begin = 0
        while begin < len(self.item_id):
            # As many whole groups as fit, at least one.
            end = int(np.searchsorted(self.starts, self.starts[begin] + AT_ONCE, side="right")) - 1
            end = max(end, begin + 1)
            rows = self.order[self.starts[begin] : self.starts[end]]
            bounds = self.starts[begin:end] - self.starts[begin]
            total[begin:end] = np.add.reduceat(token[rows].astype(np.float64), bounds, axis=0)
            begin = end
        return total, np.diff(self.starts).astype(np.float64)


def _add(before: Array, weight: Array, today: Array) -> Array:
    return (before.astype(np.float64) * weight + today).astype(np.float32)


def _check_decay(decay: float) -> None:
    if not 0 < decay <= 1:
        raise ValueError(f"decay must be above 0 and at most 1 per day, got {decay}")


def _days(column: pa.Array | pa.ChunkedArray) -> Array:
    """Dates as days since 1970."""
    return np.asarray(column.cast(pa.int32()).to_numpy(), np.int64)
