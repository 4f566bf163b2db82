"""What is run by default, how much CPU time a test may take, and the fixtures of all tests.

`pytest` runs the fast part, `pytest --all` everything. A run of the whole suite takes a process a
core where pytest-xdist is there (-n 0: one process).
"""

from __future__ import annotations

import os

import pytest

CPU_SECONDS = 5.0  # more than that takes the mark `slow`
EXEMPT = ("slow", "long", "gpu")

if os.environ.pop("PYTEST_XDIST_WORKER", None):  # a pytest that a test starts is none
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: workers are threads


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="the tests marked slow as well")
    parser.addoption("--part", metavar="I/N", help="every N-th test, from the I-th on (I from 0)")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    whole = config.args_source is not config.ArgsSource.ARGS
    options, worker = config.option, hasattr(config, "workerinput")
    if whole and not worker and getattr(options, "numprocesses", 0) is None and not options.usepdb:
        options.numprocesses = len(os.sched_getaffinity(0))
        options.dist = "worksteal"


def pytest_collection_modifyitems(config, items):
    kept = items
    if not (config.getoption("--all") or config.getoption("markexpr")):
        kept = [item for item in kept if not _is_slow(item)]
    if part := config.getoption("--part"):
        index, count = map(int, part.split("/"))
        kept = kept[index::count]
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept


def _is_slow(item) -> bool:
    return bool(item.get_closest_marker("slow")) and not item.get_closest_marker("gpu")


def _cpu_seconds() -> float:
    """Of this process and of those it has waited for."""
    t = os.times()
    return t.user + t.system + t.children_user + t.children_system


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """A test that has become too slow for the fast part fails until it is marked, or mended."""
    start = _cpu_seconds()
    result = yield
    took = _cpu_seconds() - start
    counts = "TRITON_INTERPRET" not in os.environ  # a process of many tests that are one outside
    if counts and took > CPU_SECONDS and not any(map(item.get_closest_marker, EXEMPT)):
        pytest.fail(f"{took:.1f} s of CPU time; over {CPU_SECONDS:g} s a test is marked slow")
    return result


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh memory holds NaN, or numbers that are far out of any range.

    The kernels' own memory comes from new_empty and empty_like; torch.empty only makes empty ones.
    """
    import torch  # not at the top: half of the tests do without

    plain_empty, plain_like = torch.Tensor.new_empty, torch.empty_like

    def poison(t):
        if type(t) is not torch.Tensor or t.is_meta or not t.numel():
            return t
        if t.is_floating_point():
            return t.fill_(float("nan"))
        return t.fill_(0x7EADBEEF) if t.dtype in (torch.int32, torch.int64) else t

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(plain_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(plain_like(*a, **k)))
