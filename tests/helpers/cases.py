"""Inputs and independent expectations for the kernel tests.

Shapes: T tokens, D model, F hidden = S shared + E * H, E experts, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from d2m_kernels import Stream, backends, moe_ffn, moe_ffn_pair, route

# The back-ends that serve CPU tensors; the Triton interpreter and GPUs have tests of their own.
CPU_BACKENDS = ("reference", "cpu", "torch")
NAMES = ("x", "router", "w1", "w2", "b1", "b2")


@dataclass
class Case:
    T: int = 37
    D: int = 16
    S: int = 8
    H: int = 8
    E: int = 4
    k: int | str = 2
    activation: str = "gelu_tanh"
    bias: bool = True
    dtype: torch.dtype = torch.float32
    seed: int = 0
    scale: float = 1.0
    tensors: dict = field(default_factory=dict)
    device: str = "cpu"

    @property
    def gated(self) -> bool:
        return self.activation in ("geglu", "geglu_tanh", "swiglu")

    @property
    def hidden(self) -> int:
        return self.S + self.E * self.H

    def build(self, dtype: torch.dtype | None = None, grad: bool = True) -> dict:
        """The inputs, drawn from the seed alone, rounded to `self.dtype` and given in `dtype`."""
        g = torch.Generator().manual_seed(self.seed)
        rows = self.hidden * (2 if self.gated else 1)
        sizes = {
            "x": (self.T, self.D),
            "router": (self.E, self.D),
            "w1": (rows, self.D),
            "w2": (self.D, self.hidden),
            "b1": (rows,),
            "b2": (self.D,),
        }
        out = {}
        for name, size in sizes.items():
            fan_in = 1 if name in ("x", "b1", "b2") else max(size[-1], 1)
            t = torch.randn(*size, generator=g, dtype=torch.float64) / fan_in**0.5
            t = self.tensors.get(name, t).to(self.dtype).to(self.device, dtype or self.dtype)
            out[name] = t.detach().requires_grad_(grad)
        if not self.bias:
            out["b1"] = out["b2"] = None
        return out

    def kwargs(self) -> dict:
        return dict(
            top_k=self.k, shared=self.S, activation=self.activation, routed_scale=self.scale
        )


def act(name: str, z: torch.Tensor) -> torch.Tensor:
    if name in ("geglu", "geglu_tanh", "swiglu"):
        up, gate = z.chunk(2, -1)
        return up * act({"geglu": "gelu", "geglu_tanh": "gelu_tanh", "swiglu": "silu"}[name], gate)
    return {
        "gelu": F.gelu,
        "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
        "silu": F.silu,
        "relu": F.relu,
    }[name](z)


def part(t: torch.Tensor, case: Case, own: slice, dim: int = 0):
    """The neurons `own` of w1 or b1 (both halves when gated), or of w2's columns."""
    if t is None:
        return None
    if dim:
        return t[:, own]
    if not case.gated:
        return t[own]
    return torch.cat([t[: case.hidden][own], t[case.hidden :][own]])


def plain_torch(case: Case, inputs: dict, ids: torch.Tensor | None = None) -> torch.Tensor:
    """The layer in a few autograd ops, in the dtype of `inputs`: an expert at a time, index_add."""
    x, w1, w2, b1, b2 = (inputs[n] for n in ("x", "w1", "w2", "b1", "b2"))

    def ffn(x, own):
        z = F.linear(x, part(w1, case, own), part(b1, case, own))
        return F.linear(act(case.activation, z), part(w2, case, own, 1))

    if case.k == "dense":
        y = ffn(x, slice(0, case.hidden))
        return y if b2 is None else y + b2
    y = ffn(x, slice(0, case.S))
    if b2 is not None:
        y = y + b2
    if not case.k:
        return y
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = x.to(wide) @ inputs["router"].to(wide).T
    if ids is None:
        ids = logits.topk(case.k).indices
    ids = ids.long()
    weights = logits.gather(-1, ids).softmax(-1) * case.scale
    for e in range(case.E):
        tokens, slot = (ids == e).nonzero(as_tuple=True)
        start = case.S + e * case.H
        y_e = ffn(x[tokens], slice(start, start + case.H)) * weights[tokens, slot, None].to(x.dtype)
        y = y.index_add(0, tokens, y_e)
    return y


