"""What the quickstart does before and around its chain; `.ci/run` runs the chain itself."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import pytest

from jobs import progress, quickstart
from jobs.cli import RETRY, WRONG_INPUT, run
from jobs.comparison import QUICK_ARMS
from jobs.quickstart import MARK, Args, build_command
from pipelines.domain import Source, load


class Disk(NamedTuple):
    total: int
    used: int
    free: int


def test_a_dry_run_names_the_command_and_the_arms_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lake = tmp_path / "lake"
    assert run(["quickstart", "--lake", str(lake), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "iat build --domain grocery" in printed
    assert all(arm.name in printed for arm in QUICK_ARMS)
    assert not lake.exists()


def test_a_folder_that_no_quickstart_made_is_never_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "lake" / "thesis.txt"
    kept.parent.mkdir()
    kept.write_text("years of work")
    assert run(["quickstart", "--lake", str(kept.parent)]) == WRONG_INPUT
    assert "was not made by a quickstart" in capsys.readouterr().err
    assert kept.read_text() == "years of work"


def test_what_an_earlier_quickstart_left_is_replaced(tmp_path: Path) -> None:
    old = tmp_path / "lake" / "instances"
    old.mkdir(parents=True)
    (tmp_path / "lake" / MARK).touch()
    quickstart._fresh(tmp_path / "lake")
    assert [path.name for path in (tmp_path / "lake").iterdir()] == [MARK]


def test_too_little_disk_is_said_before_anything_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lake = tmp_path / "lake"
    (lake / "instances").mkdir(parents=True)
    (lake / MARK).touch()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(10**9, 9 * 10**8, 10**8))
    assert run(["quickstart", "--lake", str(lake)]) == RETRY
    assert "0.1 GiB free and the quickstart needs 2" in capsys.readouterr().err
    assert (lake / "instances").is_dir()


def test_a_log_of_ones_own_is_built_whole() -> None:
    """Only public logs have a reader that can take a sample."""
    domain, args = load("grocery"), Args(households=5, days=9)
    assert "--limit-users 5 --limit-days 9" in " ".join(build_command(args, domain))
    own = replace(domain, source=Source(path="events.parquet"))
    assert "--limit" not in " ".join(build_command(args, own))


def test_ticks_of_workers_reach_the_one_bar() -> None:
    ticks = get_context("spawn").SimpleQueue()
    assert [*progress.ticked(range(3))] == [0, 1, 2]
    assert progress.count(ticks) == 0
    progress.forward_to(ticks)
    try:
        assert [*progress.ticked(range(3))] == [0, 1, 2]
        progress.bar(5, desc="days", unit="day").update(2)
    finally:
        progress._ticks = None
    assert progress.count(ticks) == 5


def test_the_environment_of_the_user_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, str] = {}

    class Done(NamedTuple):
        returncode: int = 0

    def fake(_: list[str], *, env: dict[str, str], check: bool) -> Done:
        seen.update(env)
        return Done()

    monkeypatch.setattr(quickstart.subprocess, "run", fake)
    monkeypatch.setitem(os.environ, "OURS", "theirs")
    quickstart._run(["iat", "build"], OURS="ours", OTHER="other")
    assert (seen["OURS"], seen["OTHER"]) == ("theirs", "other")
