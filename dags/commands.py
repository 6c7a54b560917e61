"""The toolkit's command lines: all that the DAGs know of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import PurePath
from typing import TypeAlias

Flag: TypeAlias = str | int | float | date | PurePath | bool | Sequence[str] | None


def job(name: str, *further: str, **flags: Flag) -> list[str]:
    """The arguments of `iat NAME`: --flag value for each (underscores as hyphens), --flag alone
    for True, several values for a list; nothing for None, False and an empty one.

    Text may be a Jinja template, which Airflow fills in when the task runs.
    """
    found = [name]
    for flag, value in flags.items():
        if value is None or value is False or value in ("", ()):
            continue
        found.append("--" + flag.replace("_", "-"))
        if value is not True:
            many = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
            found += [str(each) for each in many]
    return [*found, *further]


DAY: Mapping[str, Flag] = {
    "start": "{{ data_interval_start | ds }}",
    "end": "{{ data_interval_end | ds }}",
}
"""The days of a run of a schedule."""
