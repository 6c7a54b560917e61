"""Pre-norm attention blocks with an explicit mask, and the buckets of time gaps.

Shape legend: B rows, Q queries, K keys, D width, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NUM_GAP_BUCKETS = 32


def gap_buckets(gap_s: Tensor) -> Tensor:
    """Seconds (>= 0, any shape) -> 0 .. 31 by log2(1 + gap): papers/iat 1.4."""
    return torch.log2(1 + gap_s.clamp(min=0)).floor().clamp(max=NUM_GAP_BUCKETS - 1).long()


class MultiHeadAttention(nn.Module):
    """query_BQD, source_BKD, bias or mask broadcastable to [B, H, Q, K] -> [B, Q, D]."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width {width} must be a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        # A bias of keys changes no weight of a softmax, and one of values is a bias of `out`.
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width)

    def split(self, x_BLD: Tensor) -> Tensor:
        """[B, L, D] -> [B, H, L, D / H]."""
        return x_BLD.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def keys_values(self, source_BKD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, K, D / H]: what a cache keeps."""
        key_BKD, value_BKD = self.key_value(source_BKD).chunk(2, dim=-1)
        return self.split(key_BKD), self.split(value_BKD)

    def attend(
        self, query_BQD: Tensor, keys_values: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> Tensor:
        out_BHQd = F.scaled_dot_product_attention(
            self.split(self.query(query_BQD)), *keys_values, attn_mask=mask
        )
        return self.out(out_BHQd.transpose(1, 2).flatten(2))

    def forward(self, query_BQD: Tensor, source_BKD: Tensor, mask: Tensor | None) -> Tensor:
        return self.attend(query_BQD, self.keys_values(source_BKD), mask)


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and feed-forward; x_BLD -> y_BLD."""

    def __init__(self, width: int, num_heads: int, expansion: int = 4) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = MultiHeadAttention(width, num_heads)
        down = nn.Linear(expansion * width, width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, expansion * width), nn.GELU(), down
        )
        self._written_by = (self.attention.out, down)

    def starting_as_identity(self) -> TransformerBlock:
        """This block, with what it adds to its input at zero."""
        for linear in self._written_by:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        return self

    def forward(self, x_BLD: Tensor, mask: Tensor | None) -> Tensor:
        normed_BLD = self.attention_norm(x_BLD)
        x_BLD = x_BLD + self.attention(normed_BLD, normed_BLD, mask)
        return x_BLD + self.feed_forward(x_BLD)


def never_empty(mask: Tensor) -> Tensor:
    """A boolean mask [..., Q, K] in which a query that sees nothing sees everything, so that
    softmax stays finite.

    The caller must discard those rows.
    """
    return mask | ~mask.any(dim=-1, keepdim=True)
