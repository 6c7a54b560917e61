"""DIN: the candidate weighs each past event by a small MLP over the pair.

Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018. Here: the
activation unit (downstream/activation_unit.py), RankMixer in place of the paper's MLP. Left out:
Dice, GAU.

Shape legend: R requests, C candidates, L sequence length, D width, X any flat width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from compressor.nn.embedding import Vocabulary
from downstream.activation_unit import ActivationUnit
from downstream.batch import HistorySequence
from downstream.configs import RankerConfig
from downstream.inputs import RankerInputs, StepBias, StepVectors
from downstream.interaction import SequenceRanker


class DinState(NamedTuple):
    keys_values: tuple[Tensor, Tensor]
    mask_RL: Tensor
    gap_RLH: Tensor


class DinAttention(nn.Module):
    """Target attention of candidates over one request's history."""

    def __init__(
        self, config: RankerConfig, inputs: RankerInputs, side_width: int, candidate_width: int
    ) -> None:
        super().__init__()
        width = config.width // 2
        self.steps = StepVectors(side_width, inputs, width, config.history_length)
        self.candidate_in = nn.Linear(candidate_width, width, bias=False)
        self.attention = ActivationUnit(width)
        self.bias = StepBias(inputs, 1)
        self.width = 3 * width

    def encode(self, side_RLX: Tensor, sequence: HistorySequence) -> DinState:
        return DinState(
            self.attention.keys_values(self.steps(side_RLX, sequence)),
            sequence.mask_RL,
            self.bias.of_request(sequence),
        )

    def read(
        self, state: DinState, side_RCX: Tensor, candidate_RCX: Tensor, match_RCLF: Tensor
    ) -> Tensor:
        query_RCD = self.steps.side_in(side_RCX) + self.candidate_in(candidate_RCX)
        bias_R1CL = self.bias(state.gap_RLH, match_RCLF)
        bias_R1CL = bias_R1CL.masked_fill(~state.mask_RL[:, None, None], float("-inf"))
        read_RCD = self.attention.attend(query_RCD, state.keys_values, bias_R1CL)
        return torch.cat([read_RCD, query_RCD, read_RCD * query_RCD], dim=-1)


def din(
    config: RankerConfig, inputs: RankerInputs, vocabulary: Vocabulary, seed: int = 0
) -> SequenceRanker:
    """DIN over the hand-made sequence."""
    return SequenceRanker(config, inputs, vocabulary, DinAttention, seed=seed)
