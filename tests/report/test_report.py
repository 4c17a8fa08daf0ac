"""The page holds what the workdir holds, asks nothing of the network, and survives broken files."""

import argparse
import base64
import dataclasses
import hashlib
import re

import pytest

from helpers import fake_run
from helpers.page_parser import Page
from vlp.cli import report as cli
from vlp.core import check
from vlp.report import html as page
from vlp.report import load


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return fake_run.write(tmp_path_factory.mktemp("run") / "full", num_rows=70)


@pytest.fixture(scope="module")
def full(workdir) -> str:
    return page.write(workdir).read_text("utf-8")


# --- the whole page


def test_page_is_self_contained(full):
    """No attribute fetches from outside: links stay in the page, images are inline."""
    parsed = Page(full)
    assert parsed.fetches
    assert all(url.startswith(("#", "data:image/png;base64,")) for url in parsed.fetches)
    assert not re.search(r"@import|url\(|<link|<iframe", full)
    assert "default-src 'none'" in full
    outside = re.findall(r"https?://[^\s<\"]+", full)
    assert set(outside) <= {"https://openmoji.org)"}  # the attribution's own text


def test_page_policy_allows_exactly_its_script(full):
    scripts = re.findall(r"<script>(.*?)</script>", full, re.DOTALL)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in full


def test_page_tells_the_run_in_words(full):
    text = Page(full).text
    for words in (
        "coca-emoji-S16 has seen 179k samples",
        "two stages (masked, then unmasked)",
        "chance is 0.10%",
        "so it reads the image",
        "4 × NVIDIA H100 80GB HBM3",
        "3f2c9a1 (clean)",
        "optim.warmup_steps",
        "OpenMoji, CC BY-SA 4.0",
    ):
        assert words in text


def test_page_shows_every_section_and_links_to_it(full):
    ids = [a.get("id") for t, a in Page(full).tags if t == "section" and a]
    links = [a["href"].removeprefix("#") for t, a in Page(full).tags if t == "a"]
    assert ids == links == [
        "summary", "evaluation", "training", "throughput", "retrieval", "zeroshot", "captions",
        "config", "versions", "attribution",
    ]  # fmt: skip
    assert "Left out" not in full


def test_lone_surrogates_are_written(tmp_path):
    fake_run.write(tmp_path / "r", num_rows=2)
    (tmp_path / "r" / "config.json").write_text('{"name": "half \\ud800 pair"}')
    assert "half \N{REPLACEMENT CHARACTER} pair" in page.write(tmp_path / "r").read_text("utf-8")


def test_same_workdir_gives_the_same_bytes(workdir, full, tmp_path):
    assert page.write(workdir, tmp_path / "b.html").read_text("utf-8") == full


# --- broken and missing files


def test_half_written_last_line_costs_only_itself(tmp_path):
    run = fake_run.metrics(
        tmp_path / "r",
        fake_run.train_row(1, loss=2.0),
        fake_run.train_row(2, loss=1.0),
        tail='{"kind": "train", "st',
    )
    assert [row.step for row in run.train] == [1, 2]
    assert run.notes == ("metrics.jsonl: 1 of 3 lines could not be read and were skipped",)
    assert "1 of 3 lines" in Page(page.page(run)).text


@pytest.mark.parametrize(
    "line",
    ["[1]", "3", "null", '"a"', '{"kind": "train"}', '{"step": "x"}', '{"step": 1e999}', "\x00"],
)
def test_a_line_that_is_no_row_is_skipped(tmp_path, line):
    run = fake_run.metrics(tmp_path / "r", fake_run.train_row(1, loss=2.0), tail=line)
    assert len(run.train) == 1
    assert len(run.notes) == 1


def test_missing_artefacts_leave_a_note(tmp_path):
    fake_run.write(tmp_path / "r", num_rows=4, artefacts=False)
    for name in ("config.json", "versions.json"):
        (tmp_path / "r" / name).unlink()
    text = Page(page.write(tmp_path / "r").read_text("utf-8")).text
    for what in (
        "evals/retrieval_….json",
        "evals/captions_….json",
        "no config.json",
        "no versions.json",
    ):
        assert what in text


def test_only_training_rows_and_only_evaluation_rows_make_a_page(tmp_path):
    train = page.page(fake_run.metrics(tmp_path / "a", fake_run.train_row(1, loss=2.0)))
    assert "It was not evaluated" in train
    assert "no time/… values" in train
    only_eval = page.page(
        fake_run.metrics(tmp_path / "b", {"kind": "eval", "step": 1, "eval": "x", "top1": 0.5})
    )
    assert "no training rows" in only_eval


def test_broken_json_is_noted(tmp_path):
    fake_run.write(tmp_path / "r", num_rows=4)
    (tmp_path / "r" / "config.json").write_text("[]")
    (tmp_path / "r" / "evals" / "captions_test.json").write_text('{"kind": "cap')
    run = load.load(tmp_path / "r")
    assert [note.split(":")[0] for note in run.notes] == ["config.json", "evals/captions_test.json"]
    assert set(run.artefacts) == {"retrieval_test", "zeroshot_shape_test"}
    Page(page.page(run))


def test_artefacts_of_the_wrong_shape_make_a_page(workdir):
    run = load.load(workdir)
    queries = (None, [1, {}], [{"top_texts": {}, "rank_i2t": "x"}])
    items = ("x", [None, {"generated": None, "image": 3}])
    for bad in (
        {"kind": "retrieval"},
        {"kind": "captions"},
        *({"kind": "retrieval", "queries": value} for value in queries),
        *({"kind": "captions", "items": value} for value in items),
    ):
        Page(page.page(dataclasses.replace(run, artefacts={"a": bad})))


def test_no_workdir_no_metrics_and_no_row_are_user_errors(tmp_path):
    with pytest.raises(check.UserError, match="an existing folder"):
        page.write(tmp_path / "nowhere")
    with pytest.raises(check.UserError, match=r"no metrics\.jsonl"):
        page.write(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"kind": "tr')
    with pytest.raises(check.UserError, match="1 lines and no readable row"):
        page.write(tmp_path)
    assert not list(tmp_path.glob("*.html"))


def test_failed_write_leaves_the_old_report(workdir, tmp_path, monkeypatch):
    out = tmp_path / "r.html"
    out.write_text("old")
    monkeypatch.setattr(page.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(check.UserError, match="disk full"):
        page.write(workdir, out)
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]
    assert out.read_text() == "old"


# --- the command


def test_command_prints_the_path(workdir, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    args = parser.parse_args(["report", str(workdir), "--out", str(tmp_path / "new" / "r.html")])
    assert args.run(args) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'new' / 'r.html'}\n"
    assert (tmp_path / "new" / "r.html").stat().st_size > 10_000
    assert parser.parse_args(["report", "a"]).out is None
