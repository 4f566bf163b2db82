"""FFNs whose Linears are a block's own, beside attention's columns or alone.

Shapes: D width, C columns of what stands beside the FFN, F neurons.

    down(cat([attention, h]))    down [D, C + F]: FLUX.1's single-stream blocks and their cousins
    down(h)                      C = 0: PRX, MiniMax-Music

with h = act(up(x)) or gated as in `forms.py`. What a block computes is read off a trace of its
forward (torch.fx), where every child is one step.

A converted block runs the forward of its own class, on a view of itself in which `up` gives no
neurons ([..., 0] in place of [..., F]) and `down`, which so receives the C columns beside the FFN
alone, adds the routed FFN of what `up` was given. No block's class has to be known.
"""

from __future__ import annotations

import copy
import functools
import inspect
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from d2m_models.config import MoEConfig, MoEShare
from d2m_models.conversion.forms import NotConvertible, guesses, matching, refuse_dropout
from d2m_models.moe import SETTINGS, ExpertLayer


class InBlock(NamedTuple):
    """Where an FFN lies in its block: names of the block's Linears, F, and C."""

    up: str
    gate: str | None
    down: str
    activation: str
    gate_first: bool
    hidden: int
    beside: int


class RoutedBlock(ExpertLayer):
    """What a converted block is beside its own class, see `convert_in_block`."""

    dense_class: type
    place: InBlock
    own: dict[str, Any]  # attributes of the dense block that have a setting's name

    def linears(self) -> tuple[nn.Module, nn.Module]:
        return getattr(self, self.place.up), getattr(self, self.place.down)

    def gate_linear(self) -> nn.Module | None:
        return None if self.place.gate is None else getattr(self, self.place.gate)

    def forward(self, *args, **kwargs):
        call = _Call(self)
        out = self.dense_class.forward(call.view, *args, **kwargs)
        if not call.done:
            raise RuntimeError(f"{self.dense_class.__name__} has not used its {self.place.down}")
        return out

    def __reduce_ex__(self, _protocol):
        return _unpickled, (self.dense_class,), self.__dict__


class _Call:
    """One forward of a block: what its FFN was given, and the view that its class runs on."""

    def __init__(self, block: RoutedBlock):
        place, self.block, self.done = block.place, block, False
        exchanged = {place.up: self.up, place.down: self.down}
        if place.gate is not None:
            exchanged[place.gate] = _no_neurons
        # where a block splits up's output by a width of its own
        widths = {k: 0 for k, v in vars(block).items() if type(v) is int and v == place.hidden}
        self.view = _View(block, widths | block.own | exchanged)

    def up(self, x: Tensor) -> Tensor:
        self.x = x
        return _no_neurons(x)

    def down(self, beside: Tensor) -> Tensor:
        self.done = True
        return self.block.run_beside(self.x, beside)[0]


def _no_neurons(x: Tensor) -> Tensor:
    return x[..., :0]


class _View:
    """A module as its forward sees it, with some attributes exchanged."""

    def __init__(self, module: nn.Module, exchanged: dict[str, Any]):
        self.__dict__.update(exchanged, _module=module)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if isinstance(value, MethodType) and value.__self__ is self._module:
            return MethodType(value.__func__, self)
        return value


@functools.cache
def _routed_class(dense: type) -> type:
    """A class of the dense one's name, by which diffusers compiles and offloads blocks."""
    return type(dense.__name__, (RoutedBlock, dense), {"dense_class": dense})


def _unpickled(dense: type) -> nn.Module:
    kind = _routed_class(dense)
    return kind.__new__(kind)


def convert_in_block(block: nn.Module, place: InBlock, config: MoEConfig | MoEShare) -> nn.Module:
    """Turns a block into its routed form, in place: parameters and forward stay its own."""
    own = {name: getattr(block, name) for name in SETTINGS if hasattr(block, name)}
    block.__class__ = _routed_class(type(block))
    block.place, block.own = place, own
    dim = getattr(block, place.up).in_features
    block.add_experts(dim, place.hidden, config, place.activation, place.gate_first)
    device = getattr(block, place.down).weight.device
    block.router.to(device)
    block.neuron_order = block.neuron_order.to(device)
    return block.train(block.training)


# ------------------------------------------------------------------------------- recognition


def may_hold_ffn(block: nn.Module) -> bool:
    """Whether Linears of the block's own widen and narrow again, and it is no attention."""
    own = [m for m in block.children() if isinstance(m, nn.Linear)]
    attention = "attention" in type(block).__name__.lower() or hasattr(block, "get_processor")
    return not attention and any(
        up.in_features == down.out_features < min(up.out_features, down.in_features)
        for up in own
        for down in own
        if up is not down
    )


