"""DIN: the candidate weighs each past event by a small MLP over the pair.

Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018 (activation unit).
Here: the activation unit over [k, q, k * q, k - q], softmax with a learned null step (so that an
empty history reads as itself), RankMixer in place of the paper's MLP. Left out: Dice, GAU.

Shape legend: R requests, C candidates, L sequence length, D width, H hidden, X any flat width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from compressor.nn.embedding import Vocabulary
from downstream.batch import HistorySequence
from downstream.configs import RankerConfig
from downstream.inputs import RankerInputs, StepBias, StepVectors
from downstream.interaction import SequenceRanker

HIDDEN = 16


class DinState(NamedTuple):
    key_RLD: Tensor
    hidden_RLH: Tensor
    """The keys' share of the activation unit's hidden layer."""
    mask_RL: Tensor
    gap_RLH: Tensor


class DinAttention(nn.Module):
    """Target attention of candidates over one request's history, without a copy of it for each."""

    def __init__(
        self, config: RankerConfig, inputs: RankerInputs, side_width: int, candidate_width: int
    ) -> None:
        super().__init__()
        width = config.width // 2
        self.steps = StepVectors(side_width, inputs, width, config.history_length)
        self.candidate_in = nn.Linear(candidate_width, width, bias=False)
        # k - q is linear in both, so its weights are those of k and q.
        self.key_hidden = nn.Linear(width, HIDDEN)
        self.query_hidden = nn.Linear(width, HIDDEN, bias=False)
        self.product_DH = nn.Parameter(torch.randn(width, HIDDEN) / width**0.5)
        self.out = nn.Linear(HIDDEN, 1)
        self.bias = StepBias(inputs, 1)
        self.null = nn.Parameter(torch.zeros(width))
        self.width = 3 * width

    def encode(self, side_RLX: Tensor, sequence: HistorySequence) -> DinState:
        key_RLD = self.steps(side_RLX, sequence)
        gap_RLH = self.bias.of_request(sequence)
        return DinState(key_RLD, self.key_hidden(key_RLD), sequence.mask_RL, gap_RLH)

    def read(
        self, state: DinState, side_RCX: Tensor, candidate_RCX: Tensor, match_RCLF: Tensor
    ) -> Tensor:
        query_RCD = self.steps.side_in(side_RCX) + self.candidate_in(candidate_RCX)
        # (k * q) W for every pair is one product of the keys with W scaled by each query.
        num_requests, num_candidates = query_RCD.shape[:2]
        scaled_RDX = torch.einsum("rcd,dh->rdch", query_RCD, self.product_DH).flatten(2)
        product_RLCH = torch.bmm(state.key_RLD, scaled_RDX).unflatten(2, (num_candidates, HIDDEN))
        hidden_RLCH = product_RLCH + state.hidden_RLH[:, :, None]
        hidden_RLCH = torch.relu(hidden_RLCH + self.query_hidden(query_RCD)[:, None])
        bias_RLC = self.bias(state.gap_RLH, match_RCLF).squeeze(1).transpose(1, 2)
        logit_RLC = self.out(hidden_RLCH).squeeze(-1) + bias_RLC
        logit_RLC = logit_RLC.masked_fill(~state.mask_RL[..., None], float("-inf"))
        # The null step has logit 0: a history without anything alike is left unread.
        null_R1C = logit_RLC.new_zeros(num_requests, 1, num_candidates)
        weight_RLC = torch.softmax(torch.cat([null_R1C, logit_RLC], dim=1), dim=1)
        value_RLD = state.key_RLD.masked_fill(~state.mask_RL[..., None], 0)
        read_RCD = torch.bmm(weight_RLC[:, 1:].transpose(1, 2), value_RLD)
        read_RCD = read_RCD + weight_RLC[:, 0, :, None] * self.null
        return torch.cat([read_RCD, query_RCD, read_RCD * query_RCD], dim=-1)


def din(
    config: RankerConfig, inputs: RankerInputs, vocabulary: Vocabulary, seed: int = 0
) -> SequenceRanker:
    """DIN over the hand-made sequence."""
    return SequenceRanker(config, inputs, vocabulary, DinAttention, seed=seed)
