"""Peers from other libraries, each made only if it can be imported here.

A gated library (SwiGLU, three matrices) gets two thirds of the width: equal FLOPs, equal weight
bytes. A library without a shared expert gets ours, in plain torch, added. Everything routes by the
same router weights.
"""

from __future__ import annotations

import types

import torch
from harness.peers import Contender, Unavailable, dense, gate, gelu, shared_expert, two_thirds
from harness.shapes import FFNShape
from torch import nn


def _fresh(module: nn.Module, p) -> nn.Module:
    """On x's device and dtype, with weights N(0, 0.02)."""
    module = module.to(p["x"].device, p["x"].dtype)
    for w in module.parameters():
        nn.init.normal_(w, std=0.02)
    return module


def _stacks(p, shape: FFNShape):
    """Contiguous 3-D expert weights: up [E, H, D], down [E, D, H]."""
    up = p["w1"].detach()[shape.S :].view(shape.E, shape.H, -1).clone()
    down = p["w2"].detach()[:, shape.S :].unflatten(1, (shape.E, shape.H)).transpose(0, 1)
    return up, down.contiguous()


def _swiglu_expert(shape: FFNShape) -> nn.Module:
    """A shared expert of equal FLOPs for gated libraries."""
    from diffusers.models.attention import FeedForward

    return FeedForward(
        dim=shape.D, inner_dim=two_thirds(shape.S), activation_fn="swiglu", bias=False
    )


def hidream(p, shape: FFNShape) -> Contender:
    """diffusers' HiDream-I1 layer: inference only, its training path repeats every token."""
    from diffusers.models.transformers import transformer_hidream_image as module

    layer = module.MOEFeedForwardSwiGLU(shape.D, shape.H, shape.E, shape.K)
    layer.shared_experts = module.HiDreamImageFeedForwardSwiGLU(shape.D, shape.S)
    layer = _fresh(layer, p).eval()
    layer.gate.weight.data.copy_(p["router"])
    widths = [layer.shared_experts.w1.out_features, layer.experts[0].w1.out_features]
    if widths != [two_thirds(shape.S), two_thirds(shape.H)]:
        raise Unavailable("its widths come in multiples of 256: no equal FLOPs at this shape")
    if p["x"].requires_grad:
        raise Unavailable("its training path repeats every token")
    return Contender(lambda: layer(p["x"][None])[0], "other", note="SwiGLU, 2/3 width")


def nucleus(p, shape: FFNShape) -> Contender:
    """diffusers' Nucleus-Image layer with grouped_mm: experts choose tokens, always in balance."""
    from diffusers.models.transformers import transformer_nucleusmoe_image as module

    layer = module.NucleusMoELayer(
        shape.D, two_thirds(shape.H), shape.E, capacity_factor=float(shape.K), use_sigmoid=False,
        route_scale=1.0, use_grouped_mm=True,
    )  # fmt: skip
    layer.shared_expert = _swiglu_expert(shape)
    layer = _fresh(layer, p)
    x, timestep = p["x"][None], torch.zeros_like(p["x"][:1]).detach()
    return Contender(
        lambda: layer(x, x, timestep)[0], "other", [p["x"], *layer.parameters()],
        "SwiGLU, 2/3 width; expert choice",
    )  # fmt: skip


def _transformers(implementation: str):
    def make(p, shape: FFNShape) -> Contender:
        from transformers.models.nemotron_h import modeling_nemotron_h as module

        config = types.SimpleNamespace(
            n_routed_experts=shape.E, hidden_size=shape.D, moe_intermediate_size=shape.H,
            moe_latent_size=None, mlp_hidden_act="gelu_pytorch_tanh",
            _experts_implementation=implementation,
        )  # fmt: skip
        layer = module.NemotronHExperts(config).to(p["x"].device, p["x"].dtype)
        layer.up_proj.data, layer.down_proj.data = _stacks(p, shape)
        layer.requires_grad_(p["x"].requires_grad)

        def run():
            weights, ids = gate(p, shape)
            return shared_expert(p, shape) + layer(p["x"], ids, weights)

        return Contender(run, "no bias", [*p.values(), *layer.parameters()])

    return make


def scattermoe(p, shape: FFNShape) -> Contender:
    from scattermoe.mlp import MLP

    layer = MLP(
        input_size=shape.D, hidden_size=shape.H, num_experts=shape.E, top_k=shape.K, activation=gelu
    ).to(p["x"].device, p["x"].dtype)
    layer.experts.weight.data, layer.output_experts.weight.data = _stacks(p, shape)
    layer.requires_grad_(p["x"].requires_grad)

    def run():
        weights, ids = gate(p, shape)
        return shared_expert(p, shape) + layer(p["x"], weights, ids)

    return Contender(run, "no bias", [*p.values(), *layer.parameters()])


