"""AUC, GAUC, log loss and normalised entropy, with bootstrap intervals over users and seeds.

Every metric is prepared once for its rows and then read under any weights of the users: a resample
of users is a vector of how often each was drawn, so 200 resamples cost one sort and 200 passes.
Scores are probabilities; labels are 0 or 1 (drop unknown ones first). Whatever needs a class that
is absent is NaN, never an exception. Rules of evidence: FINDINGS.md section 3.

Letters: n rows, U users, S training seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Array = npt.NDArray[Any]
Reader = Callable[[Floats], float]
"""User weights [U] -> the metric over rows that count as often as their user was drawn."""

CLIP = 1e-7
"""Probabilities are kept this far from 0 and 1 in the log loss (float32 comes no closer to 1)."""


class Interval(NamedTuple):
    """A value on all rows and its 95% percentile interval."""

    value: float
    low: float
    high: float


def auc(label: Array, score: Array) -> float:
    """The chance that a positive scores above a negative, ties counting half; O(n log n)."""
    return _auc_reader(np.zeros(len(label), np.intp), label, score, 1)(np.ones(1))


def gauc(user: Array, label: Array, score: Array) -> float:
    """AUC within each user who has both classes, averaged with the user's rows as weight."""
    return _read("gauc", user, label, score)


def log_loss(label: Array, score: Array) -> float:
    """Mean of -log p(label), natural logarithm."""
    return _read("log_loss", np.zeros(len(label), np.intp), label, score)


def normalised_entropy(label: Array, score: Array) -> float:
    """Log loss over the entropy of the base rate: 1 is what the base rate alone achieves."""
    return _read("normalised_entropy", np.zeros(len(label), np.intp), label, score)


def user_bootstrap(
    user: Array, label: Array, score: Array, metrics: Sequence[str], num: int = 200, seed: int = 0
) -> dict[str, Interval]:
    """Each metric of METRICS asked for, with its interval over `num` resamples of the users."""
    dense, num_users = _dense(user)
    readers = {name: _reader(name, dense, label, score, num_users) for name in metrics}
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {name: [] for name in metrics}
    for _ in range(num):
        weight = _resample(rng, num_users)
        for name, reader in readers.items():
            drawn[name].append(reader(weight))
    return {name: _interval(r(np.ones(num_users)), drawn[name]) for name, r in readers.items()}


def paired_difference(
    user: Array,
    label: Array,
    scores_a: Array,
    scores_b: Array,
    metric: str,
    num: int = 200,
    seed: int = 0,
) -> Interval:
    """metric(a) - metric(b), mean over seeds, with its interval over users *and* seeds.

    scores_a and scores_b are [S, n] (or [n]): row s of both come from the same seed. Users and
    seeds are resampled independently of each other, with replacement; both arms always see the
    same resample.
    """
    scores_a, scores_b = np.atleast_2d(scores_a), np.atleast_2d(scores_b)
    if scores_a.shape != scores_b.shape:
        raise ValueError(f"both arms need the same [S, n], got {scores_a.shape}, {scores_b.shape}")
    dense, num_users = _dense(user)
    readers = [
        (_reader(metric, dense, label, a, num_users), _reader(metric, dense, label, b, num_users))
        for a, b in zip(scores_a, scores_b, strict=True)
    ]

    def mean(weight: Floats, times: Array) -> float:
        """Mean over seeds that count `times` each; a seed not drawn is not computed."""
        kept = [(t, readers[s]) for s, t in enumerate(times) if t]
        return sum(float(t) * (a(weight) - b(weight)) for t, (a, b) in kept) / float(times.sum())

    rng = np.random.default_rng(seed)
    num_seeds = len(readers)
    drawn = []
    for _ in range(num):
        weight = _resample(rng, num_users)
        times = np.bincount(rng.integers(num_seeds, size=num_seeds), minlength=num_seeds)
        drawn.append(mean(weight, times))
    return _interval(mean(np.ones(num_users), np.ones(num_seeds, np.intp)), drawn)


def _read(name: str, user: Array, label: Array, score: Array) -> float:
    dense, num_users = _dense(user)
    return _reader(name, dense, label, score, num_users)(np.ones(num_users))


def _dense(user: Array) -> tuple[Array, int]:
    users, dense = np.unique(user, return_inverse=True)
    return dense, len(users)


def _resample(rng: np.random.Generator, num_users: int) -> Floats:
    """How often each user is drawn when as many users as there are are drawn with replacement."""
    drawn = rng.integers(max(num_users, 1), size=num_users)
    return np.bincount(drawn, minlength=num_users).astype(np.float64)


def _interval(value: float, drawn: Sequence[float]) -> Interval:
    """Percentiles of the resamples in which the metric exists."""
    found = np.asarray(drawn, np.float64)
    found = found[np.isfinite(found)]
    if not len(found):
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(found, [0.025, 0.975])
    return Interval(value, float(low), float(high))


