"""Per-token feed-forward blocks: every token position owns its weights, all run as one batched
product.

Zhu et al., "RankMixer", arXiv 2507.15551 (PFFN). Shape legend: B rows, T tokens, D width, F hidden
width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class PerTokenLinear(nn.Module):
    """x_BTI -> y_BTO, position t through its own matrix."""

    def __init__(
        self, num_tokens: int, width_in: int, width_out: int, *, gain: float = 1.0
    ) -> None:
        super().__init__()
        bound = gain / math.sqrt(width_in)
        self.weight_TIO = nn.Parameter(
            torch.empty(num_tokens, width_in, width_out).uniform_(-bound, bound)
        )
        self.bias_TO = nn.Parameter(torch.zeros(num_tokens, width_out))

    def forward(self, x_BTI: Tensor) -> Tensor:
        y_TBO = torch.baddbmm(
            self.bias_TO[:, None].to(x_BTI.dtype),
            x_BTI.transpose(0, 1),
            self.weight_TIO.to(x_BTI.dtype),
        )
        return y_TBO.transpose(0, 1)


class PerTokenFeedForward(nn.Module):
    """GELU(x_t W1_t + b1_t) W2_t + b2_t for every position t; x_BTD -> y_BTD."""

    def __init__(self, num_tokens: int, width: int, expansion: float) -> None:
        super().__init__()
        hidden = int(width * expansion)
        self.up = PerTokenLinear(num_tokens, width, hidden)
        self.down = PerTokenLinear(num_tokens, hidden, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x_BTD)))
