"""The training loop of both stages: a generator; logging, saving and stopping are the caller's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

Batch = TypeVar("Batch")


class DivergedError(RuntimeError):
    """Losses stayed not finite: the run would only write noise."""


def train(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_of: Callable[[Batch], Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    average: WeightAverage | None = None,
    max_norm: float = 1.0,
    patience: int = 5,
) -> Iterator[tuple[int, Tensor]]:
    """Yield (step, loss, detached) after each update. A step whose gradient is not finite is
    skipped; `patience` in a row stop the run."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    num_bad = torch.zeros((), device=parameters[0].device)
    for step, batch in enumerate(batches):
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, max_norm, foreach=True)
        is_finite = torch.isfinite(norm)
        # On the device, without a wait: a bad step's gradients become zeros.
        for p in parameters:
            if p.grad is not None:
                p.grad.masked_fill_(~is_finite, 0.0)
        num_bad = torch.where(is_finite, 0.0, num_bad + 1)
        optimizer.step()
        if average is not None:
            average.update()
        if step % 50 == 49 and float(num_bad) >= patience:
            raise DivergedError(
                f"{int(num_bad)} steps in a row without a finite gradient (step {step}); lower the "
                f"learning rate"
            )
        yield step, loss.detach()


class WeightAverage:
    """Exponentially averaged weights of a model (EMA), swapped in for prediction and for writing
    tokens."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay, self.num_updates = model, decay, 0
        self.averaged = [p.detach().clone() for p in model.parameters()]

    @torch.no_grad()
    def update(self) -> None:
        """Average in today's weights; early on the decay is shorter, so that the start is
        forgotten."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        torch._foreach_lerp_(
            self.averaged, [p.detach() for p in self.model.parameters()], 1 - decay
        )

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange live and averaged weights; call again to undo."""
        for parameter, averaged in zip(self.model.parameters(), self.averaged, strict=True):
            held = parameter.detach().clone()
            parameter.copy_(averaged)
            averaged.copy_(held)

    def __enter__(self) -> None:
        self.swap()

    def __exit__(self, *_: object) -> None:
        self.swap()


def is_diverged(loss: Tensor) -> bool:
    return not math.isfinite(float(loss))
