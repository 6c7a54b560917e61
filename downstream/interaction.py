"""From groups of features to a logit: RankMixer over feature tokens, and the ranker around it.

Zhu et al., "RankMixer", arXiv 2507.15551 (groups, token mixing, mean read-out); IAT's placement of
the history and of the token branch as feature tokens *before* the interaction (papers/iat 1.6).

Shape legend: R requests, C candidates, L sequence length, T feature tokens, D width, F side fields,
E embedding width, M match features, X any flat width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from compressor.nn.embedding import EmbeddingBank, Vocabulary
from compressor.nn.mixing import RankMixer
from downstream.batch import MAIN, HistorySequence, RankerBatch
from downstream.configs import RankerConfig
from downstream.inputs import FieldVectors, RankerInputs
from downstream.tokens import BranchState, ItemTokenFeatures, TokenBranch
from downstream.transfer import SourceState, TransferBranch

GROUPS = ("user", "context", "item", "cross", "history", "branch", "sources")
SPARE_TO = ("item", "cross", "history", "context", "user", "branch", "sources")
"""Who gets the tokens that are left when every group has one, in turn."""
WIDE = ("cross", "history", "branch", "sources")
"""Groups with a linear way to the logit beside the interaction."""
MATCH_HIDDEN = 64
MATCH_DECAY = 0.99
"""Of the running mean and deviation of match features, a training batch."""
MIN_DEVIATION = 0.05
MATCH_BOUND = 10.0
"""Scaled match features are kept within this many deviations."""


class SequenceModel(Protocol):
    """A reader of the hand-made sequence: encoded once a request, read once a candidate."""

    width: int
    """Of what it reads for a candidate."""

    def encode(self, side_RLX: Tensor, sequence: HistorySequence) -> Any: ...

    def read(
        self, state: Any, side_RCX: Tensor, candidate_RCX: Tensor, match_RCLF: Tensor
    ) -> Tensor:
        """read_RCX of that width; match_RCLF: where a step's side field has the candidate's
        value."""
        ...


SequenceFactory = Callable[[RankerConfig, RankerInputs, int, int], SequenceModel]
"""(config, inputs, width of a step's side fields, width of a candidate's vector)."""


class RequestState(NamedTuple):
    """What no candidate changes."""

    request_RX: Tensor
    token_RTD: Tensor | None
    sequence: Any
    branch: BranchState | None
    sources: SourceState | None = None


class SequenceRanker(nn.Module):
    """Embeddings, a sequence model, the token branch, other domains' tokens, feature tokens,
    RankMixer, head."""

    side_slot_F: Tensor

    def __init__(
        self,
        config: RankerConfig,
        inputs: RankerInputs,
        vocabulary: Vocabulary,
        sequence: SequenceFactory,
        *,
        seed: int,
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.config, self.inputs = config, inputs
        # On the device: a list of places would be copied there by every step.
        slots = torch.tensor(inputs.side_slots, dtype=torch.int64)
        self.register_buffer("side_slot_F", slots, persistent=False)
        embedding = config.embedding
        self.bank = EmbeddingBank(vocabulary, embedding, seed=seed, std=config.embedding_std)
        self.user = FieldVectors(inputs.user, embedding)
        self.context = FieldVectors(inputs.context, embedding)
        self.candidate = FieldVectors(inputs.candidate, embedding)
        self.fields = FieldVectors(inputs.fields, embedding) if config.branch == "fields" else None
        side_width = len(inputs.side.features) * embedding
        request_width = self.user.width + self.context.width
        widths = {"user": self.user.width, "context": self.context.width}
        widths["item"] = self.candidate.width
        self.sequence: SequenceModel | None = None
        self.match: MatchFeatures | None = None
        self.branch: TokenBranch | None = None
        self.item_token: ItemTokenFeatures | None = None
        if config.history:
            self.sequence = sequence(config, inputs, side_width, self.candidate.width)
            widths["history"] = self.sequence.width
        if config.match:
            self.match = MatchFeatures(inputs.num_match)
            widths["cross"] = self.match.width
        if config.item_tokens:
            self.item_token = ItemTokenFeatures(inputs.token_width, config.width)
            widths["cross"] = widths.get("cross", 0) + self.item_token.width
        if config.branch != "none":
            self.branch = TokenBranch(
                config,
                inputs,
                source_width=self.fields.width if self.fields else inputs.token_width,
                side_width=side_width,
                request_width=request_width,
                candidate_width=self.candidate.width,
                summary_width=widths.get("history", 0),
            )
            widths["branch"] = config.width
        self.sources: TransferBranch | None = None
        if inputs.sources:
            self.sources = TransferBranch(
                config,
                inputs,
                request_width=request_width,
                candidate_width=self.candidate.width,
                summary_width=widths.get("history", 0),
            )
            widths["sources"] = config.width
        self.interaction = Interaction(config, widths)
        # A short way to the logit for what is already a good feature (Wide & Deep, arXiv
        # 1606.07792) and for what was read of a sequence: through the interaction alone, a branch
        # with much to say is first heard after several passes.
        wide_width = sum(widths.get(name, 0) for name in WIDE)
        self.wide = nn.Linear(wide_width, 1) if wide_width else None

    def encode_request(self, batch: RankerBatch) -> RequestState:
        """See Ranker."""
        num_slots = batch.ids_RS.shape[1]
        is_read = self.sequence is not None or self.branch is not None
        past = [batch.histories[MAIN].ids_RLF.flatten(1)] if is_read else []
        # One gather, so that the backward pass makes one gradient of the whole table.
        vectors_RSE = self.bank(torch.cat([batch.ids_RS, *past], dim=1))
        at = self.inputs.user.num_slots
        at_numbers = len(self.inputs.user.numbers)
        groups = {}
        for name, encoder, slots, numbers in (
            ("user", self.user, slice(0, at), slice(0, at_numbers)),
            ("context", self.context, slice(at, num_slots), slice(at_numbers, None)),
        ):
            groups[name] = encoder(
                vectors_RSE[:, slots], batch.ids_RS[:, slots], batch.numbers_RN[:, numbers]
            )
        request_RX = torch.cat([groups["user"], groups["context"]], dim=1)
        token_RTD = self.interaction.tokens(groups)
        sources = None
        if self.sources is not None:
            sources = self.sources.encode(batch.histories, request_RX)
        if not is_read:
            return RequestState(request_RX, token_RTD, None, None, sources)
        sequence = batch.histories[MAIN]
        side_RLX = vectors_RSE[:, num_slots:].reshape(*sequence.mask_RL.shape, -1)
        read = self.sequence.encode(side_RLX, sequence) if self.sequence is not None else None
        branch = None
        if self.branch is not None:
            source_RLX, is_there_RL = self._source(sequence)
            branch = self.branch.encode(source_RLX, is_there_RL, side_RLX, request_RX, sequence)
        return RequestState(request_RX, token_RTD, read, branch, sources)

    def score(self, state: RequestState, batch: RankerBatch) -> Tensor:
        """See Ranker."""
        vectors_RCSE = self.bank(batch.ids_RCS)
        candidate_RCX = self.candidate(vectors_RCSE, batch.ids_RCS, batch.numbers_RCN)
        groups = {"item": candidate_RCX}
        cross = []
        if self.match is not None:
            if self.training:
                self.match.observe(batch.match_RCM, batch.mask_RC)
            cross.append(self.match(batch.match_RCM))
        if self.sequence is not None:
            side_RCX = vectors_RCSE.index_select(2, self.side_slot_F).flatten(2)
            groups["history"] = self.sequence.read(
                state.sequence, side_RCX, candidate_RCX, self._matches(batch)
            )
        item_slot_RCD = item_token_RCD = None
        if self.branch is not None and state.branch is not None:
            if self.item_token is not None:
                item_token_RCD, item_mask_RC = _item_tokens(batch)
                item_slot_RCD, cross_RCX = self.item_token(
                    item_token_RCD, item_mask_RC, state.branch
                )
                cross.append(cross_RCX)
            groups["branch"] = self.branch.read(
                state.branch,
                candidate_RCX,
                groups.get("history"),
                item_token_RCD,
                self._matches(batch),
            )
        if self.sources is not None and state.sources is not None:
            groups["sources"] = self.sources.read(
                state.sources, candidate_RCX, groups.get("history")
            )
        if cross:
            groups["cross"] = torch.cat(cross, dim=-1)
        wide_RC: Tensor | float = 0.0
        if self.wide is not None:
            good_RCX = torch.cat([groups[name] for name in WIDE if name in groups], dim=-1)
            wide_RC = self.wide(good_RCX).squeeze(-1)
        token_RCTD = self.interaction.tokens(groups, item_slot_RCD)
        assert token_RCTD is not None  # there is always an item group
        if state.token_RTD is not None:
            shape = (-1, token_RCTD.shape[1], -1, -1)
            token_RCTD = torch.cat([state.token_RTD[:, None].expand(shape), token_RCTD], dim=2)
        return self.interaction(token_RCTD) + wide_RC

    def forward(self, batch: RankerBatch) -> Tensor:
        """logit_RC."""
        return self.score(self.encode_request(batch), batch)

    def _matches(self, batch: RankerBatch) -> Tensor:
        """match_RCLF: where a step's side field has the candidate's value."""
        own_RC1F = batch.ids_RCS.index_select(2, self.side_slot_F)[:, :, None]
        return (own_RC1F == batch.histories[MAIN].ids_RLF[:, None]) & (own_RC1F != 0)

    def _source(self, sequence: HistorySequence) -> tuple[Tensor, Tensor]:
        """What the branch reads of each step, and where it is there to be read."""
        if self.fields is None:
            if sequence.token_RLD is None or sequence.token_mask_RL is None:
                raise ValueError("this ranker reads tokens and the batch's history has none")
            return sequence.token_RLD.detach().float(), sequence.token_mask_RL
        rows, numbers = sequence.field_ids_RLS, sequence.field_numbers_RLN
        if rows is None or numbers is None or sequence.field_mask_RL is None:
            raise ValueError("this ranker reads all logged fields and the batch's history has none")
        return self.fields(self.bank(rows), rows, numbers), sequence.field_mask_RL


def _item_tokens(batch: RankerBatch) -> tuple[Tensor, Tensor]:
    """Item tokens, 0 where there is none, and where there is one."""
    if batch.item_token_RCD is None or batch.item_token_mask_RC is None:
        raise ValueError("this ranker reads item tokens and the batch has none")
    mask_RC = batch.item_token_mask_RC
    return batch.item_token_RCD.detach().masked_fill(~mask_RC[..., None], 0), mask_RC


class MatchFeatures(nn.Module):
    """Match features at one scale, through one small MLP, and beside it as they are.

    An item's counts are 0 for nine candidates in ten where a department's log counts spread over
    several units, so that unscaled the best of them are learned last. The scale is the running mean
    and deviation of what was trained on: nothing of a day that is predicted enters it.
    """

    mean_M: Tensor
    square_M: Tensor
    num_observed: Tensor

    def __init__(self, num_match: int) -> None:
        super().__init__()
        self.register_buffer("mean_M", torch.zeros(num_match))
        self.register_buffer("square_M", torch.ones(num_match))
        self.register_buffer("num_observed", torch.zeros(()))
        self.hidden = nn.Sequential(
            nn.Linear(num_match, MATCH_HIDDEN),
            nn.GELU(),
            nn.Linear(MATCH_HIDDEN, MATCH_HIDDEN),
            nn.GELU(),
        )
        self.width = num_match + MATCH_HIDDEN

    @torch.no_grad()
    def observe(self, match_RCM: Tensor, mask_RC: Tensor) -> None:
        """Move the scale towards a training batch's candidates; padding counts for nothing."""
        count = mask_RC.sum()
        weight_RC1 = (mask_RC / count.clamp(min=1))[..., None]
        is_there = count > 0
        self.num_observed += is_there
        share = is_there / self.num_observed.clamp(min=1, max=1 / (1 - MATCH_DECAY))
        self.mean_M.lerp_((match_RCM * weight_RC1).sum(dim=(0, 1)), share)
        self.square_M.lerp_((match_RCM.square() * weight_RC1).sum(dim=(0, 1)), share)

    def forward(self, match_RCM: Tensor) -> Tensor:
        deviation_M = (self.square_M - self.mean_M.square()).clamp(min=MIN_DEVIATION**2).sqrt()
        scaled_RCM = (match_RCM - self.mean_M) / deviation_M
        scaled_RCM = scaled_RCM.clamp(-MATCH_BOUND, MATCH_BOUND)
        return torch.cat([scaled_RCM, self.hidden(scaled_RCM)], dim=-1)


