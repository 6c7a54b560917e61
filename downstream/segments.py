"""Binary search in many sorted segments of one array at once, on the array's device.

Shape legend: B queries, U segments (users, items), N rows.
"""

from __future__ import annotations

import torch
from torch import Tensor


def find(keys_U: Tensor, query_B: Tensor) -> tuple[Tensor, Tensor]:
    """Where each query is among sorted unique keys, and whether it is there (else place 0)."""
    if not len(keys_U):
        return torch.zeros_like(query_B), torch.zeros_like(query_B, dtype=torch.bool)
    place_B = torch.searchsorted(keys_U, query_B).clamp(max=len(keys_U) - 1)
    is_there_B = keys_U[place_B] == query_B
    return torch.where(is_there_B, place_B, 0), is_there_B


def first_not_before(
    times_N: Tensor, begin_B: Tensor, end_B: Tensor, moment_B: Tensor, max_length: int
) -> Tensor:
    """The first row of [begin, end), sorted by time, whose time is not before the moment; else end.

    `max_length` bounds end - begin: the steps are its logarithm, and the device is not asked.
    """
    low_B, high_B = begin_B, end_B
    for _ in range(max_length.bit_length()):
        middle_B = (low_B + high_B) // 2
        is_before_B = times_N[middle_B.clamp(max=len(times_N) - 1)] < moment_B
        is_open_B = low_B < high_B
        low_B = torch.where(is_open_B & is_before_B, middle_B + 1, low_B)
        high_B = torch.where(is_open_B & ~is_before_B, middle_B, high_B)
    return low_B
