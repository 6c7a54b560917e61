"""A real Spark cluster on this machine: a standalone master and its workers, from the pip package.

    python -m jobs.local_cluster iat build-instances --master {master} ...

starts one, runs the command with its address in place of {master}, and ends it whatever happens.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyspark

from jobs.java import find_java
from pipelines.errors import InputError

HOST = "127.0.0.1"
START_WITHIN_S = 60
PACKAGE = "org.apache.spark.deploy"


@contextlib.contextmanager
def local_cluster(num_workers: int = 2, *, memory: str = "2g") -> Iterator[str]:
    """The master's address, while it and its workers of one core each run; loopback only."""
    with contextlib.ExitStack() as at_end:
        folder = Path(at_end.enter_context(tempfile.TemporaryDirectory(prefix="iat-cluster-")))
        port = _free_port()
        master = f"spark://{HOST}:{port}"
        at_end.enter_context(
            _daemon(folder, "master.Master", "--port", str(port), says="I have been elected leader")
        )
        for number in range(num_workers):
            worker = ("--cores", "1", "--memory", memory, "--work-dir", str(folder / f"w{number}"))
            at_end.enter_context(
                _daemon(
                    folder, "worker.Worker", *worker, master, says="Successfully registered with"
                )
            )
        yield master


@contextlib.contextmanager
def _daemon(folder: Path, name: str, *arguments: str, says: str) -> Iterator[None]:
    """A Spark process that has said what it says once it works; ended on the way out."""
    home = Path(pyspark.__file__).parent
    log = Path(tempfile.mkstemp(dir=folder, prefix=name, suffix=".log")[1])
    with log.open("w") as out:
        process = subprocess.Popen(
            [
                str(home / "bin" / "spark-class"),
                f"{PACKAGE}.{name}",
                *("--host", HOST, "--webui-port", "0"),
                *arguments,
            ],
            env={
                **os.environ,
                "JAVA_HOME": str(find_java().launcher_home()),
                "SPARK_HOME": str(home),
                # Without it the web pages would be open to the whole network.
                "SPARK_LOCAL_IP": HOST,
                "SPARK_DAEMON_MEMORY": "512m",
                "SPARK_DAEMON_JAVA_OPTS": "-Dspark.master.rest.enabled=false",
            },
            stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            preexec_fn=_die_with_parent,
        )  # fmt: skip
    try:
        _wait_until(log, says, process)
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until(log: Path, says: str, process: subprocess.Popen[bytes]) -> None:
    give_up = time.monotonic() + START_WITHIN_S
    while says not in log.read_text():
        if process.poll() is not None or time.monotonic() > give_up:
            raise InputError(f"the local cluster did not start:\n{log.read_text()[-2000:]}")
        time.sleep(0.1)


def _die_with_parent() -> None:
    """The kernel ends the process when ours is gone, even killed, when no `finally` runs."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def _free_port() -> int:
    with socket.create_server((HOST, 0)) as taken:
        return int(taken.getsockname()[1])


def main() -> int:
    """Runs the given command with {master} replaced; its exit code is ours."""
    if not sys.argv[1:]:
        sys.stderr.write(f"{__doc__}\n")
        return 2
    with local_cluster() as master:
        command = [word.replace("{master}", master) for word in sys.argv[1:]]
        return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
