"""What the DAG files say: every command is one of the toolkit's, and every task is looked after."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tyro

from jobs.cli import COMMANDS
from jobs.setup_airflow import AIRFLOW_VENV
from tests.conftest import ROOT

OLDEST_LOCK = ROOT / "tests" / "airflow" / "oldest.lock"
DOMAINS = ("grocery", "movielens", "synthetic")
OF_A_DOMAIN = ("iat_daily_", "iat_compressor_", "iat_ranker_")


def described(python: Path, home: Path, settings: Path = ROOT / "dags/settings.toml") -> Any:
    """What `describe.py` says, run by an Airflow's Python."""
    environment = os.environ | {
        "AIRFLOW_HOME": str(home), "PYTHONPATH": str(ROOT), "IAT_AIRFLOW": str(settings),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False", "PYTHONWARNINGS": "default",
    }  # fmt: skip
    done = subprocess.run(
        [python, ROOT / "tests" / "airflow" / "describe.py"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def newest(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return described(AIRFLOW_VENV / "bin" / "python", tmp_path_factory.mktemp("home"))


def tasks(held: Any) -> list[tuple[str, str, dict[str, Any]]]:
    return [
        (name, task, of) for name, dag in held["dags"].items() for task, of in dag["tasks"].items()
    ]


def test_every_domain_file_has_its_dags(newest: Any) -> None:
    wanted = {start + domain for start in OF_A_DOMAIN for domain in DOMAINS}
    assert newest["dags"].keys() == wanted | {"iat_backfill", "iat_transfer"}


def test_a_new_domain_file_makes_new_dags(tmp_path: Path) -> None:
    folder = tmp_path / "domains"
    folder.mkdir()
    settings = tmp_path / "airflow.toml"
    settings.write_text('lake = "s3://bucket/lake"\nwork = "w"\ndomains = "domains"\niat = "iat"\n')
    (folder / "shop.toml").write_text('name = "shop"\n')
    held = described(AIRFLOW_VENV / "bin" / "python", tmp_path, settings)
    assert {name for name in held["dags"] if "shop" in name} == {s + "shop" for s in OF_A_DOMAIN}
    (command,) = held["dags"]["iat_daily_shop"]["tasks"]["check_streams"]["commands"]
    assert command[command.index("--lake") + 1] == "s3://bucket/lake"
    assert command[command.index("--domain") + 1] == str(folder / "shop.toml")


def test_spark_goes_to_a_connection_and_lines_are_trained_anew_where_settings_say_so(
    newest: Any, tmp_path: Path
) -> None:
    settings, told = tmp_path / "airflow.toml", ROOT / "dags" / "settings.toml"
    text = told.read_text().replace('"../', f'"{ROOT}/')
    retrain = '[domain.grocery]\nretrain = "0 0 1 * *"'
    settings.write_text('operator = "spark-submit"\n' + text.replace("[domain.grocery]", retrain))
    held = described(AIRFLOW_VENV / "bin" / "python", tmp_path, settings)
    spark = {(dag, task) for dag, task, of in tasks(held) if of["type"] == "SparkSubmitOperator"}
    assert spark == {
        (f"iat_daily_{domain}", task)
        for domain in DOMAINS
        for task in ("build_instances", "build_streams_and_samples")
    } | {("iat_backfill", "build")}
    timetables = {name: dag["timetable"] for name, dag in held["dags"].items()}
    assert timetables["iat_compressor_grocery"] == "CronDataIntervalTimetable"
    assert newest["dags"]["iat_compressor_grocery"]["timetable"] == "NullTimetable"


def test_every_command_parses_as_its_jobs_arguments(newest: Any) -> None:
    seen = set()
    for dag, task, of in tasks(newest):
        assert of["commands"] or task == "run" or task == "build", (dag, task)
        for name, *flags in of["commands"]:
            module = importlib.import_module(COMMANDS[name][0])
            given = [word for word in flags if word]
            assert isinstance(tyro.cli(module.Args, args=given), module.Args)
            assert "{" not in " ".join(flags), (dag, task, flags)
            seen.add(name)
    assert seen == {
        "arrived", "build-instances", "build", "check", "walk-compressor", "index", "walk-ranker",
        "train-compressor", "approve", "backfill", "transfer", "transfer-report",
    }  # fmt: skip


def test_a_word_that_a_job_does_not_know_is_met(newest: Any) -> None:
    """The test above can fail."""
    name, *flags = newest["dags"]["iat_daily_grocery"]["tasks"]["extend_index"]["commands"][0]
    module = importlib.import_module(COMMANDS[name][0])
    with pytest.raises(SystemExit):
        tyro.cli(module.Args, args=[*flags, "--nonsense", "1"])


def test_every_task_is_looked_after(newest: Any) -> None:
    for dag, task, of in tasks(newest):
        where = (dag, task)
        assert of["alert"], where
        if task == "commands":
            continue
        assert of["doc"], where
        assert of["retries"] >= 1 or task == "check_tokens", where
        assert of["backoff"], where
        assert of["timeout_s"] or of["type"] == "IatSensor", where
    for name, dag in newest["dags"].items():
        assert dag["doc"], name
        assert dag["deadline_s"] or not name.startswith(OF_A_DOMAIN), name
    for domain in DOMAINS:
        daily = newest["dags"][f"iat_daily_{domain}"]
        assert daily["timetable"] == "CronDataIntervalTimetable"
        assert daily["tasks"]["wait_for_events"]["type"] == "IatSensor"


def test_gpu_and_spark_tasks_wait_for_their_one_slot(newest: Any) -> None:
    gpu = {"walk-compressor", "walk-ranker", "train-compressor", "transfer"}
    for dag, task, of in tasks(newest):
        names = {name for name, *_ in of["commands"]}
        if gpu & names or task in ("run", "write_tokens"):
            wanted = "default_pool" if task == "commands" else "iat_gpu"
            assert of["pool"] == wanted, (dag, task)
        elif {"build", "build-instances"} & names or task in ("build", "plan"):
            assert of["pool"] == "iat_spark", (dag, task)


def test_a_day_flows_from_its_events_to_its_tokens(newest: Any) -> None:
    steps = newest["dags"]["iat_daily_grocery"]["tasks"]
    at, path = "wait_for_events", ["wait_for_events"]
    while len(steps[at]["downstream"]) == 1:
        (at,) = steps[at]["downstream"]
        path.append(at)
    assert path == [
        "wait_for_events", "build_instances", "check_instances", "build_streams_and_samples",
        "check_streams", "walk_compressor",
    ]  # fmt: skip
    assert steps["walk_compressor"]["downstream"] == ["check_tokens", "extend_index"]


def test_nothing_that_airflow_calls_deprecated_is_imported(newest: Any) -> None:
    assert newest["warnings"] == []


@pytest.mark.slow
def test_the_same_dags_parse_on_airflow_3_1(newest: Any, tmp_path: Path) -> None:
    uv = [sys.executable, "-m", "uv"]
    environment = tmp_path / "oldest"
    subprocess.run([*uv, "venv", "-q", "--python", sys.executable, environment], check=True)
    python = environment / "bin" / "python"
    install = ["pip", "sync", "-q", "--no-config", "--python", python, "--require-hashes"]
    subprocess.run([*uv, *install, OLDEST_LOCK], check=True)
    oldest = described(python, tmp_path / "home")
    assert oldest["version"].startswith("3.1.")
    assert oldest["dags"] == newest["dags"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lake = 1\n", "needs `work`"),
        ("x", "cannot be read"),
        ("GOOD\nlakes = 1\n", "there is no lakes"),
        ('GOOD\noperator = "x"\n', "operator must be one of"),
        ('GOOD\n[domain.shop]\nwindow = "x"\n', "window must be like 30"),
        ('GOOD\n[domain.shop]\nend = "2026-02-01"\n', "end must be like 2026-01-01"),
        ('GOOD\n[domain.shop]\nstart = "2026-02-01"\n', "start must be like 2026-01-01"),
        ("GOOD\n[domain.shop]\nwindows = 3\n", r"\[domain.shop\]: there is no windows"),
    ],
)
def test_settings_that_make_no_sense_say_what_to_write(
    tmp_path: Path, text: str, says: str
) -> None:
    from dags import settings

    (tmp_path / "d").mkdir()
    good = 'lake = "l"\nwork = "w"\ndomains = "d"\niat = "iat"'
    (tmp_path / "airflow.toml").write_text(text.replace("GOOD", good))
    with pytest.raises(settings.SettingsError, match=says):
        settings.load(str(tmp_path / "airflow.toml")).of("shop")


def test_domain_files_that_make_no_sense_are_named(tmp_path: Path) -> None:
    from dags import settings

    (tmp_path / "airflow.toml").write_text('lake = "l"\nwork = "w"\ndomains = "d"\niat = "iat"\n')
    held = settings.load(str(tmp_path / "airflow.toml"))
    with pytest.raises(settings.SettingsError, match="no such folder"):
        _ = held.domain_files
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.toml").write_text('title = "x"')
    with pytest.raises(settings.SettingsError, match=r"a\.toml is no domain file"):
        _ = held.domain_files
    for name in ("a", "b"):
        (tmp_path / "d" / f"{name}.toml").write_text('name = "shop"')
    with pytest.raises(settings.SettingsError, match="both name their domain 'shop'"):
        _ = held.domain_files
