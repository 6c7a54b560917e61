"""What every ranker promises in every arm, tested once for all."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compressor.nn.attention import gap_buckets
from downstream.batch import MAIN, HistorySequence, RankerBatch
from downstream.configs import ARMS, RankerConfig, RankerTraining, Reader, arm
from downstream.data import RankerData
from downstream.inputs import StepBias, strictly_before
from downstream.interaction import MatchFeatures
from downstream.rankers import RANKERS, make_ranker
from downstream.streaming import RankerTrainer, cross_entropy
from downstream.tokens import cosine_features

SMALL = RankerConfig(
    embedding=4, width=16, num_tokens=8, depth=1, heads=2, history_length=6, query_width=8
)
CASES = [(name, arm_name) for name in RANKERS for arm_name in ARMS]
BatchOf = Callable[[RankerConfig], RankerBatch]


@pytest.fixture(params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[str, RankerConfig]:
    name, arm_name = request.param
    return name, arm(arm_name, SMALL)


@pytest.fixture
def ranker(case: tuple[str, RankerConfig], data: RankerData) -> nn.Module:
    torch.manual_seed(0)
    model = make_ranker(*case, data.inputs, data.vocabulary)
    for parameter in model.parameters():
        # Parameters that start at zero would hide what they multiply.
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture
def batch(case: tuple[str, RankerConfig], batch_of: BatchOf) -> RankerBatch:
    return batch_of(case[1])


def changed(value: Any, keep: Tensor, generator: torch.Generator) -> Any:
    """`value` with noise of its own kind wherever `keep`, a mask of its leading axes, is false."""
    if not isinstance(value, Tensor):
        return value
    keep = keep.view(*keep.shape, *(1 for _ in range(value.dim() - keep.dim())))
    if value.dtype == torch.bool:
        return value
    if value.is_floating_point():
        return torch.where(keep, value, 1e3)
    noise = torch.randint(0, 3, value.shape, generator=generator, dtype=value.dtype)
    return torch.where(keep, value, noise)


def with_history(batch: RankerBatch, change: Callable[[str, Any], Any]) -> RankerBatch:
    histories = {
        name: sequence._replace(**{f: change(f, v) for f, v in sequence._asdict().items()})
        for name, sequence in batch.histories.items()
    }
    return batch._replace(histories=histories)


REQUEST_SIDE = ("ids_RS", "numbers_RN")
CANDIDATE_SIDE = ("ids_RCS", "numbers_RCN", "match_RCM", "item_token_RCD")


def test_logits_are_finite_and_empty_histories_allowed(
    ranker: nn.Module, batch: RankerBatch
) -> None:
    for sequence in batch.histories.values():
        assert (~sequence.mask_RL.any(dim=1)).any()
        assert sequence.mask_RL.any()
    logit_RC = ranker(batch)
    assert logit_RC.shape == batch.mask_RC.shape
    assert torch.isfinite(logit_RC).all()
    cross_entropy(logit_RC, batch.label_RC).backward()
    assert all(torch.isfinite(p.grad).all() for p in ranker.parameters() if p.grad is not None)


def test_padding_never_reaches_a_logit(ranker: nn.Module, batch: RankerBatch) -> None:
    generator = torch.Generator().manual_seed(1)

    def noise(field: str, value: Any) -> Any:
        return value if "mask" in field else changed(value, mask_RL, generator)

    noisy = batch
    for sequence in batch.histories.values():
        mask_RL = sequence.mask_RL
        noisy = with_history(batch, noise)
    fields = {f: changed(getattr(batch, f), batch.mask_RC, generator) for f in CANDIDATE_SIDE}
    noisy = noisy._replace(**fields)
    torch.testing.assert_close(ranker(noisy)[batch.mask_RC], ranker(batch)[batch.mask_RC])


def test_an_unreadable_token_never_reaches_a_logit(ranker: nn.Module, batch: RankerBatch) -> None:
    generator = torch.Generator().manual_seed(1)
    masks = {"token_RLD": "token_mask_RL", "field_ids_RLS": "field_mask_RL"}
    masks |= {"field_numbers_RLN": "field_mask_RL"}
    noisy = batch
    for name, sequence in batch.histories.items():
        new = {}
        for field, mask in masks.items():
            if getattr(sequence, field) is not None:
                new[field] = changed(getattr(sequence, field), getattr(sequence, mask), generator)
        noisy = noisy._replace(histories={name: sequence._replace(**new)})
    if batch.item_token_RCD is not None and batch.item_token_mask_RC is not None:
        assert not batch.item_token_mask_RC.all()
        item = changed(batch.item_token_RCD, batch.item_token_mask_RC, generator)
        noisy = noisy._replace(item_token_RCD=item)
    torch.testing.assert_close(ranker(noisy)[batch.mask_RC], ranker(batch)[batch.mask_RC])


def test_requests_are_independent(ranker: nn.Module, batch: RankerBatch) -> None:
    keep_R = torch.arange(len(batch.mask_RC)) < 3
    generator = torch.Generator().manual_seed(1)
    other = with_history(batch, lambda _, value: changed(value, keep_R, generator))
    fields = {
        f: changed(getattr(batch, f), keep_R, generator) for f in (*REQUEST_SIDE, *CANDIDATE_SIDE)
    }
    before_RC, after_RC = ranker(batch), ranker(other._replace(**fields))
    torch.testing.assert_close(after_RC[keep_R], before_RC[keep_R])
    assert not torch.allclose(after_RC[~keep_R], before_RC[~keep_R])


def test_candidates_of_a_request_are_independent(ranker: nn.Module, batch: RankerBatch) -> None:
    keep_RC = (torch.arange(batch.mask_RC.shape[1]) != 1).expand_as(batch.mask_RC)
    generator = torch.Generator().manual_seed(1)
    fields = {f: changed(getattr(batch, f), keep_RC, generator) for f in CANDIDATE_SIDE}
    before_RC, after_RC = ranker(batch), ranker(batch._replace(**fields))
    torch.testing.assert_close(after_RC[keep_RC], before_RC[keep_RC])
    assert not torch.allclose(after_RC[~keep_RC], before_RC[~keep_RC])


def test_the_request_is_encoded_without_its_candidates(
    ranker: nn.Module, batch: RankerBatch
) -> None:
    blind = batch._replace(**dict.fromkeys((*CANDIDATE_SIDE, "mask_RC", "label_RC", "sample_RC")))
    logit_RC = ranker.score(ranker.encode_request(blind), batch)
    torch.testing.assert_close(logit_RC, ranker(batch), rtol=0, atol=0)


def test_it_overfits_32_rows(case: tuple[str, RankerConfig], data: RankerData) -> None:
    pieces = data.of_days(0, 100)
    first = pieces[: np.searchsorted(np.cumsum(data.pieces.size[pieces]), 32) + 1]
    batch = data.batch(first, case[1])
    random = torch.rand(batch.label_RC.shape, generator=torch.Generator().manual_seed(3))
    batch = batch._replace(label_RC=torch.where(batch.mask_RC, random.round(), torch.nan))
    trainer = RankerTrainer.create(*case, RankerTraining(learning_rate=1e-2), data)
    for _ in range(150):
        trainer.optimizer.zero_grad()
        loss = trainer.loss(batch)
        loss.backward()
        trainer.optimizer.step()
    assert float(loss.detach()) < 0.05


def test_tokens_get_no_gradient_and_never_change(
    case: tuple[str, RankerConfig], ranker: nn.Module, data: RankerData
) -> None:
    held = data.store.token_ND.clone()
    batch = data.batch(data.of_days(0, 100), case[1])
    tokens = [s.token_RLD for s in batch.histories.values()] + [batch.item_token_RCD]
    tokens = [t.requires_grad_() for t in tokens if t is not None]
    cross_entropy(ranker(batch), batch.label_RC).backward()
    assert all(t.grad is None for t in tokens)
    trainer = RankerTrainer.create(*case, RankerTraining(), data)
    trainer.train_on(data, [data.of_days(0, 100)], 2**62, size=100)
    torch.testing.assert_close(data.store.token_ND, held, rtol=0, atol=0)


@pytest.mark.parametrize(
    "arm_name", ["tokens", "end-to-end", "match", "tokens-only", "tokens-din", "tokens-unlabelled"]
)
def test_the_branch_reads_what_it_is_for(
    arm_name: str, data: RankerData, batch_of: BatchOf
) -> None:
    config = arm(arm_name, SMALL)
    model, batch = make_ranker("din", config, data.inputs, data.vocabulary).eval(), batch_of(config)
    sequence = batch.histories[MAIN]
    if config.branch == "tokens":
        assert sequence.token_RLD is not None
        other = sequence._replace(token_RLD=sequence.token_RLD + 1)
    else:
        assert sequence.field_numbers_RLN is not None
        other = sequence._replace(field_numbers_RLN=sequence.field_numbers_RLN + 1)
    assert not torch.allclose(model(batch), model(batch._replace(histories={MAIN: other})))


@pytest.mark.parametrize("reader", ["transformer", "din"])
@pytest.mark.parametrize("has_labels", [True, False])
def test_past_labels_reach_a_branch_alone_only_where_it_reads_them(
    has_labels: bool, reader: Reader, data: RankerData, batch_of: BatchOf
) -> None:
    config = replace(arm("tokens-only", SMALL), branch_reader=reader, branch_labels=has_labels)
    model = make_ranker("din", config, data.inputs, data.vocabulary).eval()
    batch = batch_of(config)
    turned = with_history(batch, lambda f, value: (value + 1) % 3 if f == "label_RLK" else value)
    assert torch.equal(model(turned), model(batch)) == (not has_labels)


def test_the_hand_made_sequence_beside_an_unlabelled_branch_keeps_its_labels(
    data: RankerData, batch_of: BatchOf
) -> None:
    config = arm("tokens-unlabelled", SMALL)
    model = make_ranker("din", config, data.inputs, data.vocabulary).eval()
    batch = batch_of(config)
    turned = with_history(batch, lambda f, value: (value + 1) % 3 if f == "label_RLK" else value)
    assert not torch.allclose(model(turned), model(batch))


@pytest.mark.parametrize(("arm_name", "is_read"), [("tokens", True), ("tokens-din", False)])
def test_steps_of_a_branch_read_earlier_ones_unless_din_reads_it(
    arm_name: str, is_read: bool, data: RankerData, batch_of: BatchOf
) -> None:
    torch.manual_seed(0)
    config = arm(arm_name, SMALL)
    model = make_ranker("din", config, data.inputs, data.vocabulary).eval()
    for parameter in model.parameters():  # causal layers start as identity
        parameter.data += 0.05 * torch.randn_like(parameter)
    batch = batch_of(config)
    is_other_L = torch.arange(batch.histories[MAIN].mask_RL.shape[1]) != 2

    def moved(field: str, value: Any) -> Any:
        return value + 3.0 * ~is_other_L[:, None] if field == "token_RLD" else value

    def of_steps(batch: RankerBatch) -> Tensor:
        key = model.encode_request(batch).branch.keys_values[1]
        return key if key.dim() == 3 else key.transpose(1, 2).flatten(2)

    before_RLX, after_RLX = of_steps(batch), of_steps(with_history(batch, moved))
    assert not torch.equal(before_RLX[:, ~is_other_L], after_RLX[:, ~is_other_L])
    is_moved = not torch.equal(before_RLX[:, is_other_L], after_RLX[:, is_other_L])
    assert is_moved == is_read


@pytest.mark.parametrize("arm_name", ["base", "tokens", "end-to-end"])
def test_a_step_never_reads_a_later_or_simultaneous_step(
    arm_name: str, data: RankerData, batch_of: BatchOf
) -> None:
    config = arm(arm_name, SMALL)
    model = make_ranker("transformer", config, data.inputs, data.vocabulary).eval()
    batch = batch_of(config)
    sequence = batch.histories[MAIN]
    at = sequence.mask_RL.shape[1] - 2
    generator = torch.Generator().manual_seed(1)

    def disturb(field: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or "mask" in field or field == "gap_s_RL":
            return value
        keep_RL = (torch.arange(value.shape[1]) != at).expand(len(value), -1)
        return changed(value, keep_RL, generator)

    def states(batch: RankerBatch) -> list[Tensor]:
        state = model.encode_request(batch)
        found = [state.sequence.keys_values[1]]
        return found + ([state.branch.keys_values[1]] if state.branch is not None else [])

    gap_s_RL = sequence.gap_s_RL
    is_blind_RL = sequence.mask_RL & (gap_s_RL >= gap_s_RL[:, at : at + 1])
    is_blind_RL[:, at] = False
    is_simultaneous_RL = is_blind_RL & (gap_s_RL == gap_s_RL[:, at : at + 1])
    assert is_simultaneous_RL[:, at + 1].any()
    for before_RHLd, after_RHLd in zip(
        states(batch), states(with_history(batch, disturb)), strict=True
    ):
        before_RLHd, after_RLHd = before_RHLd.transpose(1, 2), after_RHLd.transpose(1, 2)
        torch.testing.assert_close(after_RLHd[is_blind_RL], before_RLHd[is_blind_RL])
        assert not torch.allclose(after_RLHd[sequence.mask_RL], before_RLHd[sequence.mask_RL])


def test_a_step_sees_itself_and_strictly_earlier_steps() -> None:
    sequence = HistorySequence(
        ids_RLF=torch.zeros(1, 4, 0, dtype=torch.int32),
        gap_s_RL=torch.tensor([[0.0, 50.0, 20.0, 20.0]]),
        label_RLK=torch.zeros(1, 4, 1, dtype=torch.int32),
        mask_RL=torch.tensor([[False, True, True, True]]),
    )
    assert strictly_before(sequence)[0, 0, 1:].int().tolist() == [
        [0, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 1, 0, 1],
    ]


def test_a_step_is_scored_by_the_fields_it_shares_and_its_age(
    data: RankerData, batch_of: BatchOf
) -> None:
    config = arm("base", SMALL)
    batch = batch_of(config)
    past = batch.histories[MAIN]
    own_RCF = batch.ids_RCS[:, :, data.inputs.side_slots]
    match_RCLF = make_ranker("din", config, data.inputs, data.vocabulary)._matches(batch)
    assert match_RCLF.any()
    for r, c, step, f in itertools.product(*map(range, match_RCLF.shape)):
        same = own_RCF[r, c, f] == past.ids_RLF[r, step, f] != 0  # 0 is missing: it matches nothing
        assert bool(match_RCLF[r, c, step, f]) == bool(same)
    alone = StepBias(data.inputs, num_heads=1)
    assert not alone(alone.of_request(past), match_RCLF).any()  # at first nothing is preferred
    bias = StepBias(data.inputs, num_heads=4)
    first_RHCL = bias(bias.of_request(past), match_RCLF)
    alike_RCL = match_RCLF.sum(dim=-1).float()
    age_RCL = gap_buckets(past.gap_s_RL)[:, None].expand_as(alike_RCL) * np.log(2)
    for head, wanted in enumerate([0 * age_RCL, -age_RCL, alike_RCL, alike_RCL - age_RCL]):
        torch.testing.assert_close(first_RHCL[:, head], wanted.float())
    with torch.no_grad():
        bias.gap_XH[:, :3] = bias.match_FH[:, :3] = 0.0
        bias.match_FH[:, 1] = 2.0
        bias.gap_XH[:, 0] = torch.arange(len(bias.gap_XH))
    bias_RHCL = bias(bias.of_request(past), match_RCLF)
    torch.testing.assert_close(bias_RHCL[:, 1], 2 * alike_RCL)
    for c in range(match_RCLF.shape[1]):
        torch.testing.assert_close(bias_RHCL[:, 0, c], gap_buckets(past.gap_s_RL).float())


def test_cosine_features_count_the_past_tokens_that_are_alike() -> None:
    user_RLD = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [9.0, 9.0]]])
    mask_RL = torch.tensor([[True, True, True, False]])
    item_RCD = torch.tensor([[[3.0, 0.0], [5.0, 5.0]]])
    found = cosine_features(item_RCD, torch.tensor([[True, False]]), user_RLD, mask_RL)
    best, mean, *counts, exists = found[0, 0].tolist()
    assert best == pytest.approx(1.0)
    assert mean == pytest.approx(2 / 3)
    assert np.expm1(counts) == pytest.approx([2.0, 2.0, 2.0], abs=0.05)
    assert exists == 1
    assert found[0, 1].tolist() == [0.0] * 6


def test_match_features_have_the_scale_of_what_was_trained_on() -> None:
    generator = torch.Generator().manual_seed(0)
    match = MatchFeatures(3)
    spread_M, shift_M = torch.tensor([0.2, 1.0, 30.0]), torch.tensor([0.1, -4.0, 70.0])
    for num_padded in (0, 3, 5):
        match_RCM = shift_M + spread_M * torch.randn(64, 16, 3, generator=generator)
        mask_RC = torch.arange(16).expand(64, 16) < 16 - num_padded
        match.observe(match_RCM.masked_fill(~mask_RC[..., None], 1e3), mask_RC)
    torch.testing.assert_close(match.mean_M, shift_M, rtol=0.1, atol=0.05)
    scaled_RCM = match(match_RCM)[..., :3]
    torch.testing.assert_close(scaled_RCM.mean(dim=(0, 1)), torch.zeros(3), rtol=0, atol=0.2)
    torch.testing.assert_close(scaled_RCM.std(dim=(0, 1)), torch.ones(3), rtol=0, atol=0.1)


def test_a_batch_of_padding_moves_no_scale() -> None:
    match, match_RCM = MatchFeatures(2), torch.randn(2, 3, 2)
    match.observe(match_RCM, torch.zeros(2, 3, dtype=torch.bool))
    torch.testing.assert_close(match(match_RCM)[..., :2], match_RCM)
    match.observe(match_RCM, torch.ones(2, 3, dtype=torch.bool))
    torch.testing.assert_close(match.mean_M, match_RCM.mean(dim=(0, 1)))


def test_prediction_moves_no_scale(data: RankerData) -> None:
    trainer = RankerTrainer.create("din", arm("base", SMALL), RankerTraining(), data)
    days = data.of_days(0, 100)
    before = trainer.state()["model.match.mean_M"].clone()
    trainer.predict(data, days)
    torch.testing.assert_close(trainer.state()["model.match.mean_M"], before, rtol=0, atol=0)
    trainer.train_on(data, [days], 2**62, size=len(days))
    assert not torch.equal(trainer.state()["model.match.mean_M"], before)


def test_weights_depend_on_the_seed_alone(data: RankerData) -> None:
    def weights(seed: int) -> Tensor:
        model = make_ranker("din", arm("match", SMALL), data.inputs, data.vocabulary, seed)
        return nn.utils.parameters_to_vector(model.parameters())

    torch.manual_seed(123)
    first = weights(7)
    torch.testing.assert_close(weights(7), first, rtol=0, atol=0)
    assert not torch.equal(weights(8), first)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"width": 60}, "multiple of num_tokens"),
        ({"num_tokens": 4}, "at least 6"),
        ({"item_tokens": True}, "needs branch"),
        ({"branch": "token"}, "must be none, tokens or fields"),
        ({"branch": "tokens", "branch_reader": "gru"}, "must be transformer or din"),
        ({"branch_reader": "din"}, "need a branch"),
        ({"branch_labels": False}, "need a branch"),
    ],
)
def test_a_config_refuses_nonsense(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RankerConfig(**wrong)
