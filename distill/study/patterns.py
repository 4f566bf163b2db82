"""Patterns in what blocks do and experts are chosen for, and how much of them is more than chance.

Shapes: B samples, T tokens of a sample, N Euler steps, K chosen experts, E experts; for a MoB group
T is 1, and its blocks stand in the experts' place.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from d2m_models import measure_block_mse
from distill.data.batch import Batch, generator
from distill.data.photos import Photos
from distill.sampling import sample

# --- blocks (Fig. 3) ------------------------------------------------------------------------


def factorial(seed: int, times: int = 8, repeats: int = 2) -> tuple[Batch, Tensor, Tensor]:
    """(batch, prompt [B], timestep number [B]): every prompt at every timestep, `repeats` times."""
    prompts = Photos.num_classes
    batch = Photos("test").batch(seed, 0, prompts * times * repeats, "test")
    step = torch.arange(len(batch)) // prompts % times  # 16 rows in a row hold every prompt once
    return replace(batch, t=(step + 0.5) / times), batch.labels, step


def explained(values_B: Tensor, labels_B: Tensor) -> float:
    """eta^2: the share of the values' variance that lies between the labels' means."""
    values_B = values_B.double()
    total = (values_B - values_B.mean()).square().sum()
    if total == 0:
        return 0.0
    between = sum(
        float((labels_B == c).sum() * (values_B[labels_B == c].mean() - values_B.mean()).square())
        for c in labels_B.unique()
    )
    return between / float(total)


def block_variation(teacher: nn.Module, seed: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    """How much of the single blocks' log MSE is due to prompt and to timestep, beside what labels
    in random order would explain; and the curves of Fig. 3, [labels, blocks]."""
    batch, prompt, step = factorial(seed)
    log_LB = measure_block_mse(teacher, [batch.inputs()]).values["single"].T.contiguous().log10()
    gen = generator(seed, "order", 1)
    shuffled = torch.randperm(len(prompt), generator=gen)
    values, curves = {}, {}
    for name, labels in (("prompt", prompt), ("timestep", step)):
        # what the other factor explains is no noise: compare within it
        other = step if name == "prompt" else prompt
        rest_LB = log_LB.clone()
        for c in other.unique():
            rest_LB[:, other == c] -= rest_LB[:, other == c].mean(1, keepdim=True)
        values[name] = _mean(explained(row, labels) for row in rest_LB)
        values[f"{name}_chance"] = _mean(explained(row, labels[shuffled]) for row in rest_LB)
        curves[name] = torch.stack([log_LB[:, labels == c].mean(1) for c in labels.unique()])
    return values, curves


def _mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


# --- experts (Figs. 6, 7) -------------------------------------------------------------------


class Choices:
    """A hook for `sample` that keeps every choice of some MoE layers or MoB groups.

    names: theirs; by default all MoE layers. options: how many there are to choose from.
    """

    def __init__(self, samples: int, names: Collection[str] | None = None):
        self.samples, self.names = samples, names
        self.ids: dict[str, list[Tensor]] = {}
        self.options: dict[str, int] = {}

    def __call__(self, step: int, aux: Any) -> None:
        found = {**aux.routing, **aux.mob}
        for name in aux.routing if self.names is None else self.names:
            ids = found[name].ids.cpu().long()
            # tokens of one sample are consecutive rows
            self.ids.setdefault(name, []).append(ids.view(self.samples, -1, ids.shape[1]))
            self.options[name] = found[name].probs.shape[1]

    def of(self, name: str, tokens: int = 0) -> Tensor:
        """[N, B, T, K]; tokens: only these last ones (a single block sees text tokens first)."""
        return torch.stack(self.ids[name])[:, :, -tokens:]

    def frequencies(self, name: str, labels_B: Tensor) -> dict[str, Tensor]:
        """How often each was chosen by "prompt", "timestep" and "token": [groups, E] fp32."""
        ids, count = self.of(name), self.options[name]
        groups = grouped(ids, labels_B)
        return {kind: frequencies(ids, own, count).float() for kind, own in groups.items()}


def grouped(ids_NBTK: Tensor, labels_B: Tensor) -> dict[str, Tensor]:
    """{"prompt", "timestep", "token"}: the number of the group [N, B, T] each token belongs to."""
    N, B, T, _ = ids_NBTK.shape
    return {
        "prompt": labels_B[None, :, None].expand(N, B, T),
        "timestep": torch.arange(N)[:, None, None].expand(N, B, T),
        "token": torch.arange(T)[None, None, :].expand(N, B, T),
    }


def frequencies(ids_NBTK: Tensor, groups_NBT: Tensor, experts: int) -> Tensor:
    """[groups, E]: how often each expert is chosen in each group of tokens, a row adds up to 1."""
    count = int(groups_NBT.max()) + 1
    flat = groups_NBT[..., None].expand_as(ids_NBTK) * experts + ids_NBTK
    table = torch.bincount(flat.flatten(), minlength=count * experts).view(count, experts).double()
    return table / table.sum(1, keepdim=True)


def specialisation(table_GE: Tensor) -> float:
    """Mean total variation distance between a group's choices and the mean group's: 0 = all alike,
    1 = no expert in common."""
    return float((table_GE - table_GE.mean(0)).abs().sum(1).mean() / 2)


def concentration(table_NE: Tensor) -> Tensor:
    """Entropy of every row in nats; low = few experts do the work."""
    return torch.special.entr(table_NE).sum(1)


def two_layers(names: list[str]) -> list[str]:
    """The middle image layer of the double blocks and the middle single block, as far as there."""
    double = [n for n in names if n.startswith("transformer_blocks") and n.endswith(".ff")]
    single = [n for n in names if n.startswith("single")]
    return [found[len(found) // 2] for found in (double, single) if found]


def selection(
    model: nn.Module, noise: Batch, steps: int, seed: int
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Specialisation of experts by prompt, timestep and image token, mean over layers, each beside
    that of groups drawn at random; tables and one image's map of two layers for the pictures."""
    hook = Choices(len(noise))
    sample(model, noise, steps, hook, chunk=len(noise))
    T = noise.x0.shape[1]
    layers = {n: hook.of(n, T) for n in hook.ids if not n.endswith("ff_context")}
    N, B, _, _ = next(iter(layers.values())).shape
    E = hook.options[next(iter(layers))]
    gen = generator(seed, "order", 2)
    group = grouped(next(iter(layers.values())), noise.labels)
    random = {
        # whole samples keep their choices together, so that chance is not underrated
        "prompt": group["prompt"][:, torch.randperm(B, generator=gen)],
        "timestep": _shuffle(N, (B, T), gen),
        "token": _shuffle(T, (N, B), gen).permute(1, 2, 0),
    }
    values: dict[str, float] = {}
    for kind in group:
        for name, groups in ((kind, group[kind]), (f"{kind}_chance", random[kind])):
            values[name] = _mean(
                specialisation(frequencies(ids, groups, E)) for ids in layers.values()
            )
    entropy_N = sum(
        concentration(frequencies(ids, group["timestep"], E)) for ids in layers.values()
    ) / len(layers)
    values["entropy_first"] = float(entropy_N[0])
    values["entropy_rest"] = float(entropy_N[1:].mean())
    tensors = {}
    for name in two_layers(list(layers)):
        for kind in group:
            tensors[f"{name}/{kind}"] = frequencies(layers[name], group[kind], E)
        tensors[f"{name}/map"] = layers[name][:, 0, :, 0]  # first choice, one image, every step
    return values, tensors


def _shuffle(count: int, rest: tuple[int, ...], gen: torch.Generator) -> Tensor:
    """[count, *rest]: 0..count-1 in an order of its own along dim 0, everywhere in `rest`."""
    return torch.rand(count, *rest, generator=gen).argsort(0)
