"""Sequences copied in one piece are those gathered row by row, bit for bit, wherever rows are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from downstream import windows
from downstream.index_arrays import ItemArrays, LineArrays, Meta
from downstream.token_store import Tokens
from downstream.user_index import IN_MEMORY, IndexStore, UserIndex
from tests.downstream.test_segments import CHANGES, START, WIDTH, Log

WIDTHS = st.sampled_from([0, 1, 4, 16, 48])
"""Of tokens: none, one that is no whole number of words, one that is, whole vectors of words."""


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few requests are several parts."""
    monkeypatch.setattr(windows, "STEPS", 24)
    monkeypatch.setattr(windows, "QUERIES", 11)


def store_of(log: Log, width: int) -> IndexStore:
    """The log's rows with random tokens and columns, of which some are not known in time."""
    num, draw = len(log.arrays["time"]), log.draw
    late = draw.integers(0, 9, (2, num)) + log.arrays["time"]
    arrays = {
        "event_time_us": log.arrays["time"],
        "instance_id": log.arrays["tie"],
        "item_id": draw.integers(0, 9, num),
        "request_id": log.arrays["tie"],
        "f_brand": draw.integers(0, 2**31, num).astype(np.int32),
        "label_buy": draw.integers(-1, 2, num).astype(np.int8),
        "label_time_us_buy": late[0],
    }
    token = draw.standard_normal((num, width)).astype(np.float16)
    meta = Meta(
        domain=IN_MEMORY, side=["f_brand"], labels=["buy"], match=[], base=log.held.base,
        num_rows=num,
    )  # fmt: skip
    lines = {IN_MEMORY: LineArrays(token, late[1], ItemArrays.none(width))}
    return IndexStore(UserIndex(meta, log.held, arrays, lines), IN_MEMORY)


def assert_same(found: Tokens, expected: Tokens) -> None:
    """To the bit, -0.0 and 0.0 being two."""
    ours, theirs = found._asdict(), expected._asdict()
    ours |= ours.pop("side")
    theirs |= theirs.pop("side")
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        other = theirs[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        assert tensor.contiguous().numpy().tobytes() == other.contiguous().numpy().tobytes(), name


@settings(deadline=None, max_examples=200)
@given(
    start=START, changes=CHANGES, seed=st.integers(0, 99), width=WIDTHS, length=st.integers(1, 30),
    is_extended=st.booleans(),
)  # fmt: skip
def test_a_fetch_in_pieces_is_a_fetch_row_by_row(
    start: dict[int, list[int]], changes: list[dict[int, list[int]]], seed: int, width: int,
    length: int, is_extended: bool,
) -> None:  # fmt: skip
    log = Log(start if is_extended else changes[0], np.random.default_rng(seed))
    for change in changes if is_extended else ():
        log.change(change)
    store = store_of(log, width)
    draw = np.random.default_rng(seed)
    user = torch.from_numpy(draw.integers(-1, 5, 40))
    moment = torch.from_numpy(draw.integers(-1, 6 * WIDTH + 2, 40))
    for found, expected in zip(
        store.positions(user, moment), store.plain().positions(user, moment), strict=True
    ):
        assert torch.equal(found, expected)
    expected_tokens = store.plain().fetch(user, moment, length)
    found_tokens = store.fetch(user, moment, length)
    assert_same(found_tokens, expected_tokens)
    other = store.fetch(user.flip(0), moment.flip(0), length, out=found_tokens)
    assert_same(other, store.plain().fetch(user.flip(0), moment.flip(0), length))
    if store.num_rows:
        assert other.token_BLD.data_ptr() == found_tokens.token_BLD.data_ptr()


@pytest.mark.parametrize("offset", [0, 1, 4, 8, 16])
def test_memory_may_begin_anywhere(offset: int) -> None:
    store = store_of(Log({0: [1, 1, 2], 1: [2, 3]}, np.random.default_rng(0)), 16)
    user, moment = torch.tensor([0, 1, 7]), torch.tensor([99, 99, 99])
    out = store.fetch(user, moment, 2)
    assert out.token_BLD.data_ptr() % 64 == 0
    room = torch.zeros(out.token_BLD.numel() + 64, dtype=torch.float16)
    first = -room.data_ptr() // 2 % 32 + offset
    token_BLD = room[first : first + out.token_BLD.numel()].view_as(out.token_BLD)
    found = store.fetch(user, moment, 2, out._replace(token_BLD=token_BLD))
    assert_same(found, store.plain().fetch(user, moment, 2))
    assert token_BLD.any()
    before, after = room[:first], room[first + token_BLD.numel() :]
    assert not before.any()
    assert not after.any()


def test_memory_of_another_shape_is_refused() -> None:
    store = store_of(Log({0: [1, 1, 2]}, np.random.default_rng(0)), 4)
    user, moment = torch.tensor([1, 2]), torch.tensor([99, 99])
    out = store.fetch(user, moment, 2)
    with pytest.raises(ValueError, match=r"token_BLD \[2, 3, 4\] .* got \[2, 2, 4\]"):
        store.fetch(user, moment, 3, out)
    with pytest.raises(ValueError, match=r"token_BLD \[1, 2, 4\]"):
        store.fetch(user[:1], moment[:1], 2, out)
    for spoiled in (
        out._replace(token_BLD=torch.zeros(2, 4, 2, dtype=torch.float16).transpose(1, 2)),
        out._replace(gap_s_BL=out.gap_s_BL.double()),
        out._replace(side={"f_brand": out.side["f_brand"]}),
    ):
        with pytest.raises(ValueError, match="out must be what a fetch of this store"):
            store.fetch(user, moment, 2, spoiled)
        with pytest.raises(ValueError, match="out must be what a fetch of this store"):
            store.past(*store.positions(user, moment), moment, 2, out=spoiled)


def test_users_and_moments_of_other_numbers_are_refused() -> None:
    store = store_of(Log({0: [1, 1, 2]}, np.random.default_rng(0)), 4)
    user, moment = torch.tensor([1, 2, 2]), torch.tensor([99, 99])
    for asked in (store, store.plain()):
        with pytest.raises(ValueError, match=r"one moment a request .* got \[\[3\], \[2\]\]"):
            asked.fetch(user, moment, 2)
        with pytest.raises(ValueError, match=r"\[\[2\], \[2\], \[1\]\]"):
            asked.past(moment, moment, moment[:1], 2)


@pytest.mark.parametrize("num", [0, 1])
def test_a_batch_without_requests_and_an_index_without_events(num: int) -> None:
    store = store_of(Log({0: [1] * num}, np.random.default_rng(0)), 4)
    none = torch.zeros(0, dtype=torch.int64)
    assert_same(store.fetch(none, none, 5), store.plain().fetch(none, none, 5))
    one = torch.ones(1, dtype=torch.int64)
    assert_same(store.fetch(one, one, 5), store.plain().fetch(one, one, 5))
