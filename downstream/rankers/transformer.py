"""Transformer target attention: steps read strictly earlier steps, candidates read the result.

Vaswani et al. (attention), Chen et al., "Behavior Sequence Transformer", DLP-KDD 2019 (use in
ranking). Here: candidates are queries only, so a request's history is encoded once and its keys and
values are a cache; the mask is strict in time (DESIGN 5.4). Left out: the candidate inside the
sequence.

Shape legend: R requests, C candidates, L sequence length, D width, X any flat width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from compressor.nn.attention import MultiHeadAttention, TransformerBlock
from compressor.nn.embedding import Vocabulary
from downstream.batch import HistorySequence
from downstream.configs import RankerConfig
from downstream.inputs import RankerInputs, StepBias, StepVectors, strictly_before
from downstream.interaction import SequenceRanker


class TransformerState(NamedTuple):
    keys_values: tuple[Tensor, Tensor]
    mask_RL: Tensor
    gap_RLH: Tensor


class TransformerAttention(nn.Module):
    """Self-attention over a request's history, then cross-attention of its candidates."""

    def __init__(
        self, config: RankerConfig, inputs: RankerInputs, side_width: int, candidate_width: int
    ) -> None:
        super().__init__()
        width = config.width
        self.steps = StepVectors(side_width, inputs, width, config.history_length)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, config.heads, expansion=2)
            for _ in range(config.sequence_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.candidate_in = nn.Linear(candidate_width, width, bias=False)
        self.query_norm = nn.LayerNorm(width)
        self.attention = MultiHeadAttention(width, config.heads)
        self.bias = StepBias(inputs, config.heads)
        self.empty = nn.Parameter(torch.zeros(width))
        self.width = 3 * width

    def encode(self, side_RLX: Tensor, sequence: HistorySequence) -> TransformerState:
        x_RLD = self.steps(side_RLX, sequence)
        visible_R1LL = strictly_before(sequence)
        for block in self.blocks:
            x_RLD = block(x_RLD, visible_R1LL)
        return TransformerState(
            self.attention.keys_values(self.norm(x_RLD)),
            sequence.mask_RL,
            self.bias.of_request(sequence),
        )

    def read(
        self, state: TransformerState, side_RCX: Tensor, candidate_RCX: Tensor, match_RCLF: Tensor
    ) -> Tensor:
        query_RCD = self.steps.side_in(side_RCX) + self.candidate_in(candidate_RCX)
        is_empty_R = ~state.mask_RL.any(dim=1)
        mask_R11L = (state.mask_RL | is_empty_R[:, None])[:, None, None]
        bias_RHCL = self.bias(state.gap_RLH, match_RCLF).masked_fill(~mask_R11L, float("-inf"))
        read_RCD = self.attention.attend(self.query_norm(query_RCD), state.keys_values, bias_RHCL)
        read_RCD = torch.where(is_empty_R[:, None, None], self.empty, read_RCD)
        return torch.cat([read_RCD, query_RCD, read_RCD * query_RCD], dim=-1)


def transformer(
    config: RankerConfig, inputs: RankerInputs, vocabulary: Vocabulary, seed: int = 0
) -> SequenceRanker:
    """Transformer target attention over the hand-made sequence."""
    return SequenceRanker(config, inputs, vocabulary, TransformerAttention, seed=seed)
