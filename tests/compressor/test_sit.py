"""Attention over packed units: how rows are padded changes no result."""

from __future__ import annotations

import torch

from compressor.batch import Packing, _packing
from compressor.sit import SHORT, SourceInstanceTransformer, _GroupedView, _padded_view, _PaddedView


def packed(lengths: list[int]) -> Packing:
    """Units with so many token rows, two of them at a time, and three query rows each."""
    unit = torch.arange(len(lengths))
    token_unit = unit.repeat_interleave(torch.tensor(lengths))
    token_time = torch.cat([torch.arange(n) // 2 * 3_600_000_000 for n in lengths])
    query_unit = unit.repeat_interleave(3)
    query_time = torch.tensor([[1, n // 4, n] for n in lengths]).flatten() * 3_600_000_000
    return _packing(token_unit, token_time, query_unit, query_time, len(lengths))


def test_units_of_unlike_lengths_apart_or_together_read_the_same() -> None:
    packing = packed([3, 5 * SHORT, 0, SHORT, SHORT + 1, 2 * SHORT, 40])
    assert isinstance(_padded_view(packing), _GroupedView)
    torch.manual_seed(0)
    sit = SourceInstanceTransformer(width=8, num_layers=2, num_heads=2)
    found = []
    for view in (_PaddedView(packing), _padded_view(packing)):
        torch.manual_seed(1)
        x_PD = torch.randn(len(packing.unit), 8, requires_grad=True)
        y_PD = x_PD
        for layer in sit.layers:
            y_PD = layer(y_PD, view)
        sit.zero_grad()
        (y_PD * torch.randn_like(y_PD)).sum().backward()
        found.append([y_PD, x_PD.grad, *(p.grad for p in sit.parameters())])
    for together, apart in zip(*found, strict=True):
        torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-5)


def test_short_units_are_padded_to_one_length() -> None:
    assert isinstance(_padded_view(packed([0, 1, SHORT])), _PaddedView)
