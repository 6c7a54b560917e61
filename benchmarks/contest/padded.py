"""Each sample's padded history copied ahead of time into wide arrays on disk, then read in batches.

As LongCTR's loader does. Copying is done with our own fetch, the fastest way at hand; its samples
lie in the order in which they are read. They have been written just before, so what fits in memory
is read from the page cache.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.contest import ours
from benchmarks.contest.world import WIDTH, Answer, Array, World, batches

NAME = "padded"
COLUMNS: dict[str, Any] = {
    "event_time_us": np.int64, "f_a": np.int32, "f_b": np.int32, "label_buy": np.int32,
    "has_token": np.bool_, "token": np.uint16,
}  # fmt: skip


def prepare(world: World, length: int) -> None:
    """One array a column, [Q, K] or [Q, K, D]."""
    if not world.prepared(ours.NAME).exists():
        ours.prepare(world, length)
    store, folder = ours.opened(world), world.prepared(NAME)
    user, as_of = (torch.from_numpy(column) for column in world.asked())
    folder.mkdir(parents=True)
    arrays = {}
    for name, dtype in COLUMNS.items():
        shape = (len(user), length, WIDTH) if name == "token" else (len(user), length)
        arrays[name] = np.lib.format.open_memmap(
            folder / f"{name}.npy", mode="w+", dtype=dtype, shape=shape
        )
    for some in batches(len(user)):
        found = ours.answer_of(store, store.fetch(user[some], as_of[some], length))
        for name, array in arrays.items():
            array[some] = getattr(found, name)
    (folder / "length.json").write_text(json.dumps(length))


def ready(world: World, length: int) -> Callable[[Path], None]:
    arrays = _opened(world, length)
    num = len(arrays["f_a"])

    def answer(out: Path) -> None:
        # A batch is written over the one before.
        held = {name: array[next(batches(num))].copy() for name, array in arrays.items()}
        for some in batches(num):
            for name, array in arrays.items():
                rows = array[some]
                np.copyto(held[name][: len(rows)], rows)

    return answer


def checked(world: World, sample_id: Array, length: int) -> Answer:
    """What it gives some samples."""
    return Answer(**{name: array[sample_id] for name, array in _opened(world, length).items()})


def _opened(world: World, length: int) -> dict[str, Array]:
    folder = world.prepared(NAME)
    if json.loads((folder / "length.json").read_text()) != length:
        raise ValueError(f"{folder} holds another length than {length}")
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in COLUMNS}
