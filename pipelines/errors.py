"""The errors that a command turns into an exit code instead of a traceback."""

from typing import Any

from pipelines.places import shown_in


class _ToldError(Exception):
    """Its message holds no secret of a URI: it may be printed, logged and stored."""

    def __init__(self, message: object) -> None:
        super().__init__(shown_in(str(message)))


class InputError(_ToldError):
    """The input or the environment is wrong: says what was needed, what came, what to do. Exit
    code 2."""


class RetryableError(_ToldError):
    """A fault that may pass (a lost race, a full disk, a cut connection): worth retrying. Exit
    code 3."""


class CheckFailedError(_ToldError):
    """A check ran and did not hold; `result` is what it found. Exit code 1."""

    def __init__(self, message: str, result: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.result = result
