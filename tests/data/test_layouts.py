"""Folders, Parquet and TFDS as people have them, and what in them must not be followed."""

import io
import json
import os
import pathlib
import pickle

import pyarrow
import pyarrow.parquet
import pytest
import test_cli_data
from PIL import Image
from test_tables import converted, texts

from helpers import formats
from vlp.core import check
from vlp.data import records, sources
from vlp.data.config import Data
from vlp.data.dataset import open_dataset
from vlp.data.sources import fields, files, parquet, tfds
from vlp.data.tools import convert


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("VLP_CACHE", str(tmp_path_factory.mktemp("cache")))


def pairs(directory, numbers, caption="caption number {}"):
    directory.mkdir(parents=True, exist_ok=True)
    for i in numbers:
        (directory / f"{i:04d}.jpg").write_bytes(formats.jpeg(i))
        if caption:
            (directory / f"{i:04d}.txt").write_text(caption.format(i))
    return directory


# --- folders


def test_folders_in_folders_are_read(tmp_path):
    pairs(tmp_path / "cat", range(3))
    pairs(tmp_path / "dog" / "small", range(3, 6))
    rows, _ = converted(tmp_path, tmp_path.parent / f"{tmp_path.name}out")
    assert [r["key"] for r in rows][::3] == ["cat/0000", "dog/small/0003"]
    assert len(rows) == 6 and all("label" not in r for r in rows)


def test_folders_without_texts_are_classes(tmp_path, capsys):
    for split in ("train", "val"):
        pairs(tmp_path / "set" / split / "cat", range(2), None)
        pairs(tmp_path / "set" / split / "dog" / "old", range(2, 3), None)
    source = sources.open_path(tmp_path / "set", "val")
    assert [(source[i]["label"], source[i]["captions"]) for i in range(3)] == [
        ("cat", []), ("cat", []), ("dog", [])]  # fmt: skip
    rows, _ = converted(tmp_path / "set", tmp_path / "out")
    assert [r["label"] for r in rows] == ["cat", "cat", "dog"]
    assert "classes=folders" in capsys.readouterr().out
    pairs(tmp_path / "set" / "val" / "dog" / "old", range(3, 4))  # one text: no classes
    assert all("label" not in sources.open_path(tmp_path / "set", "val")[i] for i in range(4))
    pairs(tmp_path / "deep" / "all" / "cat", range(1), None)  # the level at which paths part
    pairs(tmp_path / "deep" / "all" / "dog" / "x", range(1), None)
    assert [sources.open_path(tmp_path / "deep")[i]["label"] for i in range(2)] == ["cat", "dog"]
    off = fields.Fields(off=("label",))
    assert "label" not in sources.open_path(tmp_path / "set", given=off)[0]


def test_folders_of_img2dataset(tmp_path, capsys):
    for shard, numbers in (("00000", range(3)), ("00001", range(3, 5))):
        pairs(tmp_path / "in" / shard, numbers)
        sidecar = {"url": ["u"], "caption": ["c"], "key": [f"lost{shard}"], "status": ["failed"],
                   "error_message": ["HTTP Error 404"]}  # fmt: skip
        pyarrow.parquet.write_table(pyarrow.table(sidecar), tmp_path / "in" / f"{shard}.parquet")
        stats = {"status_dict": {"success": len(numbers), "HTTP Error 404": 1}}
        (tmp_path / "in" / f"{shard}_stats.json").write_text(json.dumps(stats))
    (tmp_path / "in" / "00000" / "0000.json").write_text('{"caption": "other words", "label": 7}')
    rows, left_out = converted(tmp_path / "in", tmp_path / "out")
    assert len(rows) == 5 and [c["text"] for c in rows[0]["captions"]] == [
        "caption number 0", "other words"]  # fmt: skip
    assert rows[0]["label"] == 7
    assert [(x["key"], x["reason"]) for x in left_out] == [
        ("lost00000", "HTTP Error 404"), ("lost00001", "HTTP Error 404")]  # fmt: skip
    assert "img2dataset: {'train': {'HTTP Error 404': 2, 'success': 5}}" in capsys.readouterr().out


