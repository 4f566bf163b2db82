"""Every format of prompts, and what is wrong with one."""

import json

import pytest

from distill.errors import UserError
from distill.evaluate.prompts import Prompt, read_prompts


def test_text_and_jsonl(tmp_path):
    (tmp_path / "p.txt").write_text("a red cat\n\n  a dog \n", encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt") == [Prompt("a red cat"), Prompt("a dog")]
    assert read_prompts(tmp_path / "p.txt", limit=1) == [Prompt("a red cat")]
    entry = {"prompt": "a cat", "category": "color", "phrases": ["a cat"]}
    (tmp_path / "p.jsonl").write_text(json.dumps(entry) + "\n" + '{"prompt": "b"}\n')
    first, second = read_prompts(tmp_path / "p.jsonl")
    assert (first.kind, first.group, first.meta["phrases"]) == (
        "t2i-compbench", "color", ["a cat"])  # fmt: skip
    assert (second.kind, second.group) == ("plain", None)


def test_geneval(tmp_path):
    entry = {"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "two cats"}
    (tmp_path / "evaluation_metadata.jsonl").write_text(json.dumps(entry))
    [prompt] = read_prompts(tmp_path / "evaluation_metadata.jsonl")
    assert (prompt.kind, prompt.group, prompt.text) == ("geneval", "counting", "two cats")


def test_dpg(tmp_path):
    """The published file has its headings twice; a text with commas and lines is one."""
    head = ("item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,"
            "tuple,question_natural_language\n")  # fmt: skip
    row = '{},"{}",,{},"{}",entity,whole,"entity - whole (x)",{}\n'
    (tmp_path / "dpg.csv").write_text(
        head + head + row.format("b", "a cat, red\nand big", 1, "0", "Is there a cat?")
        + row.format("b", "a cat, red\nand big", 2, "1", "Is it red?")
        + row.format("a", "a dog", 1, "0", "Is there a dog?")
        + row.format("b", "a cat, red\nand big", 3, "1, 2", "Is it a red cat?")
    )  # fmt: skip
    cat, dog = read_prompts(tmp_path / "dpg.csv")
    assert cat.text == "a cat, red\nand big" and cat.kind == dog.kind == "dpg"
    assert cat.meta["questions"] == {1: ("Is there a cat?", []), 2: ("Is it red?", [1]),
                                     3: ("Is it a red cat?", [1, 2])}  # fmt: skip


def test_mjhq(tmp_path):
    meta = {"0a": {"category": "animals", "prompt": "a cat"}, "0b": {"category": "food",
            "prompt": "soup"}}  # fmt: skip
    (tmp_path / "meta_data.json").write_text(json.dumps(meta))
    found = read_prompts(tmp_path / "meta_data.json")
    assert [(p.text, p.group) for p in found] == [("a cat", "animals"), ("soup", "food")]


def test_a_folder_of_compbench(tmp_path):
    for name in ("3d_spatial_val", "color_val", "color_train", "non_spatial_val", "new_objects"):
        (tmp_path / f"{name}.txt").write_text(f"{name} prompt\n")
    found = read_prompts(tmp_path)
    assert {p.group for p in found} == {"3d_spatial", "color", "non_spatial"} and len(found) == 3
    (tmp_path / "colored.txt").write_text("no category\n")
    assert read_prompts(tmp_path / "colored.txt")[0].kind == "plain"


@pytest.mark.parametrize(
    "name, text, says",
    [
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "line 2 has no text under 'prompt'"),
        ("p.jsonl", "not json\n", "expected text with a prompt a line"),
        ("p.csv", "a,b\n1,2\n", "DPG's CSV"),
        ("p.json", "[]", "MJHQ's JSON"),
        ("p.txt", "\n", "there are none"),
        ("p.png", "", "expected one of .txt"),
    ],
)
def test_another_format(tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=says):
        read_prompts(tmp_path / name)


def test_names():
    with pytest.raises(UserError, match="download prompts/evaluation_metadata.jsonl"):
        read_prompts("geneval")
    with pytest.raises(UserError, match="no such file, and no name of"):
        read_prompts("nothing")
