"""Tables as people have them: quotes, optional and nested columns, rows of one image, packed files."""

import base64
import gzip
import json
import os
import pickle

import numpy as np
import pytest
import test_cli_data

from helpers import formats
from vlp.core import check
from vlp.data import pictures, records, sources
from vlp.data.config import Data
from vlp.data.dataset import open_dataset
from vlp.data.sources import delimited, fields, rows
from vlp.data.tools import convert


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("VLP_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def made(tmp_path):
    """A directory with 0.jpg … 9.jpg; the function (name, text or rows of a JSONL) → path."""
    for i in range(10):
        (tmp_path / f"{i}.jpg").write_bytes(formats.jpeg(i))

    def write(name, content):
        if isinstance(content, list):
            content = "".join(json.dumps(r) + "\n" for r in content)
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return write


def texts(source):
    return [[c["text"] for c in source[i]["captions"]] for i in range(len(source))]


def converted(path, out, *flags, split="train"):
    assert test_cli_data.run("convert", path, "--out", out, "--splits", split, *flags) == 0
    source = records.open_split(out, split)
    left_out = [json.loads(x) for x in (out / convert.LEFT_OUT).read_text().splitlines()]
    return [source[i] for i in range(len(source))], left_out


# --- quotes

LITERAL = ["a red car", '"Hello" poster on a wall', 'a 5" pipe', '"starts with a lone quote',
           "a dog", "a cat", 'the sign says "stop', "a bird"]  # fmt: skip
SWALLOWED = [
    "a",
    '"opens',
    "b",
    'and closes"',
    "c",
]  # one row of three lines, to a reader of quotes
FULL = ["one", '"two"', '"three"']


@pytest.mark.parametrize("separator", ["\t", ",", ";"])
@pytest.mark.parametrize("wanted", [LITERAL, SWALLOWED], ids=["literal", "swallowed"])
def test_quotes_that_do_not_quote_stay_as_written(made, separator, wanted):
    ending = "tsv" if separator == "\t" else "csv"
    lines = [f"{i}.jpg{separator}{t}\r\n" for i, t in enumerate(wanted)]
    source = sources.open_path(made(f"a.{ending}", f"filepath{separator}title\r\n{''.join(lines)}"))
    assert texts(source) == [[t] for t in wanted]


QUOTING = {
    "csv": ("a.csv", 'path,caption\n0.jpg,"one"\n1.jpg,two\n', ["one", "two"]),
    "stray within a cell": ("a.csv", 'path,caption\n0.jpg,"a\nb"\n1.jpg,a 5" pipe\n',
                            ["a\nb", 'a 5" pipe']),
    "tsv, some in quotes": ("a.tsv", 'path\tcaption\n0.jpg\t"one"\n1.jpg\ttwo\n', ['"one"', "two"]),
    "tsv, all in quotes": ("a.tsv", 'path\tcaption\n0.jpg\t"one"\n1.jpg\t"two"\n', ["one", "two"]),
    "tsv, header in quotes": ("a.tsv", '"path"\t"caption"\n0.jpg\t"one"\n1.jpg\ttwo\n',
                              ["one", "two"]),
    "tsv, doubled": ("a.tsv", 'path\tcaption\n0.jpg\t"a ""b"""\n1.jpg\ttwo\n', ['a "b"', "two"]),
    "tsv, a separator within": ("a.tsv", 'path\tcaption\n0.jpg\t"a\tb"\n1.jpg\ttwo\n',
                                ["a\tb", "two"]),
    "tsv, lines within": ("a.tsv", 'path\tcaption\n0.jpg\t"a\tb\nc"\n1.jpg\ttwo\n',
                               ["a\tb\nc", "two"]),
}  # fmt: skip


@pytest.mark.parametrize("name", QUOTING)
def test_quoting_is_what_the_whole_file_supports(made, name):
    file, content, wanted = QUOTING[name]
    assert texts(sources.open_path(made(file, content))) == [[t] for t in wanted]


WRITTEN = {
    "csv": (",", [["0.jpg", "in the morning\nthe dog, a boy"], ["1.jpg", "x\ny, z"]]),
    "csv, image last": (",", [["a, b\nc", "0.jpg"], ["x", "1.jpg"], ["d, e\n\nf", "2.jpg"]]),
    "csv, a row too long": (",", [["0.jpg", "in\nthe dog, a boy"], ["1.jpg", "x", "y"]]),
    "tsv": ("\t", [["0.jpg", "first\nsecond\tthird"], ["1.jpg", "x"]]),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_lines_within_cells_stay_in_them_where_both_readings_fit(made, name):
    import csv
    import io

    separator, cells = WRITTEN[name]
    header = ["image", "caption"] if cells[0][0] == "0.jpg" else ["caption", "image"]
    out = io.StringIO()
    csv.writer(out, delimiter=separator).writerows([header, *cells])
    source = sources.open_path(made(f"a.{'tsv' if separator != ',' else 'csv'}", out.getvalue()))
    at = header.index("caption")
    for i, row in enumerate(cells):
        if len(row) == 2:
            assert [c["text"] for c in source[i]["captions"]] == [row[at]]


REFUSED = {
    "cells or rows": ('path,caption\n0,"a\n1,b"\n2,c\n', "line 2"),
    "cut in a cell of lines": ('path,caption\n0.jpg,"a\nb, c"\n1.jpg,"d\ne, f\n', "line 4"),
    "never closed": ('path,caption\n0.jpg,"one"\n1.jpg,"two\n2.jpg,three\n', "line 3"),
    "text behind": ('path,caption\n0.jpg,"one"\n1.jpg,"two" and a half\n', "line 3"),
    "joins lines": ('path,caption\n0.jpg,"a"\n1.jpg,"b\n2.jpg,c"\n', "line 3"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_of_both_kinds_is_refused_with_the_line(made, name):
    content, line = REFUSED[name]
    with pytest.raises(check.UserError, match=rf"a\.csv: got .*{line}\)"):
        sources.open_path(made("a.csv", content))


def test_rows_in_are_rows_out(made):
    """Any cells, written by the csv module or without quoting, come back."""
    import csv
    import io

    rng = np.random.default_rng(0)
    pieces = np.array(['"', '""', "a", " b", ",", "\t", "\n", "é"])
    for trial in range(60):
        quoting = trial % 2 == 0
        separator = ",\t"[trial // 2 % 2]
        some = pieces if quoting else pieces[[0, 2, 3, 7]]
        wanted = [f"x{''.join(rng.choice(some, 4))}." for _ in range(7)]
        out = io.StringIO()
        if quoting:
            writer = csv.writer(out, delimiter=separator, lineterminator="\n")
            writer.writerows(
                [["path", "caption"], *([f"{i}.jpg", t] for i, t in enumerate(wanted))]
            )
        else:
            lines = [f"{i}.jpg{separator}{t}\n" for i, t in enumerate(wanted)]
            out.write(f"path{separator}caption\n{''.join(lines)}")
        path = made(f"t.{'csv' if separator == ',' else 'tsv'}", out.getvalue())
        if not quoting and any(t.count('"') % 2 for t in wanted) or quoting:
            assert texts(sources.open_path(path)) == [[t.strip()] for t in wanted], out.getvalue()


@pytest.mark.parametrize("ending", ["csv", "tsv"])
@pytest.mark.parametrize("quote", ["", '"'])
def test_empty_lines_and_a_byte_order_mark_are_nothing(made, ending, quote):
    separator = {"csv": ",", "tsv": "\t"}[ending]
    lines = [("caption", "path"), (f"the {quote}sign", "0.jpg"), ("x", "1.jpg"), ("y", "2.jpg")]
    content = "\n\r\n\n".join(separator.join(cells) for cells in lines)
    source = sources.open_path(made(f"a.{ending}", f"\ufeff{content}\n\n"))
    assert texts(source) == [[t] for t, _ in lines[1:]]
    assert [source.place(i)["line"] for i in range(3)] == [4, 7, 10]


def test_a_bad_row_keeps_its_file_and_line(made, tmp_path):
    content = 'path,caption\n0.jpg,"a\nb"\n\n1.jpg,x,y\n2.jpg,caf\xe9\n3.jpg,good\n'
    _, left_out = converted(made("a.csv", content.encode("latin-1")), tmp_path / "out")
    found = [(x["file"], x["line"], x["row"], x["reason"]) for x in left_out]
    assert found == [("a.csv", 5, 1, "bad row"), ("a.csv", 6, 2, "bad row")]
    assert all("key" not in x for x in left_out)
    assert "3 cells under 2" in left_out[0]["detail"] and "0xe9" in left_out[1]["detail"]


# --- columns that not every row has


def test_the_columns_of_a_jsonl_are_those_of_all_rows(made, tmp_path):
    things = [{"image": f"{i}.jpg", "caption": f"thing {i}", "label": "cat", "alt": f"words {i}"}
              for i in range(6)]  # fmt: skip
    del things[0]["label"], things[0]["alt"], things[3]["caption"]
    path = made("train.jsonl", things)
    for flags in ((), ("--label", "label")):
        rows_, left_out = converted(path, tmp_path / f"out{len(flags)}", *flags)
        assert [len(r["captions"]) for r in rows_] == [1, 2, 2, 1, 2, 2] and not left_out
        assert [r.get("label") for r in rows_] == [None, *["cat"] * 5]


@pytest.mark.parametrize("value", [[0, 1], 0.5, float("nan"), {"a": 1}, 2**70, "\ud800"])
@pytest.mark.parametrize("part", ["label", "lang", "id"])
def test_a_guessed_column_never_costs_a_pair(made, tmp_path, capsys, part, value):
    things = [{"image": f"{i}.jpg", "caption": "x", part: value if i else "7"} for i in range(3)]
    path = made("train.jsonl", things)
    rows_, left_out = converted(path, tmp_path / "a")
    fits = part == "id" and value in (0.5, 2**70)
    assert len(rows_) == 3 and not left_out
    assert (
        fits
        or f"left out of records: {{'{part.replace('id', 'key')}': 2}}" in capsys.readouterr().out
    )
    rows_, left_out = converted(path, tmp_path / "b", f"--{part.replace('id', 'key')}", "")
    assert all("label" not in r and r["captions"][0]["lang"] == "und" for r in rows_)
    assert [r["key"] for r in rows_] == [f"{i:09d}" for i in range(3)] or part != "id"
    rows_, left_out = converted(path, tmp_path / "c", f"--{part.replace('id', 'key')}", part)
    assert len(rows_) == (3 if fits else 1)
    assert [x["line"] for x in left_out] == ([] if fits else [2, 3])


def test_values_that_are_no_text_cost_no_other_caption(made, tmp_path):
    lines = ['{"image": "0.jpg", "caption": "good", "title": NaN}',
             '{"image": "1.jpg", "caption": "good too", "title": 1984}',
             '{"image": "2.jpg", "caption": "third", "title": null}',
             '{"image": "3.jpg", "caption": null, "title": [NaN, "fourth", 4]}',
             '{"image": "4.jpg", "caption": NaN, "title": 1984}',
             '{"image": "5.jpg", "caption": NaN, "title": null}']  # fmt: skip
    rows_, left_out = converted(made("a.jsonl", "\n".join(lines)), tmp_path / "out")
    assert [c["text"] for r in rows_ for c in r["captions"]] == [
        "good",
        "good too",
        "third",
        "fourth",
    ]
    assert [(x["line"], x["reason"]) for x in left_out] == [(5, "bad row"), (6, "no text")]


SURROGATES = {
    "caption": {"caption": "half \ud800"},
    "key": {"id": "\ud800"},
    "image": {"image": "\ud800.jpg"},
    "label": {"label": "\ud800"},
    "deep": None,
}


@pytest.mark.parametrize("name", SURROGATES)
def test_what_no_utf8_can_hold_is_a_bad_row_in_every_command(
    made, tmp_path, capsys, small_tokenizer, name
):
    things = [
        {"id": f"k{i}", "image": f"{i}.jpg", "caption": "a cat", "label": "x"} for i in range(4)
    ]
    lines = [json.dumps(t) for t in things]
    lines[2] = json.dumps(things[2] | SURROGATES[name]) if name != "deep" else "[" * 100_000
    path = made("train.jsonl", "\n".join(lines))
    made(records.TOKENIZER, small_tokenizer.to_bytes())
    named = ("--key", "id", "--label", "label")
    rows_, left_out = converted(path, tmp_path / "out", *named)
    assert [r["key"] for r in rows_] == ["k0", "k1", "k3"]
    assert [(x["line"], x["reason"]) for x in left_out] == [(3, "bad row")]
    assert test_cli_data.run("verify", tmp_path / "out") == 0
    loose = ("--min-side-px", 10, "--min-words", 1)
    assert test_cli_data.run("filter", path, "--out", tmp_path / "f", *loose, *named) == 0
    assert '"row_unreadable": 1' in capsys.readouterr().out
    assert (
        test_cli_data.run("inspect", path, "--json", "--html", tmp_path / "page.html", *named) == 0
    )
    assert '"row": 1' in capsys.readouterr().out
    train = ("--vocab-size", 12, "--model-type", "bpe")
    assert test_cli_data.run("tokenizer", path, *named, "--out", tmp_path / "m.model", *train) == 0
    data = Data(path=str(path), langs=(), image_px=16, text_len=8, bad_records="replace")
    batch = open_dataset(data).batch_at(0, 4, seed=0)
    assert batch["mask"].all()
    if name in ("caption", "image", "deep"):  # of the others, training reads nothing
        with pytest.raises(check.UserError, match="a bad record"):
            open_dataset(Data(path=str(path), langs=(), image_px=16)).record(2)


# --- several rows of one image


def test_rows_of_an_image_are_one_record(made, tmp_path, capsys):
    lines = [
        f"{'./' * (k % 2)}{i}.jpg,{k},words {k} about {i}\n" for k in range(5) for i in (2, 0, 1)
    ]
    path = made("train.csv", "image,number,comment\n" + "".join(lines))
    named = made("named.csv", "image,number,caption\n" + "".join(lines))
    for group_rows, num in ((True, 3), (False, 15)):  # as training reads it
        data = Data(path=str(named), group_rows=group_rows)
        assert len(sources.open_data(data)) == num
    flags = ("--captions", "comment", "--rows-per-shard", 2)
    rows_, _ = converted(path, tmp_path / "out", *flags)
    wanted = [[f"words {k} about {i}" for k in range(5)] for i in (2, 0, 1)]
    assert [[c["text"] for c in r["captions"]] for r in rows_] == wanted
    assert [r["image"] for r in rows_] == [formats.jpeg(i) for i in (2, 0, 1)]
    assert "15 rows are 3 images: one record each" in capsys.readouterr().out
    assert records.read_manifest(tmp_path / "out")["info"]["rows"] == {"train": 15}
    assert len(converted(path, tmp_path / "apart", *flags, "--no-group")[0]) == 15
    source = sources.open_path(path, given=fields.Fields(captions=("comment",)))
    copy = pickle.loads(pickle.dumps(source))
    assert [copy[i] for i in range(3)] == [source[i] for i in range(3)]
    assert copy.fingerprint == source.fingerprint


def test_a_bad_row_costs_its_image_no_other_caption(made, tmp_path):
    content = b"image,caption\n0.jpg,one\n0.jpg,caf\xe9\n1.jpg,two\n0.jpg,three\ngone.jpg,x\n"
    rows_, left_out = converted(made("a.csv", content), tmp_path / "out")
    assert [[c["text"] for c in r["captions"]] for r in rows_] == [["one", "three"], ["two"]]
    assert [(x["line"], x["reason"]) for x in left_out] == [(3, "bad row"), (6, "image missing")]


def test_groups_equal_a_dictionary():
    draws = np.random.default_rng(0).integers(0, 40, 300)
    found = rows.Groups(rows.group(rows.digest(bytes([d])) for d in draws))
    wanted: dict[int, list[int]] = {}
    for i, d in enumerate(draws.tolist()):
        wanted.setdefault(d, []).append(i)
    assert [found.rows(i) for i in range(len(found))] == list(wanted.values())
    assert rows.group(rows.digest(bytes([d])) for d in range(50)) == {}


def test_the_index_is_kept_and_made_again_where_it_is_damaged(made, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "CACHED_BYTES", 0)
    path = made("a.csv", "path,caption\n" + "".join(f"{i % 3}.jpg,words {i}\n" for i in range(9)))
    first = sources.open_path(path)
    built = []
    index = delimited.index
    monkeypatch.setattr(delimited, "index", lambda *a: built.append(1) or index(*a))
    again = sources.open_path(path)
    assert not built and again.fingerprint == first.fingerprint and texts(again) == texts(first)
    for file in (tmp_path.parent).glob("cache*/table-index/*"):
        file.unlink()  # a mapped file is never written into
    for file in (tmp_path.parent).glob("cache*/table-index/*"):
        file.unlink()  # a mapped file is never written into
        file.write_text("{}")
    assert texts(sources.open_path(path)) == texts(first) and built


# --- paths into columns, packed tables, JSON


def test_a_path_into_a_column_reaches_the_captions(made, tmp_path):
    things = [{"image": {"file": f"{i}.jpg"}, "a.b": f"dotted {i}", "meta": {"x.y": f"deep {i}"},
               "sentences": [{"raw": f"words {k} of {i}", "id": k} for k in range(2)]}
              for i in range(3)]  # fmt: skip
    path = made("a.jsonl", things)
    given = lambda *names: fields.Fields(image="image.file", captions=names)
    for name in ("sentences.raw", "sentences/raw"):
        found = sources.open_path(path, given=given(name))
        assert texts(found) == [[f"words {k} of {i}" for k in range(2)] for i in range(3)]
    assert texts(sources.open_path(path, given=given("a.b", "meta.x.y")))[1] == [
        "dotted 1",
        "deep 1",
    ]
    with pytest.raises(ValueError, match=r"an object, no text; .* --captions sentences.raw"):
        sources.open_path(path, given=fields.Fields(image="image.file"))[0]
    with pytest.raises(check.UserError, match="got 'sentence.raw', expected one of"):
        sources.open_path(path, given=given("sentence.raw"))
    lines = "".join(f"{i}.jpg,w{i}\n" for i in range(3))
    dotted = made("b.csv", f"my.img,my.text\n{lines}")
    named = fields.Fields(image="my.img", captions=("my.text",))
    assert texts(sources.open_path(dotted, given=named)) == [["w0"], ["w1"], ["w2"]]


def test_names_of_columns_without_the_space_around_them(made, tmp_path):
    lines = "".join(f"{i}.jpg| {k}| words {k} of {i} .\n" for i in range(2) for k in range(5))
    path = made("results.csv", "image_name| comment_number| comment\n" + lines)  # Flickr30k's
    rows_, _ = converted(path, tmp_path / "out", "--captions", "comment")
    assert [len(r["captions"]) for r in rows_] == [5, 5]
    assert rows_[1]["captions"][2]["text"] == "words 2 of 1 ."


def test_tables_under_gzip(made):
    contents = {"a.csv": "path,caption\n0.jpg,x\n1.jpg,y\n", "b.tsv": "path\tcaption\n2.jpg\tx\n",
                "c.jsonl": '{"path": "3.jpg", "caption": "x"}\n'}  # fmt: skip
    for name, content in contents.items():
        plain, packed = made(name, content), made(f"{name}.gz", gzip.compress(content.encode()))
        assert sources.open_path(packed)[0] == sources.open_path(plain)[0]
        assert sources.open_path(packed).place(0)["line"] == (1 if name == "c.jsonl" else 2)
    made("c.jsonl.gz", gzip.compress(b"x" * 10_000)[:-20])
    with pytest.raises(check.UserError, match=r"c\.jsonl\.gz: got damaged gzip"):
        sources.open_path(packed)


def test_json_of_coco_and_karpathy_and_lists(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    for i in range(3):
        (tmp_path / "val2017" / f"{i}.jpg").write_bytes(formats.jpeg(i))
    images = [{"id": 10 + i, "file_name": f"{i}.jpg"} for i in range(3)]
    captions = [{"image_id": 10 + i, "caption": f"c{k} {i}"} for k in range(2) for i in range(3)]
    coco = tmp_path / "annotations" / "captions_val2017.json"
    coco.write_text(json.dumps({"images": images, "annotations": captions}))
    found = sources.open_path(coco, "val")
    assert texts(found) == [[f"c0 {i}", f"c1 {i}"] for i in range(3)]
    assert [found[i]["key"] for i in range(3)] == ["10", "11", "12"]
    boxes = [{"image_id": 10 + i, "category_id": 1 + i % 2, "bbox": []} for i in range(3)]
    kinds = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    coco.write_text(json.dumps({"images": images, "annotations": boxes, "categories": kinds}))
    assert [sources.open_path(coco)[i]["label"] for i in range(3)] == ["cat", "dog", "cat"]
    sentences = lambda i: [{"raw": f"s{k} {i}", "tokens": []} for k in range(2)]
    images = [{"filepath": "val2017", "filename": f"{i}.jpg", "cocoid": i, "sentences": sentences(i),
               "split": ("train", "restval", "val")[i]} for i in range(3)]  # fmt: skip
    karpathy = tmp_path / "dataset_coco.json"
    karpathy.write_text(json.dumps({"images": images, "dataset": "coco"}))
    assert texts(sources.open_path(karpathy)) == [["s0 0", "s1 0"], ["s0 1", "s1 1"]]
    assert texts(sources.open_path(karpathy, "validation")) == [["s0 2", "s1 2"]]
    with pytest.raises(
        check.UserError, match=r"split 'test': got splits \['restval', 'train', 'val"
    ):
        sources.open_path(karpathy, "test")
    plain = tmp_path / "list.json"
    plain.write_text(
        json.dumps([{"image": f"val2017/{i}.jpg", "caption": f"x{i}"} for i in range(3)])
    )
    assert texts(sources.open_path(plain)) == [["x0"], ["x1"], ["x2"]]
    for content, got in (('{"images": [], "annotations": []}', "0 images"), ("{", "broken JSON"),
                         ('{"a": 1}', r"keys \['a'\]"), ("[1]", "no objects")):  # fmt: skip
        plain.write_text(content)
        with pytest.raises(check.UserError, match=rf"list\.json: got {got}"):
            sources.open_path(plain)


# --- labels alone


def test_a_label_alone_is_a_record(made, tmp_path, capsys):
    path = made("test.csv", "file,class\n0.jpg,cat\n1.jpg,dog\n2.jpg,\n")
    rows_, left_out = converted(path, tmp_path / "out")
    assert [(r["label"], r["captions"]) for r in rows_] == [("cat", []), ("dog", [])]
    assert [(x["line"], x["reason"]) for x in left_out] == [(4, "no text")]
    assert "label=class captions=-" in capsys.readouterr().out
    for command in ("verify", "inspect"):
        assert test_cli_data.run(command, tmp_path / "out") == 0
    loose = ("--min-side-px", 10)
    assert test_cli_data.run("filter", tmp_path / "out", "--out", tmp_path / "f", *loose) == 0
    assert len(records.open_split(tmp_path / "f", "train")) == 2
    with pytest.raises(check.UserError, match="--captions or --label"):
        test_cli_data.run("convert", path, "--out", tmp_path / "none", "--label", "")
    both = made("both.csv", "file,class,caption\n0.jpg,cat,x\n1.jpg,dog,\n")
    rows_, left_out = converted(both, tmp_path / "both")  # here, a row without text lacks its text
    assert len(rows_) == 1 and left_out[0]["reason"] == "no text"
    rows_, _ = converted(both, tmp_path / "labels", "--captions", "")
    assert [r["label"] for r in rows_] == ["cat", "dog"]


def test_training_on_labels_alone_says_what_is_missing(made, tmp_path, small_tokenizer):
    path = made("train.csv", "file,class\n0.jpg,cat\n1.jpg,dog\n")
    converted(path, tmp_path / "out")
    data = Data(path=str(tmp_path / "out"), langs=(), image_px=16)
    dataset = open_dataset(data, small_tokenizer)
    with pytest.raises(check.UserError, match="record '00000000.': got no caption, expected one"):
        dataset.batch_at(0, 2, seed=0)
    (batch,) = dataset.eval_iter(2, texts=False)
    assert batch["image"].any() and (batch["text"][:, :3] == [1, 2, 0]).all()


# --- paths that lead out


def test_paths_that_lead_out_are_bad_rows_unless_asked_for(tmp_path, capsys):
    root = tmp_path / "set"
    (root / "inner").mkdir(parents=True)
    (tmp_path / "secret.jpg").write_bytes(formats.jpeg(1))
    (root / "0.jpg").write_bytes(formats.jpeg(0))
    (root / "link.jpg").symlink_to("../secret.jpg")
    (root / "good.jpg").symlink_to("0.jpg")
    (root / "out").symlink_to("..")
    os.mkfifo(root / "fifo.jpg")
    names = ["0.jpg", "inner/../0.jpg", str(root / "0.jpg"), "good.jpg", "fifo.jpg",
             "../secret.jpg", str(tmp_path / "secret.jpg"), "link.jpg", "out/secret.jpg",
             "inner/../../secret.jpg", "/proc/self/environ", "/etc/hostname"]  # fmt: skip
    lines = "".join(f"{n},words {i}\n" for i, n in enumerate(names))
    (root / "train.csv").write_text(f"image,caption\n{lines}")
    rows_, left_out = converted(root / "train.csv", tmp_path / "a", "--no-group")
    assert len(rows_) == 4 and {r["image"] for r in rows_} == {formats.jpeg(0)}
    reasons = [(x["line"], x["reason"]) for x in left_out]
    assert reasons == [(6, "image missing"), *((n, "image outside") for n in range(7, 14))]
    assert "row 5, line 7: '../secret.jpg' leads out of" in left_out[1]["detail"]
    assert "--allow-outside" in left_out[1]["detail"]
    rows_, _ = converted(root / "train.csv", tmp_path / "b", "--allow-outside", "--no-group")
    assert len(rows_) >= 9
    with pytest.raises(pictures.BadImage, match=r"outside: row 5.*config\.data\.allow_outside"):
        sources.open_path(root / "train.csv")[4]
    data = Data(path=str(root), allow_outside=True)
    assert sources.open_data(data)[4]["image"] == formats.jpeg(1)


def test_images_within_the_rows(made):
    image = base64.b64encode(formats.jpeg(3)).decode()
    things = [{"image": {"base64": image}, "caption": "a"}, {"image": {"path": "4.jpg"}, "caption": "b"},
              {"image": "http://a/b.jpg", "caption": "c"}]  # fmt: skip
    source = sources.open_path(made("a.jsonl", things))
    assert [source[i]["image"] for i in range(2)] == [formats.jpeg(3), formats.jpeg(4)]
    with pytest.raises(pictures.BadImage, match="fetch it with img2dataset first"):
        source[2]


# --- values that no row should have


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_a_nul_in_a_path_is_a_bad_row(made, tmp_path, ending):
    if ending == "csv":
        path = made("a.csv", "image,caption\n0.jpg\0,a\n1.jpg,b\n")
    else:
        things = [("0.jpg\0", "a"), ("1.jpg", "b")]
        path = made("a.jsonl", [{"image": i, "caption": c} for i, c in things])
    assert list(sources.open_path(path).inputs()) == [str(path), str(tmp_path / "1.jpg")]
    rows_, left_out = converted(path, tmp_path / "out")
    assert len(rows_) == 1 and [x["reason"] for x in left_out] == ["bad row"]


def test_ids_of_coco_that_are_no_ids_cost_their_own_entries(made, tmp_path):
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in (0, 1)]
    images.append({"id": {}, "file_name": "2.jpg"})
    entries = [{"image_id": 0, "caption": "a"}, {"image_id": [1], "caption": "b"}]
    found = {"images": images, "annotations": entries, "categories": [{"id": {}, "name": "x"}]}
    assert texts(sources.open_path(made("a.json", json.dumps(found)))) == [["a"], [], []]
    found["annotations"] = [{"image_id": 0, "category_id": 1}, {"image_id": 1, "category_id": {}}]
    found["categories"].append({"id": 1, "name": {}})
    source = sources.open_path(made("b.json", json.dumps(found)))
    assert [source[i].get("label") for i in range(3)] == [1, None, None]


def test_an_image_of_karpathy_without_a_name_is_a_bad_row(made, tmp_path):
    images = [{"sentences": [{"raw": "a"}], "filename": "0.jpg"}, {"sentences": [{"raw": "b"}]}]
    path = made("a.json", json.dumps({"images": images}))
    rows_, left_out = converted(path, tmp_path / "out")
    assert len(rows_) == 1 and ["names no image" in x["detail"] for x in left_out] == [True]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_labels_of_one_image_that_differ_are_left_out_and_told(made, tmp_path, capsys, kind):
    things = [(0, "a", "cat"), (0, "b", "dog"), (1, "c", "cow"), (1, "d", "cow"), (2, "e", "")]
    if kind == "csv":
        text = "".join(f"{i}.jpg,{c},{x}\n" for i, c, x in things)
        path = made("a.csv", f"image,caption,label\n{text}")
    else:
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet

        names = ("image", "caption", "label")
        columns = {
            n: [f"{t[0]}.jpg" if not k else t[k] for t in things] for k, n in enumerate(names)
        }
        path = tmp_path / "a.parquet"
        pyarrow.parquet.write_table(pa.table(columns), path)
    rows_, left_out = converted(path, tmp_path / "out")
    assert [r.get("label") for r in rows_] == [None, "cow", None] and not left_out
    assert [len(r["captions"]) for r in rows_] == [2, 2, 1]
    assert "left out of records: {'label': 1}" in capsys.readouterr().out


def test_a_caption_that_nobody_sees_is_none(made, tmp_path):
    things = [{"image": f"{i}.jpg", "caption": c} for i, c in enumerate(("\u200b\u200b", "x"))]
    rows_, left_out = converted(made("a.jsonl", things), tmp_path / "out")
    assert len(rows_) == 1 and [x["reason"] for x in left_out] == ["no text"]


def test_base64_that_is_none_is_a_bad_row(made):
    good = base64.encodebytes(formats.jpeg(0)).decode()  # in lines, as some write it
    rows_ = [{"image": {"base64": b}, "caption": "a"} for b in ("!!!", good, f"!{good}", "abc")]
    source = sources.open_path(made("a.jsonl", rows_))
    assert source[1]["image"] == formats.jpeg(0)
    for i in (0, 2, 3):
        with pytest.raises(ValueError, match=f"row {i}, line {i + 1} is no base64"):
            source[i]
