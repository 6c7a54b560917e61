"""What happens when something is late or has failed: said in the log, and told to a command of
yours (IAT_ALERT), which gets it as its last argument."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import subprocess
from typing import Any

log = logging.getLogger(__name__)
VARIABLE = "IAT_ALERT"


async def late(what: str, **_context: Any) -> None:
    """A deadline has passed."""
    await asyncio.to_thread(tell, f"late: {what}")


def failed(context: Any) -> None:
    """A task has failed for the last time (an on_failure_callback)."""
    instance = context["task_instance"]
    tell(f"failed: {instance.dag_id} {instance.task_id} of {context['run_id']}")


def tell(text: str) -> None:
    log.error("%s", text)
    if command := os.environ.get(VARIABLE):
        subprocess.run([*shlex.split(command), text], check=False, timeout=60)
