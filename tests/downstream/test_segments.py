"""Segments grow as a sorted log would, wherever their rows are, and leave read rows alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from downstream.segments import PAGE, NewRows, Segments, SegmentTensors, grown
from tests.downstream.test_user_index import DEVICES

Array = npt.NDArray[Any]
DAY = st.integers(0, 5)
KEYS = st.lists(st.integers(0, 3), max_size=25)
CHANGES = st.lists(st.dictionaries(DAY, KEYS, min_size=1, max_size=2), min_size=1, max_size=8)
"""What some days hold from then on: a key for each row."""
START = st.dictionaries(DAY, KEYS, max_size=3)
WIDTH = 10
"""Moments of a day."""
NAMES = ("key", "time", "tie")


class Log:
    """Rows in arrays as an index has them, beside the plain log that they must say."""

    def __init__(self, start: Mapping[int, list[int]], draw: np.random.Generator) -> None:
        self.draw = draw
        self.days: dict[int, Array] = {}
        new = self.rows_of(start)
        order = np.lexsort((new["tie"], new["time"], new["key"]))
        self.arrays = {name: column[order] for name, column in new.items()}
        key, count = np.unique(new["key"], return_counts=True)
        self.held = Segments.of(key, count, newest_us=self.arrays["time"][np.cumsum(count) - 1])
        self.num_written = len(order)

    def rows_of(self, days: Mapping[int, list[int]]) -> dict[str, Array]:
        """What these days hold from now on, in no order."""
        rows = [
            (key, day * WIDTH + int(self.draw.integers(WIDTH)), int(self.draw.integers(2**40)))
            for day, keys in days.items()
            for key in keys
        ]
        new = dict(zip(NAMES, np.array(rows, np.int64).reshape(-1, 3).T, strict=True))
        for day in days:
            of_day = new["time"] // WIDTH == day
            self.days[day] = np.stack([new[name][of_day] for name in NAMES], axis=1)
        return new

    def change(self, days: Mapping[int, list[int]]) -> None:
        new = self.rows_of(days)
        time = self.arrays["time"]
        growth = grown(
            self.held, len(time), time, self.arrays["tie"],
            lambda row: np.isin(time[row] // WIDTH, list(days)),
            NewRows(new["key"], new["time"], new["tie"], 0 * new["key"]),
            [(day * WIDTH, day * WIDTH + WIDTH) for day in sorted(days)],
        )  # fmt: skip
        for name in NAMES:
            array = np.append(self.arrays[name], np.full(growth.num_rows - len(time), -1))
            array[growth.copied_to] = array[growth.copied_from]
            array[growth.new_to] = new[name]
            self.arrays[name] = array
        self.held, self.num_written = growth.segments, len(growth.copied_to) + len(new["key"])

    def said(self, held: Segments) -> Array:
        """[n, 3] What the arrays hold of these segments, in order."""
        return np.stack([self.arrays[name][held.rows()] for name in NAMES], axis=1)

    def expected(self) -> Array:
        rows = np.concatenate([np.zeros((0, 3), np.int64), *self.days.values()])
        return rows[np.lexsort((rows[:, 2], rows[:, 1], rows[:, 0]))]


@settings(deadline=None, max_examples=200)
@given(start=START, changes=CHANGES, seed=st.integers(0, 99))
def test_segments_say_the_log_and_go_on_saying_what_they_said(
    start: dict[int, list[int]], changes: list[dict[int, list[int]]], seed: int
) -> None:
    log = Log(start, np.random.default_rng(seed))
    before: list[tuple[Segments, Array]] = []
    for change in changes:
        log.change(change)
        expected, held = log.expected(), log.held
        np.testing.assert_array_equal(log.said(held), expected)
        keys, counts = np.unique(expected[:, 0], return_counts=True)
        assert (held.key.tolist(), held.count.tolist()) == (keys.tolist(), counts.tolist())
        for old, said in before:
            np.testing.assert_array_equal(log.said(old), said)
        before.append((held, expected))


@pytest.mark.parametrize("device", DEVICES)
@settings(deadline=None, max_examples=100)
@given(start=START, changes=CHANGES, seed=st.integers(0, 99), length=st.integers(0, 30))
def test_a_past_is_found_in_pages_as_in_one_piece(
    device: str,
    start: dict[int, list[int]],
    changes: list[dict[int, list[int]]],
    seed: int,
    length: int,
) -> None:
    log = Log(start, np.random.default_rng(seed))
    for change in changes:
        log.change(change)
    rows = log.expected()
    asked = np.array([(key, moment) for key in range(-1, 5) for moment in range(0, 61, 3)])
    query, moment = torch.from_numpy(asked.T.copy()).to(device)
    said = []
    for held, time in (
        (log.held, log.arrays["time"]),
        (Segments.of_sorted(rows[:, 0]), rows[:, 1]),
    ):
        tensors = SegmentTensors(held, device)
        key, is_known = tensors.find(query)
        num = tensors.count_before(torch.from_numpy(time.copy()).to(device), key, moment)
        num = torch.where(is_known, num, 0)
        row, mask = tensors.newest(torch.where(is_known, key, -1), num, length)
        row, mask = row.cpu(), mask.cpu()
        found = time[row.clamp(min=0).numpy()] if len(time) else row.numpy()
        said.append((num.tolist(), mask.tolist(), np.where(mask, found, -1).tolist()))
    assert said[0] == said[1]


def test_a_day_writes_that_day_whether_or_not_the_one_before_changed() -> None:
    """A hundred days of ten keys with three rows a day each."""
    keys = [key for key in range(10) for _ in range(3)]
    plain, late = (Log({}, np.random.default_rng(0)) for _ in range(2))
    for day in range(100):
        plain.change({day: keys})
        assert plain.num_written == 30
        late.change({max(day - 1, 0): keys} | {day: keys})
        assert late.num_written <= 60 + 10 * (PAGE - 1)
    assert len(plain.arrays["time"]) <= 1.5 * 3000 + 10 * PAGE


def test_a_late_row_costs_the_keys_of_its_day_from_then_on() -> None:
    log = Log({}, np.random.default_rng(0))
    for day in range(50):
        log.change({day: [1, 2] if day % 2 else [3, 4]})
    log.change({41: [1, 2, 2]})
    assert log.num_written <= 2 * (5 + PAGE) + 1
