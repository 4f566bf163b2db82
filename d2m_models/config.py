"""What a converted model looks like: experts, groups of blocks, AdaLN width.

Ratios are relative to the model width D, as in the paper (section 3.1): a FLUX FFN has expansion
ratio r = 4 = shared_ratio + num_experts * expert_ratio. Everything here is plain data that is
checked on construction and survives a round trip through JSON, without torch or diffusers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

KINDS = {"double": "transformer_blocks", "single": "single_transformer_blocks"}


def _check_int(owner: str, name: str, value: Any, low: int, high: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}.{name} must be an int, got {value!r}")
    if value < low or (high is not None and value > high):
        limit = f">= {low}" if high is None else f"in {low}..{high}"
        raise ValueError(f"{owner}.{name} must be {limit}, got {value}")
    return value


def _check_real(owner: str, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{owner}.{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{owner}.{name} must be finite, got {value}")
    return float(value)


def _check_ints(owner: str, name: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise TypeError(f"{owner}.{name} must be a sequence of ints, got {value!r}")
    return tuple(_check_int(owner, f"{name}[{i}]", v, 0) for i, v in enumerate(value))


class _PlainData:
    """The way to plain dicts, lists and numbers and back."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]):
        if not isinstance(data, Mapping):
            raise TypeError(f"{cls.__name__} is built from a mapping, got {type(data).__name__}")
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(data) - set(known))
        if unknown:
            raise ValueError(f"unknown {cls.__name__} keys {unknown}; known keys are {known}")
        return cls(**data)


@dataclass(frozen=True)
class MoEConfig(_PlainData):
    """One MoE layer (eqs. 2-3): `shared_ratio * D` shared neurons and `num_experts` experts.

    Args:
        shared_ratio: r_s, expansion ratio of the expert that every token uses.
        expert_ratio: r_n, expansion ratio of each routed expert.
        num_experts: n (E in the code).
        top_k: experts a token uses, 0..num_experts; "dense" runs every neuron without routing.
        routed_scale: factor on the weighted sum of routed experts (the paper: 1).
    """

    shared_ratio: float = 1.0
    expert_ratio: float = 0.25
    num_experts: int = 12
    top_k: int | str = 2
    routed_scale: float = 1.0

    def __post_init__(self):
        if _check_real("MoEConfig", "shared_ratio", self.shared_ratio) < 0:
            raise ValueError(f"MoEConfig.shared_ratio must be >= 0, got {self.shared_ratio}")
        if _check_real("MoEConfig", "expert_ratio", self.expert_ratio) <= 0:
            raise ValueError(f"MoEConfig.expert_ratio must be > 0, got {self.expert_ratio}")
        _check_int("MoEConfig", "num_experts", self.num_experts, 1)
        _check_real("MoEConfig", "routed_scale", self.routed_scale)
        check_top_k(self.top_k, self.num_experts, "MoEConfig.top_k")

    @property
    def expansion_ratio(self) -> float:
        """r = r_s + n * r_n, the ratio of the dense FFN this layer is made of."""
        return self.shared_ratio + self.num_experts * self.expert_ratio

    @property
    def activated_ratio(self) -> float:
        """r_a = r_s + k * r_n."""
        if self.top_k == "dense":
            return self.expansion_ratio
        return self.shared_ratio + self.top_k * self.expert_ratio

    def sizes(self, dim: int, hidden: int) -> tuple[int, int]:
        """(F_s, F_e) for a dense FFN of `hidden` neurons on width `dim`; exact or an error."""
        shared, expert = self.shared_ratio * dim, self.expert_ratio * dim
        for name, value in (("shared_ratio", shared), ("expert_ratio", expert)):
            if abs(value - round(value)) > 1e-6:
                raise ValueError(
                    f"MoEConfig.{name}={getattr(self, name)} times D={dim} is {value:g}, "
                    f"which is no whole number of neurons"
                )
        shared, expert = round(shared), round(expert)
        if shared + self.num_experts * expert != hidden:
            raise ValueError(
                f"MoEConfig makes {shared} + {self.num_experts} x {expert} = "
                f"{shared + self.num_experts * expert} neurons at D={dim}, but the dense FFN has "
                f"{hidden} (ratio {hidden / dim:g}); choose shared_ratio + num_experts * "
                f"expert_ratio = {hidden / dim:g}"
            )
        return shared, expert


