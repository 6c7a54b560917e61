"""The best prediction in the synthetic world for who sees everything but the past's contexts.

Known to it: every law, and every item, time and past label; not which offers, discounts and
placements a user has met. The marks are then a Gaussian state of which each past label reveals a
little: assumed-density filtering (Minka, "A family of algorithms for approximate Bayesian
inference", 2001, chapter 3), a label's moments by quadrature. It is told the own part of past
labels, placement included, so it errs on the side of a stronger base.
"""

from __future__ import annotations

import numpy as np

from pipelines.sources.synthetic_world import (
    DECAY,
    Array,
    Laws,
    Showings,
    World,
    own_logit,
    reading,
    sigmoid,
)

NODES, _weights = np.polynomial.hermite_e.hermegauss(15)
WEIGHTS = _weights / _weights.sum()


def base_probability(world: World, laws: Laws, showings: Showings, label: Array) -> Array:
    """[U, H, R, C]: mean of each label's probability given all known then but past contexts."""
    own = own_logit(laws, showings)
    weights, count = reading(world, laws, showings)
    department = laws.department[showings.item]
    users, eye = np.arange(len(own)), np.eye(world.num_departments)
    mean = np.zeros((len(own), world.num_departments))
    cov = np.zeros((len(own), world.num_departments, world.num_departments))
    found = np.full(own.shape, np.nan)
    for day in range(own.shape[1]):
        for request in range(own.shape[2]):
            here = np.flatnonzero(showings.is_real[:, day, request].any(axis=1))
            seen = [
                (c, weights[here, day, department[here, day, request, c]])
                for c in range(own.shape[3])
            ]
            for c, read in seen:
                found[here, day, request, c] = _predict(
                    own[here, day, request, c], read, mean[here], cov[here]
                )
            for (
                c,
                read,
            ) in seen:  # siblings share an instant: all are predicted before any label is known
                is_real = showings.is_real[here, day, request, c]
                at, given = here[is_real], read[is_real]
                mean[at], cov[at] = _update(
                    own[at, day, request, c], label[at, day, request, c], given, mean[at], cov[at]
                )
        mean = DECAY * mean
        cov = DECAY**2 * cov + count[users, day, :, None] * eye  # every mark has variance 1
    return found


def _predict(own: Array, read: Array, mean: Array, cov: Array) -> Array:
    centre, spread, _ = _felt(read, mean, cov)
    return sigmoid(own[:, None] + centre[:, None] + spread[:, None] * NODES) @ WEIGHTS


def _update(own: Array, label: Array, read: Array, mean: Array, cov: Array) -> tuple[Array, Array]:
    """Mean and covariance of the state after one label: matches the moments of `read @ state`."""
    centre, spread, along = _felt(read, mean, cov)
    felt = centre[:, None] + spread[:, None] * NODES
    chance = sigmoid(own[:, None] + felt)
    likelihood = np.where(label[:, None], chance, 1 - chance) * WEIGHTS
    likelihood /= likelihood.sum(axis=1, keepdims=True)
    first = (likelihood * felt).sum(axis=1)
    variance = (likelihood * (felt - first[:, None]) ** 2).sum(axis=1)
    gain = along / spread[:, None] ** 2
    shrink = (spread**2 - variance)[:, None, None]
    return mean + gain * (first - centre)[:, None], cov - shrink * gain[:, :, None] * gain[
        :, None, :
    ]


def _felt(read: Array, mean: Array, cov: Array) -> tuple[Array, Array, Array]:
    """Mean and standard deviation of `read @ state`, and its covariance with the state."""
    along = np.einsum("ukl,ul->uk", cov, read)
    variance = (along * read).sum(axis=1)
    return (read * mean).sum(axis=1), np.sqrt(np.maximum(variance, 1e-12)), along
