"""Walk the days: predict with yesterday's weights, train on the day, write the day's tokens once
(DESIGN 5.5).

`walk` is the streaming protocol. `fit` is the frozen one: passes over given days, nothing later.
Both end in the same place: averaged weights, which predict and write tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from compressor.batch import SourceBatch, make_batch
from compressor.configs import SourceConfig, Stored, TrainingConfig
from compressor.data import DAY_US, Int64s, StreamData
from compressor.losses import SourceLosses
from compressor.nn.embedding import Vocabulary
from compressor.source_model import SourceModel, SourceOutput
from compressor.training import checkpoint
from compressor.training.loop import EarlyStop, WeightAverage, train
from pipelines.domain import Domain

TOKEN_ROWS = 8192
PREDICT_UNITS = 256
HELD_OUT = 0.1
"""Share of a frozen run's days, its last, that decide when to stop."""


class DayResult(NamedTuple):
    """What one day of the walk leaves: predictions of its rows (before training on them), tokens
    of its events."""

    day: int
    row: Int64s
    score: npt.NDArray[np.float32]
    event_row: Int64s
    token: npt.NDArray[np.float16]
    loss: float


@dataclass
class Trainer:
    """A source model with all that its training carries from batch to batch."""

    model: SourceModel
    losses: SourceLosses
    optimizer: torch.optim.Optimizer
    average: WeightAverage
    training: TrainingConfig
    num_steps: int = 0

    @classmethod
    def create(
        cls,
        config: SourceConfig,
        training: TrainingConfig,
        domain: Domain,
        vocabulary: Vocabulary,
        device: torch.device | str,
    ) -> Trainer:
        torch.manual_seed(training.seed)
        model = SourceModel(config, domain, vocabulary, seed=training.seed).to(device)
        losses = SourceLosses(config, domain).to(device)
        rate = training.learning_rate
        bank = list(model.bank.parameters())
        rest = [p for n, p in model.named_parameters() if not n.startswith("bank.")] + list(
            losses.parameters()
        )
        groups = [
            {"params": rest, "lr": rate},
            {"params": bank, "lr": rate * training.embedding_factor},
        ]
        optimizer = torch.optim.Adam(groups, lr=rate, fused=True)
        return cls(model, losses, optimizer, WeightAverage(model, training.average), training)

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on (random draws are functions of seed, day and pass)."""
        found = checkpoint.state(self.model, self.optimizer, self.average)
        return found | {f"losses.{n}": t for n, t in self.losses.state_dict().items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `state`; shapes must agree."""
        checkpoint.restore(tensors, self.model, self.optimizer, self.average)
        self.losses.load_state_dict(
            {n.removeprefix("losses."): t for n, t in tensors.items() if n.startswith("losses.")}
        )

    @property
    def context(self) -> int:
        """Past events that a unit brings along: none where rows are predicted alone."""
        return self.model.config.context if self.model.sit is not None else 0

    def train_on(
        self,
        data: StreamData,
        units: list[Tensor],
        known_before_us: int,
        generator: torch.Generator,
        since_us: int = 0,
    ) -> float:
        """Train on groups of units in their order, with nothing that was known later or happened
        earlier; returns the mean loss."""
        context = self.context

        def batches() -> Iterator[SourceBatch]:
            for group in units:
                yield make_batch(
                    data, group, context=context, known_before_us=known_before_us,
                    since_us=since_us, generator=generator,
                )  # fmt: skip

        def loss_of(batch: SourceBatch) -> Tensor:
            return self.losses(self.model, data, batch, self.model(batch))

        both = nn.ModuleList([self.model, self.losses])
        total = torch.zeros((), device=data.tensors.time_N.device)
        for _step, loss in train(
            both,
            batches(),
            loss_of,
            self.optimizer,
            average=self.average,
            max_norm=self.training.max_norm,
        ):
            total += loss
            self.num_steps += 1
        return float(total) / max(1, len(units))

    @torch.no_grad()
    def predict(
        self, data: StreamData, units: Int64s, since_us: int = 0
    ) -> tuple[Int64s, npt.NDArray[np.float32]]:
        """Rows of the units and their logits under the averaged weights."""
        rows, scores = [], []
        for row_Q, output in self._outputs(data, units, since_us):
            rows.append(row_Q.cpu().numpy())
            scores.append(output.logit_Q.float().cpu().numpy())
        if not rows:
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        return np.concatenate(rows), np.concatenate(scores)

    @torch.no_grad()
    def tokens_after_sit(
        self, data: StreamData, units: Int64s, since_us: int = 0
    ) -> tuple[Int64s, npt.NDArray[np.float16]]:
        """Event rows of the units and, on the scale of tokens, what SIT reads for each when it is
        predicted: of its own row, fields known at the request alone (the control of papers/iat 1.4,
        storage after SIT)."""
        width = self.model.config.bottleneck
        rows, found = [np.zeros(0, np.int64)], [np.zeros((0, width), np.float16)]
        for row_Q, output in self._outputs(data, units, since_us):
            if output.read_QD is None:
                raise ValueError("tokens after SIT need order 'user': this model has no SIT")
            is_event_Q = data.tensors.is_event_N[row_Q]
            token_ED = self.model.token_norm(output.read_QD[is_event_Q])
            rows.append(row_Q[is_event_Q].cpu().numpy())
            found.append(token_ED.half().cpu().numpy())
        return np.concatenate(rows), np.concatenate(found)

    def _outputs(
        self, data: StreamData, units: Int64s, since_us: int
    ) -> Iterator[tuple[Tensor, SourceOutput]]:
        """Query rows and what the averaged weights say of them, some units at a time."""
        self.model.eval()
        with self.average:
            for start in range(0, len(units), PREDICT_UNITS):
                group = torch.from_numpy(units[start : start + PREDICT_UNITS]).to(
                    data.tensors.time_N.device
                )
                batch = make_batch(
                    data, group, context=self.context, known_before_us=0, since_us=since_us
                )
                yield batch.row_N[batch.query_Q], self.model(batch)

    @torch.no_grad()
    def tokens(self, data: StreamData, rows: Int64s) -> npt.NDArray[np.float16]:
        """[len(rows), D] tokens under the averaged weights, each from its own row alone."""
        self.model.eval()
        t, found = data.tensors, []
        with self.average:
            for start in range(0, len(rows), TOKEN_ROWS):
                at = torch.from_numpy(rows[start : start + TOKEN_ROWS]).to(t.time_N.device)
                token_ND = self.model.tokens(
                    t.rows_NS[at], t.numbers_NM[at], t.after_rows_NS[at], t.after_numbers_NM[at]
                )
                found.append(token_ND.half().cpu().numpy())
        width = self.model.config.bottleneck
        return np.concatenate(found) if found else np.zeros((0, width), np.float16)


