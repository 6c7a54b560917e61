"""Set-up of Airflow, into .venv-airflow: an environment of its own, with nothing of ours.

DAGs hold command lines, which run `.venv/bin/iat`; Airflow's packages and Spark's would not go
together.
"""

from __future__ import annotations

import sys

from jobs.setup import main
from jobs.setup_apart import Environment

AIRFLOW = Environment("airflow", "Airflow and what it needs")
AIRFLOW_VENV = AIRFLOW.folder


def set_up() -> None:
    """Brings .venv-airflow to what its lock says."""
    AIRFLOW.set_up()


if __name__ == "__main__":
    sys.exit(main(set_up))
