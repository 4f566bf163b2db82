"""What a forward returns beside the sample, and how to record the same of a dense teacher.

Shapes: B samples, I image tokens, X text tokens, D width, m blocks of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from d2m_kernels import Routing
from d2m_models.config import FluxMoEConfig, group_names, named_blocks
from d2m_models.mob import MoBRouting

Features = dict[str, tuple[Tensor, Tensor]]


@dataclass
class FluxMoEAux:
    """What distillation needs of a forward; tensors carry gradient.

    Attributes:
        features: block name ("transformer_blocks.3", "single_transformer_blocks.7"), or group name
            ("mob.double.0") in place of the group's blocks, -> (image [B, I, D], text [B, X, D]).
        routing: MoE layer name ("transformer_blocks.3.ff", "single_transformer_blocks.7") ->
            Routing over that layer's tokens, samples in order (inside a group: those that ran it).
        mob: group name -> MoBRouting.
    """

    features: Features = field(default_factory=dict)
    routing: dict[str, Routing] = field(default_factory=dict)
    mob: dict[str, MoBRouting] = field(default_factory=dict)


@dataclass
class FluxMoEOutput(Transformer2DModelOutput):
    """`sample`, and `aux` when the forward was called with `output_aux=True`."""

    aux: FluxMoEAux | None = None


@contextmanager
def watched(model: nn.Module, see: Callable[[str, dict, tuple], None]) -> Iterator[None]:
    """Inside, every FLUX block that has run is told: see(name, keyword arguments, output)."""

    def tell(_module, _args, kwargs, output, name):
        see(name, kwargs, output)

    handles = [
        block.register_forward_hook(partial(tell, name=name), with_kwargs=True)
        for name, block in named_blocks(model).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def block_features(model: nn.Module, config: FluxMoEConfig | None = None) -> Iterator[Features]:
    """Records the block outputs of a (dense) FLUX model under the names `FluxMoEAux.features` uses.

        with block_features(teacher, student.d2m_config) as features:
            teacher(...)

    Each forward overwrites the entries. With the student's `config`, the group entries hold the
    output of the group's last block, the teacher feature of the paper's third stage.
    """
    aliases = {} if config is None else {n[-1]: g for g, n in group_names(config).items()}
    features: Features = {}

    def record(name, _kwargs, output):
        features[name] = features[aliases.get(name, name)] = (output[1], output[0])

    with watched(model, record):
        yield features
