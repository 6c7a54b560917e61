"""`iat index`: built once, then what the tables have gained, and never another index than asked."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest

from downstream.user_index import UserIndex
from jobs import index
from jobs.cli import run
from pipelines.days import Days
from pipelines.domain import parse
from pipelines.errors import InputError
from tests.downstream.test_index_extend import LINE, built, content, days_of, write_day
from tests.downstream.test_user_index import DOMAIN, RAW


@pytest.fixture(autouse=True)
def _shop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "load_domain", lambda name: DOMAIN)


def iat_index(lake: str, folder: Path, **more: Any) -> dict[str, Any]:
    with contextlib.redirect_stdout(io.StringIO()):
        given = {"line": (LINE,), "fields": True} | more
        return index.main(index.Args(domain="shop", lake=lake, index=folder, **given))


def test_an_index_is_built_then_extended_then_left_alone(lake: str, tmp_path: Path) -> None:
    folder = tmp_path / "index"
    write_day(lake, 0)
    assert iat_index(lake, folder, dry_run=True)["was"] == "missing"
    assert not folder.exists()
    assert iat_index(lake, folder)["was"] == "built"
    assert iat_index(lake, folder)["was"] == "unchanged"
    write_day(lake, 1)
    assert iat_index(lake, folder, dry_run=True)["was"] == "there"  # and not up to date
    found = iat_index(lake, folder, line=())  # keeps what it was built with
    assert (found["was"], found["lines"]) == ("extended", [LINE])
    assert content(UserIndex.open(folder)) == content(built(lake, tmp_path / "whole"))


def test_an_index_of_some_days_gains_those_asked_for(lake: str, tmp_path: Path) -> None:
    for number in range(3):
        write_day(lake, number)
    for number in (1, 2):
        days = Days(days_of(1).start, days_of(number).end)
        iat_index(lake, tmp_path / "index", start=days.start, end=days.end)
        whole = built(lake, tmp_path / "whole", days)
        assert content(UserIndex.open(tmp_path / "index")) == content(whole)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"line": ("another",)}, "was built without line another"),
        ({"fields": True}, "was built without all logged fields"),
    ],
)
def test_what_an_index_was_not_built_with_is_refused(
    lake: str, tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    write_day(lake, 0)
    iat_index(lake, tmp_path / "index", fields=False)
    with pytest.raises(InputError, match=message):
        iat_index(lake, tmp_path / "index", **{"fields": False} | more)


def test_an_index_of_another_domain_or_of_none_is_refused(
    lake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_day(lake, 0)
    iat_index(lake, tmp_path / "index")
    monkeypatch.setattr(index, "load_domain", lambda name: parse(RAW | {"name": "mall"}))
    with pytest.raises(InputError, match="is of shop, not of mall"):
        iat_index(lake, tmp_path / "index")
    (tmp_path / "empty").mkdir()
    command = ["index", "--domain", "shop", "--lake", lake, "--index", str(tmp_path / "empty")]
    assert run(command) == 2
    assert not list((tmp_path / "empty").iterdir())