def double_loop(case: Case, inputs: dict) -> torch.Tensor:
    """Eqs. 2-3 for one token and one expert at a time, in python numbers where that matters."""
    x, router, w1, w2, b1, b2 = (None if inputs[n] is None else inputs[n].detach() for n in NAMES)
    rows = []
    for t in range(case.T):
        logits = [float(x[t] @ router[e]) for e in range(case.E)]
        ranked = sorted(range(case.E), key=lambda e: (-logits[e], e))
        chosen = ranked[: case.k] if case.k != "dense" else []
        top = max((logits[e] for e in chosen), default=0.0)
        exps = [torch.tensor(logits[e] - top, dtype=x.dtype).exp() for e in chosen]
        y = torch.zeros(case.D, dtype=x.dtype) if b2 is None else b2.clone()
        experts = [(slice(0, case.S), 1.0)]
        if case.k == "dense":
            experts = [(slice(0, case.hidden), 1.0)]
        for e, weight in zip(chosen, exps, strict=True):
            own = slice(case.S + e * case.H, case.S + (e + 1) * case.H)
            experts.append((own, case.scale * weight / sum(exps)))
        for own, weight in experts:
            z = part(w1, case, own) @ x[t]
            if b1 is not None:
                z = z + part(b1, case, own)
            y = y + weight * (w2[:, own] @ act(case.activation, z))
        rows.append(y)
    return torch.stack(rows) if rows else x.new_zeros(0, case.D)


def loss_weights(y: torch.Tensor, seed: int = 7) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(y.shape, generator=g, dtype=torch.float64).to(y.device, y.dtype)


def run(function, inputs: dict) -> dict:
    """{"y": ..., "x": dx, ...} of one forward and backward with fixed output weights."""
    y = function(inputs)
    present = {n: t for n, t in inputs.items() if t is not None and t.requires_grad}
    grads = torch.autograd.grad(
        (y * loss_weights(y)).sum(), list(present.values()), allow_unused=True
    )
    return {"y": y.detach()} | dict(zip(present, grads, strict=True))


def assert_as_good_as_torch(actual, exact, torch_own, what: str) -> None:
    """The error is at most twice what torch makes in the same dtype, + 1e-5 of the output's RMS.

    `exact` is fp64; RMS errors are compared, and no single element may be off by more than ten
    times torch's own largest error, so that one wrong element cannot hide in a mean.
    """
    assert actual is not None, f"{what}: no result"
    assert actual.shape == exact.shape, f"{what}: {actual.shape} instead of {exact.shape}"
    if exact.numel() == 0:
        return
    exact = exact.double()
    rms = exact.square().mean().sqrt().item()
    error = (actual.double() - exact).abs()
    own = (torch_own.double() - exact).abs()
    assert error.isfinite().all(), f"{what}: not finite"
    rms_error, rms_own = (e.square().mean().sqrt().item() for e in (error, own))
    # The mean over a handful of elements is luck: there, one rounding of each is allowed as well.
    few = exact.count_nonzero() < 8
    slack = torch.finfo(torch_own.dtype).eps if few else 1e-5
    assert rms_error <= 2 * rms_own + slack * rms, f"{what}: {rms_error} > 2 * {rms_own}"
    worst, worst_own = error.max().item(), own.max().item()
    assert worst <= 10 * worst_own + max(slack, 1e-4) * rms, (
        f"{what}: max {worst}, torch's {worst_own}"
    )


