"""What tests share: one Spark session, one cluster, an empty lake, the public logs if there.

Those of GPU code run where no Spark is (`pytest tests/downstream -m gpu`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

ROOT = Path(__file__).resolve().parents[1]
# Tests run everything once: Java's second compiler never pays back. The first one's work is kept:
# by itself it has room for that of a minute, and then all is interpreted.
os.environ.setdefault("SPARK_SUBMIT_OPTS", "-XX:TieredStopAtLevel=1 -XX:ReservedCodeCacheSize=240m")


@pytest.fixture(scope="session")
def spark() -> Iterator[SparkSession]:
    """One session for the whole run: starting one takes as long as a hundred small tests."""
    from jobs.spark import session

    spark = session("local[2]", app="tests", memory="2g")
    yield spark
    spark.stop()


@pytest.fixture(scope="session")
def spark_cluster() -> Iterator[str]:
    """The address of a standalone master with two workers on this machine.

    A process has one session, and this one's is `spark`: run what uses the cluster in another.
    """
    from jobs.local_cluster import local_cluster

    with local_cluster(num_workers=2) as master:
        yield master


@pytest.fixture
def lake(tmp_path: Path) -> str:
    """The root folder of an empty lake."""
    return str(tmp_path / "lake")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The public logs, in a folder beside the project's; without them the test is skipped."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the public logs in {folder}")
    return folder
