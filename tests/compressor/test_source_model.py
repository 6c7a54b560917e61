"""What an implementation of IAT must show (papers/iat 1.12), as far as the compressor alone can
show it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from compressor.batch import SourceBatch, make_batch
from compressor.data import StreamData
from compressor.nn.embedding import Vocabulary
from compressor.source_model import SourceModel
from pipelines.domain import Domain
from tests.compressor.conftest import small_config

NEVER = 2**62


def whole(data: StreamData, context: int = 16) -> SourceBatch:
    """Every user as one unit, all labels known."""
    starts = np.unique(data.user_start)
    units = np.stack([starts, np.append(starts[1:], len(data))], axis=1)
    return make_batch(data, torch.from_numpy(units), context=context, known_before_us=NEVER)


@pytest.fixture(params=["temporal", "user"])
def model(request: pytest.FixtureRequest, tiny: Domain, vocabulary: Vocabulary) -> SourceModel:
    return SourceModel(small_config(order=request.param), tiny, vocabulary, seed=0).eval()


@pytest.fixture
def user_model(tiny: Domain, vocabulary: Vocabulary) -> SourceModel:
    torch.manual_seed(1)
    model = SourceModel(small_config(order="user"), tiny, vocabulary, seed=0).eval()
    for layer in model.sit.layers:  # biases start at zero: give every bucket its own
        torch.nn.init.normal_(layer.gap_bias)
        torch.nn.init.normal_(layer.rank_bias)
    return model


def disturbed(batch: SourceBatch, rows: Sequence[int]) -> SourceBatch:
    """The batch with other fields in some rows."""
    ids, numbers, after = (
        batch.rows_NS.clone(),
        batch.numbers_NM.clone(),
        batch.after_numbers_NM.clone(),
    )
    ids[rows] = ids[rows].roll(1, dims=1)
    numbers[rows] += 3.0
    after[rows] = after[rows].nan_to_num() + 5.0
    return batch._replace(rows_NS=ids, numbers_NM=numbers, after_numbers_NM=after)


def stored_tokens(model: SourceModel, batch: SourceBatch) -> Tensor:
    return model.tokens(
        batch.rows_NS, batch.numbers_NM, batch.after_rows_NS, batch.after_numbers_NM
    )


def test_a_token_depends_on_its_own_row_alone(model: SourceModel, data: StreamData) -> None:
    batch = whole(data)
    before = stored_tokens(model, batch)
    after = stored_tokens(model, disturbed(batch, [3]))
    others = [i for i in range(len(before)) if i != 3]
    assert torch.equal(before[others], after[others])
    assert not torch.allclose(before[3], after[3])


def test_a_prediction_moves_only_when_a_strictly_earlier_event_of_its_user_or_its_own_row_moves(
    user_model: SourceModel, data: StreamData
) -> None:
    batch = whole(data)
    before = user_model(batch).logit_Q
    for row in range(len(data)):
        after = user_model(disturbed(batch, [row])).logit_Q
        moved = ((before - after).abs() > 1e-6).numpy()
        may_move = (
            (data.user_id == data.user_id[row])
            & (data.time_us > data.time_us[row])
            & data.is_event[row]
        )
        may_move[row] = True
        assert not moved[~may_move].any()
        assert moved[may_move].all()


def test_a_fixed_field_known_after_the_event_never_reaches_its_own_prediction(
    user_model: SourceModel, data: StreamData
) -> None:
    batch = whole(data)
    after = batch.after_numbers_NM.clone()
    after[0] = after[0].nan_to_num() + 5.0
    before, moved = user_model(batch), user_model(batch._replace(after_numbers_NM=after))
    assert before.logit_Q[0] == moved.logit_Q[0]
    assert not torch.allclose(before.token_KD[0], moved.token_KD[0])


def test_the_stream_over_stored_tokens_equals_the_packed_batch(
    user_model: SourceModel, data: StreamData
) -> None:
    batch = whole(data)
    packed = user_model(batch)
    streamed = user_model.forward_stored(batch, stored_tokens(user_model, batch)[batch.token_K])
    torch.testing.assert_close(streamed.logit_Q, packed.logit_Q, atol=1e-5, rtol=0)


def test_one_row_at_a_time_over_stored_tokens_equals_the_packed_batch(
    user_model: SourceModel, data: StreamData
) -> None:
    packed = user_model(whole(data)).logit_Q
    for row in range(len(data)):
        one = make_batch(data, torch.tensor([[row, row + 1]]), context=64, known_before_us=NEVER)
        # Siblings that come before in the packed order are context here: the mask must hide them.
        logit = user_model.forward_stored(one, stored_tokens(user_model, one)[one.token_K]).logit_Q
        torch.testing.assert_close(logit[0], packed[row], atol=1e-5, rtol=0)


def test_later_losses_reach_earlier_compressions_in_a_packed_batch_and_never_in_the_stream(
    user_model: SourceModel, data: StreamData
) -> None:
    batch = whole(data)
    numbers = batch.after_numbers_NM.nan_to_num().requires_grad_()
    last = int((data.user_id == data.user_id[0]).nonzero()[0][-1])
    user_model(batch._replace(after_numbers_NM=numbers)).logit_Q[last].backward()
    assert numbers.grad is not None
    assert numbers.grad[0].abs().sum() > 0

    stored = stored_tokens(user_model, batch)[batch.token_K].detach().requires_grad_()
    user_model.forward_stored(batch, stored).logit_Q.sum().backward()
    assert stored.grad is None


def test_a_triangular_mask_would_be_seen(user_model: SourceModel, data: StreamData) -> None:
    """With `<=` in place of `<`, siblings see each other: the guard above must be able to fail."""
    batch = whole(data)
    packing = batch.packing
    by_position = packing._replace(time=packing.time + torch.arange(len(packing.time)) % 4)
    before = user_model(batch._replace(packing=by_position)).logit_Q
    after = user_model(disturbed(batch._replace(packing=by_position), [0])).logit_Q
    assert (before[1] - after[1]).abs() > 1e-6


def test_units_in_one_batch_do_not_see_each_other(
    user_model: SourceModel, data: StreamData
) -> None:
    units = torch.from_numpy(data.day_units())
    together = make_batch(data, units, context=16, known_before_us=NEVER)
    packed = user_model(together).logit_Q
    alone = torch.cat(
        [
            user_model(make_batch(data, unit[None], context=16, known_before_us=NEVER)).logit_Q
            for unit in units
        ]
    )
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)


def test_context_is_the_newest_events_before_the_unit(data: StreamData) -> None:
    last = torch.from_numpy(data.day_units()[-1:])
    batch = make_batch(data, last, context=3, known_before_us=NEVER)
    past = batch.row_N[: -int(last[0, 1] - last[0, 0])].numpy()
    events = [
        r
        for r in data.events
        if r < int(last[0, 0]) and data.user_id[r] == data.user_id[int(last[0, 0])]
    ]
    assert past.tolist() == events[-3:]


def test_a_label_not_known_by_then_trains_nothing(data: StreamData) -> None:
    unit = torch.from_numpy(data.day_units()[:1])
    known = int(data.tensors.label_time_N[unit[0, 0]])
    assert make_batch(data, unit, context=4, known_before_us=known).label_Q[0].isnan()
    assert not make_batch(data, unit, context=4, known_before_us=known + 1).label_Q[0].isnan()


def test_the_next_request_is_strictly_later_and_known_by_then(data: StreamData) -> None:
    batch = whole(data)
    has_next = batch.next_row_K >= 0
    rows = batch.row_N[batch.token_K][has_next].numpy()
    following = batch.next_row_K[has_next].numpy()
    assert has_next.any()
    assert (data.user_id[rows] == data.user_id[following]).all()
    assert (data.time_us[rows] < data.time_us[following]).all()
    limited = make_batch(
        data, torch.from_numpy(data.day_units()), context=4, known_before_us=int(data.time_us.min())
    )
    assert (limited.next_row_K == -1).all()


def test_ids_of_later_days_move_no_row_that_was_there_before(
    tiny: Domain, vocabulary: Vocabulary
) -> None:
    more = vocabulary.extended(["item"], np.array([[200], [3]], np.int32))
    before = SourceModel(small_config(), tiny, vocabulary, seed=5).bank.table.weight
    after = SourceModel(small_config(), tiny, more, seed=5).bank.table.weight
    old = {int(k): before[i] for i, k in enumerate(vocabulary.row_keys())}
    for i, key in enumerate(more.row_keys()):
        if int(key) in old:
            assert torch.equal(after[i], old[int(key)])
    assert len(after) == len(before) + 1
