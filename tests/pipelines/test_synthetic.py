"""The synthetic world: past contexts of earlier days, and nothing else, lead to its oracle."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from pipelines.errors import InputError
from pipelines.sources import synthetic_world as law
from pipelines.sources.synthetic import auc, bayes_auc, events
from pipelines.sources.synthetic_bound import base_probability
from pipelines.sources.synthetic_world import (
    DAYS,
    Laws,
    Showings,
    World,
    draw,
    marks,
    oracle_logit,
    own_logit,
    reading,
    sigmoid,
)

WORLD = World(num_users=512)
LAWS = Laws.of(WORLD)


@pytest.fixture(scope="module")
def rows() -> pa.Table:
    return pa.concat_tables(events(WORLD))


@pytest.fixture(scope="module")
def showings() -> Showings:
    return draw(WORLD, LAWS, 0, horizon=DAYS)[0]


def numbers(rows: pa.Table, name: str) -> npt.NDArray[Any]:
    return rows[name].to_numpy()


def test_past_contexts_are_worth_more_than_a_tenth_of_auc(rows: pa.Table) -> None:
    for name, found in bayes_auc(rows).items():
        assert found["oracle"] > 0.8, name
        assert found["oracle"] > found["base"] + 0.1, name


def test_labels_are_drawn_from_the_oracle_probability(rows: pa.Table) -> None:
    """In every tenth of the probability, the positives are as many (within 4 deviations)."""
    label, oracle = numbers(rows, "label"), numbers(rows, "oracle_probability")
    for part in np.array_split(np.argsort(oracle), 10):
        deviation = np.sqrt((oracle[part] * (1 - oracle[part])).sum()) / len(part)
        assert abs(label[part].mean() - oracle[part].mean()) < 4 * deviation


def test_the_oracle_is_what_a_loop_over_the_raw_rows_of_earlier_days_finds(rows: pa.Table) -> None:
    """Written apart from the arrays: a user at a time, event by event, from the log."""
    depth_mean = law.DISCOUNT[0] / sum(law.DISCOUNT)
    a, b = law.DISCOUNT
    depth_deviation = (a * b / ((a + b) ** 2 * (a + b + 1))) ** 0.5
    by_user = defaultdict(list)
    for row in rows.sort_by([("user_id", "ascending"), ("event_time", "ascending")]).to_pylist():
        if row["user_id"] < 20:
            by_user[row["user_id"]].append(row)
    for of_user in by_user.values():
        for row in of_user:
            day = row["event_time"].date()
            total, weight, own_total, own_weight = 0.0, 0.0, 0.0, 0.0
            for past in of_user:
                age = (day - past["event_time"].date()).days - 1
                if age < 0:
                    continue
                mark = LAWS.offer_mark[past["offer"]] + LAWS.placement_mark[past["placement"]]
                mark += law.MARK["discount"] * (past["discount"] - depth_mean) / depth_deviation
                total += law.DECAY**age * mark
                weight += law.DECAY**age
                if past["department"] == row["department"]:
                    own_total += law.DECAY**age * mark
                    own_weight += law.DECAY**age
            state = own_total / (own_weight + law.FEW_OWN)
            state += law.SHARED * total / (weight + law.FEW_ALL)
            own = law.INTERCEPT + LAWS.quality[row["item_id"]]
            own += LAWS.taste[row["segment"], row["department"]]
            own += LAWS.placement_pull[row["placement"]]
            expected = 1 / (1 + np.exp(-(own + law.STRENGTH * state)))
            assert row["oracle_probability"] == pytest.approx(expected, abs=1e-9)


def test_contexts_of_a_day_move_only_later_days(showings: Showings) -> None:
    day = 30
    changed = replace(showings, offer=showings.offer.copy(), discount=showings.discount.copy())
    changed.offer[:, day] = (changed.offer[:, day] + 1) % law.OFFERS
    changed.discount[:, day] = 1 - changed.discount[:, day]
    before = oracle_logit(WORLD, LAWS, showings)
    after = oracle_logit(WORLD, LAWS, changed)
    np.testing.assert_array_equal(before[:, : day + 1], after[:, : day + 1])
    assert np.abs(after[:, day + 1] - before[:, day + 1]).max() > 0.5


@pytest.mark.parametrize("field", ["offer", "creative"])
def test_the_fields_of_later_use_do_not_tell_their_own_label(rows: pa.Table, field: str) -> None:
    """Rates by value learned on even users rank the odd users' labels no better than chance."""
    label, values = numbers(rows, "label") == 1, numbers(rows, field)
    is_even = numbers(rows, "user_id") % 2 == 0
    count = np.bincount(values[is_even], minlength=values.max() + 1)
    rate = np.bincount(values[is_even], label[is_even], values.max() + 1) / np.maximum(count, 1)
    assert auc(label[~is_even], rate[values[~is_even]]) == pytest.approx(0.5, abs=0.015)


def test_the_discount_does_not_tell_its_own_label(rows: pa.Table) -> None:
    label, discount = numbers(rows, "label") == 1, numbers(rows, "discount")
    assert auc(label, discount) == pytest.approx(0.5, abs=0.012)
    assert auc(label, np.abs(discount - np.median(discount))) == pytest.approx(0.5, abs=0.012)


def test_the_placement_tells_its_own_label(rows: pa.Table) -> None:
    assert auc(numbers(rows, "label") == 1, numbers(rows, "placement")) > 0.55


