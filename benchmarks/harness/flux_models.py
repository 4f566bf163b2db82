"""FLUX blocks and whole models with random weights, and inputs for them.

Shapes: B samples, I image tokens, X text tokens, D width. A random model costs what a trained one
does, except that an untrained router spreads its tokens more evenly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from harness.peers import rms_error
from harness.race import seconds_of
from report.roofline import CONFIGS, account_of, work

from d2m_models import FluxMoEConfig, MoBConfig

TINY = dict(num_attention_heads=6, attention_head_dim=16, axes_dims_rope=(4, 6, 6),
            joint_attention_dim=32, pooled_projection_dim=24)  # fmt: skip
_TINY_DEPTH = {"num_layers": 6, "num_single_layers": 12}
_TINY_GROUPS = {
    "flux-moe-m": {"double_groups": ((1, 2), (3, 4))},
    "flux-moe-s": {"double_groups": ((1, 2), (3, 4)), "single_groups": ((2, 3, 4),)},
    "flux-moe-xs": {"double_groups": ((1, 2), (3, 4)), "single_groups": ((2, 3, 4), (6, 7, 8))},
}


def structure(name: str, size: str) -> FluxMoEConfig:
    """The configuration of a model by name, scaled down for a rehearsal."""
    config = CONFIGS[name]
    if size != "tiny":
        return config
    first = (0,) if config.moe else ()
    narrow = 8 if config.adaln_dim else None
    config = replace(config, dense_double_blocks=first, mob=None, adaln_dim=narrow, **_TINY_DEPTH)
    groups = _TINY_GROUPS.get(name)
    return replace(config, mob=MoBConfig(**groups)) if groups else config


def random_weights(make: Callable[[], torch.nn.Module], device: torch.device) -> torch.nn.Module:
    """What `make` makes, on the device and in bf16; routers stay fp32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            model = make()
    finally:
        torch.set_default_dtype(before)
    for part, module in model.named_modules():
        if "router" in part:
            module.float()
    return model.eval().requires_grad_(False)


def build(name: str, size: str, device: torch.device) -> torch.nn.Module:
    """A model with random weights. Dense is diffusers'."""
    from diffusers import FluxTransformer2DModel

    from d2m_models import FluxMoETransformer2DModel

    config = structure(name, size)
    sizes = dict(TINY if size == "tiny" else {}, guidance_embeds=True)
    if config.moe is None:
        depth = {k: getattr(config, k) for k in ("num_layers", "num_single_layers")}
        make = partial(FluxTransformer2DModel, **sizes, **depth)
    else:
        make = partial(FluxMoETransformer2DModel, **sizes, **config.to_dict())
    return random_weights(make, device)


def denoise(model, kwargs: dict, steps: int) -> torch.Tensor:
    """`steps` Euler steps, as a pipeline without its text encoders and VAE would take them."""
    x, dt = kwargs["hidden_states"], 1.0 / steps
    times = torch.linspace(1, dt, steps, device=x.device, dtype=x.dtype)
    for t in times:
        velocity = model(**{**kwargs, "hidden_states": x, "timestep": t.expand(x.shape[0])})[0]
        x = x - dt * velocity
    return x


def denoise_replayed(kwargs: dict, replay, velocity: torch.Tensor, steps: int) -> torch.Tensor:
    """`denoise` by `replay`, which reads kwargs and writes velocity; kwargs end as they were."""
    x, t, dt = kwargs["hidden_states"], kwargs["timestep"], 1.0 / steps
    before = x.clone(), t.clone()
    for now in torch.linspace(1, dt, steps, device=x.device, dtype=x.dtype):
        t.copy_(now.expand_as(t))
        replay()
        x.sub_(dt * velocity)
    result = x.clone()
    x.copy_(before[0])
    t.copy_(before[1])
    return result


def block_pair(kind: str, size: str, device: torch.device):
    """(dense block of diffusers, MoE block with AdaLN input 256) of one kind, at full width."""
    from diffusers.models.transformers import transformer_flux as dense

    from d2m_models import blocks as ours

    heads, head = (6, 16) if size == "tiny" else (24, 128)
    shape = (heads * head, heads, head)
    config = CONFIGS["flux-moe-l"]
    dense_kind, moe_kind = {
        "double": (dense.FluxTransformerBlock, ours.FluxMoETransformerBlock),
        "single": (dense.FluxSingleTransformerBlock, ours.FluxMoESingleTransformerBlock),
    }[kind]
    return (
        random_weights(partial(dense_kind, *shape), device),
        random_weights(partial(moe_kind, *shape, moe=config.moe, adaln_dim=256), device),
    )


