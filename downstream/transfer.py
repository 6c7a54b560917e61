"""Transfer: a ranker reads, beside its own domain's past, the user's tokens of other domains.

A source's events are known here by its table of tokens alone: an event whose token had not been
published by the request is not there at all, not even as a step without a token. What a step holds
is its token, its age, its labels known by then, and which domain it is of. Side ids of a source are
hashed by that domain's features into buckets that mean nothing beside the ranker's own vocabulary;
the token already holds those fields, so they are not read a second time.

Shape legend: G requests of the data, R requests of a batch, C candidates, L sequence length,
S sources, W events looked back on, N events, D token or branch width, X flat width, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.nn.attention import MultiHeadAttention, TransformerBlock, gap_buckets
from downstream.batch import HistorySequence
from downstream.configs import RankerConfig
from downstream.inputs import (
    RankerInputs,
    SourceInputs,
    StepVectors,
    gap_slopes,
    strictly_before,
)
from downstream.segments import Segments
from downstream.user_index import IndexStore, UserIndex
from pipelines.errors import InputError
from pipelines.features import NEVER_US


@dataclass(frozen=True)
class SourceHistory:
    """One source domain's events with tokens, for the requests of some ranker data."""

    name: str
    store: IndexStore
    """Its events that have a token, and no others."""
    user_place_G: Tensor
    num_past_G: Tensor
    """As RankerTensors; in this store."""
    num_visible_G: Tensor
    """Events before the request whose token was published before it."""
    num_hidden: int
    """No request has more events before it whose token was not published yet."""

    @classmethod
    def of(
        cls, index: UserIndex, line: str, user_G: Tensor, as_of_G: Tensor, *, name: str = ""
    ) -> SourceHistory:
        """For the requests (user, as_of) of RankerTensors, on their device."""
        name, index = name or index.meta.domain, with_tokens_of(index, line)
        if not len(index):
            raise InputError(f"source {name} has no token of line {line!r}: write its tokens first")
        store = IndexStore(index, line, user_G.device)
        place_G, num_past_G = store.positions(user_G, as_of_G)
        available_us = store.available_us_N.cpu().numpy()
        seen_us = np.maximum(available_us, store.columns["event_time_us"].cpu().numpy())
        users = store.index.users
        order = np.lexsort((seen_us, np.repeat(users.key, users.count)))
        seen_us_N = torch.from_numpy(seen_us[order]).to(user_G.device)
        num_visible_G = store.users.count_before(seen_us_N, place_G.clamp(min=0), as_of_G)
        num_visible_G = torch.where(place_G >= 0, num_visible_G, 0)
        num_hidden = int((num_past_G - num_visible_G).max()) if len(user_G) else 0
        return cls(name, store, place_G, num_past_G, num_visible_G, num_hidden)

    @property
    def inputs(self) -> SourceInputs:
        return SourceInputs(self.name, self.store.width, len(self.store.index.meta.labels))

    def with_store(self, store: IndexStore) -> SourceHistory:
        """The same events with other tokens, published when these were."""
        return replace(self, store=store)

    def sequence(
        self, request_R: Tensor, as_of_R: Tensor, length: int, *, domain: int
    ) -> HistorySequence:
        """The newest `length` events before as_of whose token was published before as_of."""
        row_RL, mask_RL = self.rows(request_R, as_of_R, length)
        store = self.store
        token_RLD, _ = store.tokens_at(row_RL.clamp(min=0), mask_RL, as_of_R)
        labels = [f"label_{name}" for name in store.index.meta.labels]
        known = [store.side_at(name, row_RL.clamp(min=0), mask_RL, as_of_R) for name in labels]
        none_RL0 = torch.zeros(*mask_RL.shape, 0, dtype=torch.int32, device=mask_RL.device)
        return HistorySequence(
            ids_RLF=none_RL0,
            gap_s_RL=store.gap_s_at(row_RL.clamp(min=0), mask_RL, as_of_R),
            label_RLK=torch.stack(known, dim=-1) if known else none_RL0,
            mask_RL=mask_RL,
            token_RLD=token_RLD.float(),
            token_mask_RL=mask_RL,
            domain=domain,
        )

    def rows(self, request_R: Tensor, as_of_R: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """(row_RL, mask_RL) of those events, oldest first, left-padded with -1."""
        # Events wait for their tokens, not always in the order they happened in: look back on as
        # many more as may be waiting, and close the gaps.
        row_RW, mask_RW = self.store.newest(
            self.user_place_G[request_R], self.num_past_G[request_R], length + self.num_hidden
        )
        available_RW = self.store.available_us_N[row_RW.clamp(min=0)]
        visible_RW = mask_RW & (available_RW < as_of_R[:, None])
        back_RW = visible_RW.flip(1).cumsum(1).flip(1)
        place_RW = torch.where(visible_RW & (back_RW <= length), length - back_RW, length)
        row_RL1 = torch.full((len(row_RW), length + 1), -1, device=row_RW.device)
        row_RL = row_RL1.scatter(1, place_RW, row_RW.to(row_RL1.dtype))[:, :length].contiguous()
        # Place `length` took all that is not visible; nothing else is written twice.
        return row_RL, row_RL >= 0


def with_tokens_of(index: UserIndex, line: str) -> UserIndex:
    """The index's events that have a token of the line, in memory, with that line alone."""
    index = index.compacted()
    held = index.line(line)
    kept = np.flatnonzero(np.asarray(held.available_us) < NEVER_US)
    user_id = np.repeat(index.users.key, index.users.count)[kept]
    tokens = replace(held, token=held.token[kept], available_us=held.available_us[kept])
    return UserIndex(
        replace(index.meta, base=len(kept), num_rows=len(kept), has_fields=False),
        Segments.of_sorted(user_id),
        {name: array[kept] for name, array in index.arrays.items()},
        {line: tokens},
    )


class SourceSteps(nn.Module):
    """One source's events as vectors of the ranker's width: its own adapter on the token, and
    beside it age, recency, labels and the domain's embedding."""

    def __init__(
        self, config: RankerConfig, inputs: RankerInputs, source: SourceInputs, width: int
    ) -> None:
        super().__init__()
        self.adapt = nn.Sequential(nn.Linear(source.token_width, width), nn.GELU())
        self.steps = StepVectors(
            width,
            replace(inputs, num_labels=source.num_labels),
            width,
            config.history_length,
            has_labels=config.branch_labels and source.num_labels > 0,
        )
        self.join = nn.Linear(2 * width, width)

    def forward(self, sequence: HistorySequence, domain_D: Tensor) -> Tensor:
        """x_RLD."""
        if sequence.token_RLD is None:
            raise ValueError("this ranker reads tokens of a source and the batch's have none")
        adapted_RLD = self.adapt(sequence.token_RLD.detach().float())
        steps_RLD = self.steps(domain_D.expand_as(adapted_RLD), sequence)
        return self.join(torch.cat([adapted_RLD, steps_RLD], dim=-1))


class SourceState(NamedTuple):
    """The sources' sequences of a request, encoded as one; no candidate changes it."""

    keys_values: tuple[Tensor, Tensor]
    mean_RD: Tensor
    mask_RL: Tensor
    request_RX: Tensor
    """The request's part of the query."""
    bias_RH1L: Tensor


class TransferBranch(nn.Module):
    """The user's events of all sources as one sequence, read with a query compressed from the
    current request, as the branch of own tokens is (downstream/tokens.py).

    The reader is shared: a step sees strictly earlier ones of every source, and one more source
    costs an adapter, not another reader.
    """

    def __init__(
        self,
        config: RankerConfig,
        inputs: RankerInputs,
        *,
        request_width: int,
        candidate_width: int,
        summary_width: int,
    ) -> None:
        super().__init__()
        width = config.width
        self.names = [source.name for source in inputs.sources]
        self.sources = nn.ModuleList(
            SourceSteps(config, inputs, source, width) for source in inputs.sources
        )
        self.domain = nn.Embedding(inputs.num_domains, width)
        nn.init.normal_(self.domain.weight, std=0.1)
        self.empty = nn.Parameter(torch.randn(width) * 0.1)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, config.heads, expansion=2).starting_as_identity()
            for _ in range(config.branch_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.request_in = nn.Linear(request_width, config.query_width)
        self.candidate_in = nn.Linear(candidate_width, config.query_width, bias=False)
        self.summary_in = (
            nn.Linear(summary_width, config.query_width, bias=False) if summary_width else None
        )
        self.query_out = nn.Linear(config.query_width, width)
        self.gap_XH = nn.Parameter(gap_slopes(config.heads))
        self.attention = MultiHeadAttention(width, config.heads)

    def encode(self, histories: dict[str, HistorySequence], request_RX: Tensor) -> SourceState:
        found = [histories[source_key(name)] for name in self.names]
        pairs: Sequence[tuple[nn.Module, HistorySequence]] = [
            *zip(self.sources, found, strict=True)
        ]
        x_RLD = torch.cat([steps(s, self.domain.weight[s.domain]) for steps, s in pairs], dim=1)
        joint = found[0]._replace(
            gap_s_RL=torch.cat([s.gap_s_RL for s in found], dim=1),
            mask_RL=torch.cat([s.mask_RL for s in found], dim=1),
        )
        visible_R1LL = strictly_before(joint)
        for block in self.blocks:
            x_RLD = block(x_RLD, visible_R1LL)
        x_RLD = self.norm(x_RLD)
        mask_RL = joint.mask_RL
        weight_RL = mask_RL / mask_RL.sum(dim=1, keepdim=True).clamp(min=1)
        mean_RD = torch.einsum("rl,rld->rd", weight_RL, x_RLD.masked_fill(~mask_RL[..., None], 0))
        gap_RLH = self.gap_XH[gap_buckets(joint.gap_s_RL)]
        return SourceState(
            self.attention.keys_values(x_RLD),
            mean_RD,
            mask_RL,
            self.request_in(request_RX),
            gap_RLH.transpose(1, 2)[:, :, None],
        )

    def read(self, state: SourceState, candidate_RCX: Tensor, summary_RCX: Tensor | None) -> Tensor:
        """What the sources say of each candidate, [R, C, D]; of a user without a past in any of
        them, a learned vector."""
        query_RCX = self.candidate_in(candidate_RCX) + state.request_RX[:, None]
        if self.summary_in is not None and summary_RCX is not None:
            query_RCX = query_RCX + self.summary_in(summary_RCX)
        query_RCD = self.query_out(F.gelu(query_RCX))
        is_empty_R = ~state.mask_RL.any(dim=1)
        mask_R11L = (state.mask_RL | is_empty_R[:, None])[:, None, None]
        shape = (-1, -1, query_RCD.shape[1], -1)
        bias_RHCL = state.bias_RH1L.masked_fill(~mask_R11L, float("-inf")).expand(shape)
        read_RCD = self.attention.attend(query_RCD, state.keys_values, bias_RHCL)
        read_RCD = read_RCD + state.mean_RD[:, None]
        return torch.where(is_empty_R[:, None, None], self.empty, read_RCD)


def source_key(name: str) -> str:
    """What a source's sequence is called in a batch: no domain's name can be `main`'s."""
    return f"source/{name}"