class Interaction(nn.Module):
    """Groups of features -> T tokens (each group its own MLP) -> RankMixer -> mean -> logit."""

    def __init__(self, config: RankerConfig, widths: dict[str, int]) -> None:
        super().__init__()
        present = [name for name in GROUPS if widths.get(name, 0)]
        self.width = config.width
        self.shares = shares(present, config.num_tokens)
        self.project = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.Linear(widths[name], config.width),
                    nn.GELU(),
                    nn.Linear(config.width, self.shares[name] * config.width),
                )
                for name in present
            }
        )
        self.mixer = RankMixer(
            num_tokens=config.num_tokens,
            width=config.width,
            depth=config.depth,
            expansion=config.expansion,
        )
        self.head = nn.Sequential(
            nn.Linear(config.width, config.width), nn.GELU(), nn.Linear(config.width, 1)
        )

    def tokens(
        self, groups: dict[str, Tensor], item_slot_RCD: Tensor | None = None
    ) -> Tensor | None:
        """[..., T', D] tokens of the groups given, in the order of GROUPS; None without any."""
        found = []
        for name in GROUPS:
            if name not in groups or name not in self.shares:
                continue
            token = self.project[name](groups[name]).unflatten(-1, (self.shares[name], self.width))
            if name == "item" and item_slot_RCD is not None:
                token = token + item_slot_RCD.unsqueeze(-2)
            found.append(token)
        return torch.cat(found, dim=-2) if found else None

    def forward(self, token_RCTD: Tensor) -> Tensor:
        """logit_RC."""
        mixed = self.mixer(token_RCTD.flatten(0, 1))
        logit = self.head(mixed.mean(dim=1)).squeeze(-1)
        return logit.unflatten(0, token_RCTD.shape[:2])


def shares(present: list[str], num_tokens: int) -> dict[str, int]:
    """Tokens per group: one each, the rest in turn."""
    if len(present) > num_tokens:
        raise ValueError(
            f"num_tokens {num_tokens} must be at least one a group: {', '.join(present)}"
        )
    found = dict.fromkeys(present, 1)
    turns = [name for name in SPARE_TO if name in found]
    for turn in range(num_tokens - len(present)):
        found[turns[turn % len(turns)]] += 1
    return found