def call(case: Case, backend: str | None, **extra):
    """`moe_ffn` as a function of the inputs alone."""
    return lambda p: moe_ffn(
        p["x"], p["router"], p["w1"], p["w2"], p["b1"], p["b2"], backend=backend,
        **{**case.kwargs(), **extra},
    )  # fmt: skip


def checkpointed(function):
    """A function of the inputs that is run again in the backward pass, but for the routing."""
    keep = partial(create_selective_checkpoint_contexts, [torch.ops.d2m.route.default])
    return lambda p: checkpoint(function, p, use_reentrant=False, context_fn=keep)


def compare(case: Case, backend: str, **extra) -> None:
    """Forward and every gradient against plain torch in fp64, by the rule of the house.

    All three are given the back-end's own choice of experts: fp32 sums in another order may swap
    experts whose logits are equal within rounding.
    """
    low, exact = case.build(), case.build(torch.float64)
    k = 0 if case.k == "dense" else case.k
    ids = route(low["x"].detach(), low["router"].detach(), top_k=k, backend=backend).ids
    ours = run(call(case, backend, **extra), low)
    expected = run(lambda p: plain_torch(case, p, ids), exact)
    own = run(lambda p: plain_torch(case, p, ids), low)
    for name, value in expected.items():
        if value is None:  # torch's plain version leaves the router out of the graph
            assert not ours[name].any(), f"{name}: expected a zero gradient"
            continue
        assert_as_good_as_torch(ours[name], value, own[name], f"{backend} {case} {name}")


def compare_closely(case: Case, backend: str) -> None:
    """Forward and every gradient in fp32 against plain torch in fp64, within 1e-4."""
    low, exact = case.build(), case.build(torch.float64)
    ids = route(low["x"].detach(), low["router"].detach(), top_k=case.k, backend=backend).ids
    ours = run(call(case, backend), low)
    for name, value in run(lambda p: plain_torch(case, p, ids), exact).items():
        value = torch.zeros_like(ours[name]) if value is None else value.float()
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=3e-5, msg=name)


def stream(case: Case, inputs: dict, **extra) -> Stream:
    return Stream(**inputs, **{**case.kwargs(), **extra})


def run_pair(cases, inputs, backend: str | None, extra=({}, {})) -> list[dict]:
    """`run` of `moe_ffn_pair`: both outputs and all gradients of one backward, a dict a stream."""
    streams = [stream(c, p, **e) for c, p, e in zip(cases, inputs, extra, strict=True)]
    ys = moe_ffn_pair(*streams, backend=backend)
    present = [{n: t for n, t in p.items() if t is not None and t.requires_grad} for p in inputs]
    loss = sum((y * loss_weights(y)).sum() for y in ys)
    grads = iter(torch.autograd.grad(loss, [t for p in present for t in p.values()]))
    return [
        {"y": y.detach()} | {n: next(grads) for n in p} for y, p in zip(ys, present, strict=True)
    ]


def compare_pair(cases, backend: str) -> None:
    """Both streams of `moe_ffn_pair`, and every gradient, against plain torch as in `compare`."""
    inputs = [case.build() for case in cases]
    ours = run_pair(cases, inputs, backend)
    for i, (case, low) in enumerate(zip(cases, inputs, strict=True)):
        k = 0 if case.k == "dense" else case.k
        ids = route(low["x"].detach(), low["router"].detach(), top_k=k, backend=backend).ids
        expected = run(lambda p, c=case, i=ids: plain_torch(c, p, i), case.build(torch.float64))
        own = run(lambda p, c=case, i=ids: plain_torch(c, p, i), low)
        for name, value in expected.items():
            if value is None:  # torch's plain version leaves the router out of the graph
                assert not ours[i][name].any(), f"{name}: expected a zero gradient"
                continue
            what = f"{backend} stream {i} of {cases} {name}"
            assert_as_good_as_torch(ours[i][name], value, own[name], what)


def available(name: str, device: str = "cpu", dtype=torch.float32) -> bool:
    return backends.why_not(name, device, dtype) is None
