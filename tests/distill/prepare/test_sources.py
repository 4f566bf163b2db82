"""Real-world folders, tables and tars: every entry is kept, bad or left out, each with a reason."""

from __future__ import annotations

import bz2
import gzip
import json
import os

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("PIL")

from helpers.flux_folder import draw, flux_folder
from helpers.sources import (
    bad,
    decoded,
    errors,
    index,
    kept,
    left_out,
    png,
    run,
    write_files,
    write_tar,
)

from distill.cli import main
from distill.errors import UserError
from distill.prepare.names import HIDDEN, NO_CAPTION_BESIDE, OTHER, READ_ALREADY, SPECIAL
from distill.prepare.prepare import check

PNG = png(0)
BOM = b"\xef\xbb\xbf"


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return flux_folder(tmp_path_factory.mktemp("flux"))


# --- text -----------------------------------------------------------------------------------


def _rows(folder, rows):
    lines = [json.dumps({"file_name": f"{i}.png", "text": text}) for i, text in enumerate(rows)]
    files = {f"{i}.png": PNG for i in range(len(rows))}
    return write_files(folder, {**files, "metadata.jsonl": "\n".join(lines).encode()})


def test_a_caption_that_is_no_text_is_bad_and_the_rest_goes_on(flux, tmp_path):
    source = _rows(tmp_path / "s", ["a cat", "half \ud83d", "a dog \U0001f436"])
    manifest = run(source, tmp_path / "out", flux, max_bad="1")
    assert (manifest["samples"], manifest["bad"]) == (2, 1)
    assert [line["caption"] for line in index(tmp_path / "out").values()] == ["a cat", "a dog 🐶"]
    [lost] = bad(tmp_path / "out")
    assert lost["key"] == "1.png" and "'\\ud83d' at character 5" in lost["error"]
    assert check(tmp_path / "out") == []
    with pytest.raises(UserError, match="1 of 2 entries.*half a surrogate pair"):
        run(source, tmp_path / "capped", flux, max_bad="0")


@pytest.mark.parametrize("kind", ["json", "tar"])
def test_a_sidecar_s_lone_surrogate_is_bad(tmp_path, kind):
    files = {"a.png": PNG, "a.json": b'{"text": "\\ud83d"}', "b.png": PNG, "b.txt": b"b"}
    source = (
        write_files(tmp_path, files) if kind == "json" else write_tar(tmp_path / "0.tar", files)
    )
    entries = decoded(source)
    assert [c for _, c in kept(entries)] == ["b"] and len(errors(entries)) == 1


def test_names_that_are_no_text_are_kept_escaped(flux, tmp_path):
    if os.name == "nt":
        pytest.skip("names are Unicode there")
    (tmp_path / "s").mkdir()
    for name, data in ((b"caf\xe9.png", PNG), (b"caf\xe9.txt", b"a cat")):
        with open(os.path.join(os.fsencode(tmp_path / "s"), name), "wb") as file:
            file.write(data)
    run(tmp_path / "s", tmp_path / "out", flux)
    [line] = index(tmp_path / "out").values()
    assert (line["key"], line["caption"]) == ("caf\\udce9.png", "a cat")


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path):
    row = {"file_name": "a.png", "text": "a table's cat"}
    sidecars = {"a.png": PNG, "a.txt": BOM + b"a cat", "b.png": PNG}
    sidecars["b.json"] = BOM + b'{"text": "a dog"}'
    write_files(tmp_path / "folder", sidecars)
    write_files(
        tmp_path / "jsonl", {"a.png": PNG, "metadata.jsonl": BOM + json.dumps(row).encode()}
    )
    table = BOM + b"file_name,text\na.png,a table's cat\n"
    write_files(tmp_path / "csv", {"a.png": PNG, "metadata.csv": table})
    write_tar(tmp_path / "0.tar", sidecars)
    for source, words in (
        ("folder", ["a cat", "a dog"]),
        ("0.tar", ["a cat", "a dog"]),
        ("jsonl", ["a table's cat"]),
        ("csv", ["a table's cat"]),
    ):
        assert [c for _, c in kept(decoded(tmp_path / source))] == words, source


# --- tables ---------------------------------------------------------------------------------


