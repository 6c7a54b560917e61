"""Set-up: all a fresh clone needs, into .venv. Says what it does; the second time there is nothing.

Runs before any package is there: standard library only, and plain enough to refuse an old Python.
"""

from __future__ import annotations

import ast
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from pathlib import Path

from pipelines.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "share" / "iat" / "set-up"
LOCK = ROOT / "requirements.lock"
BOOTSTRAP_LOCK = ROOT / "requirements-bootstrap.lock"
INPUTS = (LOCK, BOOTSTRAP_LOCK, ROOT / "pyproject.toml", ROOT / "jobs" / "jars.lock")
OLDEST_PYTHON = (3, 11)
NEEDED_GB = 8
"""What the packages take, torch with CUDA being most of it."""

OFFLINE = """\
Packages come from where pip is configured to look, which is PyPI if nothing else is said.
If that cannot be reached:
  behind a proxy     set https_proxy
  a mirror           pip config set global.index-url URL    (or PIP_INDEX_URL)
  no network at all  on another machine: pip download -r requirements.lock -d FOLDER
                     (and -r requirements-bootstrap.lock), then here:
                     pip config set global.find-links FOLDER
                     pip config set global.no-index true"""
# What uv calls pip's settings: uv does not read pip's files, and a user has configured pip, not uv.
UV_NAMES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "no-index": "UV_NO_INDEX",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
    "proxy": "HTTPS_PROXY",
}


def set_up() -> None:
    """Brings .venv to what the locks say."""
    stamp = stamp_of(INPUTS, ROOT)
    if is_up_to_date(VENV, stamp):
        say(f"nothing to do, {VENV.name} is up to date")
        return
    started = time.monotonic()
    STAMP.unlink(missing_ok=True)
    _make_environment()
    _install_packages()
    run([PYTHON, "-m", "jobs.jars"], "Java and Delta's jars")
    run([PYTHON, "-m", "jobs.class_archive"], "Java's class archive")
    STAMP.write_text(stamp)
    say(f"done in {time.monotonic() - started:.0f} s")


def stamp_of(inputs: tuple[Path, ...], root: Path) -> str:
    """What an environment was made from, and in which folder: a moved one is made again."""
    digest = hashlib.sha256(str(root).encode())
    for path in inputs:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def is_up_to_date(environment: Path, stamp: str) -> bool:
    """Whether a whole set-up ended there with this stamp, and what it made still stands."""
    share = environment / "share" / "iat"
    try:
        made = (share / STAMP.name).read_text()
    except OSError:
        return False
    has_jars = any((share / "jars").glob("*.jar"))
    return made == stamp and has_jars and (environment / "bin" / "python").exists()


def check_machine(version: tuple[int, ...], platform: str, free_bytes: int) -> None:
    """InputError if this Python, system or disk cannot hold the environment."""
    if version < OLDEST_PYTHON:
        needed = ".".join(map(str, OLDEST_PYTHON))
        got = ".".join(map(str, version[:3]))
        raise InputError(
            f"Python {needed} or newer is needed, and {sys.executable} is {got}: "
            f"install one and run it with `make PYTHON=/path/to/python{needed} ...`"
        )
    if not platform.startswith("linux"):
        raise InputError(
            f"requirements.lock is for Linux, and this is {platform}: use a Linux container"
        )
    if free_bytes < NEEDED_GB * 2**30:
        raise InputError(
            f"the packages take {NEEDED_GB} GB and {ROOT} has {free_bytes / 2**30:.1f} GB free: "
            "make room, or clone onto a larger disk"
        )


def uv_settings(pip_config: str, environment: dict[str, str]) -> dict[str, str]:
    """What `pip config list` printed, as uv's environment variables; those already set are kept."""
    found: dict[str, str] = {}
    # pip's own order of precedence: its environment variables over its files.
    for line in sorted(pip_config.splitlines(), key=lambda line: line.startswith(":env:")):
        match = re.fullmatch(r"[\w:-]+\.([\w-]+)=('.*'|\".*\")", line)
        name = UV_NAMES.get(match[1].replace("_", "-")) if match else None
        if match and name:
            words = str(ast.literal_eval(match[2])).split()
            found[name] = ("," if name == "UV_FIND_LINKS" else " ").join(words)
    return {name: value for name, value in found.items() if name not in environment}


def say(text: str) -> None:
    """One line for the person who waits."""
    sys.stderr.write(f"set-up: {text}\n")


def _make_environment() -> None:
    if PYTHON.exists() and _works(PYTHON):
        say(f"keeping {VENV.name} ({_version(PYTHON)}), bringing it up to date")
        return
    check_machine(tuple(sys.version_info[:3]), sys.platform, shutil.disk_usage(ROOT).free)
    say(f"creating {VENV.name} with Python {'.'.join(map(str, sys.version_info[:3]))}")
    try:
        venv.create(VENV, clear=True, with_pip=True)
    except (subprocess.CalledProcessError, OSError) as error:
        raise InputError(
            f"could not create {VENV}: {error}\n"
            "On Debian and Ubuntu a Python's venv is a package of its own: apt install python3-venv"
        ) from error


def _works(python: Path) -> bool:
    done = subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=False)
    return done.returncode == 0 and str(VENV) in done.stdout.decode()


def _version(python: Path) -> str:
    return subprocess.run(
        [python, "--version"], capture_output=True, text=True, check=True
    ).stdout.strip()


def _install_packages() -> None:
    lock = LOCK.read_text()
    num_packages = len(set(re.findall(r"^([\w.-]+)==", lock, re.MULTILINE)))
    pip: list[str | Path] = [PYTHON, "-m", "pip"]
    quietly = ["--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes"]
    say("installing uv, which installs the rest")
    run([*pip, "install", *quietly, "-r", BOOTSTRAP_LOCK], "uv", OFFLINE)
    say(
        f"installing {num_packages} packages from {LOCK.name} "
        f"(up to {NEEDED_GB} GB, most of it torch with CUDA; a minute or more)"
    )
    config = subprocess.run(
        [*pip, "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    os.environ.update(uv_settings(config, dict(os.environ)))
    os.environ.setdefault("UV_HTTP_TIMEOUT", "180")
    uv: list[str | Path] = [PYTHON, "-m", "uv", "pip"]
    at: list[str | Path] = ["--python", PYTHON, "--no-config"]
    # Its progress bars need a terminal; elsewhere it would print a line for each package.
    volume = [] if sys.stderr.isatty() else ["--quiet"]
    run([*uv, "sync", *volume, *at, "--require-hashes", LOCK], "packages", OFFLINE)
    say("installing this project, editable, with its command .venv/bin/iat")
    run(
        [*uv, "install", "--quiet", *at, "--no-deps", "--no-build-isolation", "--editable", ROOT],
        "the project",
    )


def run(command: list[str | Path], what: str, advice: str = "") -> None:
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise InputError(f"{what}: failed, for the reason above. {advice}".strip())


def main(work: Callable[[], None] = set_up) -> int:
    """Sets up, one process at a time; 2 when this machine or its configuration must change."""
    try:
        here = os.open(ROOT, os.O_RDONLY)
        fcntl.flock(here, fcntl.LOCK_EX)
        work()
    except InputError as error:
        say(f"{error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
