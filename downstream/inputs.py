"""What a ranker must know of its data, and the layers that turn logged features into vectors.

Shape legend: R requests, C candidates, L sequence length, S id slots, N numbers, F fields,
E embedding width, K labels, D width, X any flat width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressor.nn.attention import NUM_GAP_BUCKETS, gap_buckets
from compressor.nn.embedding import FieldPooling, NumberEncoder
from downstream.batch import HistorySequence
from pipelines.domain import Domain
from pipelines.features import FeatureLayout

NUM_LABEL_STATES = 3


@dataclass(frozen=True, slots=True)
class SourceInputs:
    """What a ranker must know of another domain whose tokens it reads."""

    name: str
    token_width: int
    num_labels: int


@dataclass(frozen=True, slots=True)
class RankerInputs:
    """Layouts of a batch's features, and the widths of what comes beside them."""

    user: FeatureLayout
    context: FeatureLayout
    candidate: FeatureLayout
    """Item and event features known at the request."""
    side: FeatureLayout
    """The item's categorical fields: what histories carry, and the candidate has too."""
    fields: FeatureLayout
    """All logged features, those known only afterwards too: what the end-to-end arm reads."""
    num_labels: int
    num_match: int
    token_width: int = 0
    num_domains: int = 1
    sources: tuple[SourceInputs, ...] = ()
    """Domains whose tokens are read beside the own past; domain number i + 1 is the i-th."""

    @classmethod
    def of(
        cls, domain: Domain, *, num_match: int, token_width: int = 0, num_domains: int = 1
    ) -> RankerInputs:
        at_request = [f for f in domain.features if f.known == "request"]
        return cls(
            user=FeatureLayout(tuple(f for f in at_request if f.side == "user")),
            context=FeatureLayout(tuple(f for f in at_request if f.side == "context")),
            candidate=FeatureLayout(tuple(f for f in at_request if f.side in ("item", "event"))),
            side=FeatureLayout(domain.side_features),
            fields=FeatureLayout.of(domain),
            num_labels=len(domain.labels),
            num_match=num_match,
            token_width=token_width,
            num_domains=num_domains,
        )

    @property
    def request(self) -> FeatureLayout:
        """User features, then context features: the columns of the batch's request side."""
        return FeatureLayout((*self.user.features, *self.context.features))

    @property
    def side_slots(self) -> list[int]:
        """Where the candidate's slots hold the side fields."""
        slots = self.candidate.slots
        return [slots[f.name].start for f in self.side.features]


class FieldVectors(nn.Module):
    """The features of one layout as one flat vector; its slots and numbers in its order."""

    def __init__(self, layout: FeatureLayout, embedding: int) -> None:
        super().__init__()
        self.pooling = FieldPooling(layout.slot_fields)
        self.number_encoder = NumberEncoder(len(layout.numbers))
        self.width = len(layout.categorical) * embedding + self.number_encoder.width

    def forward(self, vectors_RSE: Tensor, rows_RS: Tensor, numbers_RN: Tensor) -> Tensor:
        """[..., S, E], [..., S], [..., N] -> [..., X]."""
        flat_RX = self.pooling(vectors_RSE, rows_RS).flatten(-2)
        return torch.cat([flat_RX, self.number_encoder(numbers_RN)], dim=-1)


class StepVectors(nn.Module):
    """Side information of each step as one vector: fields, time gap, labels known (unless made
    without), recency."""

    def __init__(
        self,
        side_width: int,
        inputs: RankerInputs,
        width: int,
        length: int,
        *,
        has_labels: bool = True,
    ) -> None:
        super().__init__()
        self.side_in = nn.Linear(side_width, width)
        self.gap = nn.Embedding(NUM_GAP_BUCKETS, width)
        self.label = (
            nn.Embedding(inputs.num_labels * NUM_LABEL_STATES, width) if has_labels else None
        )
        self.recency = nn.Parameter(torch.zeros(length, width))
        for table in (self.gap, self.label):
            if table is not None:
                nn.init.normal_(table.weight, std=0.1)

    def forward(self, side_RLX: Tensor, sequence: HistorySequence) -> Tensor:
        """[R, L, width]; L may not pass the length this was made with."""
        length = side_RLX.shape[1]
        step_RLD = self.side_in(side_RLX) + self.gap(gap_buckets(sequence.gap_s_RL))
        if self.label is not None:
            num_labels = sequence.label_RLK.shape[-1]
            first_K = torch.arange(num_labels, device=side_RLX.device) * NUM_LABEL_STATES
            step_RLD = step_RLD + self.label(sequence.label_RLK + first_K).sum(dim=2)
        return step_RLD + self.recency[len(self.recency) - length :]


class StepBias(nn.Module):
    """What target attention adds to a step's score: which side fields it shares with the candidate,
    and how long ago it was. What is exact need not be learned from embeddings.

    Heads start apart, so that each reads something else of the past from the first step on: even
    ones without regard to age, odd ones in proportion to 1 / age (slopes by head: Press et al.,
    "ALiBi", ICLR 2022; here over log age); the later half prefers what the candidate shares fields
    with. The first head, or the only one, starts at zero.
    """

    def __init__(self, inputs: RankerInputs, num_heads: int) -> None:
        super().__init__()
        is_alike_H = torch.arange(num_heads) >= (num_heads + 1) // 2
        num_fields = len(inputs.side.features)
        self.match_FH = nn.Parameter(is_alike_H.float().repeat(num_fields, 1))
        self.gap_XH = nn.Parameter(gap_slopes(num_heads))

    def of_request(self, sequence: HistorySequence) -> Tensor:
        """gap_RLH: the part that no candidate changes."""
        return self.gap_XH[gap_buckets(sequence.gap_s_RL)]

    def forward(self, gap_RLH: Tensor, match_RCLF: Tensor) -> Tensor:
        """bias_RHCL; match_RCLF: the step's field has the candidate's value."""
        match_RCLH = match_RCLF.to(gap_RLH.dtype) @ self.match_FH
        return (match_RCLH + gap_RLH[:, None]).permute(0, 3, 1, 2)


def gap_slopes(num_heads: int) -> Tensor:
    """[X, H] What a step's age adds to its score at first: nothing in even heads."""
    is_recent_H = torch.arange(num_heads) % 2 == 1
    log_age_X = torch.arange(NUM_GAP_BUCKETS) * math.log(2)
    return -log_age_X[:, None] * is_recent_H.float()


def strictly_before(sequence: HistorySequence) -> Tensor:
    """visible_R1LL: step i sees step j if j happened strictly earlier, and itself (DESIGN 5.4)."""
    gap_s_RL, mask_RL = sequence.gap_s_RL, sequence.mask_RL
    is_earlier_RLL = (gap_s_RL[:, None, :] > gap_s_RL[:, :, None]) & mask_RL[:, None, :]
    itself_LL = torch.eye(mask_RL.shape[1], dtype=torch.bool, device=mask_RL.device)
    return (is_earlier_RLL | itself_LL)[:, None]
