"""Packed batches: the rows of some units one after another, no padding.

Shape legend: U units, N rows (context events first, then target rows), K token rows, Q query rows,
S slots, M numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from compressor.data import StreamData


class Packing(NamedTuple):
    """Who may see whom among rows laid out as [token rows K, query rows Q]."""

    unit: Tensor
    """[K + Q] unit of each row; rows of one kind are ordered by unit."""
    time: Tensor
    """[K + Q] microseconds."""
    rank: Tensor
    """[K + Q] token rows of the unit that are strictly earlier."""
    slot: Tensor
    """[K + Q] position inside the unit: its token rows first, then its query rows."""
    num_tokens: int
    num_units: int
    max_length: int


class SourceBatch(NamedTuple):
    """Feature rows of N instances and which of them are tokens and queries."""

    rows_NS: Tensor
    numbers_NM: Tensor
    after_rows_NS: Tensor
    after_numbers_NM: Tensor
    token_K: Tensor
    """Rows of N that are token rows (keys)."""
    query_Q: Tensor
    """Rows of N that are predicted."""
    label_Q: Tensor
    """0, 1 or NaN: not known by the training moment."""
    packing: Packing
    row_N: Tensor
    """Row of the stream."""
    next_row_K: Tensor
    """A random row of the next request of each token row's user; -1 where none is known yet."""


def ragged(begin_U: Tensor, end_U: Tensor) -> tuple[Tensor, Tensor]:
    """The integers of every [begin, end), one after another, and the unit of each."""
    count_U = (end_U - begin_U).clamp(min=0)
    unit = torch.repeat_interleave(torch.arange(len(count_U), device=count_U.device), count_U)
    first_U = torch.cumsum(count_U, 0) - count_U
    return torch.arange(len(unit), device=unit.device) - first_U[unit] + begin_U[unit], unit


def make_batch(
    data: StreamData,
    units_U2: Tensor,
    *,
    context: int,
    known_before_us: int,
    since_us: int = 0,
    generator: torch.Generator | None = None,
) -> SourceBatch:
    """Units (row ranges of single users) with at most `context` earlier events each, none of them
    before `since_us`.

    Labels and next requests not known strictly before `known_before_us` read as unknown.
    """
    t = data.tensors
    begin_U, end_U = units_U2[:, 0], units_U2[:, 1]
    event_end_U = t.event_before_N[begin_U]
    event_begin_U = torch.maximum(event_end_U - context, t.event_before_N[t.user_start_N[begin_U]])
    past, past_unit = ragged(event_begin_U, event_end_U)
    is_read = t.time_N[t.events_E[past]] >= since_us
    past, past_unit = past[is_read], past_unit[is_read]
    target_row, target_unit = ragged(begin_U, end_U)
    row_N = torch.cat([t.events_E[past], target_row])
    is_token_target = t.is_event_N[target_row]
    num_past = len(past)
    token_K = torch.cat(
        [
            torch.arange(num_past, device=row_N.device),
            num_past + is_token_target.nonzero().squeeze(1),
        ]
    )
    query_Q = num_past + torch.arange(len(target_row), device=row_N.device)
    token_unit = torch.cat([past_unit, target_unit[is_token_target]])
    order = torch.argsort(token_unit, stable=True)
    token_K, token_unit = token_K[order], token_unit[order]
    label_Q = t.label_N[target_row].masked_fill(
        t.label_time_N[target_row] >= known_before_us, float("nan")
    )
    packing = _packing(
        token_unit, t.time_N[row_N[token_K]], target_unit, t.time_N[target_row], len(units_U2)
    )
    next_row_K = _next_rows(data, row_N[token_K], known_before_us, generator)
    return SourceBatch(
        t.rows_NS[row_N],
        t.numbers_NM[row_N],
        t.after_rows_NS[row_N],
        t.after_numbers_NM[row_N],
        token_K,
        query_Q,
        label_Q,
        packing,
        row_N,
        next_row_K,
    )


def _packing(
    token_unit: Tensor, token_time: Tensor, query_unit: Tensor, query_time: Tensor, num_units: int
) -> Packing:
    num_tokens_U = torch.bincount(token_unit, minlength=num_units)
    num_queries_U = torch.bincount(query_unit, minlength=num_units)
    first_token_U = torch.cumsum(num_tokens_U, 0) - num_tokens_U
    first_query_U = torch.cumsum(num_queries_U, 0) - num_queries_U
    token_slot = torch.arange(len(token_unit), device=token_unit.device) - first_token_U[token_unit]
    query_slot = (
        torch.arange(len(query_unit), device=query_unit.device)
        - first_query_U[query_unit]
        + num_tokens_U[query_unit]
    )
    unit, time = torch.cat([token_unit, query_unit]), torch.cat([token_time, query_time])
    # Token rows are time-sorted inside a unit: one search over (unit, time since the batch's
    # start) ranks every row.
    span = int(time.max() - time.min()) + 1 if len(time) else 1
    key = unit * span + (time - time.min()) if len(time) else unit
    rank = torch.searchsorted(key[: len(token_unit)].contiguous(), key) - first_token_U[unit]
    max_length = int((num_tokens_U + num_queries_U).max()) if num_units else 0
    return Packing(
        unit,
        time,
        rank,
        torch.cat([token_slot, query_slot]),
        len(token_unit),
        num_units,
        max_length,
    )


def _next_rows(
    data: StreamData, row_K: Tensor, known_before_us: int, generator: torch.Generator | None
) -> Tensor:
    t = data.tensors
    event_K = t.event_before_N[row_K]
    count_K = t.next_count_E[event_K]
    draw_K = torch.rand(len(row_K), device=row_K.device, generator=generator)
    chosen_K = t.next_first_E[event_K] + (draw_K * count_K).long().clamp(
        max=(count_K - 1).clamp(min=0)
    )
    next_row_K = t.events_E[chosen_K]
    return torch.where((count_K > 0) & (t.time_N[next_row_K] < known_before_us), next_row_K, -1)
