"""The benchmarks' scoring rules on cases computed by hand; no model runs."""

import numpy as np
import pytest

pytest.importorskip("diffusers")

from distill.evaluate import compbench, dpg, geneval
from distill.evaluate.judges import Detection
from distill.evaluate.prompts import Prompt


def box(label, x0, y0, x1, y1, score=0.9):
    return Detection(label, score, (x0, y0, x1, y1))


def no_colours(found, name):
    raise AssertionError("nobody asked for a colour")


LEFT, RIGHT = box("cat", 0, 40, 20, 60), box("dog", 70, 40, 90, 60)


# --- GenEval


def test_counting():
    meta = {"include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}]}
    for count, right in ((0, False), (1, False), (2, True), (3, False)):
        objects = {"cat": [LEFT] * count} if count else {}
        assert geneval.correct(objects, meta, no_colours) is right


@pytest.mark.parametrize("seen, right", [("red", True), ("blue", False)])
def test_colour(seen, right):
    meta = {"include": [{"class": "cat", "count": 1, "color": "red"}]}
    assert geneval.correct({"cat": [LEFT]}, meta, lambda found, name: [seen]) is right


def test_attribution_needs_both_colours():
    meta = {"include": [{"class": "cat", "count": 1, "color": "red"},
                        {"class": "dog", "count": 1, "color": "blue"}]}  # fmt: skip
    objects = {"cat": [LEFT], "dog": [RIGHT]}
    colours = {"cat": "red", "dog": "blue"}
    assert geneval.correct(objects, meta, lambda found, name: [colours[name]])
    swapped = {"cat": "blue", "dog": "red"}
    assert not geneval.correct(objects, meta, lambda found, name: [swapped[name]])


def test_left_and_right_swapped():
    def meta(relation):
        return {"include": [{"class": "dog", "count": 1},
                            {"class": "cat", "count": 1, "position": [relation, 0]}]}  # fmt: skip

    objects = {"cat": [LEFT], "dog": [RIGHT]}
    assert geneval.correct(objects, meta("left of"), no_colours)
    assert not geneval.correct(objects, meta("right of"), no_colours)
    assert not geneval.correct({"cat": [LEFT]}, meta("left of"), no_colours)  # no target


def test_relations_need_more_than_a_tenth_of_both_sizes():
    # centres 8 apart, widths 20 + 20: 8 - 0.1 * 40 = 4, over 8 is 0.5, and more is asked
    near, further = box("b", 8, 0, 28, 20), box("b", 9, 0, 29, 20)
    assert geneval.relations(box("a", 0, 0, 20, 20), near) == set()
    assert geneval.relations(box("a", 0, 0, 20, 20), further) == {"left of"}
    # a diagonal: 50/70.7 - 0.1 * 40/70.7 = 0.65 along both axes
    assert geneval.relations(box("a", 0, 0, 20, 20), box("b", 50, 50, 70, 70)) == {
        "left of", "above"}  # fmt: skip


def test_the_most_certain_objects_count():
    """Two cats are asked for: the surest two are looked at, not the third, which is red."""
    meta = {"include": [{"class": "cat", "count": 2, "color": "red"}]}
    colours = {0.9: "red", 0.8: "blue", 0.7: "red"}
    objects = {"cat": [box("cat", 0, 0, 9, 9, score) for score in colours]}
    asked = lambda found, name: [colours[d.score] for d in found]  # noqa: E731
    assert not geneval.correct(objects, meta, asked)


# --- DPG-Bench


def test_a_failed_parent_fails_its_children():
    """1 -> 2 -> 3 and 4 alone. With 1 failed, 2 and 3 count no, though answered yes: 1 of 4."""
    parents = {1: [], 2: [1], 3: [2], 4: []}
    assert dpg.graph_score({1: False, 2: True, 3: True, 4: True}, parents) == 0.25
    assert dpg.graph_score({1: True, 2: False, 3: True, 4: True}, parents) == 0.5
    assert dpg.graph_score(dict.fromkeys(parents, True), parents) == 1


# --- T2I-CompBench


def test_places():
    left, right = (0, 40, 20, 60), (70, 40, 90, 60)
    assert compbench.place_score("left", left, right) == 1
    assert compbench.place_score("right", left, right) == 0
    assert compbench.place_score("above", left, right) == 0
    # 5 apart of 20: IoU = 15 * 20 / (2 * 400 - 300) = 0.6, so 0.1 / 0.6
    assert compbench.place_score("left", (0, 0, 20, 20), (5, 0, 25, 20)) == pytest.approx(1 / 6)
    # 300 apart along x and 200 along y: 150 / 300
    far = (300, 200, 320, 220)
    assert compbench.place_score("near", (0, 0, 20, 20), far) == pytest.approx(0.5)
    assert compbench.place_score("near", left, right) == 1
    assert compbench.place_score(None, left, right) == 0


def test_in_front_is_nearer_and_overlaps():
    a, b = (0, 0, 20, 20), (10, 0, 30, 20)  # IoU 1/3
    depth = np.zeros((40, 40))
    depth[:20, :10] = 8.0  # a's own half is near
    assert compbench.place_score("front", a, b, depth) == pytest.approx(2 / 3)
    assert compbench.place_score("behind", a, b, depth) == 0
    assert compbench.place_score("behind", b, a, depth) == pytest.approx(2 / 3)
    assert compbench.place_score("front", a, (20, 20, 30, 30), depth) == 0  # no overlap


def test_spatial():
    both = [LEFT, RIGHT]
    wanted = ("cat", "dog")
    assert compbench.spatial_score(wanted, "left", both) == pytest.approx(0.95)
    assert compbench.spatial_score(wanted, "right", both) == 0  # 0.45 is under 0.5
    assert compbench.spatial_score(wanted, "left", [LEFT]) == 0
    assert compbench.spatial_score(wanted, "left", []) == 0
    flat = np.zeros((99, 99))
    assert compbench.spatial_score(wanted, "front", both, flat) == pytest.approx(0.45)


def test_counts():
    two_cats = [box("cat", 0, 0, 10, 10), box("cat", 50, 0, 60, 10)]
    again = box("cat", 0, 0, 10, 9.5)  # the first once more
    wanted = [(2, "cat"), (1, "dog")]
    assert compbench.count_score(wanted, [*two_cats, again, RIGHT]) == 1
    assert compbench.count_score(wanted, two_cats) == 0.5
    assert compbench.count_score(wanted, [two_cats[0], RIGHT]) == 0.75
    assert compbench.count_score(wanted, []) == 0


def test_b_vqa_multiplies():
    class Judge:
        def yes(self, image, question):
            return {"a red cat?": 0.5, "a dog?": 0.4}[question]

    assert compbench.b_vqa(None, ["a red cat", "a dog"], Judge()) == pytest.approx(0.2)


def test_s_cot():
    turns = []

    class Judge:
        def __init__(self, reply):
            self.reply = reply

        def talk(self, image, asked):
            turns.append(len(asked))
            return "A cat." if len(asked) == 1 else self.reply

    def grade(reply):
        return compbench.s_cot(None, Prompt("a cat runs", group="non_spatial"), Judge(reply))

    assert grade('```json\n{"score": 4, "explanation": "x"}\n```') == 80
    assert grade('{"score": "2", "explanation": "cut') == 40
    assert grade("I cannot say.") == 100
    assert turns == [1, 3] * 3


def test_what_a_prompt_says_itself_needs_no_parser():
    meta = {"phrases": ["a red cat"], "objects": ["girl", "dog"], "counts": [[2, "man"]]}
    prompt = Prompt("...", "t2i-compbench", "color", meta)
    assert compbench.phrases(prompt) == ["a red cat"]
    assert compbench.two_objects(prompt) == ("person", "dog")
    assert compbench.counts(prompt) == [(2, "person")]
    assert compbench.relation_of("a cat on the left of a dog") == "left"
