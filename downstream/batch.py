"""A batch of ranking requests, request-major: what all candidates share is held once.

Every ranker reads this batch and keeps one promise: `encode_request` reads the request side alone,
so that its result can be cached, `score` adds the candidates (docs/plugging_in_rankers.md).

Shape legend: R requests (or pieces of long ones), C candidates, L sequence length, S id slots,
N numbers, F side fields, K labels, M match features, D token width, X any state's width.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor


class HistorySequence(NamedTuple):
    """One sequence of a user's past events before the request, oldest first, left-padded.

    Ids are rows of the ranker's vocabulary (0: missing or never seen). What stands at padding is
    never read.
    """

    ids_RLF: Tensor
    """The events' side fields."""
    gap_s_RL: Tensor
    """Request time - event time, float32."""
    label_RLK: Tensor
    """Per label 0 unknown at the request, 1 negative, 2 positive."""
    mask_RL: Tensor
    token_RLD: Tensor | None = None
    """Stored tokens: buffers, through which no gradient flows."""
    token_mask_RL: Tensor | None = None
    """The event's token existed at the request."""
    field_ids_RLS: Tensor | None = None
    """All logged fields of the events, for the end-to-end arm."""
    field_numbers_RLN: Tensor | None = None
    field_mask_RL: Tensor | None = None
    """The event was published by then: what its token would have been allowed to show."""
    domain: int = 0
    """Which domain the events are of."""


class RankerBatch(NamedTuple):
    """R requests with up to C candidates each."""

    ids_RS: Tensor
    """User and context features, as vocabulary rows."""
    numbers_RN: Tensor
    """NaN: missing."""
    histories: dict[str, HistorySequence]
    """Sequences by name; `MAIN` is the domain's own past, the others are of sources
    (downstream/transfer.py)."""
    ids_RCS: Tensor
    """Item and event features known at the request, as vocabulary rows."""
    numbers_RCN: Tensor
    match_RCM: Tensor
    mask_RC: Tensor
    label_RC: Tensor
    """0, 1 or NaN (unknown)."""
    user_R: Tensor
    sample_RC: Tensor
    """The candidate's row among the loaded samples; -1 at padding."""
    item_token_RCD: Tensor | None = None
    """The candidate's item token as of the request; a buffer."""
    item_token_mask_RC: Tensor | None = None


MAIN = "main"


class Ranker(Protocol):
    """What training and scoring ask of any ranker (an `nn.Module` besides)."""

    def encode_request(self, batch: RankerBatch) -> Any:
        """Everything that no candidate changes; reads the request side alone."""
        ...

    def score(self, state: Any, batch: RankerBatch) -> Tensor:
        """logit_RC; what stands at padded candidates is anything finite."""
        ...

    def __call__(self, batch: RankerBatch) -> Tensor:
        """score(encode_request(batch), batch)."""
        ...
