"""2 x 2 patches of latents as tokens.

Shapes: B batch, h x w latents of c channels, S = hw/4 tokens, C = 4c channels of a token.
"""

from __future__ import annotations

from torch import Tensor


def pack(latents: Tensor) -> Tensor:
    """[B, c, h, w] -> [B, hw/4, 4c]: 2 x 2 patches in rows, a token's channels (c, row, column)."""
    B, c, h, w = latents.shape
    x = latents.reshape(B, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(B, (h // 2) * (w // 2), 4 * c)


def unpack(tokens: Tensor, rows: int) -> Tensor:
    """The inverse of `pack` for `rows` rows of tokens (h = 2 rows)."""
    B, S, C = tokens.shape
    x = tokens.reshape(B, rows, S // rows, C // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(B, C // 4, 2 * rows, 2 * (S // rows))