@dataclass(frozen=True)
class MoEShare(_PlainData):
    """MoE layers for FFNs of any size: the share of its neurons that a token uses.

    A model whose FFNs have other ratios (gated ones 8/3, others 3, 4, 6) converts with one of
    these. The default is the paper's 1S12E2A: of 4 D neurons D are shared and 3 D make 12 experts.

    Args:
        activated: share of an FFN's neurons that a token uses, in 0..1: (r_s + k r_n) / r.
        num_experts, top_k, routed_scale: as `MoEConfig`.
    """

    activated: float = 0.375
    num_experts: int = 12
    top_k: int = 2
    routed_scale: float = 1.0

    def __post_init__(self):
        if not 0 < _check_real("MoEShare", "activated", self.activated) < 1:
            raise ValueError(f"MoEShare.activated must be between 0 and 1, got {self.activated}")
        _check_int("MoEShare", "num_experts", self.num_experts, 2)
        _check_int("MoEShare", "top_k", self.top_k, 0, self.num_experts - 1)
        _check_real("MoEShare", "routed_scale", self.routed_scale)

    def sizes(self, dim: int, hidden: int) -> tuple[int, int]:
        """(F_s, F_e) for a dense FFN of `hidden` neurons; experts of 128 and more are whole
        multiples of 16 neurons (32 bytes in bf16), so the share is met within 1/16 of an expert."""
        expert = (1 - self.activated) * hidden / (self.num_experts - self.top_k)
        step = 16 if expert >= 128 else 1
        expert = round(min(expert, hidden / self.num_experts) / step) * step
        shared = hidden - self.num_experts * expert
        if expert == 0 or shared < 0:
            raise ValueError(
                f"{hidden} neurons do not make {self.num_experts} experts of which "
                f"{self.top_k} and the shared neurons are {self.activated:g} of all; choose fewer "
                f"experts"
            )
        return shared, expert

    def of(self, dim: int, hidden: int) -> MoEConfig:
        """The `MoEConfig` of an FFN of `hidden` neurons on width `dim`."""
        shared, expert = self.sizes(dim, hidden)
        split = shared / dim, expert / dim
        return MoEConfig(*split, self.num_experts, self.top_k, self.routed_scale)


def check_top_k(top_k: Any, num_experts: int, name: str = "top_k") -> int | str:
    """`top_k` itself if it is 0..num_experts or "dense"; else an error that names it."""
    if top_k == "dense":
        return top_k
    if isinstance(top_k, (bool, float)) or not isinstance(top_k, int):
        raise TypeError(f'{name} must be an int in 0..{num_experts} or "dense", got {top_k!r}')
    if not 0 <= top_k <= num_experts:
        raise ValueError(f'{name} must be in 0..{num_experts} or "dense", got {top_k}')
    return top_k


@dataclass(frozen=True)
class MoBConfig(_PlainData):
    """Groups of consecutive blocks of which every sample runs `active` (eqs. 4-5).

    Args:
        double_groups / single_groups: block indices of each group, ascending and consecutive.
        active: kappa, blocks that run in each group.
        alpha: weight of the pooled tokens against the conditioning embedding in eq. 5.
        select: "topk" picks any `active` blocks and keeps their order (eq. 5); "run" picks
            `active` consecutive ones (eq. 4).
    """

    double_groups: tuple[tuple[int, ...], ...] = ()
    single_groups: tuple[tuple[int, ...], ...] = ()
    active: int = 1
    alpha: float = 0.5
    select: str = "topk"

    def __post_init__(self):
        _check_int("MoBConfig", "active", self.active, 1)
        if not 0.0 <= _check_real("MoBConfig", "alpha", self.alpha) <= 1.0:
            raise ValueError(f"MoBConfig.alpha must be in 0..1, got {self.alpha}")
        if self.select not in ("topk", "run"):
            raise ValueError(f'MoBConfig.select must be "topk" or "run", got {self.select!r}')
        for kind in ("double_groups", "single_groups"):
            value = getattr(self, kind)
            if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
                raise TypeError(f"MoBConfig.{kind} must be a sequence of groups, got {value!r}")
            groups = tuple(
                _check_ints("MoBConfig", f"{kind}[{g}]", group) for g, group in enumerate(value)
            )
            self._check_groups(kind, groups)
            object.__setattr__(self, kind, groups)
        if not self.double_groups and not self.single_groups:
            raise ValueError("MoBConfig has no groups; pass mob=None for a model without MoB")

    def _check_groups(self, kind: str, groups: tuple[tuple[int, ...], ...]) -> None:
        seen: set[int] = set()
        for g, group in enumerate(groups):
            if len(group) < 2 or list(group) != list(range(group[0], group[0] + len(group))):
                raise ValueError(
                    f"MoBConfig.{kind}[{g}] must hold two or more consecutive block indices, "
                    f"got {group}"
                )
            if self.active > len(group):
                raise ValueError(
                    f"MoBConfig.active={self.active} exceeds the {len(group)} blocks of "
                    f"{kind}[{g}] = {group}"
                )
            if seen & set(group):
                raise ValueError(
                    f"MoBConfig.{kind}: blocks {sorted(seen & set(group))} are in two groups"
                )
            seen |= set(group)

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self)
        for kind in ("double_groups", "single_groups"):
            data[kind] = [list(group) for group in data[kind]]
        return data


