"""Other domains' tokens beside the own past: what is fetched, and the promises of rankers that read
it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from downstream.batch import MAIN, HistorySequence, RankerBatch
from downstream.configs import RankerConfig, RankerTraining, arm
from downstream.data import DAY_US, RankerData
from downstream.index_arrays import ItemArrays, LineArrays
from downstream.rankers import RANKERS, make_ranker
from downstream.streaming import RankerTrainer, cross_entropy, walk
from downstream.transfer import SourceHistory, source_key
from downstream.user_index import IN_MEMORY, UserIndex
from pipelines.domain import Domain
from pipelines.errors import InputError
from pipelines.features import NEVER_US
from tests.downstream.conftest import SMALL, MakeData

SOURCES = ("ads", "news")
CASES = [(name, parts) for name in RANKERS for parts in ("none", "base", "tokens", "match")]
Change = Callable[[str, Any], Any]


@pytest.fixture(scope="session")
def data(domain: Domain, make_data: MakeData) -> RankerData:
    """The tiny log beside two other ones; the users of one are not all there in the other."""
    own = make_data()
    t, others = own.tensors, (make_data(seed=5, num_events=90), make_data(seed=6, num_users=3))
    return own.with_sources(
        [
            SourceHistory.of(other.store.index, IN_MEMORY, t.user_G, t.as_of_G, name=name)
            for name, other in zip(SOURCES, others, strict=True)
        ]
    )


@pytest.fixture(params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[str, RankerConfig]:
    return request.param[0], arm(request.param[1], SMALL)


@pytest.fixture
def ranker(case: tuple[str, RankerConfig], data: RankerData) -> nn.Module:
    torch.manual_seed(0)
    model = make_ranker(*case, data.inputs, data.vocabulary)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture
def batch(case: tuple[str, RankerConfig], data: RankerData) -> RankerBatch:
    return data.batch(data.of_days(0, 100), case[1])


def with_sources(batch: RankerBatch, change: Change) -> RankerBatch:
    """The batch with every field of every source's sequence changed."""
    found = dict(batch.histories)
    for key in map(source_key, SOURCES):
        fields = found[key]._asdict().items()
        found[key] = HistorySequence(**{name: change(name, held) for name, held in fields})
    return batch._replace(histories=found)


def noise(held: Tensor, keep: Tensor) -> Tensor:
    """`held` with other values of its kind wherever `keep` is false."""
    keep = keep.view(*keep.shape, *(1 for _ in range(held.dim() - keep.dim())))
    other = 1e3 if held.is_floating_point() else (held + 1) % 3
    return torch.where(keep, held, other)


def test_logits_are_finite_and_users_without_a_past_allowed(
    ranker: nn.Module, batch: RankerBatch
) -> None:
    is_empty_R = ~torch.cat([batch.histories[source_key(n)].mask_RL for n in SOURCES], 1).any(1)
    assert is_empty_R.any()
    assert not is_empty_R.all()
    logit_RC = ranker(batch)
    assert torch.isfinite(logit_RC).all()
    cross_entropy(logit_RC, batch.label_RC).backward()
    assert all(torch.isfinite(p.grad).all() for p in ranker.parameters() if p.grad is not None)
    empty = with_sources(
        batch, lambda n, v: v & False if n.endswith("mask_RL") and v is not None else v
    )
    assert torch.isfinite(ranker(empty)).all()


def test_padding_of_a_source_never_reaches_a_logit(ranker: nn.Module, batch: RankerBatch) -> None:
    found = dict(batch.histories)
    for key in map(source_key, SOURCES):
        held = found[key]
        assert not held.mask_RL.all()
        fields = {n: v for n, v in held._asdict().items() if isinstance(v, Tensor)}
        found[key] = held._replace(
            **{n: noise(v, held.mask_RL) for n, v in fields.items() if "mask" not in n}
        )
    torch.testing.assert_close(ranker(batch._replace(histories=found)), ranker(batch))


