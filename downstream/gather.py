"""What a fetch does on a CUDA device, each part in one launch: where users' pasts end, which rows
are the newest, and what those rows hold as of a moment.

The plain path, in `user_index.py` and `segments.py`, says what these must give bit for bit.
Arrays that have at least one row; segments in one piece (a device's index is compacted). Tokens may
lie in page-locked memory of the host: a kernel reads them over the bus.

Shape legend: B requests, L sequence length, D token width, K keys, N rows of the arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from downstream.segments import SegmentTensors

QUERIES, STEPS, ROWS = 128, 256, 64
"""Handled by one program: queries, steps of a sequence, rows with their tokens."""


class Sides(NamedTuple):
    """Side columns in one piece, so that one launch reads any of them."""

    names: list[str]
    """Side columns, then labels."""
    value_FN: Tensor
    """int32."""
    known_us_KN: Tensor
    """When each value of a label became known."""


class Newest(NamedTuple):
    """Of `newest`."""

    row_BL: Tensor
    mask_BL: Tensor
    gap_s_BL: Tensor
    token_BLD: Tensor
    token_mask_BL: Tensor
    side: dict[str, Tensor]


def positions(
    held: SegmentTensors, times_N: Tensor, query_B: Tensor, moment_B: Tensor
) -> tuple[Tensor, Tensor]:
    """(key_B, num_B): each query's place among the keys (-1: not there), and how many of its rows
    are before the moment."""
    num = len(query_B)
    key_B, num_B = torch.empty_like(query_B), torch.empty_like(query_B)
    if num:
        _positions[(triton.cdiv(num, QUERIES),)](
            held.key_K, held.begin, held.count, times_N, query_B, moment_B, key_B, num_B, num,
            len(held.key_K), len(held.key_K).bit_length(), held.longest.bit_length(), QUERIES,
        )  # fmt: skip
    return key_B, num_B


def newest(
    held: SegmentTensors, times_N: Tensor, key_B: Tensor, num_B: Tensor, moment_B: Tensor,
    token_ND: Tensor, available_us_N: Tensor, sides: Sides, asked: Sequence[str], length: int,
    dtype: torch.dtype | None = None,
) -> Newest:  # fmt: skip
    """The last rows of each key's first `num`, left-padded, their tokens (as `dtype`; None: as
    stored) and the side columns asked for: as `SegmentTensors.newest`, `IndexStore.gap_s_at`,
    `IndexStore.tokens_at` and `IndexStore.side_at` have it.
    """
    num, device = len(key_B), key_B.device
    row_BL = torch.empty((num, length), dtype=torch.int64, device=device)
    mask_BL, token_mask_BL = torch.empty((2, num, length), dtype=torch.bool, device=device)
    gap_s_BL = torch.empty((num, length), dtype=torch.float32, device=device)
    width = token_ND.shape[1]
    token_BLD = token_ND.new_empty((num, length, width), dtype=dtype, device=device)
    given = [name for name in sides.names if name in asked]
    bits = sum(1 << sides.names.index(name) for name in given)
    side_FBL = torch.empty((len(given), num, length), dtype=torch.int32, device=device)
    if row_BL.numel():
        _newest[(num, triton.cdiv(length, ROWS))](
            held.begin, times_N, key_B, num_B, moment_B, token_ND, available_us_N, row_BL, mask_BL,
            gap_s_BL, token_BLD, token_mask_BL, sides.value_FN, sides.known_us_KN, side_FBL,
            length, len(times_N), row_BL.numel(), width, triton.next_power_of_2(max(width, 1)),
            ROWS, bits, len(sides.names), len(sides.names) - len(sides.known_us_KN),
        )  # fmt: skip
    side = dict(zip(given, side_FBL.unbind(), strict=True))
    return Newest(
        row_BL, mask_BL, gap_s_BL, token_BLD, token_mask_BL, {name: side[name] for name in asked}
    )


def tokens_at(
    token_ND: Tensor, available_us_N: Tensor, row_BL: Tensor, mask_BL: Tensor, moment_B: Tensor
) -> tuple[Tensor, Tensor]:
    """(token_BLD, token_mask_BL): as `IndexStore.tokens_at`."""
    width = token_ND.shape[1]
    token_BLD = token_ND.new_empty((*row_BL.shape, width), device=row_BL.device)
    token_mask_BL = torch.empty_like(mask_BL)
    if row_BL.numel():
        _tokens_at[(triton.cdiv(row_BL.numel(), ROWS),)](
            token_ND, available_us_N, row_BL.contiguous(), mask_BL.contiguous(), moment_B,
            token_BLD, token_mask_BL, row_BL.numel(), row_BL.shape[1], width,
            triton.next_power_of_2(max(width, 1)), ROWS,
        )  # fmt: skip
    return token_BLD, token_mask_BL


def rows_at(matrix_NF: Tensor, row_BL: Tensor) -> Tensor:
    """[B, L, F]: as `IndexStore.rows_at`."""
    width = matrix_NF.shape[1]
    found_BLF = matrix_NF.new_empty(*row_BL.shape, width)
    if found_BLF.numel():
        _rows_at[(triton.cdiv(row_BL.numel(), ROWS),)](
            matrix_NF, row_BL.contiguous(), found_BLF, row_BL.numel(), width,
            triton.next_power_of_2(width), ROWS,
        )  # fmt: skip
    return found_BLF


def side_at(
    column_N: Tensor, time_us_N: Tensor | None, row_BL: Tensor, mask_BL: Tensor, moment_B: Tensor
) -> Tensor:
    """int32 [B, L]: as `IndexStore.side_at`; `time_us_N`: when each label became known (None: the
    column is no label)."""
    found_BL = torch.empty(row_BL.shape, dtype=torch.int32, device=row_BL.device)
    if row_BL.numel():
        _side_at[(triton.cdiv(row_BL.numel(), STEPS),)](
            column_N, column_N if time_us_N is None else time_us_N, row_BL.contiguous(),
            mask_BL.contiguous(), moment_B, found_BL, row_BL.numel(), row_BL.shape[1],
            time_us_N is not None, STEPS,
        )  # fmt: skip
    return found_BL


@triton.jit
def _positions(
    key_K, begin_K, count_K, time_N, query_B, moment_B, key_B, num_B, num, num_keys,
    KEY_STEPS: tl.constexpr, TIME_STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_asked = at < num
    query = tl.load(query_B + at, is_asked, 0)
    moment = tl.load(moment_B + at, is_asked, 0)
    low = tl.zeros((BLOCK,), tl.int64)
    high = low + num_keys
    for _ in range(KEY_STEPS):
        middle = (low + high) // 2
        is_open = is_asked & (low < high)
        is_before = tl.load(key_K + middle, is_open, 0) < query
        low = tl.where(is_open & is_before, middle + 1, low)
        high = tl.where(is_open & (is_before == 0), middle, high)
    is_there = is_asked & (low < num_keys)
    is_there = is_there & (tl.load(key_K + low, is_there, 0) == query)
    tl.store(key_B + at, tl.where(is_there, low, -1), is_asked)
    begin = tl.load(begin_K + low, is_there, 0)
    high = tl.load(count_K + low, is_there, 0)
    low = tl.zeros((BLOCK,), tl.int64)
    for _ in range(TIME_STEPS):
        middle = (low + high) // 2
        is_open = low < high
        is_before = tl.load(time_N + begin + middle, is_open, 0) < moment
        low = tl.where(is_open & is_before, middle + 1, low)
        high = tl.where(is_open & (is_before == 0), middle, high)
    tl.store(num_B + at, low, is_asked)


@triton.jit
def _newest(
    begin_K, time_N, key_B, num_B, moment_B, token_ND, available_N, row_BL, mask_BL, gap_s_BL,
    token_BLD, token_mask_BL, side_FN, known_KN, side_FBL, length, num_rows, num_steps,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    ASKED: tl.constexpr, NUM_SIDES: tl.constexpr, NUM_PLAIN: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0).to(tl.int64)
    step = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_step = step < length
    key, num = tl.load(key_B + request), tl.load(num_B + request)
    moment = tl.load(moment_B + request)
    is_event = is_step & (step >= length - num)
    row = tl.load(begin_K + tl.maximum(key, 0)) + num - length + step
    gap_us = moment - tl.load(time_N + row, is_event, 0)
    gap_s = (gap_us.to(tl.float64) / 1e6).to(tl.float32)
    at = request * length + step
    tl.store(row_BL + at, tl.where(is_event, row, -1), is_step)
    tl.store(mask_BL + at, is_event, is_step)
    tl.store(gap_s_BL + at, tl.where(is_event, gap_s, 0.0), is_step)
    is_published = is_event & (tl.load(available_N + row, is_event, 0) < moment)
    tl.store(token_mask_BL + at, is_published, is_step)
    _copy(token_ND, row, is_published, token_BLD, at, is_step, WIDTH, COLUMNS)
    to = at
    for side in tl.static_range(NUM_SIDES):
        if (ASKED >> side) & 1:
            place = row + side * (request * 0 + num_rows)  # in 64 bits
            value = tl.load(side_FN + place, is_event, 0)
            if side >= NUM_PLAIN:
                known_at = row + (side - NUM_PLAIN) * (request * 0 + num_rows)
                known = tl.load(known_KN + known_at, is_event, 0)
                value = tl.where((value >= 0) & (known < moment), value + 1, 0)
            tl.store(side_FBL + to, tl.where(is_event, value, 0), is_step)
            to += num_steps


@triton.jit
def _copy(
    token_ND, row, is_there, token_BLD, at, is_asked, WIDTH: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    column = tl.arange(0, COLUMNS)[None, :]
    is_column = column < WIDTH
    place = token_ND + row[:, None] * WIDTH + column
    value = tl.load(place, is_there[:, None] & is_column, 0.0)
    tl.store(token_BLD + at[:, None] * WIDTH + column, value, is_asked[:, None] & is_column)


@triton.jit
def _tokens_at(
    token_ND, available_N, row_BL, mask_BL, moment_B, token_BLD, token_mask_BL, num, length,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_asked = at < num
    is_event = tl.load(mask_BL + at, is_asked, 0) != 0
    row = tl.load(row_BL + at, is_event, 0)
    moment = tl.load(moment_B + at // length, is_asked, 0)
    is_published = is_event & (tl.load(available_N + row, is_event, 0) < moment)
    tl.store(token_mask_BL + at, is_published, is_asked)
    _copy(token_ND, row, is_published, token_BLD, at, is_asked, WIDTH, COLUMNS)


@triton.jit
def _rows_at(
    matrix_NF, row_BL, found_BLF, num,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_asked = at < num
    row = tl.maximum(tl.load(row_BL + at, is_asked, 0), 0)
    _copy(matrix_NF, row, is_asked, found_BLF, at, is_asked, WIDTH, COLUMNS)


@triton.jit
def _side_at(
    column_N, time_N, row_BL, mask_BL, moment_B, found_BL, num, length,
    IS_LABEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_asked = at < num
    is_event = tl.load(mask_BL + at, is_asked, 0) != 0
    row = tl.load(row_BL + at, is_event, 0)
    value = tl.load(column_N + row, is_event, 0).to(tl.int32)
    if IS_LABEL:
        moment = tl.load(moment_B + at // length, is_asked, 0)
        is_known = is_event & (value >= 0) & (tl.load(time_N + row, is_event, 0) < moment)
        value = tl.where(is_known, value + 1, 0)
    tl.store(found_BL + at, tl.where(is_event, value, 0), is_asked)
