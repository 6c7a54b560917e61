"""Environments beside .venv, of packages that would not go together with its own.

Each is made from a lock of its own by the uv of .venv, and holds nothing of ours.
"""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from jobs.setup import OFFLINE, PYTHON, ROOT, run, say, stamp_of, uv_settings


@dataclass(frozen=True)
class Environment:
    """One of them: a group of pyproject.toml's, by its name."""

    group: str
    holds: str
    """For the person who waits."""

    @property
    def folder(self) -> Path:
        return ROOT / f".venv-{self.group}"

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def lock(self) -> Path:
        return ROOT / f"requirements-{self.group}.lock"

    def set_up(self) -> None:
        """Brings the folder to what its lock says."""
        stamp, stamped = stamp_of((self.lock,), ROOT), self.folder / "set-up"
        if stamped.is_file() and stamped.read_text() == stamp:
            return
        started = time.monotonic()
        stamped.unlink(missing_ok=True)
        config = subprocess.run(
            [PYTHON, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
        ).stdout
        os.environ.update(uv_settings(config, dict(os.environ)))
        say(f"installing {self.holds} from {self.lock.name} into {self.folder.name}")
        uv: list[str | Path] = [PYTHON, "-m", "uv"]
        at: list[str | Path] = ["--allow-existing", "--python", PYTHON, self.folder]
        run([*uv, "venv", "--quiet", *at], f"the folder {self.folder.name}")
        quietly: list[str | Path] = ["--quiet", "--no-config", "--python", self.python]
        exactly: list[str | Path] = ["--require-hashes", self.lock]
        run([*uv, "pip", "sync", *quietly, *exactly], f"packages of {self.lock.name}", OFFLINE)
        stamped.write_text(stamp)
        say(f"{self.folder.name}: done in {time.monotonic() - started:.0f} s")