def walk(
    trainer: Trainer,
    data: StreamData,
    days: Sequence[int],
    *,
    first_day: int | None = None,
    kept: npt.NDArray[np.bool_] | None = None,
    is_training: bool = True,
    stored: Stored = "pre-sit",
) -> Iterator[DayResult]:
    """Day by day: predict, train on the day and on replayed earlier days, then the day's tokens.

    Rows that are not `kept` are predicted and get tokens, and are never trained on. Tokens stored
    post-SIT are what was read when the day was predicted, before it was trained on.

    Replay draws uniformly from the user-days in [first_day, day) (default: the first of `days`); a
    replayed row reads labels known by the end of the walked day, and nothing of a later day. With
    `window_days`, nothing that is that much older than the walked day is read at all.
    """
    training, device = trainer.training, data.tensors.time_N.device
    first_day = int(days[0]) if first_day is None and len(days) else first_day
    all_units = data.day_units()
    unit_day = data.day[all_units[:, 0]]
    is_kept = np.ones(len(all_units), bool) if kept is None else kept[all_units[:, 0]]
    for day in map(int, days):
        today = all_units[unit_day == day]
        since = window_start(day, training, first_day or 0)
        since_us = since * DAY_US if training.window_days else 0
        row, score = trainer.predict(data, today, since_us)
        read = trainer.tokens_after_sit(data, today, since_us)[1] if stored == "post-sit" else None
        random = np.random.default_rng([training.seed, day])
        generator = torch.Generator(device).manual_seed(training.seed * 1_000_003 + day)
        trained = all_units[(unit_day == day) & is_kept] if is_training else today[:0]
        earlier = all_units[(unit_day < day) & (unit_day >= since) & is_kept]
        num_replayed = round(len(trained) * training.replay) if len(earlier) else 0
        replayed = (
            earlier[random.integers(0, len(earlier), num_replayed)] if num_replayed else earlier[:0]
        )
        groups = _groups(random.permutation(trained), training.batch_units) + _groups(
            replayed, training.batch_units
        )
        units = [torch.from_numpy(g).to(device) for g in groups]
        loss = (
            trainer.train_on(data, units, (day + 1) * DAY_US, generator, since_us)
            if units
            else float("nan")
        )
        event_row = (
            np.concatenate([np.arange(b, e) for b, e in today])
            if len(today)
            else np.zeros(0, np.int64)
        )
        event_row = event_row[data.is_event[event_row]]
        token = trainer.tokens(data, event_row) if read is None else read
        yield DayResult(day, row, score, event_row, token, loss)


