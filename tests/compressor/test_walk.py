"""The two protocols of training a compressor: what they read, where they end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch

from compressor import data as streams
from compressor.batch import make_batch
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


def disturbed(data: StreamData, row: int) -> StreamData:
    """The stream with other fields in one row, those known only afterwards too."""
    t = data.tensors
    changed = {
        "rows_NS": t.rows_NS.clone(),
        "numbers_NM": t.numbers_NM.clone(),
        "after_numbers_NM": t.after_numbers_NM.clone(),
    }
    changed["rows_NS"][row] = changed["rows_NS"][row].roll(1)
    changed["numbers_NM"][row] += 3.0
    changed["after_numbers_NM"][row] = changed["after_numbers_NM"][row].nan_to_num() + 5.0
    return replace(data, tensors=replace(t, **changed))


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


def test_a_token_stored_after_sit_depends_on_strictly_earlier_events_one_stored_before_on_none(
    tiny: Domain, data: StreamData, vocabulary: Vocabulary
) -> None:
    trainer, events = trainer_of(tiny, vocabulary), data.events
    user, time = data.user_id[events], data.time_us[events]

    def stored(given: StreamData) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        row, after_sit = trainer.tokens_after_sit(given, given.day_units())
        return trainer.tokens(given, events), after_sit[np.argsort(row)]

    before = stored(data)
    for row in range(len(data)):
        pre_sit, post_sit = (
            (a != b).any(axis=1) for a, b in zip(before, stored(disturbed(data, row)), strict=True)
        )
        is_itself = events == row
        is_later = (user == data.user_id[row]) & (time > data.time_us[row]) & data.is_event[row]
        np.testing.assert_array_equal(pre_sit, is_itself)
        np.testing.assert_array_equal(post_sit, is_itself | is_later)


def test_a_token_stored_after_sit_is_what_the_prediction_of_its_row_reads_of_the_past(
    tiny: Domain, data: StreamData, vocabulary: Vocabulary
) -> None:
    trainer = trainer_of(tiny, vocabulary)
    list(fit(trainer, data, days_of(data)))
    units = data.day_units()
    row, token = trainer.tokens_after_sit(data, units)
    assert sorted(row) == data.events.tolist()
    model = trainer.model
    with trainer.average, torch.no_grad():
        for begin, end in units:
            batch = make_batch(
                data, torch.tensor([[begin, end]]), context=16, known_before_us=2**62
            )
            found = model(batch)
            own_QD = model.squeeze(
                model.hidden(batch.rows_NS[batch.query_Q], batch.numbers_NM[batch.query_Q])
            )
            read_PD = model.sit(torch.cat([found.token_KD, own_QD]), batch.packing)
            read_QD = read_PD[len(found.token_KD) :]
            logit_Q1 = model.decoder(torch.cat([read_QD, own_QD], 1)) + model.wide(read_QD)
            torch.testing.assert_close(logit_Q1.squeeze(1), found.logit_Q)
            scaled_QD = torch.nn.functional.layer_norm(read_QD, read_QD.shape[1:])
            is_event_Q = data.is_event[begin:end]
            kept = torch.from_numpy(token[(row >= begin) & (row < end)]).float()
            torch.testing.assert_close(kept, scaled_QD[is_event_Q], rtol=1e-3, atol=1e-3)


def test_a_walk_that_stores_after_sit_trains_the_same_and_keeps_what_was_read_before_the_day(
    tiny: Domain, data: StreamData, vocabulary: Vocabulary
) -> None:
    days = list(days_of(data))
    usual, control = (
        list(walk(trainer_of(tiny, vocabulary), data, days, stored=stored))
        for stored in ("pre-sit", "post-sit")
    )
    for ours, theirs in zip(control, usual, strict=True):
        np.testing.assert_array_equal(ours.score, theirs.score)
        np.testing.assert_array_equal(ours.event_row, theirs.event_row)
        assert ours.loss == theirs.loss
        assert not np.array_equal(ours.token, theirs.token)
    first = data.day_units(days[:1])
    row, untrained = trainer_of(tiny, vocabulary).tokens_after_sit(data, first)
    np.testing.assert_array_equal(control[0].event_row, row)
    np.testing.assert_array_equal(control[0].token, untrained)


def test_a_model_without_sit_has_nothing_to_store_after_it(
    tiny: Domain, data: StreamData, vocabulary: Vocabulary
) -> None:
    trainer = Trainer.create(small_config(order="temporal"), FAST, tiny, vocabulary, "cpu")
    with pytest.raises(ValueError, match="has no SIT"):
        trainer.tokens_after_sit(data, data.day_units())


def test_a_config_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="pass_steps and patience must be positive"):
        TrainingConfig(pass_steps=0)
