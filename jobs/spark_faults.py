"""Spark's errors, whenever they come, as ours: wrong input, or a fault worth retrying."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from py4j.protocol import Py4JError  # type: ignore[import-untyped]
from pyspark.errors import AnalysisException, PySparkException

from pipelines.errors import InputError, RetryableError

SPARK_ERRORS = (PySparkException, Py4JError)
"""What a call of Spark raises: its own errors, and those of Java that have no class in Python."""
NO_ROOM = "No space left on device"
NOT_WRITABLE = (
    "DELTA_CANNOT_CREATE_LOG_PATH",
    "Permission denied",
    "Read-only file system",
    "Mkdirs failed",
    "Not a directory",
)


@contextmanager
def explained(doing: str) -> Iterator[None]:
    """Within it an error of Spark becomes an InputError or a RetryableError that says what to do;
    `doing` says during what ("writing views/shop")."""
    try:
        yield
    except SPARK_ERRORS as error:
        raise as_ours(error, doing) from error


def as_ours(error: Exception, doing: str) -> InputError | RetryableError:
    """The error as a person can act on it: what stands in the way, and what to do."""
    text = str(error)
    if NO_ROOM in text:
        return RetryableError(
            f"{doing}: no space left on the disk (of the lake, or the temporary folder); the table "
            "is as it was. Free some space: files of the broken write stay in the table's folder "
            "until it is vacuumed"
        )
    unread = re.search(
        r"\[FAILED_READ_FILE\S*\] Encountered error while reading file (\S+)\. ", text
    )
    if unread:
        return InputError(
            f"{doing}: the file {unread[1]} cannot be read ({reason(text)}); the table is as it "
            "was. Mend the file, or take it away"
        )
    if any(sign in text for sign in NOT_WRITABLE):
        return InputError(
            f"{doing}: this user cannot write there ({reason(text)}); choose another --lake, or "
            "change who may write to it"
        )
    if isinstance(error, AnalysisException):
        return InputError(f"{doing}: {reason(text)}")
    return RetryableError(f"{doing}: Spark failed: {reason(text)}")


def reason(text: str) -> str:
    """The first and the deepest cause in an error of Java, without its stack."""
    found = [line.strip() for line in text.splitlines()]
    named = [
        line for line in found if re.match(r"(: |Caused by: )[\w.$]+(Exception|Error)\b", line)
    ]
    causes = [re.sub(r"^(: |Caused by: )", "", line) for line in named] or found[:1]
    return "; ".join(dict.fromkeys((causes[0], causes[-1])))
