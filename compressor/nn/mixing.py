"""RankMixer: parameter-free token mixing and per-token feed-forward blocks over feature tokens.

Zhu et al., "RankMixer: Scaling Up Ranking Models in Industrial Recommenders", arXiv 2507.15551.
Here: mixing with H = T, post-LayerNorm blocks, mean read-out left to the caller. Left out: sparse
experts.
Shape legend: B rows, T tokens, D width, H heads.
"""

from __future__ import annotations

from torch import Tensor, nn

from compressor.nn.feed_forward import PerTokenFeedForward


def mix(x_BTD: Tensor, num_heads: int) -> Tensor:
    """Token h of the result is slice h of every token, in token order; [B, T, D] -> [B, H, T * D /
    H]."""
    num_rows, num_tokens, width = x_BTD.shape
    split = x_BTD.reshape(num_rows, num_tokens, num_heads, width // num_heads)
    return split.transpose(1, 2).reshape(num_rows, num_heads, num_tokens * width // num_heads)


class RankMixerBlock(nn.Module):
    """LN(Mix(X) + X), then LN(PFFN(S) + S); x_BTD -> y_BTD."""

    def __init__(self, num_tokens: int, width: int, expansion: float) -> None:
        super().__init__()
        if width % num_tokens:
            raise ValueError(
                f"width {width} must be a multiple of the number of tokens {num_tokens}"
            )
        self.num_tokens = num_tokens
        self.mixed_norm = nn.LayerNorm(width)
        self.feed_forward = PerTokenFeedForward(num_tokens, width, expansion)
        self.norm = nn.LayerNorm(width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        mixed_BTD = self.mixed_norm(mix(x_BTD, self.num_tokens) + x_BTD)
        return self.norm(self.feed_forward(mixed_BTD) + mixed_BTD)


class RankMixer(nn.Module):
    """A stack of RankMixer blocks; x_BTD -> y_BTD."""

    def __init__(self, *, num_tokens: int, width: int, depth: int, expansion: float = 2.0) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(RankMixerBlock(num_tokens, width, expansion) for _ in range(depth))
        )

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.blocks(x_BTD)
