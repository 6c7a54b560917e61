"""A ranker that is trained day by day, by one command a day or by one over many (DESIGN 5.5).

What a day gives depends on days before it and on its own rows alone: samples and ids of later days
are not read, though they be there, and every day starts from the state that the day before it left
on disk. So one command over five days ends bit for bit where five do, whenever they ran.

Shape legend: n samples, M match features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from compressor.nn.embedding import Vocabulary
from compressor.training import checkpoint
from downstream.configs import RankerConfig, RankerTraining
from downstream.data import DAY_US, RankerData, match_of, vocabulary_of
from downstream.inputs import RankerInputs
from downstream.match_features import MatchIndex
from downstream.samples import Samples
from downstream.streaming import DayResult, RankerTrainer, walk
from downstream.user_index import IndexStore
from pipelines.domain import Domain

VOCABULARY = "vocabulary."


@dataclass(frozen=True, kw_only=True)
class State:
    """All that a ranker's next day depends on."""

    settings: Mapping[str, Any]
    """What the ranker is, as JSON gives it back."""
    next_day: int
    """Since 1970."""
    days: Sequence[Mapping[str, Any]] = ()
    """What is told of each day so far."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """Of `RankerTrainer.state`; none before the first day that has samples."""
    vocabulary: Vocabulary = field(default_factory=Vocabulary.empty)
    num_steps: int = 0
    num_rows: int = 0

    def save(self, folder: Path) -> None:
        """In place of the state that the folder holds, in one step."""
        held = {VOCABULARY + n: torch.from_numpy(b) for n, b in self.vocabulary.buckets.items()}
        meta = {
            "settings": self.settings,
            "next_day": self.next_day,
            "days": self.days,
            "num_steps": self.num_steps,
            "num_rows": self.num_rows,
        }
        checkpoint.save(folder, {**self.tensors, **held}, meta)

    @classmethod
    def load(cls, folder: Path) -> State:
        held, meta = checkpoint.load(folder)
        tensors = {n: t for n, t in held.items() if not n.startswith(VOCABULARY)}
        buckets = {
            n.removeprefix(VOCABULARY): held[n].numpy() for n in sorted({*held} - {*tensors})
        }
        return cls(**meta, tensors=tensors, vocabulary=Vocabulary(buckets))


class DailyData:
    """The samples of a range of days over a store, each day read once as long as it is asked for.

    The store may hold later events and tokens: no row reads them.
    """

    def __init__(
        self, read: Callable[[int], pa.Table], domain: Domain, store: IndexStore, *, fields: bool
    ) -> None:
        self.read, self.domain, self.store, self.fields = read, domain, store, fields
        self.match = MatchIndex.build(store)
        self._held: dict[int, tuple[pa.Table, Tensor]] = {}

    def num_samples(self, day: int) -> int:
        return len(self._of(day)[0])

    def load(self, days: range, older: Vocabulary) -> RankerData:
        """The samples of `days`; the vocabulary is `older` with all ids of before their end."""
        self._held = {day: held for day, held in self._held.items() if day in days}
        held = [self._of(day) for day in days]
        samples = Samples.of(pa.concat_tables([rows for rows, _ in held]), self.domain)
        match_nM = torch.cat([match for _, match in held])
        inputs = RankerInputs.of(
            self.domain, num_match=match_nM.shape[1], token_width=self.store.width
        )
        vocabulary = vocabulary_of(
            inputs, samples, self.store, fields=self.fields, older=older,
            before_us=days.stop * DAY_US,
        )  # fmt: skip
        return RankerData.from_arrays(
            inputs, samples, self.store, match_nM, delay_us=self.domain.tokens.delay_us,
            fields=self.fields, vocabulary=vocabulary,
        )  # fmt: skip

    def _of(self, day: int) -> tuple[pa.Table, Tensor]:
        """A day's rows and their match features, which are computed day by day: how floats are
        rounded may depend on how many there are."""
        if day not in self._held:
            rows = self.read(day)
            inputs = RankerInputs.of(self.domain, num_match=0)
            match_nM = match_of(Samples.of(rows, self.domain), inputs, self.store, self.match)
            self._held[day] = rows, match_nM
        return self._held[day]


@dataclass(frozen=True)
class Walked:
    """A day of the walk: what it gave, and what is left."""

    state: State
    result: DayResult
    data: RankerData
    trainer: RankerTrainer


def walk_day(
    name: str,
    config: RankerConfig,
    training: RankerTraining,
    state: State,
    daily: DailyData,
    *,
    first_day: int,
    window: int,
) -> Walked | None:
    """Predict the state's next day, then train on it and on requests of the `window` days before it
    (0: of all since `first_day`). None where the day has no samples, which changes nothing."""
    day = state.next_day
    if not daily.num_samples(day):
        return None
    since = max(first_day, day - window) if window else first_day
    data = daily.load(range(since, day + 1), state.vocabulary)
    trainer = RankerTrainer.create(name, config, training, data)
    if state.tensors:
        rows = data.vocabulary.rows_of(state.vocabulary)
        trainer.restore(checkpoint.grown(state.tensors, trainer.model, trainer.optimizer, rows))
        trainer.num_steps, trainer.num_rows = state.num_steps, state.num_rows
    (result,) = walk(trainer, data, range(day, day + 1), first_day=first_day)
    after = replace(
        state, next_day=day + 1, tensors=trainer.state(), vocabulary=data.vocabulary,
        num_steps=trainer.num_steps, num_rows=trainer.num_rows,
    )  # fmt: skip
    return Walked(after, result, data, trainer)
