"""Small FLUX models and inputs for tests: D=64 (4 heads of 16), 2 double and 4 single blocks."""

import torch
from diffusers import FluxTransformer2DModel
from torch.nn import functional as F

from d2m_models import FluxMoEConfig, MoBConfig, MoEConfig, convert_flux
from d2m_models.conversion.flux import ffn_names

DIM, HIDDEN, CHANNELS, JOINT, POOLED = 64, 256, 16, 32, 24


def dense_flux(double=2, single=4, guidance=True, seed=0):
    torch.manual_seed(seed)
    return FluxTransformer2DModel(
        in_channels=CHANNELS,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=JOINT,
        pooled_projection_dim=POOLED,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    ).eval()


def flux_inputs(batch=2, image=12, text=5, guidance=True, seed=1, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    ids = torch.zeros(image, 3)
    ids[:, 1], ids[:, 2] = torch.arange(image) // 4, torch.arange(image) % 4
    inputs = {
        "hidden_states": torch.randn(batch, image, CHANNELS, generator=g),
        "encoder_hidden_states": torch.randn(batch, text, JOINT, generator=g),
        "pooled_projections": torch.randn(batch, POOLED, generator=g),
        "timestep": torch.rand(batch, generator=g),
        "img_ids": ids,
        "txt_ids": torch.zeros(text, 3),
    }
    if guidance:
        inputs["guidance"] = torch.full((batch,), 3.5)
    return {k: v if k.endswith("ids") else v.to(dtype) for k, v in inputs.items()}


def random_orders(dense, seed=2):
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randperm(HIDDEN, generator=g) for name in ffn_names(dense)}


def small_config(double=2, single=4, **kwargs):
    defaults = {"dense_double_blocks": (), "num_layers": double, "num_single_layers": single}
    return FluxMoEConfig(**{**defaults, **kwargs})


def mob_flux(seed=0, **mob):
    """3 double and 4 single blocks with groups (1, 2) and (1, 2, 3), routers at a large scale.

    With the initial N(0, 0.02) all samples of a small batch tend to agree; a wider spread makes
    them choose different blocks, which is what the tests are about.
    """
    dense = dense_flux(3, 4, seed=seed)
    groups = {"double_groups": ((1, 2),), "single_groups": ((1, 2, 3),), **mob}
    config = small_config(3, 4, mob=MoBConfig(**groups))
    g = torch.Generator().manual_seed(seed)
    model = convert_flux(dense, config, random_orders(dense), generator=g)
    with torch.no_grad():
        for parameter in model.mob_routers.parameters():
            parameter.mul_(50)
    return dense, model


def converted(moe=None, seed=0, **kwargs):
    dense = dense_flux(seed=seed)
    config = small_config(moe=moe or MoEConfig(), **kwargs)
    g = torch.Generator().manual_seed(seed)
    return dense, convert_flux(dense, config, random_orders(dense), generator=g)


def rel_error(a, b):
    return ((a - b).norm() / b.norm()).item()


def moe_by_hand(x_TD, router, w1, b1, w2, b2, top_k, shared, scale=1.0, act=None):
    """Eqs. 2-3, one token and one expert at a time, in double precision."""
    act = act or (lambda z: F.gelu(z, approximate="tanh"))
    x_TD, router, w1, b1, w2, b2 = (t.double() for t in (x_TD, router, w1, b1, w2, b2))
    size = (w1.shape[0] - shared) // router.shape[0]
    out = []
    for x_D in x_TD:
        alpha_E = (router @ x_D).softmax(0)
        y_D = w2[:, :shared] @ act(w1[:shared] @ x_D + b1[:shared]) + b2
        best = alpha_E.topk(top_k).indices
        for e in best:
            own = slice(shared + int(e) * size, shared + (int(e) + 1) * size)
            gate = alpha_E[e] / alpha_E[best].sum()
            y_D = y_D + scale * gate * (w2[:, own] @ act(w1[own] @ x_D + b1[own]))
        out.append(y_D)
    return torch.stack(out)
