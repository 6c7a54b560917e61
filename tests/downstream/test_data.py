"""The rules of time, seen through the batches that rankers are trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from downstream.batch import MAIN, RankerBatch
from downstream.configs import RankerConfig, arm
from downstream.data import DAY_US, RankerData, with_shuffled_tokens
from downstream.match_features import MatchIndex
from downstream.user_index import IN_MEMORY, IndexStore, UserIndex
from pipelines import tables
from pipelines.domain import Domain
from pipelines.errors import InputError
from pipelines.features import NEVER_US

LENGTH = 6
MATCH = arm("match", RankerConfig(history_length=LENGTH))
FIELDS = arm("end-to-end", RankerConfig(history_length=LENGTH))
SEEDS = range(5)
MakeData = Callable[..., RankerData]


def everything(data: RankerData, config: RankerConfig) -> RankerBatch:
    return data.batch(data.of_days(0, 1000), config)


def moments(data: RankerData, batch: RankerBatch) -> np.ndarray:
    return data.samples.as_of_us[batch.sample_RC[:, 0].numpy()]


@pytest.mark.parametrize("seed", SEEDS)
def test_histories_are_the_newest_events_strictly_before_the_request(
    seed: int, make_data: MakeData
) -> None:
    data = make_data(seed=seed)
    batch, index = everything(data, MATCH), data.store.index.arrays
    users = data.store.index.users
    user = np.repeat(users.key, users.count)
    sequence = batch.histories[MAIN]
    side = data.vocabulary.rows(
        data.inputs.side.slot_tables,
        np.stack([index[f.stream_column] for f in data.inputs.side.features], 1),
    )
    for r, as_of in enumerate(moments(data, batch)):
        mine = (user == int(batch.user_R[r])) & (index["event_time_us"] < as_of)
        past = np.flatnonzero(mine)[-LENGTH:]
        mask = sequence.mask_RL[r]
        assert int(mask.sum()) == len(past)
        assert mask[LENGTH - len(past) :].all()
        if not len(past):
            continue
        np.testing.assert_array_equal(sequence.ids_RLF[r, mask], side[past])
        gap_s = (as_of - index["event_time_us"][past]) / 1e6
        np.testing.assert_allclose(sequence.gap_s_RL[r, mask], gap_s)
        line = data.store.index.line(IN_MEMORY)
        readable = line.available_us[past] < as_of
        assert sequence.token_mask_RL is not None
        assert sequence.token_RLD is not None
        assert sequence.token_mask_RL[r, mask].tolist() == readable.tolist()
        token_LD = np.where(readable[:, None], line.token[past], 0)
        np.testing.assert_array_equal(sequence.token_RLD[r, mask], token_LD.astype(np.float32))
        for k, name in enumerate(("buy", "like")):
            value, known = index[f"label_{name}"][past], index[f"label_time_us_{name}"][past]
            expected = np.where((known < as_of) & (value >= 0), value + 1, 0)
            assert sequence.label_RLK[r, mask, k].tolist() == expected.tolist()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("config", [MATCH, FIELDS], ids=["match", "end-to-end"])
def test_the_future_never_moves_a_batch(
    seed: int, config: RankerConfig, make_data: MakeData
) -> None:
    data = make_data(seed=seed)
    moment = int(np.median(data.samples.as_of_us))
    before = _upto(data, moment, config)
    after = _upto(_disturbed(data, moment), moment, config)
    for ours, theirs in zip(_tensors(before), _tensors(after), strict=True):
        torch.testing.assert_close(theirs, ours, equal_nan=True, rtol=0, atol=0)


def _upto(data: RankerData, moment: int, config: RankerConfig) -> RankerBatch:
    """The batch of the pieces whose request is at the moment or before it."""
    pieces = data.of_days(0, 1000)
    as_of = data.samples.as_of_us[data.pieces.order[data.pieces.start[pieces]]]
    assert (as_of == moment).any()
    return data.batch(pieces[as_of <= moment], config)


def _tensors(batch: RankerBatch) -> list[torch.Tensor]:
    found = [*batch, *batch.histories[MAIN]]
    return [value for value in found if isinstance(value, torch.Tensor)]


def _disturbed(data: RankerData, moment: int) -> RankerData:
    """Events, labels and tokens of the moment and later, changed beyond recognition."""
    index = data.store.index
    held, line = dict(index.arrays), index.line(IN_MEMORY)
    is_later = held["event_time_us"] >= moment
    is_unread = line.available_us >= moment
    assert is_later.any()
    for name in ("f_item", "f_brand"):
        held[name] = np.where(is_later, 8 - held[name] % 8, held[name])
    for name in ("buy", "like"):
        is_unknown = held[f"label_time_us_{name}"] >= moment
        held[f"label_{name}"] = np.where(is_unknown, 1, held[f"label_{name}"]).astype(np.int8)
    is_unpublished = held["event_time_us"] // DAY_US * DAY_US + DAY_US >= moment
    held["ids"] = np.where(is_unpublished[:, None], 8 - held["ids"] % 8, held["ids"])
    held["numbers"] = np.where(is_unpublished[:, None], 99, held["numbers"]).astype(np.float32)
    token = np.where(is_unread[:, None], 99, line.token).astype(np.float16)
    items = line.items
    is_item_later = items.available_us >= moment
    decayed_sum = np.where(is_item_later[:, None], 99, items.decayed_sum).astype(np.float32)
    new_line = replace(line, token=token, items=replace(items, decayed_sum=decayed_sum))
    new = replace(index, arrays=held, lines={IN_MEMORY: new_line})
    store = IndexStore(new, IN_MEMORY)
    inverse = torch.empty_like(data.tensors.sample_n)
    inverse[data.tensors.sample_n] = torch.arange(len(data))
    match_nM = data.tensors.match_nM[inverse]
    other = RankerData.from_arrays(data.inputs, data.samples, store, match_nM, fields=True)
    # Rows are numbered by the vocabulary: without the same one, equal ids would look different.
    assert other.vocabulary.num_rows == data.vocabulary.num_rows
    return other


@pytest.mark.parametrize("seed", SEEDS)
def test_item_tokens_are_the_newest_published_before_the_request(
    seed: int, make_data: MakeData
) -> None:
    data = make_data(seed=seed)
    batch, items = everything(data, MATCH), data.store.index.line(IN_MEMORY).items
    assert batch.item_token_RCD is not None
    assert batch.item_token_mask_RC is not None
    for r, c in batch.mask_RC.nonzero().tolist():
        n = int(batch.sample_RC[r, c])
        item, as_of = data.samples.item_id[n], data.samples.as_of_us[n]
        rows = np.flatnonzero(
            (np.repeat(items.segments.key, items.segments.count) == item)
            & (items.available_us < as_of)
        )
        assert bool(batch.item_token_mask_RC[r, c]) == (len(rows) > 0)
        expected = items.decayed_sum[rows[-1]] if len(rows) else np.zeros(data.store.width)
        np.testing.assert_allclose(batch.item_token_RCD[r, c], expected)


def test_logged_fields_are_read_when_their_token_could_be(data: RankerData) -> None:
    batch = everything(replace(data, delay_us=DAY_US // 2), FIELDS)
    sequence = batch.histories[MAIN]
    assert sequence.field_mask_RL is not None
    for r, as_of in enumerate(moments(data, batch)):
        time_us = as_of - (sequence.gap_s_RL[r].double().numpy() * 1e6).round().astype(np.int64)
        available = (time_us // DAY_US + 1) * DAY_US + DAY_US // 2
        expected = sequence.mask_RL[r].numpy() & (available < as_of)
        assert sequence.field_mask_RL[r].tolist() == expected.tolist()


def test_a_label_not_yet_known_reads_as_unknown(data: RankerData) -> None:
    border = 3 * DAY_US
    batch = data.batch(data.of_days(0, 1000), MATCH, known_before_us=border)
    n_RC = batch.sample_RC.clamp(min=0).numpy()
    is_known_RC = ~np.isnan(data.samples.label[n_RC]) & (data.samples.label_time_us[n_RC] < border)
    is_known_RC &= batch.mask_RC.numpy()
    np.testing.assert_array_equal(~batch.label_RC.isnan(), is_known_RC)


def test_a_label_known_at_the_very_moment_is_not_yet_known(data: RankerData) -> None:
    n = int(np.flatnonzero(~np.isnan(data.samples.label))[0])
    at = int(data.samples.label_time_us[n])
    for border, is_known in ((at, False), (at + 1, True)):
        batch = data.batch(data.of_days(0, 1000), MATCH, known_before_us=border)
        assert bool(batch.label_RC[batch.sample_RC == n].isnan()) != is_known


def test_shuffled_tokens_are_other_events_of_the_same_day(make_data: MakeData) -> None:
    data = make_data(num_events=400)
    shuffled = with_shuffled_tokens(data.store, seed=1)
    old, new = data.store.token_ND, shuffled.token_ND
    day = data.store.columns["event_time_us"] // DAY_US
    is_written = data.store.available_us_N < NEVER_US
    assert (old[is_written] != new[is_written]).any(dim=1).float().mean() > 0.9
    for d in day.unique():
        for group in ((day == d) & is_written, (day == d) & ~is_written):
            assert sorted(map(tuple, old[group].tolist())) == sorted(
                map(tuple, new[group].tolist())
            )
    torch.testing.assert_close(shuffled.available_us_N, data.store.available_us_N)
    torch.testing.assert_close(data.store.token_ND, old)


def test_loading_computes_match_features_and_keeps_a_share_of_users(domain: Domain) -> None:
    rows, store = _rows(domain), _store(domain)
    data = RankerData.load(rows, domain, store)
    names = MatchIndex.build(store).names
    assert data.inputs.num_match == len(names)
    for place, num_earlier in enumerate(data.tensors.sample_n.tolist()):
        for name in ("item_all", "brand_all"):
            found = data.tensors.match_nM[place, names.index(name)]
            assert float(found.expm1().round()) == num_earlier
    half = [RankerData.load(rows, domain, store, user_share=0.5, user_seed=s) for s in range(20)]
    assert {len(d) for d in half} == {0, 3}


def test_samples_in_any_order_are_loaded_alike(domain: Domain) -> None:
    rows, store = _rows(domain), _store(domain)
    expected = RankerData.load(rows, domain, store).tensors
    for order in ([2, 1, 0], [1, 2, 0]):
        found = RankerData.load(rows.take(order), domain, store).tensors
        for name in ("match_nM", "as_of_G", "num_past_G", "user_place_G", "label_time_n"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name))


def _store(domain: Domain) -> IndexStore:
    """One user who took item 5 of brand 3 on days 0 and 1."""
    index = UserIndex.from_arrays(
        user_id=np.array([9, 9]),
        event_time_us=np.array([0, DAY_US]),
        item_id=np.array([5, 5]),
        side={"f_item": np.array([5, 5]), "f_brand": np.array([3, 3])},
        labels={x.name: (np.array([1, 1]), np.array([0, DAY_US])) for x in domain.labels},
    )
    index = replace(index, meta=replace(index.meta, match=["f_brand"]))
    return IndexStore(index, None)


def _rows(domain: Domain) -> pa.Table:
    """The same candidate at the first event's instant, the second's, and a day later."""
    table = tables.ranker_samples(domain)
    values = {"user_id": 9, "item_id": 5, "f_item": 5, "f_brand": 3, "is_sampled": False}
    times = [0, DAY_US, 2 * DAY_US]
    rows = [
        {
            **dict.fromkeys(table.schema.names),
            **values,
            "f_tags": [1, 2],
            "instance_id": i,
            "request_id": i,
            "as_of": time,
            "label_buy": 1,
            "label_time_buy": time,
        }
        for i, time in enumerate(times)
    ]
    return pa.Table.from_pylist(rows, table.schema)


def test_an_index_without_logged_fields_is_refused(data: RankerData) -> None:
    index = data.store.index
    bare = replace(index, arrays={k: v for k, v in index.arrays.items() if k != "ids"})
    store = IndexStore(bare, IN_MEMORY)
    with pytest.raises(InputError, match="fields=True"):
        RankerData.from_arrays(data.inputs, data.samples, store, torch.zeros(1, 3), fields=True)
    with pytest.raises(InputError, match="load the samples with them"):
        replace(data, tensors=replace(data.tensors, field_ids_NS=None)).batch(
            data.of_days(0, 99), FIELDS
        )


def test_a_store_of_other_histories_is_refused(data: RankerData, make_data: MakeData) -> None:
    with pytest.raises(InputError, match="load them again"):
        data.with_store(make_data(num_events=61).store)
