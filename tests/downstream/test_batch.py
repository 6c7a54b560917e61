"""How samples are cut into requests and pieces, and what a batch of pieces holds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from downstream.batch import MAIN
from downstream.configs import RankerConfig, arm
from downstream.data import RankerData
from downstream.samples import PIECE_SIZES, Pieces, best_piece_size, in_order

BASE = RankerConfig(history_length=6)


def test_every_sample_is_in_exactly_one_place(data: RankerData) -> None:
    pieces = data.of_days(0, 100)
    batch = data.batch(pieces, BASE)
    assert sorted(batch.sample_RC[batch.mask_RC].tolist()) == list(range(len(data)))
    assert (batch.sample_RC[~batch.mask_RC] == -1).all()
    assert batch.label_RC[~batch.mask_RC].isnan().all()


def test_a_batch_says_of_each_sample_what_the_samples_say(data: RankerData) -> None:
    samples, inputs = data.samples, data.inputs
    batch = data.batch(data.of_days(0, 100), BASE)
    place_RC = batch.sample_RC
    for r, c in batch.mask_RC.nonzero().tolist():
        n = int(place_RC[r, c])
        assert int(batch.user_R[r]) == samples.user_id[n]
        rows = data.vocabulary.rows
        request = rows(inputs.request.slot_tables, samples.request.ids[n : n + 1])[0]
        candidate = rows(inputs.candidate.slot_tables, samples.candidate.ids[n : n + 1])[0]
        assert batch.ids_RS[r].tolist() == request.tolist()
        assert batch.ids_RCS[r, c].tolist() == candidate.tolist()
        np.testing.assert_array_equal(batch.numbers_RN[r], samples.request.numbers[n])
        np.testing.assert_array_equal(batch.numbers_RCN[r, c], samples.candidate.numbers[n])
        np.testing.assert_array_equal(batch.label_RC[r, c], samples.label[n])


def test_pieces_are_ordered_by_day_and_never_mix_requests(data: RankerData) -> None:
    samples, pieces = data.samples, data.pieces
    assert (np.diff(data.piece_day) >= 0).all()
    for start, size in zip(pieces.start, pieces.size, strict=True):
        rows = pieces.order[start : start + size]
        for key in (samples.user_id, samples.as_of_us, samples.request_id):
            assert len(np.unique(key[rows])) == 1


def test_rows_that_differ_on_the_request_side_are_not_one_request(data: RankerData) -> None:
    samples = data.samples
    same = replace(
        samples,
        user_id=np.zeros_like(samples.user_id),
        request_id=np.zeros_like(samples.request_id),
        as_of_us=np.zeros_like(samples.as_of_us),
    )
    numbers = np.nan_to_num(samples.request.numbers, nan=-99.0)
    features = np.concatenate([samples.request.ids, numbers], axis=1)
    found = Pieces.of(same)
    assert len(found.request_start) == len(np.unique(features, axis=0))


@given(
    rows=st.lists(st.tuples(*[st.integers(0, 2)] * 4), max_size=12),
    is_sorted=st.booleans(),
)
def test_rows_in_order_are_ordered_as_any_others(
    rows: list[tuple[int, ...]], is_sorted: bool
) -> None:
    rows = sorted(rows, key=lambda row: row[::-1]) if is_sorted else rows
    keys = list(np.array(rows, np.int64).reshape(-1, 4).T)
    np.testing.assert_array_equal(in_order(keys), np.lexsort(keys))


@given(sizes=st.lists(st.integers(1, 200), min_size=1, max_size=30))
@settings(deadline=None, max_examples=50)
def test_long_requests_are_cut_evenly(sizes: list[int]) -> None:
    most = best_piece_size(np.array(sizes))
    assert most in PIECE_SIZES
    num = sum(sizes)
    group = np.repeat(np.arange(len(sizes)), sizes)
    samples = _samples(group)
    pieces = Pieces.of(samples)
    assert pieces.size.sum() == num
    assert pieces.size.max() <= most
    for request in np.unique(pieces.request):
        mine = pieces.size[pieces.request == request]
        assert mine.max() - mine.min() <= 1


def test_logs_of_single_candidates_are_not_padded() -> None:
    assert best_piece_size(np.ones(1000, np.int64)) == 1
    assert best_piece_size(np.full(1000, 60)) == 32


def test_a_batch_holds_only_what_its_arm_reads(data: RankerData) -> None:
    pieces = data.of_days(0, 100)
    none = data.batch(pieces, arm("none", BASE))
    base = data.batch(pieces, arm("base", BASE)).histories[MAIN]
    tokens = data.batch(pieces, arm("tokens", BASE))
    fields = data.batch(pieces, arm("end-to-end", BASE)).histories[MAIN]
    assert none.histories == {}
    assert base.token_RLD is None
    assert base.field_ids_RLS is None
    assert tokens.histories[MAIN].token_RLD is not None
    assert tokens.item_token_RCD is None
    assert fields.token_RLD is None
    assert fields.field_ids_RLS is not None
    assert data.batch(pieces, arm("match", BASE)).item_token_RCD is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_batch_on_the_gpu_equals_the_one_on_the_cpu(data: RankerData) -> None:
    from downstream.user_index import IN_MEMORY, IndexStore

    store = IndexStore(data.store.index, IN_MEMORY, "cuda")
    other = RankerData.from_arrays(
        data.inputs, data.samples, store, torch.zeros(len(data), data.inputs.num_match), fields=True
    )
    pieces = data.of_days(0, 100)
    ours, theirs = data.batch(pieces, arm("match")), other.batch(pieces, arm("match"))
    torch.testing.assert_close(theirs.item_token_RCD.cpu(), ours.item_token_RCD)
    for mine, its in zip(ours.histories[MAIN], theirs.histories[MAIN], strict=True):
        if isinstance(mine, torch.Tensor):
            torch.testing.assert_close(its.cpu(), mine, equal_nan=True)


def _samples(group: np.ndarray) -> object:
    from downstream.samples import Samples
    from pipelines.features import FeatureArrays

    num = len(group)
    empty = FeatureArrays(np.zeros((num, 0), np.int32), np.zeros((num, 0), np.float32))
    zeros = np.zeros(num, np.int64)
    return Samples(zeros, zeros, zeros, group, zeros, empty, empty, zeros, zeros)
