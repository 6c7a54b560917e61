"""Steps that never ask the device: clipped, skipped where not finite, averaged."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compressor.training.loop import DivergedError, WeightAverage, train, update


def model_and_optimizer() -> tuple[nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    return model, torch.optim.Adam(model.parameters(), lr=0.1, fused=True)


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("max_norm", [0.01, 1e6])
def test_an_update_is_a_step_on_the_clipped_gradient(max_norm: float) -> None:
    found = []
    for is_ours in (True, False):
        model, optimizer = model_and_optimizer()
        for step in range(3):
            model.zero_grad()
            model(torch.full((4, 3), 1.0 + step)).square().mean().backward()
            if is_ours:
                update(list(model.parameters()), optimizer, max_norm, torch.zeros(()))
            else:
                nn.utils.clip_grad_norm_(model.parameters(), max_norm)
                optimizer.step()
        found.append(weights(model))
    torch.testing.assert_close(*found)


def test_a_step_without_a_finite_gradient_moves_nothing() -> None:
    model, optimizer = model_and_optimizer()
    before, num_bad = weights(model), torch.zeros(())
    for factor, count in ((float("nan"), 1), (float("inf"), 2), (1.0, 0)):
        model.zero_grad()
        (model(torch.ones(2, 3)).sum() * factor).backward()
        update(list(model.parameters()), optimizer, 1.0, num_bad)
        assert num_bad == count
        is_moved = any(not torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
        assert is_moved == (count == 0)


def test_a_run_that_stays_not_finite_is_stopped() -> None:
    model, optimizer = model_and_optimizer()
    batches = [torch.full((2, 3), float("nan"))] * 60
    with pytest.raises(DivergedError, match="learning rate"):
        list(train(model, batches, lambda x: model(x).sum(), optimizer))


def test_a_share_on_the_device_averages_as_a_number_does() -> None:
    found = []
    for is_tensor in (True, False):
        model, _ = model_and_optimizer()
        average = WeightAverage(model, 0.9)
        for step in range(20):
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(step)
            share = average.next_share()
            average.blend(torch.tensor(share) if is_tensor else share)
        found.append(average.averaged)
    torch.testing.assert_close(*found)


def test_swapping_twice_is_nothing() -> None:
    model, _ = model_and_optimizer()
    average = WeightAverage(model, 0.9)
    with torch.no_grad():
        model.weight.add_(1)
    live, held = weights(model), [a.clone() for a in average.averaged]
    with average:
        torch.testing.assert_close(weights(model), held)
        torch.testing.assert_close(average.averaged, live)
    torch.testing.assert_close(weights(model), live)
