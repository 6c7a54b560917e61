"""How far a day is from the week before it: what is drift, and what is only a small or odd day."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from pipelines.domain import Feature
from pipelines.quality import (
    Limits,
    Profile,
    changed,
    divergence,
    moved,
    norm_moved,
    profile,
    unsorted,
)

BRAND = Feature(name="brand", column="b", side="item")
LIMITS = Limits()


def drawn(num_rows: int, num_brands: int, *, seed: int, first: int = 1) -> Profile:
    """A day of brands, each as likely as another."""
    random = np.random.default_rng(seed)
    brands = random.integers(first, first + num_brands, num_rows)
    return profile(pa.table({"f_brand": pa.array(brands, pa.int32())}), "f_brand", BRAND)


def test_days_alike_are_0_apart_and_days_with_nothing_in_common_1() -> None:
    one, same = drawn(5000, 4, seed=0), drawn(5000, 4, seed=1)
    assert divergence(one, same) < 0.001
    assert divergence(one, drawn(5000, 4, seed=1, first=100)) == pytest.approx(1, abs=0.01)


def test_a_small_day_of_many_categories_does_not_drift_by_being_small() -> None:
    week = [drawn(20_000, 300, seed=n) for n in range(7)]
    assert moved("brand", drawn(200, 300, seed=9), week, LIMITS) == []
    (found,) = moved("brand", drawn(2000, 300, seed=9, first=200), week, LIMITS)
    assert (found.rule, found.is_warning) == ("drift", True)


def test_a_week_whose_days_differ_from_each_other_expects_that_of_its_next_day() -> None:
    """Brands that each day sells alone."""
    week = [drawn(1000, 5, seed=n, first=1 + 10 * n) for n in range(7)]
    day = drawn(1000, 5, seed=9, first=200)
    assert changed(divergence, day, week).usual > 0.9
    assert moved("brand", day, week, LIMITS) == []


def test_a_busy_user_counts_once_and_so_does_a_basket() -> None:
    rows = pa.table({"f_x": [5] * 90 + [6], "user_id": [1] * 90 + [2], "request_id": [*range(91)]})

    def counts(side: str) -> list[int]:
        made = profile(rows, "f_x", Feature(name="x", column="x", side=side))  # type: ignore[arg-type]
        return made.counts[5:7].tolist()

    assert counts("user") == [1, 1]
    assert counts("context") == counts("item") == [90, 1]


def test_missing_values_are_bucket_0_an_empty_list_or_no_number() -> None:
    def missing(kind: str, values: pa.Array) -> tuple[int, int]:
        feature = Feature(name="x", column="x", side="item", kind=kind)  # type: ignore[arg-type]
        found = profile(pa.table({"f_x": values}), "f_x", feature)
        return found.missing, int(found.counts.sum())

    assert missing("category", pa.array([0, 3, None], pa.int32())) == (2, 1)
    lists = pa.array([[], [1, 2], None], pa.list_(pa.int32()))
    assert missing("multi-category", lists) == (2, 2)
    assert missing("number", pa.array([None, 1.0, -9.0], pa.float32())) == (1, 2)


def test_a_feature_that_is_often_missing_is_not_gone_when_it_is_missing_again() -> None:
    def day(num_missing: int) -> Profile:
        return Profile(np.array([1000 - num_missing]), num_missing, 1000)

    odd = [day(0), day(1000), day(0), day(0)]
    assert [x.rule for x in moved("x", day(1000), odd, LIMITS)] == []
    assert [x.rule for x in moved("x", day(1000), [day(0)] * 4, LIMITS)] == ["gone missing"]
    # Of so few values nobody can tell.
    assert moved("x", day(1000), [day(990)] * 4, LIMITS) == []


def test_norms_may_go_on_as_they_went_and_no_further() -> None:
    assert norm_moved(5.9, [4.0, 4.5, 5.0], LIMITS) == []
    assert len(norm_moved(6.3, [4.0, 4.5, 5.0], LIMITS)) == 1
    assert len(norm_moved(3.1, [4.0, 4.5, 5.0], LIMITS)) == 1
    assert norm_moved(99.0, [4.0, 4.5], LIMITS) == []  # too few days to tell


def test_order_is_by_the_first_column_and_then_by_the_next() -> None:
    rows = pa.table({"a": [1, 1, 2, 2, 3], "b": [1, 2, 1, 0, 0]})
    (found,) = unsorted(rows, ("a", "b"))
    assert found.rows == [{"a": 2, "b": 0}]
    assert unsorted(rows, ("a",)) == []
    assert unsorted(rows.slice(0, 0), ("a", "b")) == []
