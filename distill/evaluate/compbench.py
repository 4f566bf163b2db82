"""T2I-CompBench++ (Huang et al. 2025): B-VQA, UniDet's rules and S-CoT, each on its categories.

The rules are those of BLIPvqa_eval, UniDet_eval and MLLM_eval of github.com/Karine-Huang/
T2I-CompBench. UniDet itself runs only in its own fork of detectron2: any detector of transformers
takes its place, so these numbers are near the published ones, not equal to them.

What the published code asks spaCy for, a JSONL file of prompts may say itself: "phrases" (noun
phrases), "objects" (first and last noun) and "counts" ([number, noun] pairs).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from distill.errors import UserError
from distill.evaluate.judges import Detection, Item, Judges, place
from distill.evaluate.prompts import Prompt

COLUMNS = {"b_vqa": ("color", "shape", "texture"), "unidet": ("spatial", "3d_spatial", "numeracy"),
           "s_cot": ("non_spatial", "complex")}  # fmt: skip
MOST_PHRASES = 8
THRESHOLD = 0.3  # of a detection
NEAR, OVERLAP, OVERLAP_3D, SAME = 150, 0.1, 0.5, 0.9  # pixels at 512; three shares of area
NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6,
           "seven": 7, "eight": 8}  # fmt: skip
PEOPLE = ("girl", "boy", "man", "woman")
# Words of a prompt -> the relation; the first that occurs counts.
PLACES = {"on side of": "near", "next to": "near", "near": "near", "on the left of": "left",
          "on the right of": "right", "on the bottom of": "below", "on the top of": "above",
          "in front of": "front", "behind": "behind", "hidden": "behind"}  # fmt: skip
# axis and sign of the offset from the first object's centre to the second's
SIDES = {"left": (0, 1), "right": (0, -1), "above": (1, 1), "below": (1, -1)}
GRADES = (20, 40, 60, 80, 100)  # S-CoT's 1 to 5


@cache
def _parser() -> Any:
    try:
        import spacy

        return spacy.load("en_core_web_sm")
    except (ImportError, OSError) as err:
        raise UserError(
            "t2i-compbench finds nouns with spaCy: pip install spacy && python -m spacy download "
            "en_core_web_sm; or give 'phrases', 'objects' and 'counts' in a JSONL of prompts"
        ) from err


def phrases(prompt: Prompt) -> list[str]:
    """The prompt's noun phrases."""
    if "phrases" in prompt.meta:
        return prompt.meta["phrases"]
    return [chunk.text for chunk in _parser()(prompt.text).noun_chunks]


def two_objects(prompt: Prompt) -> tuple[str, str]:
    """The first and the last noun, people as "person"."""
    nouns = prompt.meta.get("objects") or [
        token.text for token in _parser()(prompt.text) if token.pos_ == "NOUN"
    ]
    if not nouns:
        raise UserError(f"t2i-compbench: no noun in the prompt {prompt.text!r}")
    return _thing(nouns[0]), _thing(nouns[-1])


def counts(prompt: Prompt) -> list[tuple[int, str]]:
    """(how many, noun in the singular) of every noun with a number before it."""
    if "counts" in prompt.meta:
        return [(int(n), _thing(noun)) for n, noun in prompt.meta["counts"]]
    found = []
    for chunk in _parser()(prompt.text).noun_chunks:
        number = next((NUMBERS[t.text.lower()] for t in chunk if t.text.lower() in NUMBERS), None)
        if number is not None:
            found.append((number, _thing(chunk.root.lemma_)))
    return found


