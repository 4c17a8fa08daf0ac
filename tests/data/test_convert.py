"""`vlp data convert`: the same records from every format, after any kill, on every runner."""

import csv
import json
import os
import shutil
import subprocess
import sys
import tarfile

import pytest
import test_cli_data

from helpers import formats
from vlp.core import check
from vlp.data import records, sources
from vlp.data.sources import fields
from vlp.data.tools import convert
from vlp.data.tools import job as jobs


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("VLP_CACHE", str(tmp_path_factory.mktemp("cache")))


def images(directory, pairs):
    directory.mkdir(exist_ok=True)
    for r in pairs:
        (directory / f"{r['key']}.jpg").write_bytes(r["jpg"])


def folder(d, pairs):
    images(d, pairs)
    for r in pairs:
        (d / f"{r['key']}.txt").write_text(r["caption"] + "\n")
    return d


def table(d, pairs, separator, name):
    images(d, pairs)
    with open(d / name, "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f, delimiter=separator)
        writer.writerow(["id", "file_name", "caption"])
        writer.writerows([r["key"], f"{r['key']}.jpg", r["caption"]] for r in pairs)
    return d / name


def jsonl(d, pairs):
    images(d, pairs)
    rows = [
        {"id": r["key"], "image_path": f"{r['key']}.jpg", "caption": r["caption"]} for r in pairs
    ]
    (d / "a.jsonl").write_text("".join(json.dumps(r) + "\n\n" for r in rows))
    return d / "a.jsonl"


def made(write):
    def inner(d, pairs):
        d.mkdir()
        return write(d, pairs) or d

    return inner


FORMATS = {
    "folder": folder,
    "csv": lambda d, p: table(d, p, ",", "a.csv"),
    "semicolons": lambda d, p: table(d, p, ";", "a.csv"),
    "tsv": lambda d, p: table(d, p, "\t", "a.tsv"),
    "jsonl": jsonl,
    "parquet": made(lambda d, p: formats.parquet(d / "a.parquet", p)),
    "webdataset": made(lambda d, p: formats.tar(d / "a.tar", p)),
    "img2dataset": made(lambda d, p: formats.img2dataset(d, 0, p)),
    "tfds": made(lambda d, p: formats.tfds(d, p)),
}


def content(out):
    """Records by key, without the captions' source tags (every format has its own)."""
    source = records.open_split(out, "train")
    rows = [source[i] for i in range(len(source))]
    texts = {r["key"]: [(c["text"], c["lang"]) for c in r["captions"]] for r in rows}
    return {r["key"]: (r["image"], texts[r["key"]]) for r in rows}


PAIRS = [r | {"caption": f'a, "b" ü;\t{r["key"]}\nsecond line'} for r in formats.rows(11)]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_records(tmp_path, name):
    path = FORMATS[name](tmp_path / "in", PAIRS)
    given = fields.Fields(default_lang="en")
    convert.run(convert.Job(str(path), str(tmp_path / "out"), given=given, rows_per_shard=4))
    assert content(tmp_path / "out") == {
        r["key"]: (r["jpg"], [(r["caption"], "en")]) for r in PAIRS
    }
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_every_id_of_img2dataset_is_accounted_for(tmp_path):
    lost = [
        ("x1", "failed_to_download", {"error_message": "HTTP Error 404: Not Found"}),
        ("x2", "failed_to_download", {"error_message": "timed out"}),
        ("x3", "failed_to_download", {"error_message": "IncompleteRead(7 bytes read, 9 more)"}),
        ("x4", "failed_to_download", {"error_message": "IncompleteRead(8 bytes read, 2 more)"}),
        ("x5", "failed_to_resize", {"error_message": "Image decoding\nerror"}),
    ]
    formats.img2dataset(tmp_path / "in", 0, PAIRS, lost)
    manifest = convert.run(convert.Job(str(tmp_path / "in"), str(tmp_path / "out")))
    truncated = "IncompleteRead(n bytes read, m more)"
    assert manifest["info"]["img2dataset"]["train"] == {
        "success": 11,
        "HTTP Error 404: Not Found": 1,
        "timed out": 1,
        truncated: 2,
        "Image decoding error": 1,
    }
    listed = (tmp_path / "out" / convert.LEFT_OUT).read_text().splitlines()
    causes = {r["key"]: r["reason"] for r in map(json.loads, listed)}
    assert content(tmp_path / "out").keys() | causes.keys() == {r["key"] for r in PAIRS} | {
        f"x{i}" for i in range(1, 6)
    }
    given = fields.Fields(key="mine")  # a column that the user had it keep
    convert.run(convert.Job(str(tmp_path / "in"), str(tmp_path / "own"), given=given))
    listed = (tmp_path / "own" / convert.LEFT_OUT).read_text().splitlines()
    assert {json.loads(x)["key"] for x in listed} == {f"own-x{i}" for i in range(1, 6)}
    assert content(tmp_path / "own").keys() == {f"own-{r['key']}" for r in PAIRS}
    assert causes["x2"] == "timed out" and causes["x3"] == causes["x4"] == truncated


def tree(directory):
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}