def test_requests_are_independent(ranker: nn.Module, batch: RankerBatch) -> None:
    sees_R = torch.stack([batch.histories[source_key(n)].mask_RL.any(1) for n in SOURCES]).any(0)
    keep_R = torch.arange(len(sees_R)) % 2 == 0
    other = with_sources(
        batch,
        lambda n, v: noise(v, keep_R) if isinstance(v, Tensor) and "mask" not in n else v,
    )
    before_RC, after_RC = ranker(batch), ranker(other)
    torch.testing.assert_close(after_RC[keep_R], before_RC[keep_R], rtol=0, atol=0)
    moved_R = (after_RC != before_RC).any(dim=1)
    assert torch.equal(moved_R, sees_R & ~keep_R)


def test_the_request_is_encoded_without_its_candidates(
    ranker: nn.Module, batch: RankerBatch
) -> None:
    hidden = ("ids_RCS", "numbers_RCN", "match_RCM", "item_token_RCD", "mask_RC", "label_RC")
    logit_RC = ranker.score(ranker.encode_request(batch._replace(**dict.fromkeys(hidden))), batch)
    torch.testing.assert_close(logit_RC, ranker(batch), rtol=0, atol=0)


def test_every_source_has_an_adapter_and_an_embedding_of_its_own(
    ranker: nn.Module, batch: RankerBatch, data: RankerData
) -> None:
    cross_entropy(ranker(batch), batch.label_RC).backward()
    branch: Any = ranker.sources
    for steps in branch.sources:
        assert steps.adapt[0].weight.grad.abs().sum() > 0
    assert (branch.domain.weight.grad.abs().sum(dim=1) > 0).tolist() == [False, True, True]
    swapped = dict(batch.histories)
    first, second = map(source_key, SOURCES)
    swapped[first], swapped[second] = (
        batch.histories[second]._replace(domain=1), batch.histories[first]._replace(domain=2),
    )  # fmt: skip
    assert not torch.allclose(ranker(batch._replace(histories=swapped)), ranker(batch))


def test_stored_tokens_get_no_gradient_and_never_change(
    case: tuple[str, RankerConfig], ranker: nn.Module, data: RankerData
) -> None:
    batch = data.batch(data.of_days(0, 100), case[1])
    tokens = [batch.histories[source_key(name)].token_RLD for name in SOURCES]
    leaves = [token.requires_grad_() for token in tokens if token is not None]
    cross_entropy(ranker(batch), batch.label_RC).backward()
    assert len(leaves) == 2
    assert all(token.grad is None for token in leaves)
    held = [source.store.token_ND.clone() for source in data.sources]
    trainer = RankerTrainer.create(*case, RankerTraining(), data)
    trainer.train_on(data, [data.of_days(0, 100)], 2**62, size=100)
    for source, before in zip(data.sources, held, strict=True):
        torch.testing.assert_close(source.store.token_ND, before, rtol=0, atol=0)


@pytest.mark.parametrize("name", RANKERS)
def test_it_overfits_32_rows(name: str, data: RankerData) -> None:
    pieces, config = data.of_days(0, 100), arm("base", SMALL)
    first = pieces[: np.searchsorted(np.cumsum(data.pieces.size[pieces]), 32) + 1]
    batch = data.batch(first, config)
    random = torch.rand(batch.label_RC.shape, generator=torch.Generator().manual_seed(3))
    batch = batch._replace(label_RC=torch.where(batch.mask_RC, random.round(), torch.nan))
    trainer = RankerTrainer.create(name, config, RankerTraining(learning_rate=1e-2), data)
    for _ in range(150):
        trainer.optimizer.zero_grad()
        loss = trainer.loss(batch)
        loss.backward()
        trainer.optimizer.step()
    assert float(loss.detach()) < 0.05


