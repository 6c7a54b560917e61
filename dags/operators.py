"""How a command runs: here, or on Spark through a connection; and a wait for one to say yes."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import tempfile
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

from airflow.providers.standard.hooks.subprocess import SubprocessHook
from airflow.sdk import Asset, BaseOperator, BaseSensorOperator, Context
from airflow.triggers.base import BaseTrigger, TriggerEvent

from dags.compat import AirflowException, AirflowFailException, AirflowSkipException

DONE, CHECK_FAILED, WRONG_INPUT = 0, 1, 2


def judge(code: int, command: Sequence[str]) -> None:
    """What an exit code of the toolkit means for a task: a check that failed or wrong input stays
    so however often it is tried; any other failure is retried."""
    if code in (CHECK_FAILED, WRONG_INPUT):
        what = "a check failed" if code == CHECK_FAILED else "wrong input"
        raise AirflowFailException(f"{what} (exit code {code}): {shlex.join(command)}")
    if code != DONE:
        raise AirflowException(f"exit code {code}, worth a retry: {shlex.join(command)}")


def words(command: Sequence[str]) -> list[str]:
    """A templated argument that was filled with several lines is several, with nothing none."""
    return [word for argument in command for word in str(argument).splitlines()]


class IatOperator(BaseOperator):
    """Runs a command of the toolkit; what it writes with --json is the task's XCom.

    Args:
        iat: the toolkit's executable.
        command: its arguments; templated.
        skip_without: a key of the JSON; the task, and what depends on it, is skipped where its
            value is empty.
        only_if: templated; skipped where it is filled with nothing, None or False.
        announces: an asset, whose event holds `domain`, `line`, `days`, and `first` and `end` of
            the line, of the JSON, or of `told`, templated.
    """

    template_fields: Sequence[str] = ("command", "only_if", "told")
    template_fields_renderers: ClassVar[dict[str, str]] = {"command": "json"}
    ui_color = "#dfeedd"

    def __init__(
        self,
        *,
        iat: str,
        command: Sequence[str],
        skip_without: str = "",
        only_if: str = "True",
        announces: Asset | None = None,
        told: str = "",
        **kwargs: Any,
    ) -> None:
        if announces is not None:
            kwargs.setdefault("outlets", [announces])
        super().__init__(**kwargs)
        self.iat, self.command = iat, command
        self.skip_without, self.only_if = skip_without, only_if
        self.announces, self.told = announces, told

    def execute(self, context: Context) -> Any:
        if self.only_if in ("", "None", "False", "[]"):
            raise AirflowSkipException("not asked for")
        with tempfile.TemporaryDirectory(prefix="iat-") as folder:
            file = Path(folder, "result.json")
            line = [self.iat, *words(self.command), "--json", str(file)]
            self.log.info("%s", shlex.join(line))
            self.hook = SubprocessHook()
            code = self.hook.run_command(line, cwd=folder).exit_code
            result = json.loads(file.read_text()) if file.is_file() else None
        judge(code, line)
        if self.skip_without and not (result or {}).get(self.skip_without):
            raise AirflowSkipException(f"nothing in {self.skip_without}: {result}")
        if self.announces is not None:
            told: dict[str, Any] = json.loads(self.told) if self.told else result or {}
            kept = {name: told[name] for name in ("domain", "line", "first", "days", "end")}
            context["outlet_events"][self.announces].extra = kept
        return result

    def on_kill(self) -> None:
        hook = getattr(self, "hook", None)
        if hook is not None:
            hook.send_sigterm()


class CommandTrigger(BaseTrigger):
    """Runs a command now and then until it leaves with anything but 1 (not yet)."""

    def __init__(self, command: Sequence[str], poll_s: float) -> None:
        super().__init__()
        self.command, self.poll_s = list(command), poll_s

    def serialize(self) -> tuple[str, dict[str, Any]]:
        return "dags.operators.CommandTrigger", {"command": self.command, "poll_s": self.poll_s}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        while True:
            await asyncio.sleep(self.poll_s)
            process = await asyncio.create_subprocess_exec(
                *self.command, stdin=asyncio.subprocess.DEVNULL, env=dict(os.environ)
            )
            code = await process.wait()
            if code != CHECK_FAILED:
                yield TriggerEvent(code)
                return


class IatSensor(BaseSensorOperator):
    """Waits until a command of the toolkit leaves with 0; exit code 1 is not yet.

    The first look is the task's own; after it the task waits in the triggerer and holds no slot.
    """

    template_fields: Sequence[str] = ("command",)
    template_fields_renderers: ClassVar[dict[str, str]] = {"command": "json"}
    ui_color = "#dde6ee"

    def __init__(self, *, iat: str, command: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.iat, self.command = iat, command

    def execute(self, context: Context) -> None:
        line = [self.iat, *words(self.command)]
        code = SubprocessHook().run_command(line).exit_code
        if code == CHECK_FAILED:
            self.defer(
                trigger=CommandTrigger(line, self.poke_interval),
                method_name="execute_complete",
                timeout=timedelta(seconds=self.timeout),
            )
        judge(code, line)

    def execute_complete(self, context: Context, event: int) -> None:
        judge(event, [self.iat, *words(self.command)])
