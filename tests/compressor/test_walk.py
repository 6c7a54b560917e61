"""The two protocols of training a compressor: what they read, where they end."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch

from compressor import data as streams
from compressor.configs import TrainingConfig
from compressor.data import StreamData
from compressor.nn.embedding import Vocabulary
from compressor.walk import Trainer, fit, walk
from pipelines.domain import Domain
from tests.compressor.conftest import small_config, stream_rows

FAST = TrainingConfig(learning_rate=0.03, epochs=6, pass_steps=4, batch_units=2)


def trainer_of(tiny: Domain, vocabulary: Vocabulary, training: TrainingConfig = FAST) -> Trainer:
    return Trainer.create(small_config(), training, tiny, vocabulary, "cpu")


def days_of(data: StreamData) -> range:
    return range(int(data.day.min()), int(data.day.max()) + 1)


def without_labels(rows: pa.Table, from_day: int) -> pa.Table:
    """The rows with every label from a day on turned over."""
    day = np.asarray(rows["event_date"].cast(pa.int32()))
    label = np.where(day >= from_day, 1 - rows["label_buy"].to_numpy(), rows["label_buy"])
    place = rows.schema.get_field_index("label_buy")
    return rows.set_column(place, "label_buy", pa.array(label, rows.schema.field(place).type))


def test_a_frozen_run_ends_with_its_best_pass_and_stops_after_a_worse_one(
    tiny: Domain, data: StreamData, vocabulary: Vocabulary
) -> None:
    trainer = trainer_of(tiny, vocabulary)
    losses, weights = [], []
    for result in fit(trainer, data, days_of(data)):
        losses.append(result.held_out_loss)
        weights.append([w.clone() for w in trainer.average.averaged])
        assert result.is_best == (result.held_out_loss == min(losses))
    best = int(np.argmin(losses))
    assert len(losses) == min(FAST.epochs, best + 1 + FAST.patience)
    for held, ended in zip(weights[best], trainer.average.averaged, strict=True):
        assert torch.equal(held, ended)


def test_a_frozen_run_reads_nothing_after_its_days(
    tiny: Domain, rows: pa.Table, vocabulary: Vocabulary
) -> None:
    found = []
    for given in (rows, without_labels(rows, 20_003)):
        data = streams.load(given, tiny, vocabulary)
        trainer = trainer_of(tiny, vocabulary)
        passes = list(fit(trainer, data, range(20_000, 20_003)))
        found.append((passes, trainer.average.averaged))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


@pytest.mark.parametrize("num_users", [3, 12])
def test_a_pass_takes_about_as_many_steps_on_a_small_log_as_on_a_large_one(
    tiny: Domain, num_users: int
) -> None:
    rows = stream_rows(tiny, num_users=num_users, num_requests=3)
    vocabulary = streams.vocabulary_of(rows, tiny)
    data = streams.load(rows, tiny, vocabulary)
    trainer = trainer_of(tiny, vocabulary, TrainingConfig(epochs=1, pass_steps=3))
    list(fit(trainer, data, range(20_000, 20_010)))
    assert trainer.num_steps == 3


def test_a_day_of_the_walk_is_predicted_before_its_labels_are_learned(
    tiny: Domain, rows: pa.Table, vocabulary: Vocabulary
) -> None:
    found = []
    for given in (rows, without_labels(rows, 20_002)):
        data = streams.load(given, tiny, vocabulary)
        days = list(range(20_000, 20_004))
        found.append(list(walk(trainer_of(tiny, vocabulary), data, days)))
    for ours, theirs in list(zip(*found, strict=True))[:3]:
        np.testing.assert_array_equal(ours.score, theirs.score)
    assert not np.array_equal(found[0][3].score, found[1][3].score)
    for ours, theirs in list(zip(*found, strict=True))[:2]:
        np.testing.assert_array_equal(ours.token, theirs.token)


def test_a_config_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="pass_steps and patience must be positive"):
        TrainingConfig(pass_steps=0)