def _table(folder, name, *lines):
    files = {f"{i}.png": PNG for i in range(4)}
    return write_files(folder, {**files, name: b"\n".join(lines)})


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (b"0.png," + b"x" * 200_000, "lines 2 to 2: field larger than field limit"),
        (b"0.png,caf\xe9", "at character 3 is a byte that is not UTF-8"),
        (b'0.png,"a cat" sitting', "lines 2 to 2: ',' expected after"),
        (b"0.png,a cat, sitting", "line 2 has more than the header's ['file_name', 'text']"),
        (b"0.png", "no caption"),
    ],
)
def test_a_broken_row_of_a_csv_is_bad_and_the_rest_goes_on(tmp_path, first, reason):
    rows = [b"file_name,text", first, b"1.png,a cat", b'2.png,"a dog, sitting"']
    entries = decoded(_table(tmp_path, "metadata.csv", *rows))
    assert kept(entries) == [("1.png", "a cat"), ("2.png", "a dog, sitting")]
    assert len(entries) == 3 and reason in entries[0].error


def test_a_quote_that_is_not_closed_names_the_lines_it_swallowed(tmp_path):
    rows = [b"file_name,text", b"0.png,a cat", b'1.png,"a', b"2.png,a dog", b"3.png,a tree"]
    entries = decoded(_table(tmp_path, "metadata.csv", *rows))
    assert kept(entries) == [("0.png", "a cat")]
    assert errors(entries) == {"row 1": "ValueError: lines 3 to 5: unexpected end of data"}


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (b'{"file_name": "0.png", ', "line 1 is no JSON"),
        (b'{"file_name": "0.png", "text": "caf\xe9"}', "a byte that is not UTF-8"),
        (b'["0.png"]', "a row without file_name"),
        (b"[" * 100_000, "line 1 is no JSON"),
        (b"1" * 5_000, "line 1 is no JSON: Exceeds the limit"),
    ],
)
def test_a_broken_line_of_jsonl_is_bad_and_the_rest_goes_on(tmp_path, first, reason):
    rows = [json.dumps({"file_name": f"{i}.png", "text": "a cat"}).encode() for i in (1, 2)]
    entries = decoded(_table(tmp_path, "metadata.jsonl", first, b"", *rows))
    assert kept(entries) == [("1.png", "a cat"), ("2.png", "a cat")]
    assert len(entries) == 3 and reason in entries[0].error


def test_a_latin_1_name_in_a_table_is_the_file_of_that_name(tmp_path):
    if os.name == "nt":
        pytest.skip("names are Unicode there")
    _table(tmp_path, "metadata.csv", b"file_name,text", b"caf\xe9.png,a cat")
    os.rename(tmp_path / "0.png", os.path.join(os.fsencode(tmp_path), b"caf\xe9.png"))
    assert kept(decoded(tmp_path)) == [("caf\\udce9.png", "a cat")]


def test_a_table_without_a_readable_row_says_why(tmp_path):
    _table(tmp_path, "metadata.jsonl", b"{file_name: 1}")
    with pytest.raises(UserError, match="no row that can be read; the first: line 1 is no JSON"):
        decoded(tmp_path)


