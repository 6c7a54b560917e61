"""What a process of each kind loads: a Spark job never torch, a GPU job never Spark."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SPARK_JOBS = (
    "build_instances",
    "build_streams",
    "build_samples",
    "materialize",
    "backfill",
    "status",
    "token_steps",
)
GPU_JOBS = (
    "train_compressor",
    "write_tokens",
    "train_ranker",
    "evaluate",
    "fetch",
    "status",
    "token_steps",
)
LOADED = """
import importlib, sys
for name in sys.argv[2:]:
    importlib.import_module(f"jobs.{name}")
print(sorted(name for name in sys.modules if name.partition(".")[0] == sys.argv[1]))
"""


@pytest.mark.parametrize(
    ("jobs", "never"), [(SPARK_JOBS, "torch"), (GPU_JOBS, "pyspark"), (GPU_JOBS, "airflow")]
)
def test_a_process_never_loads_the_other_half(jobs: tuple[str, ...], never: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOADED, never, *jobs],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"
