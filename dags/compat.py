"""Names that moved between Airflow 3.1 and now, from where they are not deprecated."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from airflow.sdk import CronDataIntervalTimetable
    from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException
else:
    try:
        from airflow.sdk import CronDataIntervalTimetable
        from airflow.sdk.exceptions import (
            AirflowException,
            AirflowFailException,
            AirflowSkipException,
        )
    except ImportError:  # Airflow 3.1
        from airflow.exceptions import AirflowException, AirflowFailException, AirflowSkipException
        from airflow.timetables.interval import CronDataIntervalTimetable

__all__ = [
    "AirflowException",
    "AirflowFailException",
    "AirflowSkipException",
    "CronDataIntervalTimetable",
]