def find_in_block(block: nn.Module, config: MoEConfig | MoEShare) -> InBlock | None:
    """The FFN among the block's own Linears, or None if it has none.

    Raises:
        NotConvertible: it has Linears of an FFN's shapes and cannot be followed, or its form or
            size does not fit.
    """
    taken = [n for n, m in block.named_children() if n in SETTINGS and [*m.parameters()]]
    if taken:
        raise NotConvertible(f"an MoE layer needs the names of its parts {taken}")
    try:
        graph = _Tracer().trace(block, _defaults(block))
    except Exception as error:
        raise NotConvertible(f"its forward cannot be traced ({error})") from None
    linears = {
        node: block.get_submodule(node.target)
        for node in graph.nodes
        if node.op == "call_module" and isinstance(block.get_submodule(node.target), nn.Linear)
    }
    refusal = None
    for node, down in linears.items():
        try:
            place = _read(block, node, linears)
        except NotConvertible as reason:
            refusal = reason
            continue
        if place is not None:
            _, steps = _sources(_parts(node)[1], linears)
            refuse_dropout(
                (s.target, block.get_submodule(s.target)) for s in steps if s.op == "call_module"
            )
            try:
                config.sizes(down.out_features, place.hidden)
            except ValueError as error:
                raise NotConvertible(str(error)) from None
            return place
    if refusal is not None:
        raise refusal
    return None


class _Tracer(fx.Tracer):
    """Every child is one step; a question put to a tensor is answered with no."""

    def is_leaf_module(self, _module, _name):
        return True

    def to_bool(self, _proxy):
        return False


def _defaults(block: nn.Module) -> dict[str, Any]:
    parameters = inspect.signature(type(block).forward).parameters
    return {k: p.default for k, p in parameters.items() if p.default is not p.empty}


def _parts(node: fx.Node) -> tuple[list[fx.Node], fx.Node]:
    """(what stands beside, the FFN's part) of a down Linear's input."""
    h = node.args[0] if node.args else next(iter(node.kwargs.values()))
    if h.op == "call_function" and h.target in (torch.cat, torch.concat):
        *beside, h = h.args[0] if h.args else h.kwargs["tensors"]
        return beside, h
    return [], h


def _sources(node: fx.Node, linears: dict) -> tuple[list[fx.Node], set[fx.Node]]:
    """The Linears' outputs that `node` is made of, and all steps between."""
    ups, steps, todo = [], set(), [node]
    while todo:
        step = todo.pop()
        if step in steps or step in ups:
            continue
        if step in linears:
            ups.append(step)
        else:
            steps.add(step)
            todo += step.all_input_nodes
    return ups, steps


def _read(block: nn.Module, node: fx.Node, linears: dict) -> InBlock | None:
    """The FFN that ends in the Linear `node`; None if nothing of the kind does."""
    down = linears[node]
    beside, h = _parts(node)
    ups, steps = _sources(h, linears)
    ups.sort(key=lambda up: list(linears).index(up))
    if not 1 <= len(ups) <= 2 or any(linears[up].in_features != down.out_features for up in ups):
        return None
    if any(step.op in ("placeholder", "get_attr") for step in steps):
        return None  # attention, or a modulation: other tensors take part
    if len({(up.args, tuple(up.kwargs.items())) for up in ups}) > 1:
        return None
    generator = torch.Generator().manual_seed(0)
    values = {up: torch.randn(2, 8, linears[up].out_features, generator=generator) for up in ups}
    try:
        actual = _evaluate(block, h, dict(values))
    except Exception as error:
        raise NotConvertible(f"between {ups[0].target} and {node.target}: {error}") from None
    hidden = actual.shape[-1]
    if hidden > down.in_features or (not beside and hidden != down.in_features):
        return None
    names = [up.target for up in ups]
    found = matching(actual, guesses(names, list(values.values()), hidden))
    activation, gate_first, up, gate = found
    return InBlock(up, gate, node.target, activation, gate_first, hidden, down.in_features - hidden)


@torch.no_grad()
def _evaluate(block: nn.Module, node: fx.Node, values: dict[fx.Node, Tensor]) -> Any:
    def value(step: fx.Node) -> Any:
        if step not in values:
            args, kwargs = fx.node.map_arg((step.args, step.kwargs), value)
            if step.op == "call_module":
                child = copy.deepcopy(block.get_submodule(step.target)).to("cpu", torch.float32)
                values[step] = child.eval()(*args, **kwargs)
            elif step.op == "call_method":
                values[step] = getattr(args[0], step.target)(*args[1:], **kwargs)
            else:
                values[step] = step.target(*args, **kwargs)
        return values[step]

    return value(node)
