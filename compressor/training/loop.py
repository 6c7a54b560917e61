"""The training loop of both stages: a generator; logging, saving and stopping are the caller's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

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
    skipped; `patience` in a row stop the run. The optimizer must be a fused one."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    num_bad = torch.zeros((), device=parameters[0].device)
    for step, batch in enumerate(batches):
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(batch)
        loss.backward()
        update(parameters, optimizer, max_norm, num_bad)
        if average is not None:
            average.update()
        if step % 50 == 49:
            refuse_divergence(num_bad, step, patience)
        yield step, loss.detach()


def update(
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    max_norm: float,
    num_bad: Tensor,
) -> None:
    """One step of a fused optimizer on gradients clipped to `max_norm`, without a wait for the
    device: none where the gradient is not finite, which `num_bad` counts in a row."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm(grads, foreach=True)
    is_bad = ~torch.isfinite(norm)
    num_bad.copy_(torch.where(is_bad, num_bad + 1, 0.0))
    # What a gradient scaler tells a fused optimizer: divide by this, and skip the step if that.
    scaled: Any = optimizer
    scaled.grad_scale = ((norm + 1e-6) / max_norm).clamp(min=1.0)
    scaled.found_inf = is_bad.to(norm.dtype)
    optimizer.step()


def refuse_divergence(num_bad: Tensor, step: int, patience: int = 5) -> None:
    """Stop a run whose last `patience` steps had no finite gradient; waits for the device."""
    if float(num_bad) >= patience:
        raise DivergedError(
            f"{int(num_bad)} steps in a row without a finite gradient (step {step}); lower the "
            f"learning rate"
        )


class EarlyStop:
    """The state of the best pass so far, and whether `patience` passes in a row were no better."""

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.best: dict[str, Tensor] = {}
        self._best_loss, self._num_worse = math.inf, 0

    def judge(self, held_out_loss: float, state: dict[str, Tensor]) -> bool:
        """Whether this pass is the best so far; then its state is kept. Without a loss to judge by
        (NaN), the last pass is the best."""
        is_best = math.isnan(held_out_loss) or held_out_loss < self._best_loss
        if is_best:
            self.best = {name: tensor.clone() for name, tensor in state.items()}
            self._best_loss, self._num_worse = held_out_loss, 0
        else:
            self._num_worse += 1
        return is_best

    @property
    def is_over(self) -> bool:
        return self._num_worse >= self.patience


class WeightAverage:
    """Exponentially averaged weights of a model (EMA), swapped in for prediction and for writing
    tokens."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay, self.num_updates = model, decay, 0
        self.averaged = [p.detach().clone() for p in model.parameters()]

    def next_share(self) -> float:
        """Count one more update; what the live weights weigh in it. Early on more, so that the
        start is forgotten."""
        self.num_updates += 1
        return 1 - min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))

    def update(self) -> None:
        """Average in today's weights."""
        self.blend(self.next_share())

    @torch.no_grad()
    def blend(self, share: float | Tensor) -> None:
        """Move the averaged weights by this share of the way to the live ones; a tensor is read on
        its device."""
        live = [p.detach() for p in self.model.parameters()]
        if isinstance(share, float):
            torch._foreach_lerp_(self.averaged, live, share)
        else:
            way = torch._foreach_sub(live, self.averaged)
            torch._foreach_mul_(way, share)
            torch._foreach_add_(self.averaged, way)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange live and averaged weights; call again to undo."""
        live = [p.detach() for p in self.model.parameters()]
        held = [p.clone() for p in live]
        torch._foreach_copy_(live, self.averaged)
        torch._foreach_copy_(self.averaged, held)

    def __enter__(self) -> None:
        self.swap()

    def __exit__(self, *_: object) -> None:
        self.swap()
