"""Fixtures of all tests."""

from __future__ import annotations

import pytest


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
