"""Parts that need what not every machine has: they are skipped, and the results say so and why."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module

import pytest


def skip_without(session, packages: Iterable[str], record_ids: Iterable[str]) -> None:
    """Skip where one of `packages` cannot be imported, with a record under each of `record_ids`."""
    for name in packages:
        try:
            import_module(name)
        except ImportError as error:
            skip(session, f"needs {name}: {error}", record_ids)


def skip(session, why: str, record_ids: Iterable[str]) -> None:
    for record_id in record_ids:
        session.results.add("skipped", record_id, {"why": why})
    session.lines.append(f"not measured: {', '.join(record_ids)}: {why}")
    pytest.skip(why)
