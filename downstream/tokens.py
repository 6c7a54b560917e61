"""The IAT branch: stored instance tokens read as a sequence, ending in one more feature token.

Li et al., "IAT: Instance-As-Token Compression", arXiv 2604.08933, stage 2 (papers/iat 1.6).
Here: adaptation MLP, side information beside the token, two causal layers, one cross-attention
whose query is compressed from the current request and candidate, mean-pooled residual; or, in place
of layers and cross-attention, DIN's activation unit. Item tokens are FINDINGS.md section 2. Tokens
are buffers: nothing here sends a gradient into them.

Shape legend: R requests, C candidates, L sequence length, D token or branch width, X flat width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.nn.attention import MultiHeadAttention, TransformerBlock
from downstream.activation_unit import ActivationUnit
from downstream.batch import HistorySequence
from downstream.configs import RankerConfig
from downstream.inputs import RankerInputs, StepBias, StepVectors, strictly_before

SOFT_COUNTS = (0.4, 0.6, 0.8)
"""Cosines above which a past token counts as alike."""
SHARPNESS = 20.0


class BranchState(NamedTuple):
    """The encoded sequence of a request; no candidate changes it."""

    keys_values: tuple[Tensor, Tensor]
    mean_RD: Tensor
    mask_RL: Tensor
    request_RX: Tensor
    """The request's part of the query."""
    token_RLD: Tensor
    """What the steps hold, as stored."""
    token_mask_RL: Tensor
    gap_RLH: Tensor


