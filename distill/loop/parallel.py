"""Many processes: who does which rows of the batch, and how parameters are sharded (FSDP2).

`torchrun --nproc-per-node N -m distill ...` starts N processes ("ranks"). Each computes its rows of
the global batch; parameters, gradients and optimizer state are sharded over `shard` ranks and
replicated `replicate` times (HSDP).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from d2m_models.config import named_blocks
from distill.configs.training import ParallelConfig
from distill.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all; the default is one process alone, for which nothing is sharded."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    mesh: Any = None

    @property
    def main(self) -> bool:
        """Whether this process writes logs and messages."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks; a new tensor."""
        if self.size > 1:
            values = values.clone()
            torch.distributed.all_reduce(values)
        return values

    def anywhere(self, *values: bool) -> list[bool]:
        """For each value whether it is true on any rank."""
        if self.size == 1:
            return list(values)
        flags = torch.tensor([float(value) for value in values], device=self.device)
        return [count > 0 for count in self.sum(flags).tolist()]

    def barrier(self) -> None:
        if self.size > 1:
            torch.distributed.barrier()

    def first(self, make: Callable[[], T]) -> T:
        """`make()` on rank 0, then on the others, which find in a cache what rank 0 has left."""
        if self.main:
            result = make()
        self.barrier()
        return result if self.main else make()

    def rows(self, batch_size: int, micro_batch: int | None = None) -> list[slice]:
        """This rank's rows of a global batch, in parts of at most `micro_batch`.

        Every rank has as many parts as every other: sharded parameters are gathered together.
        """
        if batch_size % self.size:
            raise ConfigError(
                f"train.batch_size is {batch_size}, the number of samples over all processes; "
                f"expected a multiple of their number, {self.size}"
            )
        share = batch_size // self.size
        first, parts = self.rank * share, -(-share // (micro_batch or share))
        cuts = [first + share * i // parts for i in range(parts + 1)]
        return [slice(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]


def start_world(config: ParallelConfig, device: str) -> World:
    """Join the other processes; alone, no process group is made.

    Args:
        config: how many ranks shard, how many copies there are; their product is the world's size.
        device: "cpu" (gloo) or "cuda" (nccl, one GPU a local rank).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:  # torchrun sets it, as other launchers do
        if (config.shard or 1) * config.replicate > 1:
            raise ConfigError(
                f"parallel.shard is {config.shard} and parallel.replicate {config.replicate}, but "
                "this is one process; start it with torchrun --nproc-per-node N -m distill ..."
            )
        return World(device=torch.device(device))
    from torch.distributed.device_mesh import init_device_mesh

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    shard = config.shard or size // config.replicate
    if shard * config.replicate != size:
        raise ConfigError(
            f"parallel.shard x parallel.replicate is {shard} x {config.replicate}; expected the "
            f"number of processes, {size}"
        )
    kind = torch.device(device).type
    place = torch.device(kind)
    if kind == "cuda":
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(place)
    timeout = timedelta(minutes=config.timeout_minutes)
    torch.distributed.init_process_group(
        # gloo beside nccl: asynchronous saves and host values go over the CPU
        "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
        store=_store(timeout),
        rank=rank,
        world_size=size,
        timeout=timeout,
    )
    shape, names = (config.replicate, shard), ("replicate", "shard")
    cut = slice(0 if config.replicate > 1 else 1, None)
    return World(rank, size, place, init_device_mesh(kind, shape[cut], mesh_dim_names=names[cut]))


def _store(timeout: timedelta) -> Any:
    """Where the processes find each other.

    On one machine torchrun keeps its store when it starts them again: whoever is first would find
    the addresses of the dead there. So every attempt has keys of its own. (Over several machines
    each attempt has a new store, and the machines count attempts differently.)
    """
    store, *_ = next(torch.distributed.rendezvous("env://", timeout=timeout))
    if os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"]:
        return store
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return torch.distributed.PrefixStore(f"attempt-{attempt}", store)


def stop_world(world: World) -> None:
    if world.size > 1 and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# --- sharding -------------------------------------------------------------------------------


def shard_model(model: nn.Module, world: World) -> nn.Module:
    """FSDP2, one unit a block and one for the rest; in place. Alone, nothing happens.

    Gathered parameters are plain fp32 tensors; compute in bf16 comes from autocast, as on one
    device, so that routers stay in fp32.
    """
    if world.size > 1:
        from torch.distributed.fsdp import fully_shard

        # blocks return views of one sequence; nobody writes into them
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        for block in named_blocks(model).values():
            fully_shard(block, mesh=world.mesh)
        fully_shard(model, mesh=world.mesh)
    return model


def shard_copy(model: nn.Module, world: World, prepare: Callable[[nn.Module], T]) -> tuple[Any, T]:
    """A sharded copy of a converted model that is whole on every rank, and `prepare(copy)`.

    prepare: sets what trains, before sharding, for FSDP2 fixes it then.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    from d2m_models.conversion.flux import skeleton

    copy = skeleton(model)
    prepared = prepare(copy)
    shard_model(copy, world)
    copy.to_empty(device=world.device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    state = model.state_dict() if world.main else {}
    set_model_state_dict(copy, state, options=options)
    return copy, prepared


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: its shard if it is a DTensor, sharing memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def local_span(tensor: Tensor, dim: int, start: int, stop: int) -> tuple[int, int]:
    """Entries start..stop along dim of the whole tensor, as a range of this rank's shard."""
    if not hasattr(tensor, "placements"):
        return start, stop
    for level, placement in enumerate(tensor.placements):
        if placement.is_shard() and placement.dim == dim:
            count = tensor.device_mesh.size(level)
            size = -(-tensor.shape[dim] // count)  # FSDP2 cuts like torch.chunk
            first = tensor.device_mesh.get_local_rank(level) * size
            held = tensor.to_local().shape[dim]
            start, stop = (min(max(at - first, 0), held) for at in (start, stop))
    return start, stop


def full_tensors(tensors: dict[str, Tensor], world: World) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors on the CPU, one after another; on other ranks than 0 an empty one.

    Every rank must go through it: each is gathered from all.
    """
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        yield name, whole.detach().cpu() if world.main else torch.empty(0)
