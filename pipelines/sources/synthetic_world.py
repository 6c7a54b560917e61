"""A world with a known oracle: labels depend on the *context* of a user's past events.

A shop shows 2 or 3 items at a time. Every showing has an `offer`, a `discount` and a `placement`,
and leaves a mark on the user. Its label is Bernoulli(sigmoid(own + STRENGTH * state)), where

    own    = the item's quality + the segment's taste for its department + the placement's pull
    state  = the marks that the user's showings of *earlier days* left: a decayed mean over those
             of the same department, plus a share of the decayed mean over all of them, both
             shrunk towards 0 while they are few
    mark   = a hidden value of the offer + the depth of the discount + the wear of the placement

Offer and discount never enter `own`, and are drawn independently of everything: a showing's own
label says nothing about them (a temporal-order bottleneck has no reason to keep them), later
labels do (a user-order one has). The placement serves both. Item ids reach the state only through
what past labels give away. A dozen further fields are noise.

Shape legend: U users of a block, H days, R requests a day, C candidates of a request,
K departments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.errors import InputError

Array = npt.NDArray[Any]

DAYS = 60
USERS_PER_BLOCK = 256
REQUESTS = 2
CANDIDATES = 3
SEGMENTS = 8
OFFERS = 200
PLACEMENTS = 6
DECAY = 0.5 ** (1 / 4)
"""Of a mark, per day: half in four days."""
SHARED = 0.4
"""Weight of the marks of every department, beside those of the candidate's own (1)."""
FEW_OWN, FEW_ALL = 1.0, 2.0
"""Showings at which the mean of the marks, own or of every department, is shrunk by half."""
STRENGTH = 5.0
INTERCEPT = -1.0
MARK = {"offer": 0.75, "discount": 0.5, "placement": 0.43}
"""Standard deviation of each field's share of a mark; together 1."""
DISCOUNT = (1.5, 3.0)
"""Beta distribution of the discount."""
NOISE_CATEGORIES = {
    "device": 4,
    "browser": 12,
    "page": 20,
    "region": 50,
    "carrier": 8,
    "creative": 400,
    "badge": 6,
    "font": 10,
}
NOISE_NUMBERS = ("temperature", "load_ms", "stock", "delivery_days")
PER_REQUEST = ("device", "browser", "page", "region", "carrier", "temperature", "load_ms")


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """How large the world is; users are drawn in blocks by seed, so that smaller worlds nest."""

    num_users: int = 4000
    num_items: int = 1200
    num_departments: int = 5
    days: int = DAYS
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_users", "days"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_items < CANDIDATES * self.num_departments or self.num_departments < 1:
            raise InputError(
                f"num_items must be at least {CANDIDATES} x num_departments, got {self.num_items}"
            )


@dataclass(frozen=True, slots=True)
class Laws:
    """What is true of the whole world: items, tastes, hidden values of offers and placements."""

    department: Array
    """[items] of 0 .. K-1"""
    brand: Array
    quality: Array
    taste: Array
    """[segments, K]"""
    offer_mark: Array
    placement_mark: Array
    placement_pull: Array

    @classmethod
    def of(cls, world: World) -> Laws:
        rng = np.random.default_rng([world.seed, 0])
        brand = rng.integers(60, size=world.num_items)
        quality = 0.4 * rng.normal(size=60)[brand] + 0.4 * rng.normal(size=world.num_items)
        return cls(
            department=rng.integers(world.num_departments, size=world.num_items),
            brand=brand,
            quality=quality,
            taste=0.3 * rng.normal(size=(SEGMENTS, world.num_departments)),
            offer_mark=MARK["offer"] * _standard(rng.normal(size=OFFERS)),
            placement_mark=MARK["placement"] * _standard(rng.permutation(PLACEMENTS).astype(float)),
            placement_pull=0.5 * _standard(np.arange(PLACEMENTS, dtype=float)),
        )


@dataclass(frozen=True, slots=True)
class Showings:
    """A block of users' events, [U, H, R, C] unless said; `is_real` where one happened."""

    is_real: Array
    second: Array
    """[U, H, R] of the day"""
    segment: Array
    item: Array
    offer: Array
    discount: Array
    placement: Array
    noise: dict[str, Array]


