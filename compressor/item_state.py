"""The newest item tokens of a line, kept beside its weights: without them, a day's item tokens cost
a read of all days before it.

What is kept is a copy. It counts only while the table's last commit of the line is the one that it
was kept after; otherwise the table is read.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from datetime import date
from pathlib import Path

import numpy as np
import torch

from compressor import versions
from compressor.item_tokens import ItemState
from compressor.training import checkpoint
from pipelines import delta, tables
from pipelines.errors import InputError

NUM_COMMITS = 64
"""Newest commits of the table among which the line's last is looked for."""


def before(lake: str, domain_name: str, line: str, day: date, width: int) -> ItemState:
    """The state at the start of `day`."""
    kept = _kept(lake, domain_name, line, day)
    if kept is not None and kept.decayed_sum.shape[1] == width:
        return kept
    return ItemState.before(lake, domain_name, line, day, width)


def keep(lake: str, line: str, state: ItemState, commit: Mapping[str, str], end: date) -> None:
    """Keep the state that `commit`, which replaced days up to `end`, left in the table."""
    tensors = {name: torch.from_numpy(np.array(x)) for name, x in vars(state).items()}
    checkpoint.save(_folder(lake, line), tensors, {"run": commit.get("run", ""), "end": str(end)})


def drop(lake: str, line: str) -> None:
    """Nothing is kept of the line."""
    shutil.rmtree(_folder(lake, line), ignore_errors=True)


def _kept(lake: str, domain_name: str, line: str, day: date) -> ItemState | None:
    table = tables.item_tokens(domain_name)
    try:
        tensors, meta = checkpoint.load(_folder(lake, line))
        opened = delta.open_table(lake, table)
    except InputError:  # nothing is kept, or written
        return None
    told = (commit for _, commit in delta.commits(opened, NUM_COMMITS))
    # A commit that names no line, as an erasure's, may have changed any.
    last = next((commit for commit in told if commit.get("line", line) == line), {})
    is_same = last.get("run") == meta["run"] and delta.days_told(last).end == day
    return ItemState(**{name: t.numpy() for name, t in tensors.items()}) if is_same else None


def _folder(lake: str, line: str) -> Path:
    return versions.line_folder(lake, line) / "item_state"
