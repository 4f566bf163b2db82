"""Context parallelism through diffusers: two gloo processes equal one, with MoB and without."""

import pytest
import torch
from helpers.tiny_flux import converted, flux_inputs, mob_flux

from d2m_models import MixtureOfBlocks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is absent"),
]
MODELS = {"mob": lambda: mob_flux()[1], "moe": lambda: converted(adaln_dim=16)[1]}


def inputs(mask):
    given = flux_inputs(batch=2, image=12, text=6)
    if mask:
        tokens = torch.arange(6)[None] < torch.tensor([[4], [6]])
        given["joint_attention_kwargs"] = {"token_mask": tokens}
    return given


def forward(model, mask):
    """Sample, blocks chosen by each MoB group, image tokens a block sees."""
    chosen, tokens = [], []
    for group in model.modules():
        if isinstance(group, MixtureOfBlocks):
            group.register_forward_hook(lambda _m, _a, out: chosen.append(out[2].ids))
    block = model.transformer_blocks[0]
    block.register_forward_hook(lambda _m, _a, out: tokens.append(out[1].shape[1]))
    with torch.no_grad():
        sample = model(**inputs(mask), return_dict=False)[0]  # as pipelines call it
    return sample, chosen, tokens


def worker(rank, path, results):
    from diffusers import ContextParallelConfig

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=2
    )
    torch.accelerator.device_count = lambda: 1  # diffusers divides by it; there are none here
    outputs = {}
    for name, make in MODELS.items():
        for mask in (False, True):
            model = make()
            model.set_attention_backend("native")
            model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
            outputs[name, mask] = forward(model, mask)
    results[rank] = outputs
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    path = tmp_path_factory.mktemp("gloo") / "store"
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(worker, (str(path), results), nprocs=2)
        return dict(results)


@pytest.mark.parametrize("mask", [False, True], ids=["all-tokens", "token-mask"])
@pytest.mark.parametrize("name", MODELS)
def test_two_processes_equal_one(ranks, name, mask):
    expected, blocks, _ = forward(MODELS[name](), mask)
    unmasked = forward(MODELS[name](), False)[0]
    for rank in (0, 1):
        sample, chosen, tokens = ranks[rank][name, mask]
        assert tokens == [6], "the image was not split over the two ranks"
        torch.testing.assert_close(sample, expected, rtol=1e-4, atol=1e-5)
        assert len(chosen) == len(blocks) == (2 if name == "mob" else 0)
        assert all(torch.equal(a, b) for a, b in zip(chosen, blocks, strict=True))
    assert mask == (not torch.allclose(expected, unmasked))