@pytest.fixture
def damaged(tmp_path):
    """A table in which three of eleven rows cannot be records."""
    path = jsonl(tmp_path / "in", PAIRS)
    lines = path.read_text().split("\n\n")
    lines[2] = json.dumps({"id": "gone", "image_path": "gone.jpg", "caption": "x"})
    lines[5] = json.dumps({"id": "mute", "image_path": "id005.jpg", "caption": " "})
    lines[9] = json.dumps({"id": "html", "image_path": "html.jpg", "caption": "x"})
    (path.parent / "html.jpg").write_text("<html>")
    path.write_text("\n".join(lines))
    return path


def test_what_is_left_out_is_counted_and_listed(tmp_path, damaged):
    job = convert.Job(str(damaged), str(tmp_path / "out"), rows_per_shard=3, check_images=True)
    info = convert.run(job)["info"]
    assert info["left_out"] == {"image missing": 1, "image not_an_image": 1, "no text": 1}
    listed = (tmp_path / "out" / convert.LEFT_OUT).read_text().splitlines()
    found = [(r["row"], r["key"]) for r in map(json.loads, listed)]
    assert found == [(2, "gone"), (5, "mute"), (9, "html")]
    kept = {r["key"] for r in PAIRS} - {"id002", "id005", "id009"}
    assert content(tmp_path / "out").keys() == kept


def test_killed_anywhere_it_resumes_to_the_same_bytes(tmp_path, damaged, monkeypatch):
    def job(out):
        return convert.Job(str(damaged), str(tmp_path / out), rows_per_shard=3, check_images=True)

    convert.run(job("true"))
    true = tree(tmp_path / "true")
    true["manifest.json"] = true["manifest.json"].replace(b'"true"', b'"out"')

    class Kill(BaseException):
        pass

    for doomed in range(100):
        calls = 0

        def replace(a, b, *, before=doomed % 2, real=os.replace, doomed=doomed):
            nonlocal calls
            calls += 1
            if calls == doomed // 2 + 1:
                if not before:
                    real(a, b)  # killed right after, else right before
                raise Kill
            real(a, b)

        with monkeypatch.context() as m:
            m.setattr(os, "replace", replace)
            try:
                convert.run(job("out"))
            except Kill:
                killed = True
            else:
                killed = False
        convert.run(job("out"))
        assert tree(tmp_path / "out") == true
        assert not (tmp_path / ".out.convert").exists()
        shutil.rmtree(tmp_path / "out")
        if not killed:
            break
    assert doomed >= 16  # plan, four shards twice, the dataset