def test_without_sources_a_ranker_is_what_it_was_bit_for_bit(
    data: RankerData, make_data: MakeData
) -> None:
    config, training = arm("tokens", SMALL), RankerTraining()
    scores = []
    for each in (make_data(), data.with_sources([])):
        trainer = RankerTrainer.create("din", config, training, each)
        scores.append(np.concatenate([r.score for r in walk(trainer, each, range(6))]))
        assert [*each.batch(each.of_days(0, 100), config).histories] == [MAIN]
    np.testing.assert_array_equal(*scores)


def test_more_groups_than_tokens_are_refused(data: RankerData) -> None:
    six = RankerConfig(embedding=4, width=24, num_tokens=6, heads=2, query_width=8)
    with pytest.raises(ValueError, match="num_tokens 6 must be at least one a group"):
        make_ranker("din", arm("tokens", six), data.inputs, data.vocabulary)


USERS, WIDTH = 3, 2
Event = tuple[int, int, int | None]
"""User, time and when its token was published, in quarters of a day; None: it has none."""
EVENTS = st.lists(
    st.tuples(
        st.integers(0, USERS - 1), st.integers(0, 12), st.one_of(st.none(), st.integers(0, 16))
    ),
    max_size=30,
)
ASKED = st.lists(
    st.tuples(st.integers(0, USERS), st.integers(0, 16)), min_size=1, max_size=8
)  # the last user is not there


def index_of(events: list[Event]) -> UserIndex:
    rows = sorted((user, time, i, seen) for i, (user, time, seen) in enumerate(events))
    user, time, ids = np.array([row[:3] for row in rows], np.int64).T
    available = [NEVER_US if row[3] is None else row[3] * DAY_US // 4 for row in rows]
    return UserIndex.from_arrays(
        user_id=user,
        event_time_us=time * (DAY_US // 4),
        item_id=ids,
        instance_id=ids,
        labels={"buy": (ids % 2, time * (DAY_US // 4) + DAY_US)},
        tokens=LineArrays(
            np.stack([ids, ids + 0.5], axis=1).astype(np.float16),
            np.array(available, np.int64),
            ItemArrays.none(WIDTH),
        ),
    )


@settings(max_examples=100, deadline=None)
@given(events=EVENTS, asked=ASKED, length=st.integers(1, 4))
def test_what_is_fetched_is_what_brute_force_finds(
    events: list[Event], asked: list[tuple[int, int]], length: int
) -> None:
    if all(seen is None for *_, seen in events):
        return
    user_G, as_of_G = torch.tensor(asked).T.contiguous() * torch.tensor([[1], [DAY_US // 4]])
    source = SourceHistory.of(index_of(events), IN_MEMORY, user_G, as_of_G, name="s")
    found = source.sequence(torch.arange(len(asked)), as_of_G, length, domain=1)
    for r, (user, as_of) in enumerate(asked):
        visible = sorted(
            (time, i)
            for i, (whose, time, seen) in enumerate(events)
            if whose == user and time < as_of and seen is not None and seen < as_of
        )
        assert int(source.num_visible_G[r]) == len(visible)
        newest = visible[-length:]
        assert found.mask_RL[r].tolist() == [False] * (length - len(newest)) + [True] * len(newest)
        assert found.token_RLD is not None
        assert found.token_RLD[r, length - len(newest) :, 0].tolist() == [i for _, i in newest]
        assert found.token_RLD[r, : length - len(newest)].abs().sum() == 0
        assert found.gap_s_RL[r, length - len(newest) :].tolist() == [
            (as_of - time) * 21_600 for time, _ in newest
        ]
        assert found.label_RLK[r, length - len(newest) :, 0].tolist() == [
            1 + i % 2 if time + 4 < as_of else 0 for time, i in newest
        ]


def test_a_source_without_a_token_is_refused() -> None:
    one = torch.tensor([1])
    with pytest.raises(InputError, match="source ads has no token of line 'memory'"):
        SourceHistory.of(index_of([(1, 2, None)]), IN_MEMORY, one, one, name="ads")
