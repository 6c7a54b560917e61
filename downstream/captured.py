"""A ranker's training and prediction steps as CUDA graphs, over batches of fixed shapes.

The same computation as the plain path, whose batches are as wide as their own longest piece: here
every batch has R pieces of up to C candidates, short ones filled up with pieces of nothing, which
no loss or gradient sees. A day's pieces are copied to the device at once, and the host only starts
the steps.

Shape legend: T batches, R pieces of a batch, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressor.nn.attention import TransformerBlock
from compressor.nn.mixing import RankMixer
from compressor.training.capture import Captured
from compressor.training.fusing import fuse
from compressor.training.loop import WeightAverage, refuse_divergence, update
from downstream.batch import RankerBatch
from downstream.configs import RankerConfig
from downstream.data import RankerData
from downstream.interaction import MatchFeatures
from downstream.samples import Array
from downstream.tokens import ItemTokenFeatures

FUSED = (RankMixer, TransformerBlock, MatchFeatures, ItemTokenFeatures)
"""Parts of rankers that are compiled: the same in all arms, and most of a step. Plain steps, whose
batches differ in shape, do without."""


class TrainingStep:
    """Batch, loss, gradient, clipped update and weight average in one launch."""

    def __init__(
        self,
        data: RankerData,
        config: RankerConfig,
        model: nn.Module,
        loss_of: Callable[[RankerBatch], Tensor],
        optimizer: torch.optim.Optimizer,
        average: WeightAverage,
        *,
        num_pieces: int,
        max_norm: float,
    ) -> None:
        fuse(model, FUSED, dynamic=False)
        model.train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        _make_state(optimizer, parameters)
        self.data, self.average = data, average
        self.piece_3R = torch.zeros(3, num_pieces, dtype=torch.int64, device=data.device)
        self.known_before_us = torch.zeros((), dtype=torch.int64, device=data.device)
        self.share = torch.zeros((), device=data.device)
        self.total, self.num_bad = torch.zeros((2,), device=data.device).unbind()

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            batch = data.gather(self.piece_3R, data.piece_size, config, self.known_before_us)
            loss = loss_of(batch)
            loss.backward()
            update(parameters, optimizer, max_norm, self.num_bad)
            average.blend(self.share)
            self.total.add_(loss.detach())

        slots = [t for kept in optimizer.state.values() for t in kept.values()]
        kept = [*parameters, *model.buffers(), *average.averaged, *slots, self.total, self.num_bad]
        self.captured = Captured(step, kept)

    def run(self, groups: Sequence[Array], known_before_us: int) -> float:
        """One step a group; returns the mean loss."""
        piece_T3R = self.data.described(groups, self.piece_3R.shape[1])
        shares = torch.tensor([self.average.next_share() for _ in groups])
        share_T = shares.to(self.data.device, non_blocking=True)
        self.known_before_us.fill_(known_before_us)
        self.total.zero_()
        for piece_3R, share in zip(piece_T3R.unbind(), share_T.unbind(), strict=True):
            self.piece_3R.copy_(piece_3R)
            self.share.copy_(share)
            self.captured.replay()
        refuse_divergence(self.num_bad, len(groups))
        return float(self.total) / len(groups)


class PredictionStep:
    """Batch and probabilities in one launch, under the model's weights of that moment."""

    def __init__(
        self, data: RankerData, config: RankerConfig, model: nn.Module, *, num_pieces: int
    ) -> None:
        fuse(model, FUSED, dynamic=False)
        model.eval()
        self.data = data
        self.piece_3R = torch.zeros(3, num_pieces, dtype=torch.int64, device=data.device)

        @torch.no_grad()
        def step() -> tuple[Tensor, Tensor]:
            batch = data.gather(self.piece_3R, data.piece_size, config)
            return batch.sample_RC, torch.sigmoid(model(batch).float())

        self.captured = Captured(step)

    def run(self, pieces: Array) -> tuple[Array, Array]:
        """(sample, probability) of all candidates of the pieces, -1 where there is none."""
        size = self.piece_3R.shape[1]
        groups = [pieces[start : start + size] for start in range(0, len(pieces), size)]
        found = []
        for piece_3R in self.data.described(groups, size).unbind():
            self.piece_3R.copy_(piece_3R)
            self.captured.replay()
            found.append([x_RC.flatten().clone() for x_RC in self.captured.result])
        sample, score = (torch.cat(x).cpu().numpy() for x in zip(*found, strict=True))
        return sample, np.asarray(score, np.float32)


def _make_state(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """Give a fused optimizer the state that its first step would make, by a step that is skipped:
    made inside the capture it would be made anew by every replay."""
    missing = [p for p in parameters if p not in optimizer.state]
    if not missing:
        return
    optimizer.zero_grad(set_to_none=True)
    for p in missing:
        p.grad = torch.zeros_like(p)
    scaled: Any = optimizer
    scaled.grad_scale = torch.ones((), device=missing[0].device)
    scaled.found_inf = torch.ones((), device=missing[0].device)
    optimizer.step()
