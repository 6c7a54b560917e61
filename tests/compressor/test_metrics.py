import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.training.metrics import (
    METRICS,
    auc,
    gauc,
    log_loss,
    normalised_entropy,
    paired_difference,
    user_bootstrap,
)

# (user, label, score) with many ties
ROWS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 1), st.integers(0, 4)), min_size=0, max_size=25
)


def brute_auc(rows: list[tuple[int, int, float]]) -> float:
    positive = [s for _, y, s in rows if y == 1]
    negative = [s for _, y, s in rows if y == 0]
    wins = [1.0 if p > n else 0.5 if p == n else 0.0 for p in positive for n in negative]
    return sum(wins) / len(wins) if wins else math.nan


def brute_gauc(rows: list[tuple[int, int, float]]) -> float:
    above, below = 0.0, 0
    for user in {u for u, _, _ in rows}:
        mine = [r for r in rows if r[0] == user]
        if not math.isnan(brute_auc(mine)):
            above, below = above + brute_auc(mine) * len(mine), below + len(mine)
    return above / below if below else math.nan


def columns(rows: list[tuple[int, int, float]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    array = np.asarray(rows, np.float64).reshape(-1, 3)
    return array[:, 0].astype(np.int64), array[:, 1].astype(np.int8), array[:, 2]


@given(ROWS)
def test_auc_and_gauc_are_what_counting_every_pair_gives(
    rows: list[tuple[int, int, float]],
) -> None:
    user, label, score = columns(rows)
    assert auc(label, score) == pytest.approx(brute_auc(rows), nan_ok=True)
    assert gauc(user, label, score) == pytest.approx(brute_gauc(rows), nan_ok=True)


@settings(deadline=None)
@given(ROWS, st.integers(0, 9))
def test_a_resample_is_the_metric_of_repeated_rows(
    rows: list[tuple[int, int, float]], seed: int
) -> None:
    """The interval of one resample is that resample: recompute it by repeating rows."""
    user, label, score = columns([(u, y, (s + 1) / 6) for u, y, s in rows])
    users = np.unique(user)
    found = user_bootstrap(user, label, score, METRICS, num=1, seed=seed)
    drawn = np.random.default_rng(seed).integers(max(len(users), 1), size=len(users))
    # A user drawn twice is two users to nobody: GAUC weighs the user's rows twice.
    repeated = [
        (u * 100 + copy, y, s)
        for u, y, s in zip(user, label, score, strict=True)
        for copy in range(np.count_nonzero(users[drawn] == u))
    ]
    expected = {
        "auc": auc(*columns(repeated)[1:]),
        "gauc": gauc(*columns(repeated)),
        "log_loss": log_loss(*columns(repeated)[1:]),
        "normalised_entropy": normalised_entropy(*columns(repeated)[1:]),
    }
    assert {k: v.low for k, v in found.items()} == pytest.approx(expected, nan_ok=True)


def test_log_loss_and_entropy_of_the_base_rate() -> None:
    label = np.array([1, 0, 0, 0])
    assert log_loss(label, np.full(4, 0.25)) == pytest.approx(
        -(math.log(0.25) + 3 * math.log(0.75)) / 4
    )
    assert normalised_entropy(label, np.full(4, 0.25)) == pytest.approx(1.0)
    assert math.isfinite(log_loss(label, np.array([0.0, 1.0, 0.0, 1.0])))


@pytest.mark.parametrize("label", [[], [1, 1], [0, 0]])
def test_an_absent_class_is_nan_and_never_an_exception(label: list[int]) -> None:
    y, score = np.array(label, np.int8), np.linspace(0.2, 0.8, len(label))
    found = user_bootstrap(y, y, score, METRICS, num=3)
    for name in ("auc", "gauc", "normalised_entropy"):
        assert all(math.isnan(x) for x in found[name])
    assert math.isnan(paired_difference(y, y, score, score, "auc", num=3).low)
    assert math.isnan(log_loss(y, score)) == (not label)


def test_a_nan_score_is_a_nan_metric() -> None:
    assert math.isnan(auc(np.array([0, 1]), np.array([0.3, np.nan])))
    assert math.isnan(gauc(np.zeros(2), np.array([0, 1]), np.array([0.3, np.nan])))


def test_unknown_labels_and_metrics_are_refused() -> None:
    with pytest.raises(ValueError, match="drop the rows whose label is unknown"):
        log_loss(np.array([-1, 1]), np.array([0.5, 0.5]))
    with pytest.raises(ValueError, match="auc, gauc, log_loss, normalised_entropy"):
        user_bootstrap(np.zeros(1), np.zeros(1), np.zeros(1), ["f1"])


def noisy(seed: int, gain: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """60 users x 20 rows whose arm a knows `gain` more of the label than arm b, in 6 seeds."""
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(60), 20)
    label = rng.integers(0, 2, len(user))
    known = rng.normal(size=len(user)) + label * 0.5
    b = known + rng.normal(size=(6, len(user))) * 0.3
    a = known + rng.normal(size=(6, len(user))) * 0.3 + label * gain
    return user, label, a, b


def test_the_interval_of_no_difference_holds_zero_about_as_often_as_it_says() -> None:
    held = 0
    for seed in range(40):
        low, high = paired_difference(*noisy(seed, 0.0), "auc", num=60, seed=seed)[1:]
        held += low <= 0 <= high
    assert held >= 32


def test_a_real_difference_is_found_and_changes_sign_with_the_arms() -> None:
    user, label, a, b = noisy(0, 0.5)
    found = paired_difference(user, label, a, b, "auc", num=50)
    assert found.low > 0.02
    assert found.low < found.value < found.high
    turned = paired_difference(user, label, b, a, "auc", num=50)
    assert turned == pytest.approx((-found.value, -found.high, -found.low))


def test_seeds_that_disagree_widen_the_interval() -> None:
    user, label, a, b = noisy(0, 0.5)
    a[0] = -b[0]
    alone = paired_difference(user, label, a.mean(0), b.mean(0), "auc", num=50)
    seeds = paired_difference(user, label, a, b, "auc", num=50)
    assert seeds.high - seeds.low > 3 * (alone.high - alone.low)


def test_users_are_resampled_and_not_rows() -> None:
    """1 user of 10,000 equal rows is one observation: its interval has no width, rows' would."""
    rng = np.random.default_rng(0)
    label, score = rng.integers(0, 2, 500), rng.random(500)
    found = user_bootstrap(np.zeros(500), label, score, ["auc"], num=20)["auc"]
    assert found.low == found.value == found.high


@pytest.mark.slow
def test_a_million_rows_resample_200_times_in_seconds() -> None:
    rng = np.random.default_rng(0)
    label, score = rng.integers(0, 2, 1_000_000), rng.random(1_000_000).astype(np.float32)
    started = time.perf_counter()
    user_bootstrap(rng.integers(0, 20_000, 1_000_000), label, score, METRICS, num=200)
    assert time.perf_counter() - started < 60
