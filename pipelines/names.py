"""Names that become part of a path or of a predicate: plain letters, digits and a few signs."""

from __future__ import annotations

import re

from pipelines.errors import InputError

LINE = re.compile(r"[\w:@+-][\w.:@+-]*", re.ASCII)
TABLE = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*", re.ASCII)


def checked_line(name: str, what: str = "compressor line") -> str:
    """The name of a line or version, which can neither leave its folder nor end a quoted text."""
    if not LINE.fullmatch(name):
        raise InputError(
            f"{name!r} is no {what}: letters, digits and _ . : @ + - only, and no . in front"
        )
    return name


def checked_table(name: str) -> str:
    """The name of a table, which cannot leave the lake."""
    if not TABLE.fullmatch(name):
        raise InputError(f"{name!r} is no table name: letters, digits, _ - . and / only")
    return name