def draw(world: World, laws: Laws, block: int, *, horizon: int) -> tuple[Showings, Array]:
    """All that is independent of labels, and a uniform number per showing to draw its label."""
    rng = np.random.default_rng([world.seed, 1, block])
    shape = (USERS_PER_BLOCK, horizon, REQUESTS, CANDIDATES)
    is_active = rng.random(shape[:2]) < rng.uniform(0.3, 0.6, (USERS_PER_BLOCK, 1))
    num_requests = is_active * (1 + (rng.random(shape[:2]) < 0.25))
    num_candidates = rng.integers(2, CANDIDATES + 1, shape[:3])
    is_request = np.arange(REQUESTS) < num_requests[..., None]
    # Candidate c is an item of residue c: no request shows one twice. Low numbers are popular.
    third = world.num_items // CANDIDATES
    noise: dict[str, Array] = {}
    for name in (*NOISE_CATEGORIES, *NOISE_NUMBERS):
        drawn = (*shape[:3], 1) if name in PER_REQUEST else shape
        size = NOISE_CATEGORIES.get(name)
        values = rng.integers(size, size=drawn) if size else np.exp(rng.normal(size=drawn))
        noise[name] = np.broadcast_to(values, shape)
    showings = Showings(
        is_real=is_request[..., None] & (np.arange(CANDIDATES) < num_candidates[..., None]),
        second=np.sort(rng.integers(6 * 3600, 23 * 3600, shape[:3]), axis=-1) + np.arange(REQUESTS),
        segment=rng.integers(SEGMENTS, size=USERS_PER_BLOCK),
        item=CANDIDATES * np.floor(third * rng.random(shape) ** 1.5).astype(int)
        + np.arange(CANDIDATES),
        offer=rng.integers(OFFERS, size=shape),
        discount=rng.beta(*DISCOUNT, size=shape),
        placement=rng.integers(PLACEMENTS, size=shape),
        noise=noise,
    )
    return showings, rng.random(shape)


def own_logit(laws: Laws, showings: Showings) -> Array:
    """[U, H, R, C]: what the label owes to the present: item, segment, placement."""
    department = laws.department[showings.item]
    taste = laws.taste[showings.segment[:, None, None, None], department]
    return INTERCEPT + laws.quality[showings.item] + taste + laws.placement_pull[showings.placement]


def marks(laws: Laws, showings: Showings) -> Array:
    """[U, H, R, C]: what each showing leaves behind, mean 0 and standard deviation 1."""
    a, b = DISCOUNT
    depth = (showings.discount - a / (a + b)) / np.sqrt(a * b / ((a + b) ** 2 * (a + b + 1)))
    return (
        laws.offer_mark[showings.offer]
        + MARK["discount"] * depth
        + laws.placement_mark[showings.placement]
    )


def reading(world: World, laws: Laws, showings: Showings) -> tuple[Array, Array]:
    """How labels read marks: weights [U, H, K, K] by department of candidate and marks.

    They fold in the shrinkage, by the decayed number of earlier days' showings. Also the number of
    showings, [U, H, K].
    """
    of_department = _by_department(world, laws, showings)
    count = of_department.sum(axis=(2, 3))
    decayed = np.zeros((len(count), world.num_departments))
    weights = np.zeros((*count.shape, world.num_departments))
    for day in range(count.shape[1]):
        everything = SHARED / (decayed.sum(axis=1) + FEW_ALL)
        weights[:, day] = (
            everything[:, None, None] + np.eye(world.num_departments) / (decayed + FEW_OWN)[:, None]
        )
        decayed = DECAY * decayed + count[:, day]
    return STRENGTH * weights, count


def oracle_logit(world: World, laws: Laws, showings: Showings) -> Array:
    """[U, H, R, C]: the logit labels are drawn from; reads marks of strictly earlier days."""
    weights, _ = reading(world, laws, showings)
    left = (marks(laws, showings)[..., None] * _by_department(world, laws, showings)).sum(
        axis=(2, 3)
    )
    state = np.zeros_like(left)
    for day in range(1, left.shape[1]):
        state[:, day] = DECAY * state[:, day - 1] + left[:, day - 1]
    felt = np.einsum("uhck,uhk->uhc", weights, state)
    by_showing = np.take_along_axis(
        felt, laws.department[showings.item].reshape(*felt.shape[:2], -1), axis=2
    )
    return own_logit(laws, showings) + by_showing.reshape(showings.item.shape)


def sigmoid(logit: Array) -> Array:
    return 1 / (1 + np.exp(-logit))


def _by_department(world: World, laws: Laws, showings: Showings) -> Array:
    """[U, H, R, C, K]: 1 where a real showing is of the department."""
    is_of = laws.department[showings.item][..., None] == np.arange(world.num_departments)
    return is_of & showings.is_real[..., None]


def _standard(values: Array) -> Array:
    return (values - values.mean()) / values.std()
