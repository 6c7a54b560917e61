"""Set-up of Airflow, into .venv-airflow: an environment of its own, with nothing of ours.

DAGs hold command lines, which run `.venv/bin/iat`; Airflow's packages and Spark's would not go
together.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from jobs.setup import OFFLINE, PYTHON, ROOT, main, run, say, stamp_of, uv_settings

AIRFLOW_VENV = ROOT / ".venv-airflow"
LOCK = ROOT / "requirements-airflow.lock"
STAMP = AIRFLOW_VENV / "set-up"


def set_up() -> None:
    """Brings .venv-airflow to what its lock says."""
    stamp = stamp_of((LOCK,), ROOT)
    if STAMP.is_file() and STAMP.read_text() == stamp:
        return
    started = time.monotonic()
    STAMP.unlink(missing_ok=True)
    config = subprocess.run(
        [PYTHON, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    os.environ.update(uv_settings(config, dict(os.environ)))
    say(f"installing Airflow and what it needs from {LOCK.name} into {AIRFLOW_VENV.name}")
    uv: list[str | Path] = [PYTHON, "-m", "uv"]
    run([*uv, "venv", "--quiet", "--allow-existing", "--python", PYTHON, AIRFLOW_VENV], "a folder")
    python = AIRFLOW_VENV / "bin" / "python"
    quietly: list[str | Path] = ["--quiet", "--no-config", "--python", python]
    run([*uv, "pip", "sync", *quietly, "--require-hashes", LOCK], "Airflow's packages", OFFLINE)
    STAMP.write_text(stamp)
    say(f"Airflow: done in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    sys.exit(main(set_up))
