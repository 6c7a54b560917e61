"""Checkpoints: safetensors and JSON in one folder that appears whole or not at all; never
pickle."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compressor.training.loop import WeightAverage
from pipelines.errors import InputError, RetryableError

TENSORS = "tensors.safetensors"
LEFT_S = 86_400
"""Seconds after which nobody is still writing a checkpoint."""


def save(folder: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write `folder` atomically, replacing one of the same name.

    RetryableError, with all as it was, where the disk refuses.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        save_file(
            {name: t.detach().cpu().contiguous() for name, t in tensors.items()},
            temporary / TENSORS,
        )
        (temporary / "meta.json").write_text(
            json.dumps(dict(meta), indent=1, sort_keys=True, default=str)
        )
        for path in temporary.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if folder.exists():
            _exchange(temporary, folder)
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.rename(folder)
        _remove_left(folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, SafetensorError) and "I/O error" in str(error):
            raise RetryableError(f"could not write {folder}: {error}") from error
        raise


def _exchange(one: Path, other: Path) -> None:
    """Each takes the other's name, in one step where the system can (renameat2: Linux's local file
    systems), so that a kill leaves neither name without one; elsewhere in three."""
    here, exchange = -100, 2
    first, second = (os.fsencode(path.absolute()) for path in (one, other))
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None or rename(here, first, here, second, exchange):
        between = Path(f"{one}-between")
        other.rename(between)
        one.rename(other)
        between.rename(one)


def _remove_left(folder: Path) -> None:
    """What killed saves of the same checkpoint have left behind, once it is a day old."""
    for left in folder.parent.glob(f".{glob.escape(folder.name)}-*"):
        with contextlib.suppress(OSError):  # another run's, which has just gone
            if time.time() - left.stat().st_mtime > LEFT_S:
                shutil.rmtree(left)


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and meta of a checkpoint."""
    try:
        return load_file(folder / TENSORS), meta(folder)
    except FileNotFoundError as error:
        raise _missing(folder) from error
    except SafetensorError as error:
        raise InputError(
            f"{folder / 'tensors.safetensors'} is no safetensors file ({error}); no other kind is "
            "read, for loading it could run code. Train again, or copy the checkpoint again"
        ) from error


def meta(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself, without its tensors."""
    try:
        return dict(json.loads((folder / "meta.json").read_text()))
    except FileNotFoundError as error:
        raise _missing(folder) from error


def _missing(folder: Path) -> InputError:
    return InputError(f"no checkpoint at {folder}: train one first, or check --version")


def state(
    model: nn.Module, optimizer: torch.optim.Optimizer, average: WeightAverage
) -> dict[str, Tensor]:
    """Everything that the next step depends on, by name."""
    found = {f"model.{n}": t for n, t in model.state_dict().items()}
    found |= {f"average.{i}": t for i, t in enumerate(average.averaged)}
    found["average.num_updates"] = torch.tensor(average.num_updates)
    for i, slots in optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{i}.{k}": t for k, t in slots.items()}
    return found


def restore(
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage,
) -> None:
    """The inverse of `state`; shapes must agree."""
    model.load_state_dict(
        {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    )
    with torch.no_grad():
        for i, averaged in enumerate(average.averaged):
            averaged.copy_(tensors[f"average.{i}"])
    average.num_updates = int(tensors["average.num_updates"])
    slots: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            slots.setdefault(int(index), {})[key] = tensor
    held = optimizer.state_dict()
    optimizer.load_state_dict({"state": slots, "param_groups": held["param_groups"]})


def grown(
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rows: Tensor,
) -> dict[str, Tensor]:
    """`state` of a model of fewer embedding rows, for this fresh one, where its rows are `rows`.

    Rows that came since have their initial weights and an optimizer state of zeros. Tensors that
    do not fit stay as they are, which `restore` refuses.
    """
    name, table = next((n, p) for n, p in model.named_parameters() if n.startswith("bank."))
    place = [n for n, _ in model.named_parameters()].index(name)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    slot = next(i for i, p in enumerate(held) if p is table)
    initial = table.detach().cpu()
    found = dict(tensors)
    for key, tensor in tensors.items():
        is_slot = key.startswith(f"optimizer.{slot}.")
        is_of_table = is_slot or key in (f"model.{name}", f"average.{place}")
        if is_of_table and tensor.shape == (len(rows), initial.shape[1]):
            out = torch.zeros_like(initial) if is_slot else initial.clone()
            out[rows] = tensor
            found[key] = out
    return found
