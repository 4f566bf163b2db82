"""Which of the GPU tests this process runs: run.sh spreads them over several.

$D2M_SHARD = "I/N" keeps the I-th of N parts (I from 0), $D2M_TEST_BACKENDS = "triton,torch" the
tests of those back-ends and, where the first of the list is "triton", those without a back-end.
"""

from __future__ import annotations

import os
import signal


def pytest_configure(config):
    """The shell's background processes ignore SIGINT, which is how run.sh ends one that is late."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def same_kernels(item) -> tuple:
    """Tests that differ in T, a seed or bad values alone run the same compiled kernels."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    kept = {n: str(v) for n, v in params.items() if n not in ("T", "tokens", "bad", "seed")}
    return getattr(item, "originalname", item.name), tuple(sorted(kept.items()))


def keep(items, shard: str = "", backends: str = "") -> list:
    """The items of one shard. Kernels are compiled once where groups of tests stay together."""
    if backends:
        names = backends.split(",")
        items = [
            item for item in items
            if getattr(getattr(item, "callspec", None), "params", {}).get("backend", "triton")
            in names
        ]  # fmt: skip
    if not shard:
        return list(items)
    index, count = map(int, shard.split("/"))
    if not 0 <= index < count:
        raise ValueError(f"D2M_SHARD: {shard!r}; expected I/N with 0 <= I < N")
    groups: dict[tuple, list] = {}
    for item in items:
        groups.setdefault(same_kernels(item), []).append(item)
    return [item for group in list(groups.values())[index::count] for item in group]


def pytest_collection_modifyitems(config, items):
    kept = keep(items, os.environ.get("D2M_SHARD", ""), os.environ.get("D2M_TEST_BACKENDS", ""))
    dropped = [item for item in items if item not in kept]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept
