"""The two protocols of training a ranker (DESIGN 5.5): walk the days, or fit once, then predict.

Streaming: each day is predicted with yesterday's averaged weights, then trained on (once, with as
many requests of earlier days drawn uniformly beside it). Frozen: passes over the training days,
stopped by the log loss of their last part, then every test day with the same weights.

Shape legend: n samples, R requests, C candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.training.capture import BUILDING
from compressor.training.checkpoint import restore, state
from compressor.training.loop import EarlyStop, WeightAverage, train
from downstream.batch import Ranker, RankerBatch
from downstream.captured import PredictionStep, TrainingStep
from downstream.configs import RankerConfig, RankerTraining
from downstream.data import DAY_US, RankerData
from downstream.rankers import make_ranker
from downstream.samples import Array

PREDICT_REQUESTS = 128
VALIDATION_SHARE = 0.1

Floats = npt.NDArray[np.float32]


class DayResult(NamedTuple):
    """One day of the walk: its samples with the scores they had before training on the day."""

    day: int
    sample: Array
    """Rows among the loaded samples; none on a warm-up day."""
    score: Floats
    """Probabilities."""
    loss: float
    """Mean training loss of the day's steps; NaN without any."""
    num_steps: int


class EpochResult(NamedTuple):
    """One pass of the frozen protocol."""

    epoch: int
    loss: float
    validation_loss: float
    is_best: bool


