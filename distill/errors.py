"""Errors that a command prints as one line: the thing, what it was, what was expected."""

from __future__ import annotations

from typing import Any


class UserError(Exception):
    """Something the user can put right; `d2m` prints it without a traceback and exits with 2."""


class ConfigError(UserError, ValueError):
    """A configuration key is unknown, missing or of the wrong kind."""


class CheckpointError(UserError):
    """A checkpoint is missing, truncated or belongs to another run."""


class TrainingError(UserError, RuntimeError):
    """Training cannot go on, for example because the loss is no longer finite."""


class library_errors:
    """Argument errors of the libraries (which name the argument) become one-line user errors."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, err: Any, trace: Any) -> None:
        if isinstance(err, (ValueError, TypeError)) and not isinstance(err, UserError):
            raise UserError(" ".join(str(err).split())) from err