def test_linked_folders_are_followed_within_the_root(tmp_path, capsys):
    root = pairs(tmp_path / "set" / "train", range(2)).parent
    pairs(root / "more", range(2, 4))
    pairs(tmp_path / "elsewhere", range(5, 8))
    (root / "train" / "inside").symlink_to("../more")
    (root / "train" / "again").symlink_to("../more")
    (root / "train" / "loop").symlink_to("..")
    (root / "train" / "outside").symlink_to(tmp_path / "elsewhere")
    rows, left_out = converted(root, tmp_path / "out")
    assert [r["key"] for r in rows] == ["0000", "0001", "again/0002", "again/0003"]
    reasons = {x["file"]: x["reason"] for x in left_out}
    assert reasons["outside"] == "a linked folder outside (--allow-outside follows it)"
    assert reasons["inside"] == "a linked folder that was read already"
    assert "a linked folder outside" in capsys.readouterr().out
    assert len(converted(root, tmp_path / "out2", "--allow-outside")[0]) == 7


def test_every_ending_that_can_be_decoded(tmp_path):
    kinds = {"jpg": "JPEG", "JPEG": "JPEG", "jfif": "JPEG", "jpe": "JPEG", "PNG": "PNG",
             "webp": "WEBP", "tiff": "TIFF", "bmp": "BMP", "gif": "GIF", "jp2": "JPEG2000",
             "ppm": "PPM", "avif": "AVIF", "heic": "JPEG", "svg": "PNG"}  # fmt: skip
    kinds = {e: k for e, k in kinds.items() if k in Image.SAVE}
    for i, (ending, kind) in enumerate(kinds.items()):
        out = io.BytesIO()
        Image.open(io.BytesIO(formats.jpeg(i))).save(out, kind)
        (tmp_path / f"{i}.{ending}").write_bytes(out.getvalue())
        (tmp_path / f"{i}.{'TXT' if i % 2 else 'txt'}").write_text(ending)
    (tmp_path / "lonely.caption").write_text("no image")
    (tmp_path / "README.md").write_text("of the folder")
    (tmp_path / os.fsdecode(b"a.\xff")).touch()
    rows, left_out = converted(tmp_path, tmp_path.parent / f"{tmp_path.name}o", "--check-images")
    assert {r["captions"][0]["text"] for r in rows} == {*kinds} - {"heic", "svg"}
    counts = sorted(x["reason"] for x in left_out)
    assert counts == [*["no image beside it"] * 3, "not read (.\\xff)", "not read (.heic)",
                      "not read (.md)", "not read (.svg)"]  # fmt: skip


