"""Batches compared."""

from dataclasses import fields

import torch


def equal(a, b):
    """Whether two batches have the same numbers, layout and family."""

    def same(x, y):
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
            return torch.equal(x, y)
        return type(x) is type(y) and (x == y or not isinstance(x, tuple))

    return all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
