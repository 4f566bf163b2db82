"""FLUX blocks and whole models with random weights, and inputs for them.

Shapes: B samples, I image tokens, X text tokens, D width. A random model costs what a trained one
does, except that an untrained router spreads its tokens more evenly.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from report.roofline import account_of, config_of, work

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
    config = config_of(name)
    if size != "tiny":
        return config
    first = (0,) if config.moe else ()
    narrow = 8 if config.adaln_dim else None
    config = replace(config, dense_double_blocks=first, mob=None, adaln_dim=narrow, **_TINY_DEPTH)
    groups = _TINY_GROUPS.get(name)
    return replace(config, mob=MoBConfig(**groups)) if groups else config


def build(name: str, size: str, device: torch.device, dtype=torch.bfloat16) -> torch.nn.Module:
    """A model with random weights, made on the device; routers stay fp32. Dense is diffusers'."""
    from diffusers import FluxTransformer2DModel

    from d2m_models import FluxMoETransformer2DModel

    config = structure(name, size)
    sizes = dict(TINY if size == "tiny" else {}, guidance_embeds=True)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            if config.moe is None:
                depth = {k: getattr(config, k) for k in ("num_layers", "num_single_layers")}
                model = FluxTransformer2DModel(**sizes, **depth)
            else:
                model = FluxMoETransformer2DModel(**sizes, **config.to_dict())
    finally:
        torch.set_default_dtype(before)
    for part, module in model.named_modules():
        if "router" in part:
            module.float()
    return model.eval().requires_grad_(False)


def inputs(model, image: int, text: int, device, dtype=torch.bfloat16, batch: int = 1) -> dict:
    """Random inputs of `FluxTransformer2DModel.forward`, as FluxPipeline lays them out."""
    g = torch.Generator(device).manual_seed(0)
    c = model.config

    def draw(*size):
        return torch.randn(*size, generator=g, device=device).to(dtype)

    side = round(image**0.5)
    ids = torch.zeros(image, 3, device=device)
    ids[:, 1], ids[:, 2] = (torch.arange(image, device=device) // side,
                            torch.arange(image, device=device) % side)  # fmt: skip
    return {
        "hidden_states": draw(batch, image, c.in_channels),
        "encoder_hidden_states": draw(batch, text, c.joint_attention_dim),
        "pooled_projections": draw(batch, c.pooled_projection_dim),
        "timestep": torch.full((batch,), 0.5, device=device, dtype=dtype),
        "guidance": torch.full((batch,), 3.5, device=device, dtype=dtype),
        "img_ids": ids.to(dtype),
        "txt_ids": torch.zeros(text, 3, device=device, dtype=dtype),
        "return_dict": False,
    }


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


def block_pair(kind: str, size: str, device: torch.device, dtype=torch.bfloat16):
    """(dense block of diffusers, MoE block with AdaLN input 256) of one kind, at full width."""
    from diffusers.models.transformers import transformer_flux as dense

    from d2m_models import blocks as ours

    heads, head = (6, 16) if size == "tiny" else (24, 128)
    shape = (heads * head, heads, head)
    config = config_of("flux-moe-l")
    classes = {
        "double": (dense.FluxTransformerBlock, ours.FluxMoETransformerBlock),
        "single": (dense.FluxSingleTransformerBlock, ours.FluxMoESingleTransformerBlock),
    }[kind]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            pair = classes[0](*shape), classes[1](*shape, moe=config.moe, adaln_dim=256)
    finally:
        torch.set_default_dtype(before)
    for name, module in pair[1].named_modules():
        if "router" in name:
            module.float()
    return tuple(b.eval().requires_grad_(False) for b in pair)


def block_inputs(size: str, image: int, text: int, device, dtype=torch.bfloat16):
    """Keyword arguments of a block, without temb, and the two tembs (dense, narrow)."""
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed

    dim, axes = (96, (4, 6, 6)) if size == "tiny" else (3072, (16, 56, 56))
    g = torch.Generator(device).manual_seed(0)
    side = round(image**0.5)
    ids = torch.zeros(text + image, 3, device=device)
    ids[text:, 1] = torch.arange(image, device=device) // side
    ids[text:, 2] = torch.arange(image, device=device) % side

    def draw(*shape):
        return torch.randn(*shape, generator=g, device=device).to(dtype)

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
        self.name, self.device, self.size = name, session.device, session.size
        self.image, self.text = TOKENS.get(session.size, (4096, 512))
        self.model = build(name, session.size, self.device)
        if session.attention:
            self.model.set_attention_backend(session.attention)
        self.kwargs = inputs(self.model, self.image, self.text, self.device)
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
        synchronize = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        synchronize()
        start = time.perf_counter()
        if replay is None:
            denoise(self.model, self.kwargs, steps)
        else:
            denoise_replayed(self.kwargs, replay, self.velocity, steps)
        synchronize()
        return time.perf_counter() - start


def rms_error(got, want) -> float:
    """RMS of the difference over RMS of `want`."""
    got, want = got.float(), want.float()
    return ((got - want).square().mean() / want.square().mean()).sqrt().item()