def _parquet(path, texts, **options):
    """texts: bytes, which need not be UTF-8."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    raw = pyarrow.array(texts, pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), len(raw), raw.buffers())
    names = pyarrow.array([f"{i}.png" for i in range(len(texts))])
    parquet.write_table(pyarrow.table({"file_name": names, "text": text}), path, **options)


def test_a_row_of_parquet_that_is_no_text_is_bad(tmp_path):
    _table(tmp_path, "note.md", b"")
    _parquet(tmp_path / "metadata.parquet", [b"a", b"\xff", b"c"])
    entries = decoded(tmp_path)
    assert kept(entries) == [("0.png", "a"), ("2.png", "c")]
    assert "UnicodeDecodeError" in errors(entries)["row 1"]


def test_a_damaged_part_of_parquet_loses_its_own_rows(tmp_path):
    _table(tmp_path, "note.md", b"")
    table = tmp_path / "metadata.parquet"
    options = {"row_group_size": 2, "use_dictionary": False, "compression": "gzip"}
    _parquet(table, [b"a" * 50, b"b" * 50, b"c", b"d"], **options)
    from pyarrow.parquet import ParquetFile

    chunk = ParquetFile(table).metadata.row_group(0).column(1)
    data = bytearray(table.read_bytes())
    middle = chunk.data_page_offset + chunk.total_compressed_size - 12
    data[middle : middle + 8] = b"\xff" * 8
    table.write_bytes(data)
    entries = decoded(tmp_path)
    assert [c for _, c in kept(entries)] == ["c", "d"]
    assert list(errors(entries)) == ["row 0", "row 1"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_of_a_dataset_that_cannot_be_read_is_bad(tmp_path, streaming):
    datasets = pytest.importorskip("datasets")
    rows = {"image": [PNG, b"none", None, PNG], "text": ["a", "b", "c", "\ufeff"]}
    rows["image"] = [x and {"bytes": x, "path": None} for x in rows["image"]]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features).save_to_disk(tmp_path / "saved")
    entries = decoded(tmp_path / "saved", streaming=streaming)
    assert [c for _, c in kept(entries)][0] == "a" and len(entries) == 4
    assert list(errors(entries))[:2] == ["train/1", "train/2"]


# --- tars -----------------------------------------------------------------------------------


def _sample(key, words=None):
    return {f"{key}.png": PNG, f"{key}.txt": (words or key).encode()}


def test_dotted_names_in_a_tar_are_read(tmp_path):
    names = ["photo.v1", "photo.v2", "1.5", "1.50", "./sub.dir/x", "plain"]
    source = write_tar(tmp_path / "0.tar", {k: v for n in names for k, v in _sample(n).items()})
    want = [(f"0.tar/{n.removeprefix('./')}", n) for n in names]
    assert kept(decoded(source)) == want
    # WebDataset's own dots: further files of a sample
    files = {"a.cls": b"1", "a.png": PNG, "a.seg.png": PNG, "a.txt": b"a", "b.depth.npy": b""}
    entries = decoded(write_tar(tmp_path / "1.tar", {**files, **_sample("c.d")}))
    assert kept(entries) == [("1.tar/a", "a"), ("1.tar/c.d", "c.d")]
    assert left_out(entries) == {
        "1.tar/a.seg.png": NO_CAPTION_BESIDE,
        "1.tar/b.depth.npy": OTHER,
    }


def test_a_key_that_comes_twice_in_a_tar_is_seen_twice(tmp_path):
    pairs = [*_sample("a", "one").items(), *_sample("a", "two").items()]
    assert kept(decoded(write_tar(tmp_path / "0.tar", pairs))) == [
        ("0.tar/a", "one"),
        ("0.tar/a", "two"),
    ]
    both = {"a.jpg": PNG, "a.png": PNG, "a.TXT": b"both"}
    assert kept(decoded(write_tar(tmp_path / "1.tar", both))) == [
        ("1.tar/a.jpg", "both"),
        ("1.tar/a.png", "both"),
    ]
    pairs = [*_sample("a", "one").items(), ("a.jpg", PNG), ("a.txt", b"two")]
    assert kept(decoded(write_tar(tmp_path / "2.tar", pairs))) == [
        ("2.tar/a", "one"),
        ("2.tar/a", "two"),
    ]


def test_what_a_tar_holds_beside_its_samples_is_counted_and_named(flux, tmp_path):
    inner = write_tar(tmp_path / "inner.tar", _sample("x")).read_bytes()
    files = {"._a.png": b"x", "__MACOSX/a.png": b"x", **_sample("a"), "alone.txt": b"a caption"}
    (tmp_path / "s").mkdir()
    write_tar(tmp_path / "s" / "0.tar", {**files, "inner.tar": inner, "README.md": b""})
    write_files(tmp_path / "s", {"0_stats.json": b"{}", "._0.tar": b"x", "b.png": PNG})
    manifest = run(tmp_path / "s", tmp_path / "out", flux)
    assert manifest["samples"] == 1 and manifest["bad"] == 0
    assert manifest["left_out"] == {
        HIDDEN: {"count": 3, "first": ["0.tar/._a.png", "0.tar/__MACOSX/a.png", "._0.tar"]},
        OTHER: {"count": 5, "first": ["0.tar/alone.txt", "0.tar/inner.tar", "0.tar/README.md"]},
    }


@pytest.mark.parametrize("squeeze", [gzip.compress, bz2.compress])
def test_a_compressed_tar_is_read_whatever_it_is_called(tmp_path, squeeze):
    plain = write_tar(tmp_path / "plain.tar", {**_sample("a"), **_sample("b.c")}).read_bytes()
    (tmp_path / "0.TAR").write_bytes(squeeze(plain))
    assert kept(decoded(tmp_path / "0.TAR")) == [("0.TAR/a", "a"), ("0.TAR/b.c", "b.c")]
    cut = squeeze(plain[: len(plain) // 3] + b"\xff" * 512)
    (tmp_path / "0.TAR").write_bytes(cut)
    assert "0.TAR" in errors(decoded(tmp_path / "0.TAR"))


def test_no_tar_at_all_is_bad_and_the_others_go_on(tmp_path):
    (tmp_path / "0.tar").write_bytes(b"PK\x03\x04" + b"zip" * 1000)
    (tmp_path / "1.tar").write_bytes(b"")
    write_tar(tmp_path / "2.tar", _sample("a"))
    entries = decoded(tmp_path)
    assert kept(entries) == [("2.tar/a", "a")] and list(errors(entries)) == ["0.tar", "1.tar"]


# --- folders --------------------------------------------------------------------------------


def test_hidden_and_system_entries_are_left_out_and_counted(flux, tmp_path, capsys):
    odd = [".DS_Store", "._a.png", "Thumbs.db", "__MACOSX/x.png", ".ipynb_checkpoints/a.png"]
    odd += [".git/objects/a.png", ".git/objects/b.png", "desktop.ini"]
    files = {**_sample("a"), "notes.md": b"", "alone.txt": b"", **dict.fromkeys(odd, b"x")}
    write_files(tmp_path / "s", files)
    command = ["prepare", str(tmp_path / "s"), str(tmp_path / "out"), "--model", str(flux)]
    assert main([*command, "--size", "64", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    # a hidden folder is one entry, whatever it holds
    assert f"7 left out: {HIDDEN}; the first: .DS_Store, ._a.png, .git\n" in said
    assert f"2 left out: {OTHER}; the first: alone.txt, notes.md\n" in said
    assert bad(tmp_path / "out") == []


def test_a_folder_of_hidden_images_alone_says_so(tmp_path):
    write_files(tmp_path, {".cache/a.png": PNG, "._b.png": b"x"})
    with pytest.raises(UserError, match=f"holds no images.*; 2 entries: {HIDDEN}"):
        decoded(tmp_path)


def test_suffixes_are_found_in_any_case(tmp_path):
    write_files(tmp_path, {"a.PNG": PNG, "a.TXT": b"a", "b.png": PNG, "b.Json": b'{"text": "b"}'})
    assert kept(decoded(tmp_path)) == [("a.PNG", "a"), ("b.png", "b")]
    write_files(tmp_path / "t", {"0.png": PNG, "METADATA.CSV": b"file_name,text\n0.png,a cat\n"})
    assert kept(decoded(tmp_path / "t")) == [("0.png", "a cat")]


def test_links_are_followed_and_loops_end(tmp_path):
    write_files(tmp_path / "elsewhere", _sample("a"))
    source = write_files(tmp_path / "s", _sample("sub/b"))
    (source / "linked").symlink_to(tmp_path / "elsewhere")
    (source / "sub" / "loop").symlink_to(source)
    (source / "self").symlink_to(source / "self")
    (source / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(source / "pipe.png")
    entries = decoded(source)
    assert kept(entries) == [("linked/a.png", "linked/a"[7:]), ("sub/b.png", "sub/b")]
    assert left_out(entries) == {
        "gone.png": SPECIAL,
        "pipe.png": SPECIAL,
        "self": SPECIAL,
        "sub/loop": READ_ALREADY,
    }


def test_a_long_thin_image_is_cropped_before_it_grows():
    from distill.prepare.buckets import fit

    assert fit(draw(65000, 1, 0), (96, 48)).shape == (3, 96, 48)
