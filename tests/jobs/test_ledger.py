"""The ledger: one row per run, whatever happens to the run or beside it."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jobs import ledger
from pipelines import delta, tables


@dataclass(frozen=True, kw_only=True)
class Args:
    lake: str
    seed: int = 3
    dry_run: bool = False


def reports(lake: Path) -> list[dict[str, Any]]:
    rows = delta.read(str(lake), tables.job_reports()).to_pylist()
    return [json.loads(row["report"]) | {"run_row": row["run"]} for row in rows]


def test_a_run_leaves_one_row_with_its_figures(tmp_path: Path) -> None:
    with ledger.job(str(tmp_path), "write-tokens", Args(lake=str(tmp_path))) as run:
        run.add(rows=10, num_bytes=1280)
    (report,) = reports(tmp_path)
    assert (report["status"], report["rows"], report["bytes_per_instance"]) == ("done", 10, 128.0)
    assert report["peak_rss_bytes"] > 1 << 20
    assert report["args"]["seed"] == 3
    assert report["run_row"] == run.run


def test_a_failed_run_leaves_its_row_and_its_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="gone"), ledger.job(str(tmp_path), "evaluate"):
        raise KeyError("gone")
    (report,) = reports(tmp_path)
    assert (report["status"], report["error"]) == ("failed", "KeyError: 'gone'")
    assert {row["metric"] for row in report["missing"]} >= {"rows", "bytes_per_instance"}


def test_runs_at_the_same_moment_lose_no_row(tmp_path: Path) -> None:
    def one(number: int) -> str:
        with ledger.job(str(tmp_path), f"job-{number}") as run:
            run.add(rows=number)
        return run.run

    with ThreadPoolExecutor(4) as pool:
        runs = list(pool.map(one, range(6)))
    assert sorted(r["run_row"] for r in reports(tmp_path)) == sorted(runs)


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    with ledger.job(str(tmp_path), "evaluate", Args(lake=str(tmp_path), dry_run=True)):
        pass
    assert not delta.exists(str(tmp_path), tables.job_reports())
