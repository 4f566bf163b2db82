"""DPG-Bench (Hu et al. 2024, ELLA): yes-no questions in a graph of what depends on what.

The rule is that of dpg_bench/compute_dpg_bench.py of github.com/TencentQQGYLab/ELLA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from distill.evaluate.judges import Item, Judges


def graph_score(yes: Mapping[int, bool], parents: Mapping[int, Sequence[int]]) -> float:
    """Share of questions with yes; one with a parent that counts as no is no, too. Questions go by
    their numbers, so a no passes down to all below it."""
    counted = dict(yes)
    for number in sorted(counted):
        if any(not counted[parent] for parent in parents[number]):
            counted[number] = False
    return sum(counted.values()) / len(counted)


def score(items: Sequence[Item], judges: Judges) -> dict[str, dict[str, float]]:
    """100 x `graph_score` of every image."""
    judge = judges.need("vqa", judges.answers)
    values = {}
    for item in items:
        image, questions = item.open(), item.prompt.meta["questions"]
        yes = {n: judge.answer(image, text) == "yes" for n, (text, _) in questions.items()}
        values[item.key] = 100 * graph_score(yes, {n: p for n, (_, p) in questions.items()})
    return {"dpg": values}