@dataclass(frozen=True)
class FluxMoEConfig(_PlainData):
    """Structure of a FLUX model after conversion.

    Args:
        moe: every FFN outside the dense blocks becomes this MoE layer; None keeps FFNs dense.
        dense_double_blocks / dense_single_blocks: blocks whose FFNs stay as they are.
        mob: groups of blocks, or None.
        adaln_dim: width the AdaLN input silu(temb) is compressed to, or None.
        num_layers / num_single_layers: double-stream and single-stream blocks.
    """

    moe: MoEConfig | None = MoEConfig()
    dense_double_blocks: tuple[int, ...] = (0, 1, 2)
    mob: MoBConfig | None = None
    adaln_dim: int | None = None
    num_layers: int = 19
    num_single_layers: int = 38
    dense_single_blocks: tuple[int, ...] = ()

    def __post_init__(self):
        for name, cls in (("moe", MoEConfig), ("mob", MoBConfig)):
            value = getattr(self, name)
            if isinstance(value, Mapping):
                object.__setattr__(self, name, cls.from_dict(value))
            elif value is not None and not isinstance(value, cls):
                raise TypeError(
                    f"FluxMoEConfig.{name} must be a {cls.__name__} or None, got {value!r}"
                )
        _check_int("FluxMoEConfig", "num_layers", self.num_layers, 0)
        _check_int("FluxMoEConfig", "num_single_layers", self.num_single_layers, 0)
        if self.adaln_dim is not None:
            _check_int("FluxMoEConfig", "adaln_dim", self.adaln_dim, 1)
        for kind, count in (("double", self.num_layers), ("single", self.num_single_layers)):
            name, groups = f"dense_{kind}_blocks", getattr(self.mob, f"{kind}_groups", ())
            blocks = tuple(sorted(set(_check_ints("FluxMoEConfig", name, getattr(self, name)))))
            if blocks and blocks[-1] >= count and self.moe is not None:
                raise ValueError(
                    f"FluxMoEConfig.{name}={blocks} does not fit a model of {count} such blocks"
                )
            object.__setattr__(self, name, blocks)
            last = max((group[-1] for group in groups), default=-1)
            if last >= count:
                raise ValueError(
                    f"MoBConfig.{kind}_groups names block {last}, the model has {count} such blocks"
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers: what `json.dumps` and a diffusers config take."""
        return {
            **asdict(self),
            "dense_double_blocks": list(self.dense_double_blocks),
            "mob": None if self.mob is None else self.mob.to_dict(),
            "dense_single_blocks": list(self.dense_single_blocks),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> FluxMoEConfig:
        return cls.from_dict(json.loads(text))


@dataclass(frozen=True)
class GroupsConfig(_PlainData):
    """MoB groups of any model, see `add_mob`: {name of a list of blocks: groups of indices}."""

    groups: Mapping[str, Any]
    active: int = 1
    alpha: float = 0.5
    select: str = "topk"
    condition: str | None = None

    def __post_init__(self):
        if not isinstance(self.groups, Mapping) or not self.groups:
            raise TypeError(
                f"GroupsConfig.groups must name lists of blocks, got {self.groups!r}; expected "
                "{name: [[1, 2], ...]}"
            )
        checked = {n: MoBConfig(g, (), *self._how()).double_groups for n, g in self.groups.items()}
        object.__setattr__(self, "groups", {n: [*map(list, g)] for n, g in checked.items()})

    def _how(self) -> tuple[int, float, str]:
        return self.active, self.alpha, self.select


@dataclass(frozen=True)
class AnyMoEConfig(_PlainData):
    """Structure of any DiT after `convert` and `add_mob`, as a saved model's configuration has it.

    Args:
        moe: of every FFN: a `MoEShare`, or a `MoEConfig` where all have its ratio.
        mob: groups of blocks, or None.
    """

    moe: MoEShare | MoEConfig = MoEShare()
    mob: GroupsConfig | None = None

    adaln_dim = None  # compressed for FLUX.1 alone

    def __post_init__(self):
        if isinstance(self.moe, Mapping):
            kind = MoEConfig if "shared_ratio" in self.moe else MoEShare
            object.__setattr__(self, "moe", kind.from_dict(self.moe))
        if isinstance(self.mob, Mapping):
            object.__setattr__(self, "mob", GroupsConfig.from_dict(self.mob))
        for name, kinds in (("moe", (MoEShare, MoEConfig)), ("mob", (GroupsConfig, type(None)))):
            if not isinstance(value := getattr(self, name), kinds):
                raise TypeError(f"AnyMoEConfig.{name} must be a mapping, got {value!r}")


def named_blocks(model: Any) -> dict[str, Any]:
    """The blocks by name, in order: FLUX.1's, or those of a model that `convert_any` made."""
    if (names := getattr(model, "d2m_blocks", None)) is not None:
        return {name: model.get_submodule(name) for name in names}
    return {f"{kind}.{i}": b for kind in KINDS.values() for i, b in enumerate(getattr(model, kind))}


def group_names(config: FluxMoEConfig | AnyMoEConfig) -> dict[str, tuple[str, ...]]:
    """Group name ("mob.double.0", "mob.layers.0") -> names of its blocks."""
    if config.mob is None:
        return {}
    if isinstance(config, AnyMoEConfig):
        return {
            f"mob.{prefix}.{g}": tuple(f"{prefix}.{i}" for i in group)
            for prefix, groups in config.mob.groups.items()
            for g, group in enumerate(groups)
        }
    return {
        f"mob.{kind}.{g}": tuple(f"{prefix}.{i}" for i in group)
        for kind, prefix in KINDS.items()
        for g, group in enumerate(getattr(config.mob, f"{kind}_groups"))
    }