KILLS = """
import os, pathlib, random, shutil, signal, sys, time
from vlp.data.tools import convert

def child(out):
    if pid := os.fork():
        return pid
    convert.run(convert.Job(sys.argv[1], out, rows_per_shard=3, check_images=True))
    os._exit(0)

tree = lambda out: {p.name: p.read_bytes() for p in pathlib.Path(out).iterdir()}
parent, began = pathlib.Path(sys.argv[2]), time.monotonic()
os.waitpid(child(str(parent / "whole" / "set")), 0)
took, draws, killed = time.monotonic() - began, random.Random(0), 0
while killed < 6:
    out = str(parent / "killed" / "set")
    for _ in range(3):  # deaths in a row
        pid = child(out)
        time.sleep(draws.uniform(0, took))
        os.kill(pid, signal.SIGKILL)
        met = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        took, killed = took * (1.1 if met else 0.7), killed + met  # however busy the machine
    assert os.waitpid(child(out), 0)[1] == 0
    assert tree(out) == tree(parent / "whole" / "set")
    assert os.listdir(parent / "killed") == ["set"], os.listdir(parent / "killed")
    shutil.rmtree(parent / "killed")
print(killed)
"""


def test_sigkill_at_random_moments(tmp_path, damaged):
    """Real deaths of a real process, three in a row: whenever they come, the end is the same."""
    (tmp_path / "whole").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(damaged), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": ":".join(p for p in sys.path if p)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) >= 6


def test_finished_shards_are_not_made_again(tmp_path, damaged, monkeypatch):
    job = convert.Job(str(damaged), str(tmp_path / "out"), rows_per_shard=3)
    make, made_shards = convert.make_shard, []

    def failing(job, task):
        made_shards.append(task)
        if len(made_shards) == 3:
            raise OSError("disk full")
        make(job, task)

    monkeypatch.setattr(convert, "make_shard", failing)
    with pytest.raises(OSError, match="disk full"):
        convert.run(job)
    convert.run(job)
    assert [n for _, n in made_shards] == [0, 1, 2, 2, 3]
    convert.run(job)  # all there
    assert len(made_shards) == 5


def test_processes_and_beam_give_the_same_bytes(tmp_path):
    path = FORMATS["webdataset"](tmp_path / "in", PAIRS)

    def run(out, **how):
        (tmp_path / out).mkdir()
        convert.run(convert.Job(str(path), str(tmp_path / out / "set"), rows_per_shard=4), **how)
        return tree(tmp_path / out / "set")

    one = run("one")
    assert run("two", workers=2) == one
    pytest.importorskip("apache_beam")
    assert run("beam", runner="DirectRunner") == one


def test_foreign_directories_are_refused(tmp_path):
    path = str(FORMATS["webdataset"](tmp_path / "in", PAIRS))
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    with pytest.raises(check.UserError, match="no manifest"):
        convert.run(convert.Job(path, str(out)))
    (out / "thesis.tex").unlink()
    convert.run(convert.Job(path, str(out)))
    with pytest.raises(check.UserError, match="another dataset"):
        convert.run(convert.Job(path, str(out), rows_per_shard=2))
    jobs.claim(convert.Job(path, str(tmp_path / "b")), {"version": 0})
    with pytest.raises(check.UserError, match="shards of another conversion"):
        convert.run(convert.Job(path, str(tmp_path / "b")))


