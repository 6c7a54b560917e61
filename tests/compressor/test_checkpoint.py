"""Checkpoints on a disk that refuses."""

from __future__ import annotations

import resource
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
