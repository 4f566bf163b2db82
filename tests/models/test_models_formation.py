"""Experts by co-activation and routers by regression, on a teacher whose structure is known."""

import pytest
import torch
from helpers.tiny_flux import dense_flux, flux_inputs, random_orders, rel_error, small_config

from d2m_models import MoEConfig, convert_flux, moe_layers
from d2m_models.conversion.flux import ffn_names
from d2m_models.conversion.formation import coactivation_orders, fit_routers, record_ffns

BATCHES = [flux_inputs(batch=4, image=16, text=6, seed=s) for s in range(4)]


def test_records_are_what_the_ffns_see():
    dense = dense_flux()
    records = record_ffns(dense, BATCHES[:1], tokens=10_000)
    assert set(records) == set(ffn_names(dense))
    for name, record in records.items():
        module = dense.get_submodule(name)
        if name.startswith("single"):
            up, act, tokens = module.proj_mlp, module.act_mlp, 4 * 22
        else:
            act = torch.nn.GELU(approximate="tanh")
            up, tokens = module.net[0].proj, 4 * (6 if "context" in name else 16)
        assert record.x.shape == (tokens, 64) and record.h.shape == (tokens, 256)
        with torch.no_grad():
            torch.testing.assert_close(act(up(record.x)), record.h, rtol=1e-4, atol=1e-5)
    assert len(record_ffns(dense, BATCHES, tokens=50)["transformer_blocks.0.ff"].x) == 50
    with pytest.raises(ValueError, match="batches is empty"):
        record_ffns(dense, [])


def test_fitted_routers_choose_better_experts_than_random_ones():
    """Kept for the two chosen experts: more of what the twelve contribute."""
    dense = dense_flux()
    orders = random_orders(dense)
    model = convert_flux(dense, small_config(), orders)
    records = record_ffns(dense, BATCHES)

    def error():
        """Of each layer's routed part with weight 1 an expert, against all experts."""
        errors = []
        for name, layer in moe_layers(model).items():
            x, h = records[name]
            h = h[:, layer.neuron_order.long()]
            w2 = layer.linears()[1].weight[:, -256:].detach()
            parts = torch.stack(
                [
                    h[:, 64 + 16 * e : 80 + 16 * e] @ w2[:, 64 + 16 * e : 80 + 16 * e].T
                    for e in range(12)
                ],
                dim=1,
            )
            ids = layer.choose(x).ids.long()
            kept = parts.gather(1, ids[..., None].expand(-1, -1, 64)).norm(dim=2).sum(1)
            best = parts.norm(dim=2).topk(2, dim=1).values.sum(1)
            errors.append(float((best - kept).mean() / best.mean()))
        return torch.tensor(errors)

    random = error()
    explained = fit_routers(model, records)
    fitted = error()
    assert set(explained) == set(moe_layers(model))
    assert all(0 < value <= 1 for value in explained.values())
    assert (fitted < random).all() and fitted.mean() < 0.7 * random.mean()
    with pytest.raises(ValueError, match="records lacks"):
        fit_routers(model, {})


def test_a_linear_relation_is_found_exactly():
    """If log contributions are linear in x, the regression finds the very router."""
    dense = dense_flux(1, 1)
    model = convert_flux(dense, small_config(1, 1))
    name = "transformer_blocks.0.ff"
    layer = moe_layers(model)[name]
    g = torch.Generator().manual_seed(0)
    truth = 0.1 * torch.randn(12, 64, generator=g)
    truth -= truth.mean(0)
    x = torch.randn(4000, 64, generator=g)
    h = torch.zeros(4000, 256)
    h[:, 64::16] = (x @ truth.T).exp()  # one neuron of each expert
    with torch.no_grad():
        layer.net[2].weight.copy_(torch.nn.functional.normalize(layer.net[2].weight, dim=0))
    records = record_ffns(dense, BATCHES)
    records[name] = type(records[name])(x, h)
    explained = fit_routers(model, records, ridge=0.0)
    assert explained[name] > 0.9999
    assert rel_error(layer.router.weight.detach(), truth) < 1e-3


def test_coactivation_orders_convert():
    dense = dense_flux()
    records = record_ffns(dense, BATCHES)
    importance = {n: torch.rand(256) for n in records}
    orders = coactivation_orders(records, importance, MoEConfig())
    for name, order in orders.items():
        best = importance[name].argsort(descending=True)[:64]
        assert set(order[:64].tolist()) == set(best.tolist()), "shared neurons go by importance"
    model = convert_flux(dense, small_config(), orders)
    model.set_top_k("dense")
    with torch.no_grad():
        outputs = [m(**flux_inputs()).sample for m in (dense, model)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)


def test_records_are_a_uniform_sample_of_all_batches():
    """Whatever comes first or last is kept as often; x and h of a record are the same token's."""
    dense = dense_flux(1, 1)
    name, counts = "transformer_blocks.0.ff", torch.zeros(len(BATCHES))
    each = [record_ffns(dense, [b], tokens=10_000)[name].x for b in BATCHES]
    module = dense.get_submodule(name)
    for seed in range(60):
        x, h = record_ffns(dense, BATCHES, tokens=12, seed=seed)[name]
        assert len(x) == len(h) == 12 == len(x.unique(dim=0))
        for i, known in enumerate(each):
            counts[i] += int((x[:, None] == known).all(2).any(1).sum())
    with torch.no_grad():
        torch.testing.assert_close(module.net[0](x), h, rtol=1e-4, atol=1e-5)
    assert counts.sum() == 60 * 12
    assert (counts - 180).abs().max() < 5 * (720 * 0.25 * 0.75) ** 0.5