def test_command_shows_what_it_took_for_what(tmp_path, capsys):
    path = FORMATS["semicolons"](tmp_path / "in", PAIRS)
    assert test_cli_data.run("convert", path, "--out", tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "11 rows of table, key=id image=file_name" in out and "separator=';'" in out
    assert "captions=caption" in out and "left out: nothing" in out
    assert test_cli_data.run("verify", tmp_path / "out") == 0
    (path.parent / "b.csv").write_text("id,file_name\n1,a.jpg\n")
    with pytest.raises(check.UserError, match="name it with --captions"):
        test_cli_data.run("convert", path.parent / "b.csv", "--out", tmp_path / "c")


def test_several_captions_keep_their_sources(tmp_path):
    (tmp_path / "a.jpg").write_bytes(formats.jpeg(0))
    row = {
        "id": 7,
        "path": "a.jpg",
        "alt": "short",
        "synthetic_caption": ["l1", "l2"],
        "lang": "fr",
    }
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    record = sources.open_path(tmp_path / "t.jsonl")[0]
    assert record["key"] == "7"
    assert [(c["text"], c["source"], c["lang"]) for c in record["captions"]] == [
        ("short", "alt", "fr"),
        ("l1", "synthetic_caption", "fr"),
        ("l2", "synthetic_caption", "fr"),
    ]


def test_a_split_that_is_not_there_is_refused(tmp_path):
    """A single file or a folder is one split: asked for another, it never gives the same rows again."""
    paths = [FORMATS[name](tmp_path / name, PAIRS) for name in ("folder", "csv", "parquet")]
    paths += [FORMATS["parquet"](tmp_path / "p", PAIRS) / "a.parquet"]
    for path in paths:
        job = convert.Job(str(path), str(tmp_path / "out"), splits=("train", "val"))
        with pytest.raises(check.UserError, match=r"split 'val': got (none in|the one file) "):
            convert.run(job)
        assert not (tmp_path / "out").exists() and not (tmp_path / ".out.convert").exists()
    for split, part in (("train", PAIRS[:7]), ("val", PAIRS[7:])):
        (tmp_path / "both").mkdir(exist_ok=True)
        folder(tmp_path / "both" / split, part)
        table(tmp_path / "tables", part, ",", f"{split}.csv")
    for name, ending in (("both", ""), ("tables", ""), ("tables", "/val.csv")):
        path = f"{tmp_path / name}{ending}"
        lengths = [len(sources.open_path(path, s)) for s in ("train", "val")[bool(ending) :]]
        assert lengths == [7, 4][bool(ending) :]


@pytest.mark.parametrize("name", ["folder", "csv", "webdataset", "parquet"])
def test_changed_inputs_are_not_taken_for_the_old_ones(tmp_path, name):
    path = FORMATS[name](tmp_path / "in", PAIRS)
    job = convert.Job(str(path), str(tmp_path / "out"))
    convert.run(job)
    convert.run(job)
    later = [r | {"jpg": r["jpg"][:-3] + b"xyz"} for r in PAIRS]  # of the same size
    shutil.rmtree(tmp_path / "in")
    FORMATS[name](tmp_path / "in", later)
    with pytest.raises(check.UserError, match="what was made before the input files changed"):
        convert.run(job)
    shutil.copytree(tmp_path / "out", tmp_path / "plain")  # a copy without the note is trusted
    (tmp_path / "plain" / convert.INPUTS).unlink()
    convert.run(convert.Job(str(path), str(tmp_path / "plain")))


def test_nothing_left_leaves_nothing_behind(tmp_path):
    path = FORMATS["csv"](tmp_path / "in", PAIRS)
    for file in path.parent.glob("*.jpg"):
        file.unlink()
    job = convert.Job(str(path), str(tmp_path / "out"))
    with pytest.raises(check.UserError, match=r"0 records .*'image missing': 11.*id000.jpg"):
        convert.run(job)
    images(path.parent, PAIRS)
    convert.run(job)  # mended, the same command goes through
    assert len(content(tmp_path / "out")) == 11


def test_members_of_tars_that_are_no_records_are_listed(tmp_path):
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "a.tar", "w") as archive:
        for r in PAIRS[:3]:
            formats.add(archive, f"{r['key']}.jpg", r["jpg"])
            formats.add(archive, f"{r['key']}.txt", r["caption"].encode())
        formats.add(archive, "mute.jpg", PAIRS[3]["jpg"])
        formats.add(archive, "blind.txt", b"x")
        formats.add(archive, "../up.jpg", b"x")
        formats.add(archive, "last.jpg", PAIRS[4]["jpg"])
        formats.add(archive, "last.txt", b"x" * 2000)
    data = (tmp_path / "in" / "a.tar").read_bytes()
    (tmp_path / "in" / "a.tar").write_bytes(data[: data.rindex(b"x" * 1000)])
    info = convert.run(convert.Job(str(tmp_path / "in"), str(tmp_path / "out")))["info"]
    listed = map(json.loads, (tmp_path / "out" / convert.LEFT_OUT).read_text().splitlines())
    found = {(r["file"], r["key"], r["reason"]) for r in listed}
    assert found == {
        ("a.tar", "mute", "no_text"),
        ("a.tar", "blind", "no_image"),
        ("a.tar", "../up.jpg", "unsafe_name"),
        ("a.tar", "last", "truncated"),
    }
    counts = {"no_text": 1, "no_image": 1, "unsafe_name": 1, "truncated": 1}
    assert info["tar"] == {"train": counts}


