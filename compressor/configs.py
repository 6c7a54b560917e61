"""What a source model is and how it is trained; a run is a function that returns one of these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Order = Literal["temporal", "user"]
Stored = Literal["pre-sit", "post-sit"]
"""What is kept of an event: its bottleneck vector, or (a control) what SIT reads for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """The source model: encoder, bottleneck, Source Instance Transformer, heads (papers: IAT,
    RankMixer)."""

    order: Order = "user"
    embedding: int = 16
    width: int = 64
    num_tokens: int = 8
    depth: int = 2
    bottleneck: int = 64
    sit_layers: int = 2
    heads: int = 4
    context: int = 64
    """Past tokens of the user that SIT may see, at most."""
    decoder: int = 256
    embedding_std: float = 0.2
    next_basket_weight: float = 0.1
    """Weight of the loss by which a token predicts the user's next request's items (user order)."""
    decode_weight: float = 0.05
    """Weight of the loss that keeps logged fields decodable from the token."""

    def __post_init__(self) -> None:
        if self.width % self.num_tokens:
            raise ValueError(
                f"width {self.width} must be a multiple of num_tokens {self.num_tokens}"
            )
        if self.bottleneck % self.heads:
            raise ValueError(
                f"bottleneck {self.bottleneck} must be a multiple of heads {self.heads}"
            )
        if self.context < 1:
            raise ValueError(f"context must be at least 1, got {self.context}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """How weights are updated; `units` are user-days (streaming) or users' whole pasts (frozen)."""

    learning_rate: float = 3e-3
    embedding_factor: float = 2.5
    """Embeddings learn this much faster."""
    batch_units: int = 64
    replay: float = 1.0
    """Units of earlier days trained again, per unit of today (streaming)."""
    window_days: int = 0
    """Days before a walked day that it reads, as context and for replay; 0: all (streaming)."""
    epochs: int = 8
    """Passes over the days, forward then reversed in turn, at most (frozen)."""
    pass_steps: int = 400
    """Steps to a pass, about (frozen): as many are needed to learn from a small log as from a
    large one, whose steps hold more users."""
    patience: int = 1
    """Passes without a better log loss of the held-out last days before a frozen run stops."""
    average: float = 0.98
    """Decay of the averaged weights that predict and write tokens."""
    max_norm: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        if (
            self.learning_rate <= 0
            or min(self.batch_units, self.epochs, self.pass_steps, self.patience) < 1
            or min(self.replay, self.window_days) < 0
            or not 0 <= self.average < 1
        ):
            raise ValueError(
                f"learning_rate, batch_units, epochs, pass_steps and patience must be positive, "
                f"replay and window_days not negative, average in [0, 1): {self}"
            )
