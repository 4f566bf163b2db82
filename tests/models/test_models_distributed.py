"""MoB over two gloo processes: ranks that share tokens agree, ranks that do not still meet."""

import pytest
import torch
from helpers.tiny_flux import flux_inputs, mob_flux
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import init

from d2m_models import MixtureOfBlocks
from d2m_models.mob import pool_tokens

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is absent"),
]
X, C = torch.arange(96.0).view(2, 6, 8).sin(), torch.arange(32.0).view(2, 2, 8).cos()


def gate():
    return init.normal_(torch.empty(3, 8), generator=torch.Generator().manual_seed(0))


def shared_tokens(rank):
    """Each rank holds its part of every sample's tokens, unequal parts at that."""
    mob = MixtureOfBlocks(8, 3)
    with torch.no_grad():
        mob.token_gate.weight.copy_(gate())
        mob.condition_gate.weight.zero_()
    part = slice(0, 4) if rank == 0 else slice(4, 6)
    group = torch.distributed.group.WORLD
    return mob.route(X[:, part], C[:, rank : rank + 1], torch.zeros(2, 8), group).probs.detach()


def sharded_parameters(rank, checkpointing):
    """Largest error of a rank's sample and of the averaged gradient against one process."""
    (_, reference), (_, model) = mob_flux(), mob_flux()
    mesh = init_device_mesh("cpu", (2,))
    for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    own = slice(2 * rank, 2 * rank + 2)
    inputs = flux_inputs(batch=4)
    part = {k: v if k.endswith("ids") else v[own] for k, v in inputs.items()}
    for m in (reference, model):
        m.train()
        if checkpointing:
            m.enable_gradient_checkpointing()
    whole = reference(**inputs)
    ours = model(**part, output_aux=True)
    choice = [routing.ids.tolist() for routing in ours.aux.mob.values()]
    for out in (whole, ours):
        out.sample.square().mean().backward()
    error = (ours.sample - whole.sample[own]).abs().max().item()
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        grad = expected[name].grad
        if grad is not None:
            difference = (parameter.grad.full_tensor() - grad).abs().max()
            error = max(error, (difference / grad.abs().max().clamp(min=1e-12)).item())
    return choice, error


def worker(rank, path, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=2
    )
    results[rank] = (
        shared_tokens(rank),
        [sharded_parameters(rank, checkpointing) for checkpointing in (False, True)],
    )
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    path = tmp_path_factory.mktemp("gloo") / "store"
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(worker, (str(path), results), nprocs=2)
        return dict(results)


def test_ranks_that_share_the_tokens_choose_alike(ranks):
    assert torch.equal(ranks[0][0], ranks[1][0])
    expected = (0.5 * pool_tokens(X, C) @ gate().T).softmax(-1)
    torch.testing.assert_close(ranks[0][0], expected)


def test_fsdp_ranks_may_choose_different_blocks(ranks):
    for (first, first_error), (second, second_error) in zip(ranks[0][1], ranks[1][1], strict=True):
        assert first != second, "both ranks chose the same blocks, which proves nothing"
        assert max(first_error, second_error) < 1e-5
