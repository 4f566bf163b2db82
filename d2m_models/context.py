"""What travels beside the tokens through the blocks of one forward.

Shapes: B samples, X text tokens, D width, A AdaLN input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map


@dataclass(frozen=True)
class BlockContext:
    """What every block is given beside the tokens; all but `rotary` belong to the samples."""

    condition: Tensor  # [B, D] or [B, A], what AdaLN reads
    rotary: tuple[Tensor, Tensor]
    attention_kwargs: dict[str, Any]
    token_mask: Tensor | None  # [B, X]

    def take(self, rows: Tensor, batch: int) -> BlockContext:
        """The context of a sub-batch."""
        own = (self.condition, self.attention_kwargs, self.token_mask)
        condition, kwargs, mask = take_rows(own, rows, batch)
        return BlockContext(condition, self.rotary, kwargs, mask)

    def shorten(self) -> BlockContext:
        """The context of one text and one image token."""
        rotary = tuple(part[:2] for part in self.rotary)
        mask = None if self.token_mask is None else self.token_mask[:, :1]
        return BlockContext(self.condition, rotary, self.attention_kwargs, mask)


def take_rows(tree: Any, rows: Tensor, batch: int) -> Any:
    """The sub-batch `rows` of every tensor in `tree` whose first dimension is the batch."""

    def take(leaf: Any) -> Any:
        batched = isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch
        return leaf[rows] if batched else leaf

    return tree_map(take, tree)


def add_residual(count: int, repeat: bool, samples, index: int, x: Tensor) -> Tensor:
    """Adds the ControlNet residual that belongs to block `index` of the dense model's `count`."""
    if samples is None:
        return x
    if repeat:
        return x + samples[index % len(samples)]
    return x + samples[index // -(-count // len(samples))]
