"""Checkpoints on a disk that refuses, and saves that are killed."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch

from compressor.training import checkpoint
from pipelines.errors import RetryableError


def test_a_disk_that_refuses_is_worth_a_retry_and_leaves_all_as_it_was(tmp_path: Path) -> None:
    folder, old = tmp_path / "weights", {"w": torch.ones(3)}
    checkpoint.save(folder, old, {"is": "old"})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(RetryableError, match=r"could not write .*weights: .*File too large"):
            checkpoint.save(folder, {"w": torch.ones(100_000)}, {"is": "new"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]
    tensors, meta = checkpoint.load(folder)
    assert meta == {"is": "old"}
    assert tensors["w"].equal(old["w"])


def save_for_ever(folder: Path) -> None:
    while True:
        checkpoint.save(folder, {"w": torch.ones(3)}, {"is": "new"})


def test_a_checkpoint_is_there_at_every_moment_of_being_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    checkpoint.save(folder, {"w": torch.ones(3)}, {"is": "old"})
    writer = multiprocessing.get_context("spawn").Process(target=save_for_ever, args=(folder,))
    writer.start()
    try:
        until = time.monotonic() + 60
        while checkpoint.meta(folder)["is"] == "old" and time.monotonic() < until:
            time.sleep(0.01)
        for _ in range(3000):
            assert checkpoint.meta(folder)["is"] == "new"
    finally:
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
    assert checkpoint.load(folder)[1] == {"is": "new"}


def test_what_killed_saves_left_goes_once_it_is_a_day_old(tmp_path: Path) -> None:
    for name, age_s in ((".weights-old", checkpoint.LEFT_S + 60), (".weights-new", 60)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age_s,) * 2)
    checkpoint.save(tmp_path / "weights", {"w": torch.ones(3)}, {})
    assert {path.name for path in tmp_path.iterdir()} == {"weights", ".weights-new"}


def test_where_names_cannot_be_exchanged_a_checkpoint_is_replaced_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint.ctypes, "CDLL", lambda name: object())
    for what in ("old", "new"):
        checkpoint.save(tmp_path / "weights", {"w": torch.ones(3)}, {"is": what})
    assert checkpoint.load(tmp_path / "weights")[1] == {"is": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]