def window_start(day: int, training: TrainingConfig, first_day: int) -> int:
    """The first day that a walk of `day` reads, of a line that starts at `first_day`."""
    return max(first_day, day - training.window_days) if training.window_days else first_day


class FitResult(NamedTuple):
    """One pass of the frozen protocol."""

    epoch: int
    loss: float
    held_out_loss: float
    """Log loss of the days held out; NaN where no label of theirs is known."""
    is_best: bool


def fit(
    trainer: Trainer,
    data: StreamData,
    days: range,
    *,
    max_rows: int = 256,
    kept: npt.NDArray[np.bool_] | None = None,
) -> Iterator[FitResult]:
    """Frozen protocol: passes over users' whole pasts in `days`, forward then reversed in turn.

    The last tenth of the days is held out to decide when to stop; ends with the best pass's weights
    as the trainer's. Learning rate falls linearly to a tenth over the passes. Labels not known by
    the end of the days that are trained on stay unknown, and nothing after `days` is read.
    """
    training, device = trainer.training, data.tensors.time_N.device
    num_held = max(1, round(len(days) * HELD_OUT)) if len(days) > 1 else 0
    border = days.stop - num_held
    units = data.user_units(days.start, border, max_rows)
    held_out = data.day_units(range(border, days.stop))
    if kept is not None:
        units, held_out = units[kept[units[:, 0]]], held_out[kept[held_out[:, 0]]]
    size = max(1, round(len(units) / training.pass_steps))
    base = [group["lr"] for group in trainer.optimizer.param_groups]
    passes = EarlyStop(training.patience)
    for epoch in range(training.epochs):
        random = np.random.default_rng([training.seed, epoch // 2])
        order = random.permutation(len(units))
        order = order[::-1] if epoch % 2 else order
        for group, rate in zip(trainer.optimizer.param_groups, base, strict=True):
            group["lr"] = rate * (1 - 0.9 * epoch / training.epochs)
        groups = [torch.from_numpy(g).to(device) for g in _groups(units[order], size)]
        generator = torch.Generator(device).manual_seed(training.seed * 1_000_003 + epoch)
        loss = trainer.train_on(data, groups, border * DAY_US, generator)
        held_loss = _log_loss(trainer, data, held_out, days.stop * DAY_US)
        yield FitResult(epoch, loss, held_loss, passes.judge(held_loss, trainer.state()))
        if passes.is_over:
            break
    for group, rate in zip(trainer.optimizer.param_groups, base, strict=True):
        group["lr"] = rate
    trainer.restore(passes.best)


def _log_loss(trainer: Trainer, data: StreamData, units: Int64s, known_before_us: int) -> float:
    """Log loss of the units' rows whose label is known by then; NaN without any."""
    row, logit = trainer.predict(data, units)
    label, label_time = (
        t[torch.from_numpy(row).to(t.device)].cpu().numpy()
        for t in (data.tensors.label_N, data.tensors.label_time_N)
    )
    is_known = ~np.isnan(label) & (label_time < known_before_us)
    if not is_known.any():
        return float("nan")
    margin = np.where(label == 1, logit, -logit)[is_known]
    return float(np.logaddexp(0, -margin).mean())


def _groups(units: Int64s, size: int) -> list[Int64s]:
    return [
        np.ascontiguousarray(units[start : start + size]) for start in range(0, len(units), size)
    ]
