"""What `d2m ablate` measures of a model, and how much of a pattern is more than chance.

Shapes: B samples, T tokens of a sample, N Euler steps, K chosen experts, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from distill.data.batch import Batch, generator
from distill.data.photos import Photos
from distill.sampling import evaluating, sample
from distill.study.measure import predict, relative_mse

# --- quality --------------------------------------------------------------------------------


def held_out(count: int, grid: Sequence[float] | None = None) -> Batch:
    """`count` triples (x_t, t, prompt) from test crops, the same for every arm and seed.

    t is spread evenly over (0, 1), or over the entries of `grid`.
    """
    batch = Photos("test").batch(0, 0, count, "test")
    t = (torch.arange(count) + 0.5) / count
    if grid is not None:
        t = torch.tensor(grid)[torch.arange(count) % len(grid)]
    return replace(batch, t=t[torch.randperm(count, generator=generator(0, "test", 1))])


class Bench:
    """A teacher's answers, against which students are measured.

    rel_mse: ||student - teacher||^2 / ||teacher||^2 on held-out triples; flow_loss: the mean
    squared error to the data's own velocity there; sample_mse: relative squared distance of the
    samples drawn in `steps` Euler steps to those the teacher draws from the same noise.
    """

    def __init__(self, teacher: nn.Module, evaluate: Any, grid: Sequence[float] | None = None):
        self.batch = held_out(evaluate.held_out, grid)
        self.noise = Photos("test").noise_batch(0, evaluate.per_prompt)
        self.steps = evaluate.sample_steps if grid is None else len(grid)
        self.target = predict(teacher, self.batch, chunk=64)
        self.samples = sample(teacher, self.noise, self.steps)

    def rel_mse(self, model: nn.Module) -> float:
        return relative_mse(self.target, predict(model, self.batch, chunk=64))

    def measure(self, model: nn.Module, samples: bool = True) -> dict[str, float]:
        output = predict(model, self.batch, chunk=64)
        values = {
            "rel_mse": relative_mse(self.target, output),
            "flow_loss": float((output - self.batch.velocity).square().mean()),
        }
        if samples:
            drawn = sample(model, self.noise, self.steps)
            values["sample_mse"] = relative_mse(self.samples, drawn)
        return values


def by_top_k(bench: Bench, model: nn.Module, counts: Sequence[int]) -> dict[str, float]:
    """Relative MSE at every top_k, without any training; the configured one is put back."""
    from d2m_models import set_top_k

    values = {}
    for k in counts:
        set_top_k(model, k)
        values[f"top{k}"] = bench.rel_mse(model)
    set_top_k(model, model.d2m_config.moe.top_k)
    return values


# --- blocks (Fig. 3) ------------------------------------------------------------------------


def block_changes(teacher: nn.Module, batch: Batch) -> dict[str, list[Tensor]]:
    """Mean squared difference between output and input of every block, a sample: {"double",
    "single"} -> [B] for each block, over image (and, in single blocks, text) tokens alike."""
    found: dict[str, list[Tensor]] = {"double": [], "single": []}
    handles = []
    for kind, blocks in (
        ("double", teacher.transformer_blocks),
        ("single", teacher.single_transformer_blocks),
    ):
        for block in blocks:

            def record(_module, args, kwargs, output, kind=kind):
                names = ("hidden_states", "encoder_hidden_states")
                before = [kwargs.get(n, args[i] if i < len(args) else None)
                          for i, n in enumerate(names)]  # fmt: skip
                text, image = output
                found[kind].append(
                    torch.cat(
                        [
                            (after - was).float().square().flatten(1)
                            for after, was in zip((image, text), before, strict=True)
                        ],
                        1,
                    ).mean(1)
                )

            handles.append(block.register_forward_hook(record, with_kwargs=True))
    try:
        with evaluating(teacher):
            teacher(**batch.inputs())
    finally:
        for handle in handles:
            handle.remove()
    return found


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
    log_LB = torch.stack(block_changes(teacher, batch)["single"]).log10()
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


class Selection:
    """A hook for `sample` that keeps every choice of every MoE layer on image tokens.

    layers: name -> int tensor [N, B, T, K]. Text streams have no image tokens and are left out.
    """

    def __init__(self, noise: Batch):
        self.samples, self.tokens = len(noise), noise.x0.shape[1]
        self.steps: dict[str, list[Tensor]] = {}
        self.experts = 0

    def __call__(self, step: int, aux: Any) -> None:
        for name, routing in aux.routing.items():
            if name.endswith("ff_context"):
                continue
            self.experts = routing.probs.shape[1]
            ids = routing.ids.cpu().view(self.samples, -1, routing.ids.shape[1])
            # a single block sees text tokens first
            self.steps.setdefault(name, []).append(ids[:, -self.tokens :].long())

    @property
    def layers(self) -> dict[str, Tensor]:
        return {name: torch.stack(ids) for name, ids in self.steps.items()}


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


def selection(
    model: nn.Module, noise: Batch, steps: int, seed: int
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Specialisation of experts by prompt, timestep and token, mean over layers, each beside that
    of groups drawn at random; tables and one image's map of two layers for the pictures."""
    hook = Selection(noise)
    sample(model, noise, steps, hook, chunk=len(noise))
    layers, E = hook.layers, hook.experts
    N, B, T, _ = next(iter(layers.values())).shape
    gen = generator(seed, "order", 2)
    group = {
        "prompt": noise.labels[None, :, None].expand(N, B, T),
        "timestep": torch.arange(N)[:, None, None].expand(N, B, T),
        "token": torch.arange(T)[None, None, :].expand(N, B, T),
    }
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
    names = list(layers)
    double = [n for n in names if n.startswith("transformer_blocks")]
    single = [n for n in names if n.startswith("single")]
    tensors = {}
    for name in (double[len(double) // 2], single[len(single) // 2]):
        for kind in group:
            tensors[f"{name}/{kind}"] = frequencies(layers[name], group[kind], E)
        tensors[f"{name}/map"] = layers[name][:, 0, :, 0]  # first choice, one image, every step
    return values, tensors


def _shuffle(count: int, rest: tuple[int, ...], gen: torch.Generator) -> Tensor:
    """[count, *rest]: 0..count-1 in an order of its own along dim 0, everywhere in `rest`."""
    return torch.rand(count, *rest, generator=gen).argsort(0)