def block_inputs(size: str, image: int, text: int, device):
    """Keyword arguments of a block, without temb, and the two tembs (dense, narrow)."""
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed

    dim, axes = (96, (4, 6, 6)) if size == "tiny" else (3072, (16, 56, 56))
    g = torch.Generator(device).manual_seed(0)
    side = torch.arange(round(image**0.5), device=device)
    ids = torch.zeros(text + image, 3, device=device)
    ids[text:, 1:] = torch.cartesian_prod(side, side)

    def draw(*shape):
        return torch.randn(*shape, generator=g, device=device).to(torch.bfloat16)

    kwargs = {
        "hidden_states": draw(1, image, dim),
        "encoder_hidden_states": draw(1, text, dim),
        "image_rotary_emb": FluxPosEmbed(theta=10000, axes_dim=list(axes))(ids),
    }
    return kwargs, draw(1, dim), draw(1, 256)


# ------------------- a whole model and its ways to run a step: eager, compiled, a CUDA graph

TOKENS = {"tiny": (16, 8)}
WRONG = 0.15  # an RMS error that rounding does not explain


class Model:
    """A model with its inputs and its three ways to run a step."""

    def __init__(self, name, session):
        from d2m_models.inspection.differences import random_inputs

        self.name, self.device, self.size = name, session.device, session.size
        self.image, self.text = TOKENS.get(session.size, (4096, 512))
        self.model = build(name, session.size, self.device)
        if session.attention:
            self.model.set_attention_backend(session.attention)
        given = random_inputs(self.model, 1, self.image, self.text)
        self.kwargs = {**given, "return_dict": False}
        self.bytes = sum(t.numel() * t.element_size() for t in self.model.state_dict().values())
        self.work = work(self.model, self.image, self.text)
        self.account = account_of(self.model, self.image, self.text)
        self.record: dict = {"modes": {}}
        self.error = 0.0

    def compile(self) -> None:
        backend = "aot_eager" if self.size == "tiny" else "inductor"
        self.model.compile_repeated_blocks(backend=backend, dynamic=False)

    def uncompile(self) -> None:
        for module in self.model.modules():
            module._compiled_call_impl = None

    def step(self):
        return self.model(**self.kwargs)

    def graph(self):
        """Replays a captured step; raises where a step cannot be captured.

        The step reads self.kwargs and leaves its velocity in self.velocity, `graph_bytes` is the
        most that capture and one replay hold beyond what was there before.
        """
        if self.device.type != "cuda":
            raise RuntimeError("CUDA graphs need a GPU")
        if getattr(getattr(self.model, "d2m_config", None), "mob", None) is not None:
            raise RuntimeError("the block router's choice is read on the host")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.velocity = self.step()[0]
        graph.replay()
        torch.cuda.synchronize(self.device)
        self.graph_bytes = torch.cuda.max_memory_allocated(self.device) - before
        error = rms_error(self.velocity, self.step()[0])
        if not error < WRONG:
            raise RuntimeError(f"a replay is off by {error:.3g} of the step it was captured from")
        return graph.replay

    def image_seconds(self, steps: int, replay=None) -> float:
        """Seconds of `steps` Euler steps in a row, from idle to idle."""
        if replay is None:
            run = partial(denoise, self.model, self.kwargs, steps)
        else:
            run = partial(denoise_replayed, self.kwargs, replay, self.velocity, steps)
        return seconds_of(run, self.device)


@torch.inference_mode()
def error_to_reference(model, run) -> float:
    """RMS error of what `run` makes of the model against its reference back-end's, the largest.

    Rounding may send a token whose two best logits nearly tie to another expert, layer after layer,
    so for whole models this is no tight bound; a MoB model may even choose another block.
    """
    layers = [m for m in model.modules() if getattr(m, "num_experts", 0)]
    got = run()
    assert all(part.isfinite().all() for part in got)
    for layer in layers:
        layer.backend = "reference"
    want = run()
    for layer in layers:
        layer.backend = None
    return max(map(rms_error, got, want))
