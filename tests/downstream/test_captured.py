"""Batches filled up to one shape, and steps captured over them: the numbers stay the same."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from downstream.configs import RankerConfig, RankerTraining, arm
from downstream.data import RankerData
from downstream.rankers import RANKERS
from downstream.streaming import RankerTrainer, fit, walk
from downstream.user_index import IN_MEMORY, IndexStore

SMALL = RankerConfig(
    embedding=4, width=16, num_tokens=8, depth=1, heads=2, history_length=6, query_width=8
)
TRAINING = RankerTraining(
    batch_candidates=14, learning_rate=0.01, epochs=2, patience=2, pass_steps=1
)
DAYS = range(6)
NAMES = ("none", "base", "match", "end-to-end", "tokens-din", "tokens-unlabelled")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ranker", RANKERS)
def test_pieces_of_nothing_change_neither_loss_nor_gradient(
    ranker: str, name: str, data: RankerData
) -> None:
    trainer = RankerTrainer.create(ranker, arm(name, SMALL), TRAINING, data)
    pieces, known_us = data.of_days(2, 4), 4 * 86_400_000_000
    (piece_3R,) = data.described([pieces], len(pieces) + 5)
    padded = data.gather(piece_3R, data.piece_size + 3, trainer.config, torch.tensor(known_us))
    found, start = [], {name: t.clone() for name, t in trainer.model.state_dict().items()}
    for batch in (data.batch(pieces, trainer.config, known_before_us=known_us), padded):
        trainer.model.load_state_dict(start)
        trainer.model.zero_grad()
        loss = trainer.loss(batch)
        loss.backward()
        grads = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        found.append([loss, *grads, *trainer.model.buffers()])
        found[-1] = [t.detach().clone() for t in found[-1]]
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
    is_there = padded.sample_RC >= 0
    assert int(is_there.sum()) == data.pieces.size[pieces].sum()


def on_gpu(data: RankerData) -> RankerData:
    store = IndexStore(data.store.index, IN_MEMORY, "cuda")
    match_nM = torch.empty(len(data), data.inputs.num_match)
    match_nM[data.tensors.sample_n] = data.tensors.match_nM
    return RankerData.from_arrays(data.inputs, data.samples, store, match_nM, fields=True)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ranker", RANKERS)
def test_captured_steps_give_the_numbers_of_plain_ones(
    ranker: str, name: str, data: RankerData
) -> None:
    data = on_gpu(data)
    found = []
    for is_captured in (False, True):
        trainer = RankerTrainer.create(ranker, arm(name, SMALL), TRAINING, data)
        trainer = replace(trainer, is_captured=is_captured)
        days = [(r.score, r.loss) for r in walk(trainer, data, DAYS)]
        scores = np.concatenate([score for score, _ in days])
        losses = np.array([loss for _, loss in days])
        found.append((scores, losses, trainer.average.averaged))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-4, equal_nan=True)


@pytest.mark.gpu
@needs_gpu
def test_a_frozen_run_that_is_captured_ends_with_its_best_weights(data: RankerData) -> None:
    data = on_gpu(data)
    found = []
    for is_captured in (False, True):
        trainer = RankerTrainer.create("din", arm("base", SMALL), TRAINING, data)
        trainer = replace(trainer, is_captured=is_captured)
        passes = [result.validation_loss for result in fit(trainer, data, DAYS)]
        found.append((np.array(passes), trainer.predict(data, data.of_days(0, 6))[1]))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-4, equal_nan=True)


@pytest.mark.gpu
@needs_gpu
def test_runs_at_once_do_not_disturb_each_other(data: RankerData) -> None:
    data = on_gpu(data)
    torch.cuda.synchronize()

    def scores(_: int) -> np.ndarray:
        with torch.cuda.stream(torch.cuda.Stream()):
            trainer = RankerTrainer.create("din", arm("match", SMALL), TRAINING, data)
            return np.concatenate([r.score for r in walk(trainer, data, DAYS)])

    alone = scores(0)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(scores, range(8)):
            np.testing.assert_allclose(found, alone, rtol=2e-3, atol=2e-4)