def megablocks(p, shape: FFNShape) -> Contender:
    from megablocks.layers.arguments import Arguments
    from megablocks.layers.dmoe import dMoE

    layer = dMoE(
        Arguments(
            hidden_size=shape.D, ffn_hidden_size=shape.H, moe_num_experts=shape.E,
            moe_top_k=shape.K, bias=False, return_bias=False, moe_normalize_expert_weights=1,
            mlp_impl="grouped", fp16=False, bf16=True, device=p["x"].device,
        )
    )  # fmt: skip
    layer = _fresh(layer, p)
    layer.router.layer.weight.data.copy_(p["router"])

    def run():
        y = layer(p["x"][:, None])
        y = y[0] if isinstance(y, tuple) else y
        return shared_expert(p, shape) + y[:, 0]

    return Contender(run, "other", [*p.values(), *layer.parameters()], "weights differ")


def sonic_moe(p, shape: FFNShape) -> Contender:
    from sonicmoe import MoE
    from sonicmoe.enums import ActivationType

    layer = MoE(
        num_experts=shape.E, num_experts_per_tok=shape.K, hidden_size=shape.D,
        intermediate_size=two_thirds(shape.H), activation_function=ActivationType.SWIGLU,
        add_bias=False, std=0.02,
    )  # fmt: skip
    layer, shared = _fresh(layer, p), _fresh(_swiglu_expert(shape), p)
    layer.router.weight.data.copy_(p["router"])
    layer.train(p["x"].requires_grad)
    leaves = [p["x"], *layer.parameters(), *shared.parameters()]
    return Contender(
        lambda: shared(p["x"]) + layer(p["x"])[0], "other", leaves, "SwiGLU, 2/3 width"
    )


def triton_kernels(p, shape: FFNShape) -> Contender:
    from triton_kernels.matmul_ogs import matmul_ogs
    from triton_kernels.routing import routing

    if p["x"].requires_grad:
        raise Unavailable("it has no backward pass")
    up, down = (w.transpose(1, 2).contiguous() for w in _stacks(p, shape))

    def run():
        logits = p["x"] @ p["router"].to(p["x"].dtype).T
        data, gather, scatter = routing(logits, shape.K)
        h = gelu(matmul_ogs(p["x"], up, None, data, gather_indx=gather))
        y = matmul_ogs(h, down, None, data, scatter_indx=scatter, gammas=data.gate_scal)
        return shared_expert(p, shape) + y

    return Contender(run, "no bias")


def dense_fp8(p, shape: FFNShape) -> Contender:
    """The dense FFN in fp8 by torchao: what a user would try instead of an MoE."""
    if p["x"].device.type != "cuda" or torch.cuda.get_device_capability(p["x"].device) < (8, 9):
        raise Unavailable("needs a GPU with fp8")
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    if p["x"].requires_grad:
        raise Unavailable("inference only")
    model = nn.Sequential(
        nn.Linear(shape.D, shape.F), nn.GELU(approximate="tanh"), nn.Linear(shape.F, shape.D)
    ).to(p["x"].device, p["x"].dtype)
    for target, name in zip(model.parameters(), ("w1", "b1", "w2", "b2"), strict=True):
        target.data = p[name].detach().clone()
    quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    run = torch.compile(model)
    got, exact = run(p["x"]).float(), dense(p, shape).float()
    if (got - exact).square().mean() > 0.1**2 * exact.square().mean():
        raise Unavailable("its result is off by more than 10%")
    return Contender(lambda: run(p["x"]), "other", note="all neurons, fp8")


LIBRARIES = {
    "diffusers HiDream": hidream,
    "diffusers Nucleus": nucleus,
    "transformers eager": _transformers("eager"),
    "transformers grouped_mm": _transformers("grouped_mm"),
    "scattermoe": scattermoe,
    "megablocks": megablocks,
    "sonic-moe": sonic_moe,
    "triton_kernels": triton_kernels,
    "dense fp8": dense_fp8,
}


def installed(p, shape: FFNShape) -> tuple[dict[str, Contender], dict[str, str]]:
    """The libraries that work here at this shape, and why the others do not.

    A library may fail in many ways (import, build, a shape it refuses): each is an answer.
    """
    found, missing = {}, {}
    for name, make in LIBRARIES.items():
        try:
            found[name] = make(p, shape)
        except Exception as error:  # noqa: BLE001
            text = " ".join(str(error).split())[:200]
            kind = "" if isinstance(error, Unavailable) else f"{type(error).__name__}: "
            missing[name] = kind + text
    return found, missing