def _thing(noun: str) -> str:
    return "person" if noun in PEOPLE else noun


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes."""
    shared = _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    return shared / (_area(a) + _area(b) - shared) if shared else 0.0


def _area(box: Sequence[float]) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def place_score(relation: str | None, a: Sequence[float], b: Sequence[float],
                depth: np.ndarray | None = None, side: float = 512) -> float:  # fmt: skip
    """How far box a stands in the relation to box b, 0..1.

    Left, right, above, below: 1 if the offset of the centres points that way more than across,
    0.1 / IoU where the boxes overlap by more than 0.1. Near: 1 within 150 pixels of an image 512
    wide along an axis, else 150 over the larger distance. Front, behind: the mean depth (larger is
    nearer) decides; IoU over 0.5 counts 1, less counts IoU / 0.5. (The published code has pixels
    at 512; here they scale with the image's side.)
    """
    x, y = ((b[i] + b[i + 2] - a[i] - a[i + 2]) / 2 for i in (0, 1))
    overlap, near = iou(a, b), NEAR * side / 512
    if relation == "near":
        return 1.0 if min(abs(x), abs(y)) < near else near / max(abs(x), abs(y))
    if relation in SIDES:
        axis, sign = SIDES[relation]
        along, across = ((x, y), (y, x))[axis]
        if sign * along <= 0 or abs(along) <= abs(across):
            return 0.0
        return 1.0 if overlap < OVERLAP else OVERLAP / overlap
    if relation in ("front", "behind") and depth is not None and overlap:
        first, second = (_mean_depth(depth, box) for box in (a, b))
        right = first > second if relation == "front" else first < second
        return float(right) * min(1.0, overlap / OVERLAP_3D)
    return 0.0


def _mean_depth(depth: np.ndarray, box: Sequence[float]) -> float:
    x0, y0, x1, y1 = (int(v) for v in box)
    return float(depth[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)].mean())


def spatial_score(objects: tuple[str, str], relation: str | None, seen: Sequence[Detection],
                  depth: np.ndarray | None = None, side: float = 512) -> float:  # fmt: skip
    """A quarter of each object's score, and half of `place_score`; without depth, less than 0.5
    counts 0."""
    first, second = (next((d for d in seen if d.label == name), None) for name in objects)
    score = 0.25 * sum(d.score for d in (first, second) if d is not None)
    if first is not None and second is not None:
        score += place_score(relation, first.box, second.box, depth, side) / 2
    return score if depth is not None or score >= 0.5 else 0.0


def count_score(wanted: Sequence[tuple[int, str]], seen: Sequence[Detection]) -> float:
    """Mean over the nouns of 0.5 for being there and 0.5 for the right number; boxes of a label
    that cover each other by more than 0.9 are one."""
    kept: list[Detection] = []
    for d in seen:
        if not any(d.label == k.label and _same(d.box, k.box) for k in kept):
            kept.append(d)
    numbers = {name: sum(name in d.label for d in kept) for _, name in wanted}
    scores = [0.5 * (numbers[name] > 0) + 0.5 * (numbers[name] == n) for n, name in wanted]
    return float(np.mean(scores)) if scores else 0.0


def _same(a: Sequence[float], b: Sequence[float]) -> bool:
    shared = _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    return shared > SAME * min(_area(a), _area(b))


def b_vqa(image: Any, names: Sequence[str], judge: Any) -> float:
    """Product over the noun phrases, at most 8, of the probability of yes to "PHRASE?"."""
    return math.prod(judge.yes(image, f"{name}?") for name in names[:MOST_PHRASES])


def read_grade(reply: str) -> float | None:
    """The number under "score" in the reply's JSON, or after the word, as 20..100."""
    match = re.search(r"\{.*?\}", reply, re.S)
    try:
        grade = int(json.loads(match[0])["score"]) if match else None
    except (ValueError, KeyError, TypeError):
        grade = None
    if grade is None and (match := re.search(r"score\W{0,5}([1-5])\b", reply, re.I)):
        grade = int(match[1])
    return float(GRADES[grade - 1]) if grade in range(1, 6) else None


def s_cot(image: Any, prompt: Prompt, judge: Any) -> float:
    """First describe the image, then grade it from 1 to 5 by criteria; no grade counts 100, as the
    published code leaves it."""
    action = prompt.group == "non_spatial"
    focus = ("the actions, events, objects and their relationships" if action else
             "the objects, their color, shape and texture, layout and actions")  # fmt: skip
    describe = f"Describe the image within 50 words. Focus on {focus} in it."
    criteria = (
        ("no action or event of the text", "only a part of what the text says",
         "some elements, but wrong relationships between objects",
         "most of it, with minor discrepancies", "all actions, events and relationships") if action
        else ("nothing of the text's content", "no action or event of the text",
              "some elements, but key parts are ignored", "most of it, with minor discrepancies",
              "all of the text, with no discrepancy")
    )  # fmt: skip
    listed = " ".join(f"{i}: the image shows {what}." for i, what in enumerate(criteria, 1))
    grade = (
        "According to the image and your previous answer, how well does the image portray the text "
        f'"{prompt.text}"? Give a score from 1 to 5. {listed} Reply in JSON with the keys "score" '
        'and "explanation" (within 20 words).'
    )
    value = read_grade(judge.talk(image, [describe, judge.talk(image, [describe]), grade]))
    return 100.0 if value is None else value


class Depth:
    """A depth estimator of transformers; larger is nearer, as DPT and MiDaS have it."""

    def __init__(self, name: str, device: torch.device):
        from transformers import AutoImageProcessor, AutoModelForDepthEstimation

        self.model = AutoModelForDepthEstimation.from_pretrained(**place(name)).eval().to(device)
        self.processor = AutoImageProcessor.from_pretrained(**place(name))
        self.device = device

    @torch.no_grad()
    def __call__(self, image: Any) -> np.ndarray:
        """[H, W]."""
        inputs = self.processor(images=image, return_tensors="pt").to(self.device)
        depth = self.model(**inputs).predicted_depth[:, None].float()
        size = (image.height, image.width)
        return torch.nn.functional.interpolate(depth, size, mode="bilinear")[0, 0].cpu().numpy()


def relation_of(prompt: str) -> str | None:
    return next((relation for words, relation in PLACES.items() if words in prompt), None)


def unidet(image: Any, prompt: Prompt, detector: Any, depth: Any) -> float:
    """The rule of the prompt's category."""
    if prompt.group == "numeracy":
        wanted = counts(prompt)
        return count_score(wanted, detector(image, [name for _, name in wanted], THRESHOLD))
    objects = two_objects(prompt)
    seen = detector(image, sorted(set(objects)), THRESHOLD)
    far = depth(image) if prompt.group == "3d_spatial" else None
    return spatial_score(objects, relation_of(prompt.text), seen, far, max(image.size))


def score(items: Sequence[Item], judges: Judges) -> dict[str, Mapping[str, float]]:
    """Columns b_vqa and unidet, and s_cot where a vision-language model is given."""
    groups = {item.prompt.group for item in items}
    columns: dict[str, dict[str, float]] = {}
    makers = {
        "vqa": (judges.need, judges.answers, COLUMNS["b_vqa"]),
        "detector": (judges.need, judges.detector, COLUMNS["unidet"]),
        "depth": (judges.need, lambda name: Depth(name, judges.device), ("3d_spatial",)),
        "vlm": (judges.open, judges.chat, COLUMNS["s_cot"]),
    }
    judge = {role: load(role, make) for role, (load, make, asked) in makers.items()
             if groups & set(asked)}  # fmt: skip
    for item in items:
        column = next(c for c, names in COLUMNS.items() if item.prompt.group in names)
        if column == "s_cot" and judge["vlm"] is None:
            continue
        image, prompt = item.open(), item.prompt
        columns.setdefault(column, {})[item.key] = (
            b_vqa(image, phrases(prompt), judge["vqa"]) if column == "b_vqa"
            else unidet(image, prompt, judge["detector"], judge.get("depth")) if column == "unidet"
            else s_cot(image, prompt, judge["vlm"])
        )  # fmt: skip
    return columns
