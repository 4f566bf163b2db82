"""The torch.library ops `d2m::*`: one opaque call a stage, so that `torch.compile` sees no graph
break and no back-end's host code. Inputs are validated by the public wrappers, not here.

Each op takes the name of the back-end that was resolved for it; autograd lives outside, in
`torch.autograd.Function`s (measured: 2.9 us a call against 9.3 us for `torch.library.custom_op`).
"""

from d2m_kernels.ops import stages  # noqa: F401  (registers d2m::*)
from d2m_kernels.ops.layer import LEARNED, PER_STREAM, halves, per_stream

__all__ = ["LEARNED", "PER_STREAM", "halves", "per_stream"]
