"""GenEval (Ghosh et al. 2023): objects, counts, colours and positions, by a detector and CLIP.

The rules are those of evaluation/evaluate_images.py of github.com/djghosh13/geneval.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from distill.evaluate.judges import Detection, Item, Judges

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {c} {n}", "a photo of a {c}-colored {n}", "a photo of a {c} object")
# COCO's names -> GenEval's
ALIASES = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
THRESHOLD, COUNTING_THRESHOLD, MOST, APART = 0.3, 0.9, 16, 0.1

Colours = Callable[[Sequence[Detection], str], Sequence[str]]


def relations(a: Detection, b: Detection) -> set[str]:
    """Where a is relative to b: the offset of the centres, less 0.1 of both sizes, over its length;
    more than 0.5 along an axis counts."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = a.box, b.box
    offset = np.array([ax0 + ax1 - bx0 - bx1, ay0 + ay1 - by0 - by1]) / 2
    sizes = np.array([ax1 - ax0 + bx1 - bx0, ay1 - ay0 + by1 - by0])
    revised = np.maximum(np.abs(offset) - APART * sizes, 0) * np.sign(offset)
    if np.all(np.abs(revised) < 1e-3):
        return set()
    dx, dy = revised / np.linalg.norm(offset)
    named = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in named.items() if holds}


def correct(objects: Mapping[str, Sequence[Detection]], meta: Mapping[str, Any],
            colours: Colours) -> bool:  # fmt: skip
    """Whether the objects, surest first, satisfy every "include" and no "exclude"."""
    right, groups = True, []
    for wanted in meta.get("include", ()):
        name, count = wanted["class"], wanted["count"]
        found = objects.get(name, ())[:count]
        matched = len(found) == count
        if matched and "color" in wanted:
            matched = list(colours(found, name)).count(wanted["color"]) >= count
        if matched and "position" in wanted:
            relation, group = wanted["position"]
            targets = groups[group]
            matched = targets is not None and all(
                relation in relations(a, b) for a in found for b in targets
            )
        groups.append(found if matched else None)
        right &= matched
    return right and not any(
        len(objects.get(x["class"], ())) >= x["count"] for x in meta.get("exclude", ())
    )


def colour_reader(clip: Any) -> Callable[[Any], Colours]:
    """image -> colours of its objects: CLIP's best of `COLOURS` for the object on grey."""
    classifiers: dict[str, torch.Tensor] = {}

    def classifier(name: str) -> torch.Tensor:
        if name not in classifiers:
            texts = [t.format(c=c, n=name) for c in COLOURS for t in TEMPLATES]
            features = torch.nn.functional.normalize(clip.texts(texts), dim=1)
            mean = features.unflatten(0, (len(COLOURS), len(TEMPLATES))).mean(1)
            classifiers[name] = torch.nn.functional.normalize(mean, dim=1)
        return classifiers[name]

    def of(image: Any) -> Colours:
        def colours(found: Sequence[Detection], name: str) -> list[str]:
            crops = [cut(image, one) for one in found]
            features = torch.nn.functional.normalize(clip.images(crops), dim=1)
            return [COLOURS[i] for i in (features @ classifier(name).T).argmax(1).tolist()]

        return colours

    return of


def cut(image: Any, found: Detection) -> Any:
    """The object's box; what its mask leaves out is #999."""
    from PIL import Image

    if found.mask is not None:
        grey = Image.new("RGB", image.size, "#999")
        image = Image.composite(image, grey, Image.fromarray(found.mask))
    return image.crop(tuple(map(int, found.box)))


def score(items: Sequence[Item], judges: Judges) -> dict[str, dict[str, float]]:
    """1 for an image that is right, else 0; the benchmark's score is the mean over its tasks."""
    detector = judges.need("detector", judges.detector)
    colours = colour_reader(judges.need("clip", judges.clip))
    values = {}
    for item in items:
        image, meta = item.open(), item.prompt.meta
        least = COUNTING_THRESHOLD if item.prompt.group == "counting" else THRESHOLD
        names = sorted({x["class"] for k in ("include", "exclude") for x in meta.get(k, ())})
        objects: dict[str, list[Detection]] = {}
        for found in detector(image, names, least):
            label = ALIASES.get(found.label, found.label)
            if len(objects.setdefault(label, [])) < MOST:
                objects[label].append(found)
        values[item.key] = float(correct(objects, meta, colours(image)))
    return {"geneval": values}
