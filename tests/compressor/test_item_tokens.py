from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor import item_tokens
from compressor.item_tokens import ItemRows, ItemState, advance, item_token_days
from pipelines import delta, tables, token_format
from pipelines.days import Days
from pipelines.errors import InputError
from pipelines.token_format import TokenFormat

EVENTS = st.lists(
    st.tuples(st.integers(-2, 3), st.integers(0, 9).map(lambda d: d * d), st.integers(-5, 5)),
    max_size=40,
)
Event = tuple[int, int, int]


def columns(events: list[Event]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    array = np.asarray(events, np.int64).reshape(-1, 3)
    token = np.stack([array[:, 2], array[:, 2] * 0.5 + 1], axis=1).astype(np.float16)
    return array[:, 0], array[:, 1], token


def brute(events: list[Event], decay: float) -> list[tuple[int, int, float, float, float]]:
    """One row per item and day it occurred, by summing over its whole past."""
    item_id, day, token = columns(events)
    found = []
    for item, today in sorted({(int(i), int(d)) for i, d in zip(item_id, day, strict=True)}):
        past = [
            (decay ** (today - int(d)), t)
            for i, d, t in zip(item_id, day, token.tolist(), strict=True)
            if i == item and d <= today
        ]
        sums = [sum(w * t[j] for w, t in past) for j in (0, 1)]
        found.append((item, today, *sums, sum(w for w, _ in past)))
    return found


def listed(rows: ItemRows) -> list[tuple[int, int, float, float, float]]:
    return [
        (int(i), int(d), float(s[0]), float(s[1]), float(c))
        for i, d, s, c in zip(
            rows.item_id, rows.day, rows.decayed_sum, rows.decayed_count, strict=True
        )
    ]


@given(EVENTS, st.sampled_from([1.0, 0.995, 0.5]))
def test_rows_are_decayed_sums_over_each_items_whole_past(
    events: list[Event], decay: float
) -> None:
    found, expected = listed(item_token_days(*columns(events), decay=decay)), brute(events, decay)
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@given(EVENTS)
def test_day_by_day_gives_the_same_bits_as_all_days_at_once(events: list[Event]) -> None:
    item_id, day, token = columns(events)
    state, rows = ItemState.empty(2), []
    for today in np.unique(day):
        at = day == today
        state, made = advance(state, item_id[at], token[at], int(today))
        rows += listed(made)
    assert sorted(rows) == listed(item_token_days(item_id, day, token))


@given(EVENTS, st.integers(0, 81))
def test_later_days_never_change_a_row(events: list[Event], today: int) -> None:
    past = [e for e in events if e[1] <= today]
    disturbed = past + [(i, d, 5 - x) for i, d, x in events if d > today]
    until = [r for r in listed(item_token_days(*columns(disturbed))) if r[1] <= today]
    assert until == listed(item_token_days(*columns(past)))


@settings(max_examples=20)
@given(EVENTS)
def test_the_sum_does_not_depend_on_how_many_tokens_fit_in_memory(events: list[Event]) -> None:
    whole = listed(item_token_days(*columns(events)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(item_tokens, "AT_ONCE", 1)
        assert listed(item_token_days(*columns(events))) == whole


def test_a_year_without_the_item_decays_and_does_not_overflow() -> None:
    rows = item_token_days(np.array([1, 1]), np.array([0, 20_000]), np.ones((2, 1), np.float16))
    assert rows.decayed_count.tolist() == [1.0, 1.0]
    assert np.isfinite(rows.decayed_sum).all()


def test_days_out_of_order_are_refused() -> None:
    one = np.ones((1, 1), np.float16)
    state, _ = advance(ItemState.empty(1), np.array([4]), one, 7)
    with pytest.raises(ValueError, match="got day 7 after an item's day 7"):
        advance(state, np.array([4]), one, 7)
    with pytest.raises(ValueError, match="decay must be above 0"):
        advance(state, np.array([4]), one, 8, decay=1.5)


def test_a_walk_that_starts_again_from_the_table_gives_the_same_bits(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    item_id, day = rng.integers(0, 9, 200), rng.integers(100, 106, 200)
    token = rng.normal(size=(200, 3)).astype(np.float16)
    at_once = item_token_days(item_id, day, token)
    table, lake = tables.item_tokens("shop"), str(tmp_path)
    assert len(ItemState.before(lake, "shop", "main", date(1970, 4, 11), 3).item_id) == 0
    token_format.declare(lake, table, TokenFormat("float32", 3))
    made = []
    for today in range(100, 106):
        start = date(1970, 1, 1) + timedelta(days=today)
        state = ItemState.before(lake, "shop", "main", start, 3)
        _, rows = advance(state, item_id[day == today], token[day == today], today)
        made.append(rows)
        for line in ("main", "other"):  # the other line's sums are nobody else's business
            write(lake, rows, line, start, factor=1.0 if line == "main" else 7.0)
    found = {(i, d): s for rows in made for i, d, *s in listed(rows)}
    assert found == {(i, d): s for i, d, *s in listed(at_once)}
    # Written again later, an early day starts from the days before it, and from its own line.
    third = date(1970, 1, 1) + timedelta(days=103)
    early = listed(item_token_days(item_id[day < 103], day[day < 103], token[day < 103]))
    newest = {i: (d, s) for i, d, s, *_ in early}
    for line, factor in (("main", 1), ("other", 7)):
        state = ItemState.before(lake, "shop", line, third, 3)
        rows = ItemRows(state.item_id, state.day, state.decayed_sum, state.decayed_count)
        assert {i: (d, s) for i, d, s, *_ in listed(rows)} == {
            i: (d, float(np.float32(s) * np.float32(factor))) for i, (d, s) in newest.items()
        }
    with pytest.raises(
        InputError, match="holds float32 x 3 vectors and this run needs float32 x 4"
    ):
        ItemState.before(lake, "shop", "main", date(1970, 4, 20), 4)


def write(lake: str, rows: ItemRows, line: str, start: date, factor: float) -> None:
    table, count = tables.item_tokens("shop"), len(rows)
    columns = {
        "item_id": rows.item_id,
        "compressor_line": [line] * count,
        "compressor_version": ["v"] * count,
        "available_time": pa.array([0] * count, pa.int64()).cast(tables.UTC_TIME),
        "decayed_sum": token_format.encode(rows.decayed_sum * np.float32(factor), "float32"),
        "decayed_count": rows.decayed_count,
        "event_date": [start] * count,
    }
    made = pa.table(columns).cast(table.schema)
    days = Days(start, start + timedelta(days=1))
    delta.replace(lake, table, made, days, commit={"job": "test"}, line=line)