class TokenBranch(nn.Module):
    """H_iat: the user's tokens, read with a query compressed from the current request."""

    def __init__(
        self,
        config: RankerConfig,
        inputs: RankerInputs,
        *,
        source_width: int,
        side_width: int,
        request_width: int,
        candidate_width: int,
        summary_width: int,
    ) -> None:
        super().__init__()
        width, is_din = config.width, config.branch_reader == "din"
        self.adapt = nn.Sequential(nn.Linear(source_width, width), nn.GELU())
        self.missing = nn.Parameter(torch.randn(width) * 0.1)
        self.empty = nn.Parameter(torch.randn(width) * 0.1)
        self.steps = StepVectors(
            side_width, inputs, width, config.history_length, has_labels=config.branch_labels
        )
        self.domain = nn.Embedding(inputs.num_domains, width)
        nn.init.zeros_(self.domain.weight)
        self.join = nn.Linear(2 * width, width)
        # A step is first read for what its own token holds; what it gains from earlier steps is
        # learned on top.
        self.blocks = nn.ModuleList(
            TransformerBlock(width, config.heads, expansion=2).starting_as_identity()
            for _ in range(0 if is_din else config.branch_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.request_in = nn.Linear(request_width, config.query_width)
        self.candidate_in = nn.Linear(candidate_width, config.query_width, bias=False)
        self.summary_in = (
            nn.Linear(summary_width, config.query_width, bias=False) if summary_width else None
        )
        self.item_in = (
            nn.Linear(inputs.token_width, config.query_width, bias=False)
            if config.item_tokens
            else None
        )
        self.query_out = nn.Linear(config.query_width, width)
        self.bias = StepBias(inputs, 1 if is_din else config.heads)
        self.attention: MultiHeadAttention | ActivationUnit = (
            ActivationUnit(width) if is_din else MultiHeadAttention(width, config.heads)
        )

    def encode(
        self,
        source_RLX: Tensor,
        is_there_RL: Tensor,
        side_RLX: Tensor,
        request_RX: Tensor,
        sequence: HistorySequence,
    ) -> BranchState:
        """Adapt, join with side information, and (transformer) let every step read strictly
        earlier ones."""
        adapted_RLD = torch.where(is_there_RL[..., None], self.adapt(source_RLX), self.missing)
        steps_RLD = self.steps(side_RLX, sequence) + self.domain.weight[sequence.domain]
        x_RLD = self.join(torch.cat([adapted_RLD, steps_RLD], dim=-1))
        visible_R1LL = strictly_before(sequence)
        for block in self.blocks:
            x_RLD = block(x_RLD, visible_R1LL)
        x_RLD = self.norm(x_RLD)
        mask_RL = sequence.mask_RL
        weight_RL = mask_RL / mask_RL.sum(dim=1, keepdim=True).clamp(min=1)
        mean_RD = torch.einsum("rl,rld->rd", weight_RL, x_RLD.masked_fill(~mask_RL[..., None], 0))
        return BranchState(
            self.attention.keys_values(x_RLD),
            mean_RD,
            mask_RL,
            self.request_in(request_RX),
            source_RLX,
            is_there_RL & mask_RL,
            self.bias.of_request(sequence),
        )

    def read(
        self,
        state: BranchState,
        candidate_RCX: Tensor,
        summary_RCX: Tensor | None,
        item_token_RCD: Tensor | None,
        match_RCLF: Tensor,
    ) -> Tensor:
        """H_iat_RCD."""
        query_RCX = self.candidate_in(candidate_RCX) + state.request_RX[:, None]
        if self.summary_in is not None and summary_RCX is not None:
            query_RCX = query_RCX + self.summary_in(summary_RCX)
        if self.item_in is not None and item_token_RCD is not None:
            query_RCX = query_RCX + self.item_in(item_token_RCD)
        is_empty_R = ~state.mask_RL.any(dim=1)
        mask_R11L = (state.mask_RL | is_empty_R[:, None])[:, None, None]
        query_RCD = self.query_out(F.gelu(query_RCX))
        bias_RHCL = self.bias(state.gap_RLH, match_RCLF).masked_fill(~mask_R11L, float("-inf"))
        read_RCD = self.attention.attend(query_RCD, state.keys_values, bias_RHCL)
        read_RCD = read_RCD + state.mean_RD[:, None]
        return torch.where(is_empty_R[:, None, None], self.empty, read_RCD)


class ItemTokenFeatures(nn.Module):
    """The candidate's item token beside the user's tokens (FINDINGS.md section 2, "match").

    Six cosine features (max, mean, soft counts above .4, .6, .8, exists), the item token through
    its own MLP for the item slot, item token x mean user token for the cross slot.
    """

    def __init__(self, token_width: int, width: int) -> None:
        super().__init__()
        self.item = nn.Sequential(nn.Linear(token_width, width), nn.GELU(), nn.Linear(width, width))
        self.width = token_width + 3 + len(SOFT_COUNTS)

    def forward(
        self, item_token_RCD: Tensor, item_mask_RC: Tensor, state: BranchState
    ) -> tuple[Tensor, Tensor]:
        """(item_slot_RCD, cross_RCX); item tokens are 0 where there is none."""
        mask_RL = state.token_mask_RL
        user_RLD = state.token_RLD.masked_fill(~mask_RL[..., None], 0)
        cosine_RCX = cosine_features(item_token_RCD, item_mask_RC, user_RLD, mask_RL)
        count_R1 = mask_RL.sum(dim=1, keepdim=True).clamp(min=1)
        mean_RD = F.normalize(user_RLD.sum(dim=1) / count_R1, dim=-1)
        product_RCD = F.normalize(item_token_RCD, dim=-1) * mean_RD[:, None] * mean_RD.shape[-1]
        item_slot_RCD = self.item(item_token_RCD) * item_mask_RC[..., None]
        return item_slot_RCD, torch.cat([product_RCD, cosine_RCX], dim=-1)


def cosine_features(
    item_RCD: Tensor, item_mask_RC: Tensor, user_RLD: Tensor, mask_RL: Tensor
) -> Tensor:
    """[R, C, 6]: max, mean, log soft counts above .4, .6, .8, and whether both sides exist."""
    cosine_RCL = F.normalize(item_RCD, dim=-1) @ F.normalize(user_RLD, dim=-1).transpose(1, 2)
    mask_R1L = mask_RL[:, None]
    exists_RC = item_mask_RC & mask_RL.any(dim=1, keepdim=True)
    count_R1 = mask_R1L.sum(dim=2).clamp(min=1)
    best_RC = cosine_RCL.masked_fill(~mask_R1L, -1).amax(dim=2)
    mean_RC = (cosine_RCL * mask_R1L).sum(dim=2) / count_R1
    found = [best_RC, mean_RC]
    for bar in SOFT_COUNTS:
        alike_RCL = torch.sigmoid((cosine_RCL - bar) * SHARPNESS) * mask_R1L
        found.append(torch.log1p(alike_RCL.sum(dim=2)))
    features_RCX = torch.stack(found, dim=2) * exists_RC[..., None]
    return torch.cat([features_RCX, exists_RC[..., None].to(features_RCX.dtype)], dim=2)