def _ratio(above: Any, below: Any) -> float:
    return float(above) / float(below) if below else float("nan")


def _auc_reader(user: Array, label: Array, score: Array, num_users: int) -> Reader:
    if np.isnan(score).any():
        return lambda _: float("nan")
    order = np.argsort(score, kind="stable")
    label, score, user = np.asarray(label)[order], np.asarray(score)[order], user[order]
    is_positive = label == 1
    negative = score[~is_positive]
    user_p, user_n = user[is_positive], user[~is_positive]
    # A positive beats the negatives below it and half of those it ties with.
    below = np.searchsorted(negative, score[is_positive], side="left")
    not_above = np.searchsorted(negative, score[is_positive], side="right")

    def read(weight: Floats) -> float:
        num_negative = np.concatenate([np.zeros(1), np.cumsum(weight[user_n])])
        weight_p = weight[user_p]
        beaten = (num_negative[below] + num_negative[not_above]) / 2
        return _ratio(weight_p @ beaten, weight_p.sum() * num_negative[-1])

    return read


def _gauc_reader(user: Array, label: Array, score: Array, num_users: int) -> Reader:
    """Per-user AUC once; a resample only weights the users."""
    if np.isnan(score).any():
        return lambda _: float("nan")
    order = np.lexsort((score, user))
    user, label, score = user[order], np.asarray(label)[order], np.asarray(score)[order]
    is_positive = label == 1
    num_negative = np.concatenate([[0], np.cumsum(~is_positive)])
    # Ties: rows of one user with one score; [start, end) of each row's tie.
    is_new = np.ones(len(user), bool)
    is_new[1:] = (user[1:] != user[:-1]) | (score[1:] != score[:-1])
    tie = np.cumsum(is_new) - 1
    starts = np.append(np.flatnonzero(is_new), len(user))
    negative_u = np.bincount(user[~is_positive], minlength=num_users)
    positive_u = np.bincount(user[is_positive], minlength=num_users)
    before_u = np.concatenate([[0], np.cumsum(negative_u)])
    beaten = (num_negative[starts[tie]] + num_negative[starts[tie + 1]]) / 2 - before_u[user]
    beaten_u = np.bincount(user[is_positive], beaten[is_positive], minlength=num_users)
    has_both = (negative_u > 0) & (positive_u > 0)
    auc_u = beaten_u[has_both] / (negative_u * positive_u)[has_both]
    rows_u = (negative_u + positive_u)[has_both]

    def read(weight: Floats) -> float:
        weight_u = weight[has_both] * rows_u
        return _ratio(weight_u @ auc_u, weight_u.sum())

    return read


def _loss_u(user: Array, label: Array, score: Array, num_users: int) -> Floats:
    p = np.clip(np.asarray(score, np.float64), CLIP, 1 - CLIP)
    loss = -np.log(np.where(np.asarray(label) == 1, p, 1 - p))
    return np.asarray(np.bincount(user, loss, minlength=num_users), np.float64)


def _log_loss_reader(user: Array, label: Array, score: Array, num_users: int) -> Reader:
    loss_u = _loss_u(user, label, score, num_users)
    rows_u = np.bincount(user, minlength=num_users)
    return lambda weight: _ratio(weight @ loss_u, weight @ rows_u)


def _entropy_reader(user: Array, label: Array, score: Array, num_users: int) -> Reader:
    mean_loss = _log_loss_reader(user, label, score, num_users)
    rows_u = np.bincount(user, minlength=num_users)
    positive_u = np.bincount(user, np.asarray(label, np.float64), minlength=num_users)

    def read(weight: Floats) -> float:
        rate = _ratio(weight @ positive_u, weight @ rows_u)
        if not 0 < rate < 1:
            return float("nan")
        return mean_loss(weight) / float(-rate * np.log(rate) - (1 - rate) * np.log(1 - rate))

    return read


_READERS: dict[str, Callable[[Array, Array, Array, int], Reader]] = {
    "auc": _auc_reader,
    "gauc": _gauc_reader,
    "log_loss": _log_loss_reader,
    "normalised_entropy": _entropy_reader,
}
METRICS = tuple(_READERS)


def _reader(name: str, user: Array, label: Array, score: Array, num_users: int) -> Reader:
    if name not in _READERS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}; got {name!r}")
    if len(label) != len(user) or len(score) != len(user):
        raise ValueError(
            f"rows differ: {len(user)} users, {len(label)} labels, {len(score)} scores"
        )
    if not np.isin(label, (0, 1)).all():
        raise ValueError("labels must be 0 or 1; drop the rows whose label is unknown")
    return _READERS[name](user, label, score, num_users)
