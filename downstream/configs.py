"""What a ranker is and how it is trained; an arm of a comparison is a function of a config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from pipelines.errors import InputError

Branch = Literal["none", "tokens", "fields"]
Reader = Literal["transformer", "din"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RankerConfig:
    """Sizes of a ranker and which of its parts it has (papers/iat 1.2, 1.6)."""

    embedding: int = 16
    width: int = 64
    """D of the feature tokens."""
    num_tokens: int = 8
    """T: feature tokens that interact; the same in every arm."""
    depth: int = 2
    expansion: float = 2.0
    heads: int = 4
    history_length: int = 64
    history: bool = True
    """The hand-made sequence: side information of past events, read with target attention."""
    sequence_layers: int = 1
    """Self-attention layers over the hand-made sequence (transformer only)."""
    match: bool = True
    """Match features of the candidate in the user's whole past."""
    branch: Branch = "none"
    """A second sequence: stored tokens, or all logged fields of the same events end to end."""
    branch_reader: Reader = "transformer"
    """How the branch is read: causal layers and cross-attention, or DIN's activation unit alone."""
    branch_layers: int = 2
    """Causal layers over the branch (transformer only)."""
    branch_labels: bool = True
    """The branch's side information holds past labels; the hand-made sequence's always does."""
    query_width: int = 128
    """Width to which the current request is compressed before it queries the branch."""
    item_tokens: bool = False
    """The candidate's item token, in the query, as cosine features and as a feature."""
    embedding_std: float = 0.2

    def __post_init__(self) -> None:
        if self.width % self.num_tokens:
            raise ValueError(
                f"width {self.width} must be a multiple of num_tokens {self.num_tokens}"
            )
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        if self.num_tokens < 6:
            raise ValueError(f"num_tokens must be at least 6, one a group; got {self.num_tokens}")
        if min(self.history_length, self.depth, self.embedding, self.query_width) < 1:
            raise ValueError(f"lengths, depths and widths must be positive: {self}")
        if self.branch not in ("none", "tokens", "fields"):
            raise ValueError(f"branch must be none, tokens or fields, got {self.branch!r}")
        if self.branch_reader not in ("transformer", "din"):
            raise ValueError(
                f"branch_reader must be transformer or din, got {self.branch_reader!r}"
            )
        if self.branch == "none" and (self.branch_reader == "din" or not self.branch_labels):
            raise ValueError(
                "branch_reader = 'din' and branch_labels = False need a branch: tokens or fields"
            )
        if self.item_tokens and self.branch != "tokens":
            raise ValueError("item_tokens needs branch = 'tokens': both come from one line")


@dataclass(frozen=True, kw_only=True, slots=True)
class RankerTraining:
    """How weights are updated: what served the base on the grocery log, of all households and of
    40, where rates from .001 to .005 and batches from 16 to 384 pieces were tried."""

    learning_rate: float = 1e-3
    embedding_factor: float = 2.5
    """Embeddings learn this much faster; at the rate of the rest the base loses .004 of AUC."""
    batch_candidates: int = 1000
    """Candidates a step, about: whole requests (or pieces of long ones) that hold so many. Smaller
    batches are as good or better, and cost more steps."""
    replay: float = 1.0
    """Requests of earlier days trained again, per request of today (streaming)."""
    warm_days: int = 1
    """First days that are trained on without being predicted (streaming)."""
    epochs: int = 4
    """Passes over the training days, at most (frozen)."""
    pass_steps: int = 1000
    """Steps to a pass, at least (frozen): a small log is cut into smaller batches."""
    patience: int = 1
    """Passes without a better validation log loss before a frozen run stops."""
    average: float = 0.98
    """Decay of the averaged weights that predict."""
    max_norm: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.learning_rate <= 0 or self.embedding_factor <= 0 or self.max_norm <= 0:
            raise ValueError(f"rates and max_norm must be positive: {self}")
        if (
            min(self.batch_candidates, self.epochs, self.pass_steps) < 1
            or min(self.replay, self.warm_days) < 0
        ):
            raise ValueError(
                "batch_candidates, epochs and pass_steps must be positive, replay and warm_days "
                f"not negative: {self}"
            )
        if not 0 <= self.average < 1:
            raise ValueError(f"average must be in [0, 1), got {self.average}")


ARMS: Mapping[str, Mapping[str, Any]] = {
    "none": {"history": False, "match": False},
    "base": {},
    "end-to-end": {"branch": "fields"},
    "tokens": {"branch": "tokens"},
    "match": {"branch": "tokens", "item_tokens": True},
    "tokens-only": {"history": False, "match": False, "branch": "tokens"},
    "tokens-din": {"branch": "tokens", "branch_reader": "din"},
    "tokens-unlabelled": {"branch": "tokens", "branch_labels": False},
}
"""Arms of a comparison by name, as changes to the base (FINDINGS.md section 3; the last two:
papers/iat 1.6)."""


def arm(name: str, config: RankerConfig | None = None) -> RankerConfig:
    """The config of an arm: `config` (default: the default sizes) with the arm's parts."""
    if name not in ARMS:
        raise InputError(f"no arm called {name!r}; known: {', '.join(ARMS)}")
    return replace(config or RankerConfig(), **ARMS[name])