def test_text_that_cannot_be_read_is_a_bad_row_with_its_detail(tmp_path):
    """Beside an image or in a tar: never replaced in silence."""
    latin = [r | {"caption": "x"} for r in PAIRS[:3]]
    for name in ("folder", "webdataset"):
        path = FORMATS[name](tmp_path / name, latin)
        if name == "folder":
            (path / "id001.txt").write_bytes("Köln".encode("latin-1"))
            (path / "id002.json").write_text("{")
        else:
            file = path / "a.tar"
            with tarfile.open(file, "w") as archive:
                for r, text in zip(latin, (b"x", "Köln".encode("latin-1"), b"y")):
                    formats.add(archive, f"{r['key']}.jpg", r["jpg"])
                    formats.add(archive, f"{r['key']}.txt", text)
                formats.add(archive, "id002.json", b"{")
        out = tmp_path / f"{name}.out"
        info = convert.run(convert.Job(str(path), str(out)))["info"]
        assert info["left_out"] == {"bad row": 2} and list(content(out)) == ["id000"]
        listed = [json.loads(x) for x in (out / convert.LEFT_OUT).read_text().splitlines()]
        assert "can't decode byte 0xf6" in listed[0]["detail"]
        assert "Expecting property name" in listed[1]["detail"]


def test_a_runner_without_beam_claims_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    path = FORMATS["csv"](tmp_path / "in", PAIRS)
    with pytest.raises(check.UserError, match=r"vlp\[beam\]"):
        convert.run(convert.Job(str(path), str(tmp_path / "out")), runner="DirectRunner")
    assert os.listdir(tmp_path) == ["in"]


def test_a_work_directory_that_is_not_ones_own_is_refused(tmp_path, monkeypatch):
    """Shards would be written through a link, and what it leads to removed."""
    formats.tar(tmp_path / "a.tar", formats.rows(2))
    victim, work = tmp_path / "victim", tmp_path / ".out.convert"
    victim.mkdir()
    command = ("convert", tmp_path / "a.tar", "--out", tmp_path / "out")
    work.symlink_to(victim)
    refused = lambda why: pytest.raises(check.UserError, match=why)
    with refused("a link to"):
        test_cli_data.run(*command)
    assert not list(victim.iterdir())
    work.unlink()
    work.symlink_to(tmp_path / "nowhere")
    with refused("a link to"):
        test_cli_data.run(*command)
    assert not (tmp_path / "nowhere").exists()
    work.unlink()
    work.write_text("mine")
    with refused("no directory"):
        test_cli_data.run(*command)
    assert work.read_text() == "mine"
    work.unlink()
    work.mkdir()
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    with refused("of the user"):
        test_cli_data.run(*command)
    assert not list(work.iterdir())
    monkeypatch.undo()
    assert test_cli_data.run(*command) == 0 and not work.exists()


def test_a_split_named_twice_is_refused(tmp_path):
    formats.tar(tmp_path / "a.tar", formats.rows(2))
    for command in ("convert", "filter"):
        argv = (command, tmp_path / "a.tar", "--out", tmp_path / "o", "--splits", "train", "train")
        with pytest.raises(check.UserError, match="train twice"):
            test_cli_data.run(*argv)
        assert not (tmp_path / "o").exists() and not (tmp_path / ".o.convert").exists()
