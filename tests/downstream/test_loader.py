"""Batches for a training loop of one's own: which pieces they hold, when, on which rank."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from downstream.batch import RankerBatch
from downstream.configs import RankerConfig, RankerTraining, arm
from downstream.data import DAY_US, RankerData
from downstream.loader import AT_ONCE, RankerLoader, shuffled
from downstream.samples import Array
from downstream.streaming import RankerTrainer
from downstream.user_index import IN_MEMORY, IndexStore
from pipelines.errors import InputError

SMALL = RankerConfig(
    embedding=4, width=16, num_tokens=8, depth=1, heads=2, history_length=6, query_width=8
)
MATCH = arm("match", SMALL)
MakeData = Callable[..., RankerData]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def loader_of(data: RankerData, config: RankerConfig = MATCH, **given: Any) -> RankerLoader:
    return RankerLoader(data, config, **{"days": range(6), "pieces_a_batch": 5, "seed": 7, **given})


def arrays(batch: RankerBatch) -> dict[str, Array]:
    """All that a batch holds, by name."""
    named = dict(batch._asdict())
    for key, sequence in named.pop("histories").items():
        named |= {f"{key} {name}": value for name, value in sequence._asdict().items()}
    return {n: x.cpu().numpy() for n, x in named.items() if isinstance(x, Tensor)}


def check_same(found: RankerBatch | dict[str, Array], expected: RankerBatch) -> None:
    ours = arrays(found) if isinstance(found, RankerBatch) else found
    theirs = arrays(expected)
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert ours[name].dtype == array.dtype, name
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


@pytest.mark.parametrize("known_before_us", [None, 3 * DAY_US])
@pytest.mark.parametrize("name", ["base", "match", "end-to-end"])
def test_a_batch_is_that_of_its_pieces_filled_up_with_nothing(
    name: str, known_before_us: int | None, data: RankerData
) -> None:
    config = arm(name, SMALL)
    loader = loader_of(data, config, known_before_us=known_before_us)
    assert len(loader.pieces(0, len(loader) - 1)) < 5
    for number, batch in enumerate(loader):
        pieces = loader.pieces(0, number)
        expected = data.batch(pieces, config, known_before_us=known_before_us)
        num, num_candidates = expected.mask_RC.shape
        cut = {
            key: x[:num, :num_candidates] if "_RC" in key else x[:num]
            for key, x in arrays(batch).items()
        }
        check_same(cut, expected)
        assert batch.mask_RC.shape == (5, data.piece_size)
        is_filling_RC = torch.ones_like(batch.mask_RC)
        is_filling_RC[:num, :num_candidates] = False
        assert not batch.mask_RC[is_filling_RC].any()
        assert (batch.sample_RC[is_filling_RC] == -1).all()
        assert batch.label_RC[is_filling_RC].isnan().all()


def test_epochs_differ_and_are_the_same_each_time(data: RankerData) -> None:
    def epochs(**given: Any) -> list[list[list[int]]]:
        loader = loader_of(data, **given)
        return [[batch.sample_RC.flatten().tolist() for batch in loader] for _ in range(3)]

    found = epochs()
    assert found == epochs()
    assert found != epochs(seed=8)
    assert len({str(epoch) for epoch in found}) == 3
    in_time = epochs(shuffle=False)
    assert in_time[0] == in_time[2]
    assert [n for batch in in_time[0] for n in batch if n >= 0] == data.tensors.sample_n.tolist()


@pytest.mark.parametrize("world_size", [1, 2])
def test_resumed_at_any_batch_it_goes_on_as_if_never_left(
    world_size: int, data: RankerData
) -> None:
    def made() -> RankerLoader:
        return loader_of(data, world_size=world_size, rank=world_size - 1)

    whole, states, loader = [], [], made()
    for _ in range(2):
        states.append(loader.state_dict())
        for batch in loader:
            whole.append(batch)
            states.append(loader.state_dict())
        # After an epoch's last batch comes the next one's first: one place, told twice.
        assert loader.state_dict() == states.pop()
    assert len(whole) == 2 * len(loader) == len(states)
    for place, state in enumerate(states):
        loader = made()
        loader.load_state_dict(json.loads(json.dumps(state)))
        rest = [batch for _ in range(2) for batch in loader][: len(whole) - place]
        for batch, expected in zip(rest, whole[place:], strict=True):
            check_same(batch, expected)


def test_a_pass_that_was_left_goes_on_at_its_next_batch(data: RankerData) -> None:
    whole = [*loader_of(data)]
    loader, found = loader_of(data), []
    for batch in loader:
        found.append(batch)
        if len(found) == 2:
            break
    for batch, expected in zip([*found, *loader], whole, strict=True):
        check_same(batch, expected)


@given(
    num_requests=st.integers(1, 40),
    size=st.integers(1, 9),
    world_size=st.integers(1, 5),
    epoch=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_ranks_share_out_every_piece_once_in_equally_many_batches(
    num_requests: int, size: int, world_size: int, epoch: int, make_data: MakeData
) -> None:
    data = make_data(num_requests=num_requests)
    loaders = [
        loader_of(data, pieces_a_batch=size, world_size=world_size, rank=rank)
        for rank in range(world_size)
    ]
    found = [[loader.pieces(epoch, t) for t in range(len(loader))] for loader in loaders]
    assert len({len(batches) for batches in found}) == 1
    sizes = np.array([[len(pieces) for pieces in batches] for batches in found])
    assert (sizes[:, :-1] == size).all()
    assert sizes[:, -1].max() - sizes[:, -1].min() <= 1
    # Round after round, rank after rank: the order that one rank alone has.
    dealt = [pieces for batches in zip(*found, strict=True) for pieces in batches]
    alone = loader_of(data, pieces_a_batch=len(data.pieces.size)).pieces(epoch, 0)
    np.testing.assert_array_equal(np.concatenate(dealt), alone)
    np.testing.assert_array_equal(np.sort(alone), np.arange(len(data.pieces.size)))


def test_a_pass_gives_every_sample_to_one_rank_once(make_data: MakeData) -> None:
    """Of so many batches that their pieces are looked up in more than one go."""
    data, found = make_data(num_requests=900), []
    for rank in range(3):
        loader = loader_of(data, pieces_a_batch=1, rank=rank, world_size=3)
        assert len(loader) > AT_ONCE
        found += [batch.sample_RC[batch.mask_RC] for batch in loader]
    assert sorted(torch.cat(found).tolist()) == list(range(len(data)))


@pytest.mark.parametrize("ranker", ["din", "transformer"])
def test_a_batch_of_nothing_trains_nothing(ranker: str, make_data: MakeData) -> None:
    data = make_data(num_requests=1)
    *_, batch = loader_of(data, world_size=5, pieces_a_batch=2, rank=0)
    assert not batch.mask_RC.any()
    trainer = RankerTrainer.create(ranker, MATCH, RankerTraining(), data)
    loss = trainer.loss(batch)
    loss.backward()
    assert float(loss.detach()) == 0
    for name, parameter in trainer.model.named_parameters():
        assert parameter.grad is None or not parameter.grad.any(), name


@given(num=st.integers(0, 500), seed=st.integers(-5, 2**64), epoch=st.integers(0, 99))
def test_an_order_is_a_permutation(num: int, seed: int, epoch: int) -> None:
    order = shuffled(num, seed, epoch)
    assert sorted(order.tolist()) == list(range(num))


def test_an_order_looks_drawn() -> None:
    """Whatever is far from chance for a few of these would be a fault of the hash."""
    num = 20_000
    orders = [shuffled(num, seed, epoch).numpy() for seed in range(3) for epoch in range(3)]
    for n, order in enumerate([np.arange(num), *orders]):
        for other in orders[n:]:
            assert abs(np.corrcoef(order, other)[0, 1]) < 0.04
            assert (order == other).sum() < 12
    for order in orders:
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.04


def test_an_order_is_the_same_wherever_and_whenever() -> None:
    """What a saved state goes on with depends on these numbers: they never change."""
    assert shuffled(10, seed=0, epoch=0).tolist() == [5, 0, 7, 4, 2, 1, 8, 9, 3, 6]
    if torch.cuda.is_available():
        assert torch.equal(shuffled(9999, 5, 3, "cuda").cpu(), shuffled(9999, 5, 3))


@pytest.mark.parametrize(
    ("given_other", "name"),
    [
        ({"seed": 8}, "seed"),
        ({"pieces_a_batch": 4}, "pieces_a_batch"),
        ({"world_size": 2}, "world_size"),
        ({"days": range(5)}, "days"),
        ({"shuffle": False}, "shuffle"),
        ({"known_before_us": 5}, "known_before_us"),
    ],
)
def test_a_state_of_another_loader_is_refused(
    given_other: dict[str, Any], name: str, data: RankerData
) -> None:
    state = loader_of(data, **given_other).state_dict()
    with pytest.raises(InputError, match=f"whose {name} was"):
        loader_of(data).load_state_dict(state)


def test_a_state_of_other_samples_or_of_no_place_is_refused(
    data: RankerData, make_data: MakeData
) -> None:
    loader = loader_of(data)
    state = loader.state_dict()
    for other in (make_data(seed=1), make_data(num_requests=23)):
        with pytest.raises(InputError, match="whose samples was"):
            loader.load_state_dict(loader_of(other).state_dict())
    for wrong in ({"batch": len(loader)}, {"batch": -1}, {"epoch": -1}):
        with pytest.raises(InputError, match="which is none"):
            loader.load_state_dict({**state, **wrong})
    with pytest.raises(InputError, match="whose samples was None"):
        loader.load_state_dict({})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rank": 2, "world_size": 2}, r"rank in \[0, world_size\), got rank 2 of 2"),
        ({"rank": -1}, "got rank -1 of 1"),
        ({"world_size": 0}, "world_size must be at least 1"),
        ({"pieces_a_batch": 0}, "pieces_a_batch must be at least 1, got 0"),
        ({"days": range(100, 200)}, r"no sample is on days \[100, 200\)"),
        ({"days": range(0, 6, 2)}, "days must follow each other"),
        ({"captured": True}, "captured batches need a CUDA device"),
    ],
)
def test_what_does_not_fit_is_refused(
    wrong: dict[str, Any], message: str, data: RankerData
) -> None:
    with pytest.raises(InputError, match=message):
        loader_of(data, **wrong)


def on_gpu(data: RankerData) -> RankerData:
    store = IndexStore(data.store.index, IN_MEMORY, "cuda")
    match_nM = torch.empty(len(data), data.inputs.num_match)
    match_nM[data.tensors.sample_n] = data.tensors.match_nM
    return RankerData.from_arrays(data.inputs, data.samples, store, match_nM, fields=True)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("name", ["base", "match", "end-to-end"])
def test_batches_on_a_gpu_are_those_of_the_cpu(name: str, captured: bool, data: RankerData) -> None:
    config = arm(name, SMALL)
    ours = loader_of(on_gpu(data), config, world_size=2, rank=1, captured=captured)
    theirs = loader_of(data, config, world_size=2, rank=1)
    assert ours.state_dict() == theirs.state_dict()
    for _ in range(2):
        for batch, expected in zip(ours, theirs, strict=True):
            check_same(batch, expected)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("captured", [False, True])
def test_a_pass_never_waits_for_the_device(captured: bool, make_data: MakeData) -> None:
    data = on_gpu(make_data(num_requests=400))
    loader = loader_of(data, pieces_a_batch=1, captured=captured)
    # Kernels are compiled meanwhile, and the step captured.
    num_left = 2 * len(data) - int(next(iter(loader)).mask_RC.sum())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        total = sum(batch.mask_RC.sum() for _ in range(2) for batch in loader)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert int(total) == num_left
