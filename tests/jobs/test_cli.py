"""The command line: one word for one thing, exit codes, help that lists what --json writes."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from jobs.cli import CHECK_FAILED, COMMANDS, DONE, JSON_KEYS, RETRY, WRONG_INPUT, run, write_json
from pipelines.errors import CheckFailedError, InputError, RetryableError

SAID_ALIKE = ("domain", "lake", "start", "end", "version", "master", "device", "seed", "dry_run")


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == DONE
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_says_what_it_does_and_what_json_holds(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        run([name, "--help"])
    assert left.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert JSON_KEYS[name].split(",")[0] in printed
    for field in fields(importlib.import_module(COMMANDS[name][0]).Args):
        flag = field.name.replace("_", "-")
        assert f"--{flag}" in printed or flag.upper() in printed


def test_the_same_thing_has_the_same_type_in_every_command() -> None:
    found: dict[str, set[str]] = {}
    for module, _ in COMMANDS.values():
        for field in fields(importlib.import_module(module).Args):
            if field.name in SAID_ALIKE:
                found.setdefault(field.name, set()).add(str(field.type))
    assert set(found) == set(SAID_ALIKE)
    assert {name: kinds for name, kinds in found.items() if len(kinds) > 1} == {}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("needed a, got b"), WRONG_INPUT),
        (CheckFailedError("3 rows"), CHECK_FAILED),
        (RetryableError("a lost race"), RETRY),
        (PermissionError(13, "Permission denied", "/x"), WRONG_INPUT),
        (OSError(28, "No space left on device", "/x"), RETRY),
    ],
)
def test_an_error_is_one_message_and_its_exit_code(
    error: Exception,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(_: object) -> None:
        raise error

    monkeypatch.setattr("jobs.evaluate.main", fails)
    assert run(["evaluate", "--predictions", "x.parquet"]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("iat")
    assert "Traceback" not in printed.err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["verfy"], "did you mean 'verify'?"),
        (["fetch", "--json"], "--json needs a FILE"),
        (["fetch", "--json", "nowhere/x.json"], "there is no folder"),
    ],
)
def test_a_slip_is_answered_with_what_to_do(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(argv) == WRONG_INPUT
    assert said in capsys.readouterr().err


def test_json_has_null_where_there_is_no_number(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    write_json(path, {"auc": float("nan"), "rows": [{"low": float("inf")}, 1.5], "name": "x"})
    assert "NaN" not in path.read_text()
    assert json.loads(path.read_text()) == {"auc": None, "rows": [{"low": None}, 1.5], "name": "x"}


def test_json_holds_the_documented_keys(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text(
        "user_id,item_id,timestamp,clicked\n"
        + "".join(f"u{n % 7},i{n % 5},{1_700_000_000 + n},{n % 2}\n" for n in range(200))
    )
    out, draft = tmp_path / "out.json", tmp_path / "log.toml"
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", "init", str(log), "--out", str(draft), "--json", out],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == DONE, done.stderr
    assert set(json.loads(out.read_text())) == set(JSON_KEYS["init"].split(", "))