def test_compound_endings_in_a_folder(tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.jpg").write_bytes(formats.jpeg(i))
        (tmp_path / f"{i}.seg.png").write_bytes(formats.jpeg(10 + i))
        (tmp_path / f"{i}.alt.txt").write_text(f"alt {i}")
        (tmp_path / f"{i}.json").write_text(
            json.dumps({"a.b": f"dotted {i}", "c": {"d": f"deep {i}"}})
        )
    given = fields.Fields(image="seg.png", captions=("alt.txt", "a.b", "c/d"))
    source = sources.open_path(tmp_path, given=given)
    assert [source[i]["key"] for i in range(len(source))] == ["0", "1"]
    assert texts(source) == [[f"alt {i}", f"dotted {i}", f"deep {i}"] for i in range(2)]
    assert source[1]["image"] == formats.jpeg(11)


def test_what_a_folder_must_not_open(tmp_path):
    """Links that lead out, of images and texts, and FIFOs: bad rows, each with its file; nothing waits."""
    root = pairs(tmp_path / "set", range(4))
    (root / "0000.jpg").unlink()
    (root / "0000.jpg").symlink_to("/etc/hostname")
    (root / "0001.txt").unlink()
    (root / "0001.txt").symlink_to("/etc/hostname")
    (root / "0002.jpg").unlink()
    os.mkfifo(root / "0002.jpg")
    for name in ("a.tar", "b.parquet", "train.csv", "metadata.jsonl"):
        os.mkfifo(root / name)
    rows, left_out = converted(root, tmp_path / "out")
    assert [r["key"] for r in rows] == ["0003"]
    found = [(x["file"], x["reason"]) for x in left_out if "row" in x]
    assert found == [
        ("0000.jpg", "image outside"),
        ("0001.jpg", "bad row"),
        ("0002.jpg", "image missing"),
    ]
    with pytest.raises(check.UserError, match=r"train\.csv: got no regular file"):
        sources.open_path(root / "train.csv")


def test_a_bad_row_of_a_tar_has_its_file_and_key(tmp_path):
    (tmp_path / "in").mkdir()
    formats.tar(tmp_path / "in" / "a.tar", formats.rows(2), text="json")  # no JSON
    meta = {"caption": "x", "label": [1, 2], "lang": 7}
    row = formats.rows(3)[2]
    formats.tar(tmp_path / "in" / "b.tar", [row | {"caption": json.dumps(meta)}], text="json")
    rows, left_out = converted(tmp_path / "in", tmp_path / "out")
    assert [(r["key"], "label" in r) for r in rows] == [("id002", False)]
    assert [(x["file"], x["key"], x["reason"]) for x in left_out] == [
        ("a.tar", "id000", "bad row"), ("a.tar", "id001", "bad row")]  # fmt: skip


def test_a_bad_text_has_its_file(tmp_path, capsys):
    pairs(tmp_path / "s", range(2))
    (tmp_path / "s" / "0001.txt").write_bytes(b"caf\xe9 on a table")
    _, left_out = converted(tmp_path / "s", tmp_path / "out")
    assert [(x["file"], x["reason"]) for x in left_out] == [("0001.jpg", "bad row")]
    loose = ("--min-side-px", 10, "--min-words", 1)
    assert test_cli_data.run("filter", tmp_path / "s", "--out", tmp_path / "f", *loose) == 0
    assert '"row_unreadable": 1' in capsys.readouterr().out


# --- which files are a split


def test_a_snapshot_of_the_hub(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("x")
    store = tmp_path.parent / f"{tmp_path.name}blobs"
    store.mkdir()
    sizes = {"train-00000-of-00002": 3, "train-00001-of-00002": 2, "validation-00000-of-00001": 4}
    for number, (name, num) in enumerate(sizes.items()):  # linked, as the hub's cache has them
        formats.parquet(store / str(number), formats.rows(num))
        (tmp_path / "data" / f"{name}.parquet").symlink_to(store / str(number))
    for split, num in (("train", 5), ("val", 4), ("validation", 4)):
        assert sources.open_path(tmp_path, split).num_rows == num
    converted(tmp_path, store / "out")
    assert "not asked for: val (name them after --splits)" in capsys.readouterr().out
    with pytest.raises(check.UserError, match="split 'test': got none in"):
        sources.open_path(tmp_path, "test")


@pytest.mark.parametrize("asked", ["val", "validation"])
@pytest.mark.parametrize("there", ["val", "validation", "valid"])
def test_val_is_validation(tmp_path, asked, there, capsys):
    pairs(tmp_path / "dirs" / "train", range(2))
    pairs(tmp_path / "dirs" / there, range(3))
    (tmp_path / "files").mkdir()
    for split, num in (("train", 2), (there, 3)):
        formats.tar(tmp_path / "files" / f"cc3m-{split}-0000.tar", formats.rows(num))
    for name in ("dirs", "files"):
        assert [len(sources.open_path(tmp_path / name, s)) for s in ("train", asked)] == [2, 3]
        out = tmp_path / f"{name}.out"
        argv = ("convert", tmp_path / name, "--splits", "train", asked, "--out", out)
        assert test_cli_data.run(*argv) == 0
        assert len(records.open_split(out, asked)) == len(sources.open_path(out, there)) == 3
    assert "not asked for" not in capsys.readouterr().out


def test_files_of_another_split_are_not_train(tmp_path):
    for name, num in (("data-0", 2), ("val-0", 3)):
        formats.tar(tmp_path / f"{name}.tar", formats.rows(num))
    assert len(sources.open_path(tmp_path)) == 2
    (tmp_path / "data-0.tar").unlink()
    with pytest.raises(check.UserError, match=r"split 'train': got none in .*val-0\.tar"):
        sources.open_path(tmp_path)
    pairs(tmp_path / "d" / "val" / "cat", range(2), None)
    with pytest.raises(
        check.UserError, match=r"split 'train': got none in .*, which has \['val'\]"
    ):
        sources.open_path(tmp_path / "d")


def test_errors_speak_of_what_is_there(tmp_path):
    pairs(tmp_path / "s", range(1))
    packed = tmp_path / "tars"
    packed.mkdir()
    saved = tmp_path / "saved"
    saved.mkdir()
    for file in ("x.tar.gz", "x.zip", "x.dat", "tars/a.tar.gz", "saved/state.json",
                 "saved/data-00000-of-00001.arrow", "saved/dataset_info.json"):  # fmt: skip
        (tmp_path / file).write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    cases = {
        "x.tar.gz": r"a packed archive \(\.tar\.gz\), .*gunzip",
        "x.zip": r"a packed archive \(\.zip\), .*unpack it",
        "x.dat": r"a file ending in '\.dat', .*\.jsonl\.gz",
        "tars": r"a directory with 1 \.gz, .*unpack the archives \(a\.tar\.gz",
        "saved": r"a Hugging Face dataset saved to disk \(Arrow\), .*to_parquet",
        "empty": r"a directory with nothing, ",
        "none": r"no such file or directory, .*check the path",
        "none.csv": "no file, ",
        "s/0000.jpg": "one image, ",
    }
    for name, message in cases.items():
        with pytest.raises(check.UserError, match=f"{name}: got {message}") as caught:
            test_cli_data.run("convert", tmp_path / name, "--out", tmp_path / "out")
        assert "data convert" not in str(caught.value) and "\n" not in str(caught.value)


# --- Parquet


def images(num, same=()):
    """Rows of embedded images; those in `same` have the first one's bytes."""
    return [{"bytes": formats.jpeg(0 if i in same else i), "path": f"{i}.jpg"} for i in range(num)]


def test_a_path_into_a_column_of_parquet(tmp_path):
    sentences = [[{"raw": f"w{k} {i}", "sentid": k} for k in range(3)] for i in range(2)]
    table = {
        "image": images(2),
        "sentences": sentences,
        "a.b": ["x", "y"],
        "s": [{"t": "p"}, {"t": "q"}],
    }
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    for name in ("sentences.raw", "sentences/raw"):
        found = sources.open_path(tmp_path, given=fields.Fields(captions=(name,)))
        assert texts(found) == [[f"w{k} {i}" for k in range(3)] for i in range(2)]
    found = sources.open_path(tmp_path, given=fields.Fields(captions=("a.b", "s.t")))
    assert texts(found) == [["x", "p"], ["y", "q"]]
    with pytest.raises(check.UserError, match=r"got objects with .* --captions sentences\.raw"):
        sources.open_path(tmp_path)
    with pytest.raises(
        check.UserError, match=r"got 'sentences\.row', .* did you mean 'sentences\.raw'"
    ):
        sources.open_path(tmp_path, given=fields.Fields(captions=("sentences.row",)))


def test_rows_of_parquet_with_the_same_image(tmp_path):
    caption = [f"words {i}" for i in range(12)]
    same = (0, 3, 11)
    table = pyarrow.table(
        {"image": images(12, same), "caption": caption, "label": [5, *[None] * 11]}
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    rows, _ = converted(tmp_path, tmp_path.parent / f"{tmp_path.name}a", "--rows-per-shard", 3)
    assert len(rows) == 10 and rows[0]["label"] == 5
    assert [c["text"] for c in rows[0]["captions"]] == ["words 0", "words 3", "words 11"]
    assert [r["captions"][0]["text"] for r in rows] == [
        t for i, t in enumerate(caption) if i not in (3, 11)
    ]
    assert len(converted(tmp_path, tmp_path.parent / f"{tmp_path.name}b", "--no-group")[0]) == 12
    data = Data(path=str(tmp_path))
    assert len(sources.open_data(data)) == 10


def test_large_parquet_is_compared_only_where_asked(tmp_path, monkeypatch):
    formats.parquet(tmp_path / "a.parquet", formats.rows(2) * 2)
    monkeypatch.setattr(parquet, "HASHED_BYTES", 10)
    assert len(sources.open_path(tmp_path)) == 4
    assert len(sources.open_path(tmp_path, given=fields.Fields(group=True))) == 2


def test_labels_of_parquet_that_are_none(tmp_path):
    """As the recipe has them: lists, scores, and NaN for nothing."""
    nan = pyarrow.array([0.0, 1.0, float("nan"), 1.0, 0.0], from_pandas=False)
    columns = {"several": [[0, 1], [2], [], [1], [0]], "score": [0.5] * 5, "nan": nan}
    for name, column in columns.items():
        (tmp_path / name).mkdir()
        table = pyarrow.table({"image": images(5), "caption": list("abcde"), "label": column})
        pyarrow.parquet.write_table(table, tmp_path / name / "train-0.parquet")
        rows, left_out = converted(tmp_path / name, tmp_path / f"{name}.out")
        labels = [r.get("label") for r in rows]
        assert not left_out and labels == ([0, 1, None, 1, 0] if name == "nan" else [None] * 5)
        assert len(converted(tmp_path / name, tmp_path / f"{name}.off", "--label", "")[0]) == 5


def test_a_label_of_parquet_alone(tmp_path):
    table = {"image": images(3), "label": [0, 1, None]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "test-0.parquet")
    rows, left_out = converted(tmp_path, tmp_path.parent / f"{tmp_path.name}out", split="test")
    assert [(r["label"], r["captions"]) for r in rows] == [(0, []), (1, [])]
    assert [x["reason"] for x in left_out] == ["no text"]


def test_text_of_parquet_that_is_not_utf8(tmp_path):
    """A bad row, and only that one of its row group; as bytes and in a column of texts."""
    data = [b"good", "caf\xe9".encode("latin-1"), b"fine"]
    for name, kind in (("bytes", pyarrow.binary()), ("text", pyarrow.string())):
        column = pyarrow.Array.from_buffers(
            kind, 3, pyarrow.array(data, pyarrow.binary()).buffers()
        )
        table = pyarrow.table({"image": images(3), "caption": column, "key": list("abc")})
        (tmp_path / name).mkdir()
        pyarrow.parquet.write_table(table, tmp_path / name / "a.parquet")
        rows, left_out = converted(tmp_path / name, tmp_path / f"{name}.out")
        assert [r["captions"][0]["text"] for r in rows] == ["good", "fine"]
        assert [(x["row_of_file"], x["reason"]) for x in left_out] == [(1, "bad row")]
        assert "0xe9" in left_out[0]["detail"] and left_out[0]["file"] == "a.parquet"


def test_paths_in_parquet(tmp_path):
    root = tmp_path / "set"
    root.mkdir()
    for i in range(2):
        (root / f"{i}.jpg").write_bytes(formats.jpeg(i))
    (tmp_path / "secret.jpg").write_bytes(formats.jpeg(5))
    names = ["0.jpg", "1.jpg", "./0.jpg", "../secret.jpg", "/proc/self/environ"]
    for column in (names, [{"bytes": None, "path": n} for n in names]):
        table = pyarrow.table(
            {"file_name" if column is names else "image": column, "text": list("abcde")}
        )
        pyarrow.parquet.write_table(table, root / "a.parquet")
        source = sources.open_path(root)
        assert texts_of(source) == [["a", "c"], ["b"], "outside", "outside"]
        given = fields.Fields(allow_outside=True)
        assert sources.open_path(root, given=given)[2]["image"] == formats.jpeg(5)


def texts_of(source):
    out = []
    for i in range(len(source)):
        try:
            out.append([c["text"] for c in source[i]["captions"]])
        except ValueError as e:
            out.append(getattr(e, "reason", "row"))
    return out


# --- TFDS


def test_a_path_into_a_feature(tmp_path):
    features = pytest.importorskip("tensorflow_datasets").features
    pairs = [
        r | {"caption": [{"text": f"w{k} {r['key']}"} for k in range(2)]} for r in formats.rows(3)
    ]
    captions = features.Sequence({"text": features.Text()})
    path = formats.tfds(tmp_path, pairs, captions)
    for name in ("caption.text", "caption/text"):
        source = sources.open_path(path, given=fields.Fields(captions=(name,)))
        assert [[c["text"] for c in source[i]["captions"]] for i in range(3)] == [
            [f"w0 {source[i]['key']}", f"w1 {source[i]['key']}"] for i in range(3)]  # fmt: skip
    with pytest.raises(check.UserError, match="neither|label"):
        sources.open_path(path, given=fields.Fields(off=("captions",)))


EVIL = {
    "class": {"pythonClassName": "evil_module.Evil"},
    "other spelling": {"python_class_name": "evil_module.Evil"},
    "a neighbour": {"pythonClassName": "tensorflow_datasets.core.features_evil.x.Evil"},
    "a test": {"pythonClassName": "tensorflow_datasets.core.features.image_feature_test.Evil"},
    "legacy": {"type": "evil_module.Evil", "content": {}},
    "legacy message": {"type": "tensorflow_datasets.core.features.image_feature.Image",
                       "proto_cls": "evil_module.Evil", "content": "{}"},
    "in a string": {"pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
                    "jsonFeature": {"json": '{"a": {"type": "evil_module.Evil", "content": {}}}'}},
    "no string": {"pythonClassName": ["evil_module.Evil"]},
}  # fmt: skip


@pytest.mark.parametrize("name", EVIL)
@pytest.mark.parametrize("deep", [False, True])
def test_classes_that_are_not_tfds_own_are_never_imported(tmp_path, monkeypatch, name, deep):
    directory = tmp_path / "d" / "1.0.0"
    directory.mkdir(parents=True)
    feature = EVIL[name]
    if deep:
        own = "tensorflow_datasets.core.features."
        feature = {
            "pythonClassName": f"{own}sequence_feature.Sequence",
            "sequence": {"feature": feature},
        }
        inner = {
            "image": {"pythonClassName": f"{own}image_feature.Image", "image": {}},
            "x": feature,
        }
        feature = {
            "pythonClassName": f"{own}features_dict.FeaturesDict",
            "featuresDict": {"features": inner},
        }
    (directory / "features.json").write_text(json.dumps(feature))
    info = {"name": "d", "version": "1.0.0", "fileFormat": "array_record", "splits": []}
    (directory / "dataset_info.json").write_text(json.dumps(info))
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    commands = (("convert", directory, "--out", out), ("inspect", directory), ("bench", directory),
                ("filter", directory, "--out", out), ("tokenizer", directory, "--out", out))  # fmt: skip
    for argv in commands:
        with pytest.raises(check.UserError, match=r"features\.json: got the (class|message) "):
            test_cli_data.run(*argv)
    with pytest.raises(check.UserError, match=r"features\.json: got the (class|message) "):
        open_dataset(Data(path=str(directory)))
    assert not (tmp_path / "imported").exists() and not out.exists()


def test_files_of_tfds_stay_in_its_directory(tmp_path):
    path = pathlib.Path(formats.tfds(tmp_path, formats.rows(2)))
    tfds.check_files(str(path))
    text = (path / "dataset_info.json").read_text()
    (path / "dataset_info.json").write_text(text.replace("{DATASET}-", "../../{DATASET}-"))
    with pytest.raises(check.UserError, match=r"dataset_info\.json: got the path '\.\./\.\./"):
        sources.open_path(path)
    (path / "features.json").unlink()
    with pytest.raises(check.UserError, match=r"features\.json: got no file"):
        sources.open_path(path)


INFO = {
    "a name that leads out": ({"name": "../../x"}, "the name '../../x'"),
    "a split that leads out": ({"splits": [{"name": "a/../../x"}]}, "the name 'a/"),
    "no list of splits": ({"splits": "q"}, "splits 'q'"),
    "no splits within": ({"splits": ["train"]}, "splits "),
    "a null": (None, "None, expected a JSON object"),
    "a number": ({"fileFormat": [3]}, "ParseError"),
}


@pytest.mark.parametrize("name", INFO)
def test_what_tfds_json_may_say(tmp_path, name):
    pytest.importorskip("tensorflow_datasets")
    own = "tensorflow_datasets.core.features."
    inner = {"image": {"pythonClassName": f"{own}image_feature.Image", "image": {}}}
    feature = {
        "pythonClassName": f"{own}features_dict.FeaturesDict",
        "featuresDict": {"features": inner},
    }
    info = {"name": "d", "version": "1.0.0", "fileFormat": "array_record", "splits": []}
    change, message = INFO[name]
    (tmp_path / "features.json").write_text(json.dumps(feature))
    (tmp_path / "dataset_info.json").write_text(json.dumps(change and info | change))
    with pytest.raises(check.UserError, match=message):
        sources.open_path(tmp_path)
    for broken in ("null", "[1]"):
        (tmp_path / "features.json").write_text(broken)
        with pytest.raises(check.UserError, match="expected a JSON object"):
            sources.open_path(tmp_path)


def test_a_map_is_no_caption(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    tags = pa.array([[("a key", "a value")]] * 2, pa.map_(pa.string(), pa.string()))
    image = [formats.jpeg(i) for i in range(2)]
    columns = {"image": image, "caption": ["x", "y"], "text": tags}
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    source = sources.open_path(tmp_path)
    assert [[c["text"] for c in source[i]["captions"]] for i in range(2)] == [["x"], ["y"]]
    with pytest.raises(check.UserError, match="'text'.*a map"):
        sources.open_path(tmp_path, given=fields.Fields(captions=("text",)))


def test_convert_names_no_key_that_it_does_not_know(tmp_path):
    formats.parquet(tmp_path / "a.parquet", [*formats.rows(2), formats.rows(3)[2] | {"jpg": None}])
    job = convert.Job(str(tmp_path), str(tmp_path / "out"))
    convert.run(job)
    (line,) = (tmp_path / "out" / convert.LEFT_OUT).read_text().splitlines()
    assert json.loads(line)["key"] == "id002" and json.loads(line)["row_of_file"] == 2


def test_a_large_folder_is_read_once(tmp_path, monkeypatch):
    """Its names and what its texts say are kept in an index; who opens it again looks at sizes and times."""
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "in" / "ü"
    folder.mkdir(parents=True)
    for i in range(20):
        (folder / f"{i:02d}.jpg").write_bytes(formats.jpeg(i))
        (folder / f"{i:02d}.txt").write_text(f"text {i}")
    plain = sources.open_path(folder.parent)
    monkeypatch.setattr(files, "CACHED_FILES", 5)
    found = sources.open_path(folder.parent)
    assert found.fingerprint == plain.fingerprint and list(found.files) == list(plain.files)
    assert len(pickle.dumps(found)) < 1000 and pickle.loads(pickle.dumps(found))[7] == plain[7]
    with monkeypatch.context() as m:
        m.setattr(files.FolderSource, "_read", lambda *_: pytest.fail("read again"))
        assert sources.open_path(folder.parent).fingerprint == found.fingerprint
    (folder / "03.txt").write_text("other 3")
    assert sources.open_path(folder.parent).fingerprint != found.fingerprint


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_files_missing_by_the_names_of_the_others_are_told(tmp_path, kind, caplog):
    write, rows = getattr(formats, kind), formats.rows(6)
    for i in (0, 2):
        write(tmp_path / f"train-{i:05d}-of-00003.{kind}", rows[2 * i :][:2])
    with pytest.raises(check.UserError, match="2 of 3 files, without train-00001-of-00003"):
        sources.open_path(tmp_path, strict=True)
    assert not caplog.records and len(sources.open_path(tmp_path)) == 4
    assert "without train-00001-of-00003" in caplog.text
    caplog.clear()
    sources.open_path(tmp_path / f"train-00000-of-00003.{kind}", strict=True)  # asked for alone
    write(tmp_path / f"train-00001-of-00003-9f.{kind}", rows[2:4])  # a hash in it, as on the hub
    assert len(sources.open_path(tmp_path, strict=True)) == 6
    for i in (1, 2):  # numbered from 1 on
        (tmp_path / "one").mkdir(exist_ok=True)
        write(tmp_path / "one" / f"{i}-of-2.{kind}", rows[2 * i :][:2])
    assert len(sources.open_path(tmp_path / "one", strict=True)) == 4
    assert not caplog.records


def test_tables_beside_images_without_texts_are_named(tmp_path):
    pairs(tmp_path / "in", range(2), None)
    for name in ("a.csv", "b.csv"):
        (tmp_path / "in" / name).write_text("file_name,caption\n0000.jpg,a cat\n")
    with pytest.raises(check.UserError, match=r"the path of the table: a\.csv, b\.csv"):
        convert.run(convert.Job(str(tmp_path / "in"), str(tmp_path / "out")))
