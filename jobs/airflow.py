"""A local Airflow with our DAGs: start, stop. SQLite, two tasks at once, every port on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from jobs.setup import ROOT
from jobs.setup_airflow import AIRFLOW_VENV, set_up
from pipelines.errors import InputError

HOST = "127.0.0.1"
HEALTHY_S, STOP_S = 180, 30
POOLS = {"iat_spark": "Spark jobs, one at a time", "iat_gpu": "GPU jobs, one at a time"}
PROCESSES = {
    "api-server": ["api-server", "--host", HOST],
    # What serves the logs of tasks listens on every interface; here the files are at hand.
    "scheduler": ["scheduler", "--skip-serve-logs"],
    "dag-processor": ["dag-processor"],
    "triggerer": ["triggerer", "--skip-serve-logs"],
}
PASSWORDS = "passwords.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Local:
    """One Airflow on this machine."""

    home: Path
    """Its database, logs and passwords."""
    settings: Path
    """Of our DAGs (dags/settings.py)."""
    port: int = 8080

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def pid_file(self) -> Path:
        return self.home / "pid"

    def environment(self) -> dict[str, str]:
        """What all its processes are told."""
        home = str(self.home)
        told = {
            "CORE__DAGS_FOLDER": str(ROOT / "dags"),
            "CORE__LOAD_EXAMPLES": "False",
            "CORE__EXECUTOR": "LocalExecutor",
            "CORE__PARALLELISM": "2",
            "CORE__EXECUTION_API_SERVER_URL": f"{self.address}/execution/",
            "CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(self.home / PASSWORDS),
            "CORE__SIMPLE_AUTH_MANAGER_USERS": "admin:admin",
            "DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home}/airflow.db",
            "API__HOST": HOST,
            "API__PORT": str(self.port),
            "API__WORKERS": "1",
            "API__BASE_URL": self.address,
            "API_AUTH__JWT_SECRET": self._secret("jwt"),
            "API__SECRET_KEY": self._secret("api"),
            "SCHEDULER__ENABLE_HEALTH_CHECK": "False",
            # A task whose process is gone is found after this long.
            "SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "60",
            "SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "10",
            "DAG_PROCESSOR__REFRESH_INTERVAL": "15",
            "DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "15",
            "USAGE_DATA_COLLECTION__ENABLED": "False",
        }
        return os.environ | {
            "AIRFLOW_HOME": home,
            "PATH": f"{AIRFLOW_VENV / 'bin'}:{os.environ['PATH']}",
            # Triggers, and a DAG's own modules, are imported by name.
            "PYTHONPATH": str(ROOT),
            "IAT_AIRFLOW": str(self.settings),
            **{f"AIRFLOW__{name}": value for name, value in told.items()},
        }

    def _secret(self, name: str) -> str:
        """The same for every process, and known to nobody else."""
        place = self.home / f"{name}.secret"
        if not place.is_file():
            with os.fdopen(os.open(place, os.O_CREAT | os.O_WRONLY, 0o600), "w") as file:
                file.write(secrets.token_urlsafe(32))
        return place.read_text()

    def run(self, *command: str) -> None:
        """An airflow command that ends; InputError with what it said where it fails."""
        done = subprocess.run(
            [str(AIRFLOW_VENV / "bin" / "airflow"), *command], env=self.environment(),
            cwd=self.home, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise InputError(f"airflow {' '.join(command)}: {(done.stderr or done.stdout)[-2000:]}")


def start(local: Local) -> subprocess.Popen[bytes]:
    """Starts it in the background and waits until it is healthy; returns its supervisor."""
    if _supervisor(local):
        raise InputError(f"it runs already, at {local.address}; make airflow-stop stops it")
    with socket.socket() as probe:
        if probe.connect_ex((HOST, local.port)) == 0:
            raise InputError(f"port {local.port} is taken; choose another: make airflow PORT=8090")
    if not local.settings.is_file():
        raise InputError(f"there is no {local.settings}; docs/airflow.md says what it holds")
    local.home.mkdir(parents=True, exist_ok=True)
    say("preparing its database")
    local.run("db", "migrate")
    for pool, what in POOLS.items():
        local.run("pools", "set", pool, "1", what)
    with (local.home / "supervisor.log").open("a") as log:
        command = ["supervise", str(local.home), str(local.settings), str(local.port)]
        supervisor = subprocess.Popen(
            [sys.executable, "-m", "jobs.airflow", *command],
            cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    local.pid_file.write_text(str(supervisor.pid))
    say("waiting until its four processes are healthy")
    until = time.monotonic() + HEALTHY_S
    while not is_healthy(local):
        if supervisor.poll() is not None or time.monotonic() > until:
            stop(local)
            raise InputError(f"it did not become healthy; its logs are in {local.home}")
        time.sleep(0.5)
    user, password = login(local)
    sys.stdout.write(
        f"Airflow: {local.address}  user {user}  password {password}\n"
        f"settings {local.settings}, logs {local.home}; make airflow-stop stops it\n"
    )
    return supervisor


def stop(local: Local) -> bool:
    """Ends all its processes; False where none ran."""
    pid = _supervisor(local)
    if pid:
        os.kill(pid, signal.SIGTERM)
        until = time.monotonic() + STOP_S
        while _supervisor(local) and time.monotonic() < until:
            time.sleep(0.1)
    local.pid_file.unlink(missing_ok=True)
    return bool(pid)


def supervise(local: Local) -> None:
    """Runs the four processes until told to stop, or until one of them ends."""

    def end(_signal: int, _frame: FrameType | None) -> None:
        raise SystemExit

    signal.signal(signal.SIGTERM, end)
    running: list[subprocess.Popen[bytes]] = []
    try:
        for name, command in PROCESSES.items():
            more = ["--port", str(local.port)] if name == "api-server" else []
            with (local.home / f"{name}.log").open("ab") as log:
                running.append(
                    subprocess.Popen(
                        [str(AIRFLOW_VENV / "bin" / "airflow"), *command, *more],
                        env=local.environment(),
                        cwd=local.home,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                    )
                )
        while all(process.poll() is None for process in running):
            time.sleep(0.5)
        say(f"a process has ended, see the logs in {local.home}: stopping the others")
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _end_all(running)


def _end_all(running: list[subprocess.Popen[bytes]]) -> None:
    """Each process with all that it started: asked first, then made to."""
    for process in running:
        _signal_group(process.pid, signal.SIGTERM)
    until = time.monotonic() + STOP_S / 2
    while time.monotonic() < until and any(process.poll() is None for process in running):
        time.sleep(0.1)
    for process in running:
        _signal_group(process.pid, signal.SIGKILL)


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)


def is_healthy(local: Local) -> bool:
    """Whether every process says of itself that it is."""
    try:
        with urllib.request.urlopen(f"{local.address}/api/v2/monitor/health", timeout=5) as reply:
            told = json.load(reply)
    except (urllib.error.URLError, OSError, ValueError):
        return False
    parts = ("metadatabase", "scheduler", "dag_processor", "triggerer")
    return all((told.get(part) or {}).get("status") == "healthy" for part in parts)


def login(local: Local) -> tuple[str, str]:
    """Of its one user."""
    ((user, password),) = json.loads((local.home / PASSWORDS).read_text()).items()
    return user, password


def _supervisor(local: Local) -> int | None:
    """Its process, if it is running."""
    try:
        pid = int(local.pid_file.read_text())
        told = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return None
    is_dead = ") Z" in Path(f"/proc/{pid}/stat").read_text()
    return pid if b"jobs.airflow" in told and not is_dead else None


def main(argv: list[str]) -> int:
    """start HOME SETTINGS PORT, stop HOME SETTINGS PORT; 2 for what a person must change."""
    what, home, settings, port = argv
    local = Local(home=Path(home).absolute(), settings=Path(settings).absolute(), port=int(port))
    try:
        if what == "start":
            set_up()
            start(local)
        elif what == "supervise":
            supervise(local)
        else:
            sys.stdout.write("stopped\n" if stop(local) else "it did not run\n")
    except InputError as error:
        say(f"{error}")
        return 2
    return 0


def say(text: str) -> None:
    """One line for the person who waits."""
    sys.stderr.write(f"airflow: {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
