"""Ours: the user index of the lake's tables, built once, and its CPU fetch, 4096 samples at a time.

The trainer gets tensors. `ours_written.py` writes them too, as everyone else has to.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.contest.world import DOMAIN, LINE, Answer, Array, World, batches
from downstream.token_store import Tokens
from downstream.user_index import IndexStore, UserIndex
from pipelines.domain import parse

NAME = "ours"


def prepare(world: World, length: int) -> None:
    """The index, for any length."""
    UserIndex.build(world.lake, parse(DOMAIN), world.prepared(NAME), days=None, lines=[LINE])


def ready(world: World, length: int) -> Callable[[Path], None]:
    store = opened(world)
    user, as_of = (torch.from_numpy(column) for column in world.asked())

    def answer(out: Path) -> None:
        held: Tokens | None = None
        for some in batches(len(user)):
            # A batch is written over the one before, as long as they are of one size.
            is_whole = held is not None and len(held.row_BL) == len(user[some])
            held = store.fetch(user[some], as_of[some], length, held if is_whole else None)

    return answer


def opened(world: World) -> IndexStore:
    return IndexStore(UserIndex.open(world.prepared(NAME)), LINE)


def checked(world: World, sample_id: Array, length: int) -> Answer:
    """What it gives some samples."""
    user, as_of = (torch.from_numpy(column[sample_id]) for column in world.asked())
    store = opened(world)
    return answer_of(store, store.fetch(user, as_of, length))


def answer_of(store: IndexStore, found: Tokens) -> Answer:
    """A fetch as contestants' answers are compared."""
    row, mask = found.row_BL.numpy(), found.mask_BL.numpy()
    side = {name: column.numpy() for name, column in found.side.items()}
    return Answer(
        event_time_us=np.where(mask, store.index.arrays["event_time_us"][row], -1),
        token=found.token_BLD.contiguous().numpy().view(np.uint16),
        has_token=found.token_mask_BL.numpy(),
        **{name: side[name] for name in ("f_a", "f_b", "label_buy")},
    )
