"""Places as people, logs, tables and other systems may see them: never with what opens them."""

from __future__ import annotations

import re

CONTAINERS = ("abfs", "abfss", "wasb", "wasbs")
"""Schemes in which what stands before the @ is a container, not a user."""


def shown(place: str) -> str:
    """A path, or a URI without user, password, key, query and fragment.

    A secret that was not quoted as a URI asks (with a / or an @ in it) is left out too, and what
    stands before its end with it.

    >>> shown("s3://key:secret@bucket/lake?sig=abc")
    's3://bucket/lake'
    >>> shown("abfss://container@account.dfs.core.windows.net/lake")
    'abfss://container@account.dfs.core.windows.net/lake'
    >>> shown("s3://key:se/cr@et@bucket/lake")
    's3://bucket/lake'
    >>> shown("/data/lake")
    '/data/lake'
    """
    scheme, separator, rest = place.partition("://")
    if not separator:
        return place
    rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    authority = rest.partition("/")[0]
    if ":" in authority and "@" in rest:
        rest = rest.rpartition("@")[2]
    elif "@" in authority and scheme.lower() not in CONTAINERS:
        rest = rest.partition("@")[2]
    elif re.search(r":(?!\d*$)", authority):  # a secret cut off by its own ? or #
        rest = "..."
    return f"{scheme}://{rest}"


def shown_in(text: str) -> str:
    """The text with every URI in it as `shown`.

    >>> shown_in("no table at s3://key:secret@bucket/lake; run the job")
    'no table at s3://bucket/lake; run the job'
    """
    return re.sub(r"[A-Za-z][\w+.-]*://[^\s'\"<>]+", lambda found: shown(found[0]), text)
