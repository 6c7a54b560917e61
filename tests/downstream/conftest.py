"""A tiny fuzzed log behind every test of rankers: events with tokens, requests, candidates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from downstream.batch import RankerBatch
from downstream.configs import RankerConfig, arm
from downstream.data import DAY_US, RankerData
from downstream.index_arrays import ItemArrays, LineArrays
from downstream.inputs import RankerInputs
from downstream.samples import Samples
from downstream.segments import Segments
from downstream.user_index import IN_MEMORY, IndexStore, UserIndex
from pipelines.domain import Domain, parse
from pipelines.features import FeatureArrays, FeatureLayout

torch.set_num_threads(1)  # tiny tensors: threads only wait for each other

NUM_MATCH, TOKEN_WIDTH, NUM_ITEMS = 3, 4, 7

SMALL = RankerConfig(
    embedding=4, width=16, num_tokens=8, depth=1, heads=2, history_length=6, query_width=8
)


def small(name: str) -> RankerConfig:
    return arm(name, SMALL)


@pytest.fixture(scope="session")
def domain() -> Domain:
    def feature(name: str, side: str, **more: object) -> dict[str, object]:
        return {"name": name, "column": name, "side": side, "buckets": 64, **more}

    features = [
        feature("age", "user"),
        feature("store", "context"),
        feature("temperature", "context", kind="number"),
        feature("item", "item"),
        feature("brand", "item"),
        feature("tags", "item", kind="multi-category", max_length=2),
        feature("price", "item", kind="number"),
        feature("rank", "event", kind="number"),
        feature("coupon", "event", known="after"),
        feature("paid", "event", kind="number", known="after"),
    ]
    raw = {
        "name": "tiny",
        "source": {"path": "nowhere"},
        "columns": {"user": "user", "item": "item", "time": "time"},
        "label": [{"name": "buy", "column": "buy"}, {"name": "like", "column": "like"}],
        "feature": features,
    }
    return parse(raw)


MakeData = Callable[..., RankerData]


@pytest.fixture(scope="session")
def make_data(domain: Domain) -> MakeData:
    return lambda **given: tiny_data(domain, **given)


def tiny_data(
    domain: Domain,
    *,
    seed: int = 0,
    num_users: int = 5,
    num_events: int = 60,
    num_requests: int = 24,
    num_days: int = 6,
) -> RankerData:
    """Times fall on few instants, so that equal ones abound; the last user has no event."""
    rng = np.random.default_rng(seed)

    def ids(layout: FeatureLayout, num: int) -> np.ndarray:
        return rng.integers(0, 9, (num, layout.num_slots)).astype(np.int32)

    def numbers(layout: FeatureLayout, num: int) -> np.ndarray:
        found = rng.standard_normal((num, len(layout.numbers))).astype(np.float32)
        return np.where(rng.random(found.shape) < 0.2, np.nan, found).astype(np.float32)

    def moments(num: int) -> np.ndarray:
        return rng.integers(0, 4 * num_days, num) * (DAY_US // 4)

    inputs = RankerInputs.of(domain, num_match=NUM_MATCH, token_width=TOKEN_WIDTH)
    user, time = rng.integers(0, num_users - 1, num_events), moments(num_events)
    order = np.lexsort((time, user))
    user, time = user[order], time[order]
    side_ids = ids(inputs.side, num_events)
    item = side_ids[:, 0].astype(np.int64)
    is_written = rng.random(num_events) < 0.8
    tokens = LineArrays(
        token=rng.standard_normal((num_events, TOKEN_WIDTH)).astype(np.float16),
        available_us=np.where(is_written, (time // DAY_US + 1) * DAY_US, 2**62),
        items=_item_tokens(rng, num_days),
    )
    index = UserIndex.from_arrays(
        user_id=user,
        event_time_us=time,
        item_id=item,
        side={f.stream_column: side_ids[:, i] for i, f in enumerate(inputs.side.features)},
        labels={
            label.name: (rng.integers(-1, 2, num_events), later(time, rng))
            for label in domain.labels
        },
        tokens=tokens,
    )
    fields = {"ids": ids(inputs.fields, num_events), "numbers": numbers(inputs.fields, num_events)}
    index = replace(index, arrays={**index.arrays, **fields})
    group = np.repeat(np.arange(num_requests), rng.integers(1, 8, num_requests))
    num = len(group)
    as_of = np.sort(moments(num_requests))[group]
    candidate_ids = ids(inputs.candidate, num)
    request_ids, request_numbers = (
        ids(inputs.request, num_requests),
        numbers(inputs.request, num_requests),
    )
    score = (candidate_ids[:, 0] % 2) + 0.3 * rng.standard_normal(num)
    samples = Samples(
        instance_id=rng.permutation(num) + 1000,
        user_id=rng.integers(0, num_users, num_requests)[group],
        item_id=candidate_ids[:, 0].astype(np.int64),
        request_id=group + 500,
        as_of_us=as_of,
        request=FeatureArrays(request_ids[group], request_numbers[group]),
        candidate=FeatureArrays(candidate_ids, numbers(inputs.candidate, num)),
        label=np.where(rng.random(num) < 0.1, np.nan, score > 0.5).astype(np.float32),
        label_time_us=later(as_of, rng),
    )
    match_nM = torch.from_numpy(rng.standard_normal((num, NUM_MATCH)).astype(np.float32))
    store = IndexStore(index, IN_MEMORY)
    return RankerData.from_arrays(inputs, samples, store, match_nM, fields=True)


def later(time_us: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Up to two days later: when a label became known."""
    return time_us + rng.integers(0, 2 * DAY_US, len(time_us))


def _item_tokens(rng: np.random.Generator, num_days: int) -> ItemArrays:
    """Every item but the last has a row on every other day."""
    days = np.arange(1, num_days, 2)
    items = np.arange(NUM_ITEMS - 1)
    num = len(days) * len(items)
    return ItemArrays(
        segments=Segments.of(items, np.full(len(items), len(days))),
        available_us=np.tile(days * DAY_US, len(items)),
        decayed_sum=rng.standard_normal((num, TOKEN_WIDTH)).astype(np.float32),
        decayed_count=np.ones(num, np.float32),
    )


@pytest.fixture(scope="session")
def data(domain: Domain) -> RankerData:
    return tiny_data(domain)


@pytest.fixture
def batch_of(data: RankerData) -> Callable[[RankerConfig], RankerBatch]:
    """The batch of all days' pieces for a config; tests change copies of it."""
    return lambda config: data.batch(data.of_days(0, 100), config)