def test_item_ids_and_past_labels_alone_stay_far_below_the_oracle(showings: Showings) -> None:
    """Logistic regression on the own logit and the decayed past labels, own department and all."""
    oracle = sigmoid(oracle_logit(WORLD, LAWS, showings))
    label = np.random.default_rng(1).random(oracle.shape) < oracle
    own = own_logit(LAWS, showings)
    surprise = np.where(showings.is_real, label - sigmoid(own), 0.0)
    department = LAWS.department[showings.item]
    state = np.zeros((len(own), WORLD.num_departments))
    read = np.zeros((*own.shape, 2))
    for day in range(own.shape[1]):
        users = np.arange(len(own))[:, None, None]
        read[:, day, ..., 0] = state[users, department[:, day]]
        read[:, day, ..., 1] = state.sum(axis=1)[:, None, None]
        state = law.DECAY * state
        np.add.at(
            state,
            (np.broadcast_to(users, department[:, day].shape), department[:, day]),
            surprise[:, day],
        )
    real = showings.is_real
    x, y = np.column_stack([np.ones(real.sum()), own[real], read[real]]), label[real]
    found = auc(y, x @ logistic_regression(x, y))
    assert auc(y, own[real]) + 0.01 < found < auc(y, oracle[real]) - 0.1


def logistic_regression(x: npt.NDArray[Any], y: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Weights by Newton's method."""
    weights = np.zeros(x.shape[1])
    for _ in range(10):
        chance = sigmoid(x @ weights)
        hessian = (x * (chance * (1 - chance))[:, None]).T @ x
        weights += np.linalg.solve(hessian, x.T @ (y - chance))
    return weights


def test_the_base_bound_agrees_with_a_particle_filter(showings: Showings) -> None:
    """20,000 particles of one user's state, with the true law of marks instead of a Gaussian."""
    one = replace(
        showings,
        **{f.name: getattr(showings, f.name)[:1] for f in fields(showings) if f.name != "noise"},
    )
    rng = np.random.default_rng(0)
    own, department = own_logit(LAWS, one), LAWS.department[one.item]
    weights, count = reading(WORLD, LAWS, one)
    label = rng.random(own.shape) < sigmoid(oracle_logit(WORLD, LAWS, one))
    bound = base_probability(WORLD, LAWS, one, label)
    pool = marks(LAWS, showings)[showings.is_real]
    state = np.zeros((20_000, WORLD.num_departments))
    differences = []
    for day in range(own.shape[1]):
        for request in range(own.shape[2]):
            real = np.flatnonzero(one.is_real[0, day, request])
            felt = state @ weights[0, day, department[0, day, request, real]].T
            chance = sigmoid(own[0, day, request, real] + felt)
            differences += list(chance.mean(axis=0) - bound[0, day, request, real])
            given = np.where(label[0, day, request, real], chance, 1 - chance).prod(axis=1)
            state = state[rng.choice(len(state), len(state), p=given / given.sum())]
        state = law.DECAY * state
        for k, n in enumerate(count[0, day]):
            state[:, k] += rng.choice(pool, (len(state), n)).sum(axis=1)
    assert len(differences) > 40
    assert np.abs(differences).max() < 0.05
    assert np.abs(differences).mean() < 0.01


def test_the_base_bound_does_not_see_contexts_only_labels(showings: Showings) -> None:
    label = showings.is_real & (np.random.default_rng(0).random(showings.is_real.shape) < 0.3)
    other = replace(showings, offer=showings.offer[::-1], discount=1 - showings.discount)
    found = base_probability(WORLD, LAWS, showings, label)
    np.testing.assert_array_equal(found, base_probability(WORLD, LAWS, other, label))
    assert not np.array_equal(
        found, base_probability(WORLD, LAWS, showings, ~label), equal_nan=True
    )


def test_a_seed_is_a_world(rows: pa.Table) -> None:
    small = World(num_users=64)
    first = pa.concat_tables(events(small))
    assert first.equals(pa.concat_tables(events(small)))
    assert not first.equals(pa.concat_tables(events(World(num_users=64, seed=1))))


def test_smaller_worlds_are_parts_of_larger_ones(rows: pa.Table) -> None:
    small = pa.concat_tables(events(World(num_users=300, days=10)))
    end = small["event_time"][0].as_py().date().replace(day=11)
    kept = [
        u < 300 and t.date() < end
        for u, t in zip(rows["user_id"].to_pylist(), rows["event_time"].to_pylist(), strict=True)
    ]
    assert small.equals(rows.filter(pa.array(kept)))


def test_candidates_of_a_request_share_the_instant_and_no_item_twice(rows: pa.Table) -> None:
    found = rows.group_by(["user_id", "request_id"]).aggregate(
        [("event_time", "count_distinct"), ("item_id", "count_distinct"), ("item_id", "count")]
    )
    assert set(found["event_time_count_distinct"].to_pylist()) == {1}
    assert found["item_id_count_distinct"].equals(found["item_id_count"])
    assert set(found["item_id_count"].to_pylist()) == {2, 3}


def test_users_have_30_to_150_events(rows: pa.Table) -> None:
    count = rows.group_by("user_id").aggregate([("item_id", "count")])["item_id_count"].to_numpy()
    assert count.min() >= 30
    assert count.max() <= 150


def test_a_world_without_users_is_refused() -> None:
    with pytest.raises(InputError, match="num_users must be at least 1, got 0"):
        World(num_users=0)


def test_auc_counts_ties_half() -> None:
    assert auc(np.array([True, False, True, False]), np.array([2.0, 1.0, 1.0, 0.0])) == 0.875