@dataclass
class RankerTrainer:
    """A ranker with all that its training carries from batch to batch."""

    model: nn.Module
    config: RankerConfig
    training: RankerTraining
    optimizer: torch.optim.Optimizer
    average: WeightAverage
    num_steps: int = 0
    num_rows: int = 0
    """Candidates that passed through training."""
    is_captured: bool = False
    """Steps are CUDA graphs (downstream/captured.py)."""
    _training_step: TrainingStep | None = field(default=None, repr=False)
    _prediction_step: PredictionStep | None = field(default=None, repr=False)

    @classmethod
    def create(
        cls, name: str, config: RankerConfig, training: RankerTraining, data: RankerData
    ) -> RankerTrainer:
        """A fresh ranker on the data's device; weights depend on the seed alone. On a GPU its steps
        are captured."""
        with BUILDING:
            model = make_ranker(name, config, data.inputs, data.vocabulary, training.seed)
        model = model.to(data.device)
        is_captured = data.device.type == "cuda"
        bank = [p for n, p in model.named_parameters() if n.startswith("bank.")]
        rest = [p for n, p in model.named_parameters() if not n.startswith("bank.")]
        rates = [training.learning_rate, training.learning_rate * training.embedding_factor]
        groups = [
            # A captured step reads its rate on the device, where a later one can be set.
            {"params": p, "lr": torch.tensor(rate, device=data.device) if is_captured else rate}
            for p, rate in zip((rest, bank), rates, strict=True)
        ]
        optimizer = torch.optim.Adam(groups, fused=True, capturable=is_captured)
        average = WeightAverage(model, training.average)
        return cls(model, config, training, optimizer, average, is_captured=is_captured)

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on (random draws are functions of seed and day)."""
        return state(self.model, self.optimizer, self.average)

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        # The optimizer's state is other memory from here on.
        self._training_step = None
        restore(tensors, self.model, self.optimizer, self.average)

    def train_on(
        self, data: RankerData, groups: Sequence[Array], known_before_us: int, size: int
    ) -> tuple[float, int]:
        """One step a group of at most `size` pieces; returns (mean loss, steps)."""
        self.num_steps += len(groups)
        self.num_rows += int(sum(data.pieces.size[group].sum() for group in groups))
        if not groups:
            return float("nan"), 0
        if self.is_captured:
            return self._training_on(data, size).run(groups, known_before_us), len(groups)

        def batches() -> Iterator[RankerBatch]:
            for group in groups:
                yield data.batch(group, self.config, known_before_us=known_before_us)

        total = torch.zeros((), device=data.device)
        max_norm, average = self.training.max_norm, self.average
        steps = train(
            self.model, batches(), self.loss, self.optimizer, average=average, max_norm=max_norm
        )
        for _step, loss in steps:
            total += loss
        return float(total) / len(groups), len(groups)

    def _training_on(self, data: RankerData, size: int) -> TrainingStep:
        """The captured step over this data: captured once, as long as data and size stay."""
        held = self._training_step
        if held is None or held.data is not data or held.piece_3R.shape[1] != size:
            held = self._training_step = None
            held = self._training_step = TrainingStep(
                data,
                self.config,
                self.model,
                self.loss,
                self.optimizer,
                self.average,
                num_pieces=size,
                max_norm=self.training.max_norm,
            )
        return held

    def _prediction_on(self, data: RankerData) -> PredictionStep:
        held = self._prediction_step
        if held is None or held.data is not data:
            held = self._prediction_step = None
            held = self._prediction_step = PredictionStep(
                data, self.config, self.model, num_pieces=PREDICT_REQUESTS
            )
        return held

    def loss(self, batch: RankerBatch) -> Tensor:
        """Mean cross-entropy of known labels, plus what the ranker adds by `losses`."""
        ranker = cast(Ranker, self.model)
        encoded = ranker.encode_request(batch)
        loss = cross_entropy(ranker.score(encoded, batch), batch.label_RC)
        extra: Any = getattr(self.model, "losses", None)
        return loss if extra is None else loss + extra(encoded, batch)

    @torch.no_grad()
    def predict(self, data: RankerData, pieces: Array) -> tuple[Array, Floats]:
        """(sample, probability) of all candidates of the pieces, under the averaged weights."""
        if not len(pieces):
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        self.model.eval()
        sample, score = [], []
        if self.is_captured:
            with self.average:
                samples, scores = self._prediction_on(data).run(pieces)
            is_there = samples >= 0
            return samples[is_there], scores[is_there]
        with self.average:
            for start in range(0, len(pieces), PREDICT_REQUESTS):
                batch = data.batch(pieces[start : start + PREDICT_REQUESTS], self.config)
                sample.append(batch.sample_RC.flatten())
                score.append(torch.sigmoid(self.model(batch).float()).flatten())
        samples, scores = torch.cat(sample).cpu().numpy(), torch.cat(score).cpu().numpy()
        is_there = samples >= 0
        return samples[is_there], scores[is_there]


def cross_entropy(logit_RC: Tensor, label_RC: Tensor) -> Tensor:
    """Mean over known labels; 0 where none is known."""
    is_known_RC = ~torch.isnan(label_RC)
    loss_RC = F.binary_cross_entropy_with_logits(
        logit_RC, label_RC.nan_to_num(0.0), reduction="none"
    )
    return (loss_RC * is_known_RC).sum() / is_known_RC.sum().clamp(min=1)


def walk(
    trainer: RankerTrainer, data: RankerData, days: range, *, first_day: int | None = None
) -> Iterator[DayResult]:
    """Day by day: predict, then train on the day and on requests of [first_day, day).

    Days are numbers since 1970. A label counts once it is known by the end of the walked day. The
    first `warm_days` after first_day (default: the first of `days`) are not predicted.
    """
    training = trainer.training
    first_day = days.start if first_day is None else first_day
    for day in days:
        today = data.of_days(day, day + 1)
        is_warm = day < first_day + training.warm_days
        sample, score = trainer.predict(data, today[:0] if is_warm else today)
        random = np.random.default_rng([training.seed, day])
        earlier = data.of_days(first_day, day)
        num_replayed = round(len(today) * training.replay) if len(earlier) else 0
        replayed = earlier[random.integers(0, max(1, len(earlier)), num_replayed)]
        size = pieces_a_batch(data, training)
        groups = [*_groups(random.permutation(today), size), *_groups(replayed, size)]
        loss, num_steps = trainer.train_on(data, groups, (day + 1) * DAY_US, size)
        yield DayResult(day, sample, score, loss, num_steps)


def fit(trainer: RankerTrainer, data: RankerData, days: range) -> Iterator[EpochResult]:
    """Shuffled passes over the days, the last tenth of them held out to decide when to stop.

    Ends with the best pass's weights as the trainer's. The learning rate falls linearly to a tenth
    over the passes.
    """
    training = trainer.training
    num_held = max(1, round(len(days) * VALIDATION_SHARE)) if len(days) > 1 else 0
    border = days.stop - num_held
    pieces, held_out = data.of_days(days.start, border), data.of_days(border, days.stop)
    size = min(pieces_a_batch(data, training), max(1, len(pieces) // training.pass_steps))
    rates = [float(group["lr"]) for group in trainer.optimizer.param_groups]
    passes = EarlyStop(training.patience)
    for epoch in range(training.epochs):
        _set_rates(trainer, [rate * (1 - 0.9 * epoch / training.epochs) for rate in rates])
        order = np.random.default_rng([training.seed, epoch]).permutation(pieces)
        # What a pass over days before the border may know is what was known at the border.
        groups = _groups(order, size)
        loss, _ = trainer.train_on(data, groups, border * DAY_US, size)
        held_loss = _log_loss(trainer, data, held_out, days.stop * DAY_US)
        yield EpochResult(epoch, loss, held_loss, passes.judge(held_loss, trainer.state()))
        if passes.is_over:
            break
    _set_rates(trainer, rates)
    trainer.restore(passes.best)


def _set_rates(trainer: RankerTrainer, rates: Sequence[float]) -> None:
    """A rate on the device stays where it is: captured steps read it there."""
    for group, rate in zip(trainer.optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _log_loss(
    trainer: RankerTrainer, data: RankerData, pieces: Array, known_before_us: int
) -> float:
    """Log loss of the samples whose label is known by then; NaN without any."""
    sample, score = trainer.predict(data, pieces)
    label = data.samples.label[sample]
    kept = ~np.isnan(label) & (data.samples.label_time_us[sample] < known_before_us)
    if not kept.any():
        return float("nan")
    p = np.clip(np.where(label[kept] == 1, score[kept], 1 - score[kept]), 1e-7, 1)
    return float(-np.log(p).mean())


def pieces_a_batch(data: RankerData, training: RankerTraining) -> int:
    """Pieces of requests that hold about `batch_candidates` in this data."""
    return max(1, round(training.batch_candidates / max(1.0, float(data.pieces.size.mean()))))


def _groups(pieces: Array, size: int) -> list[Array]:
    return [pieces[start : start + size] for start in range(0, len(pieces), size)]
