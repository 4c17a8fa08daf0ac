"""One page about several runs; the table of zero-shot classes."""

import json
import re

import pytest

from helpers import fake_run
from vlp.cli import main as cli
from vlp.report import compare, html, load, tables


@pytest.fixture
def workdirs(tmp_path):
    paths = [tmp_path / name for name in ("first", "second", "third")]
    for i, path in enumerate(paths):
        fake_run.write(path, num_rows=100, seed=i, artefacts=False)
    config = json.loads((paths[1] / "config.json").read_text())
    config["objective"]["caption_weight"] = 0.125
    (paths[1] / "config.json").write_text(json.dumps(config))
    return paths


def test_the_page_names_the_runs_and_only_settings_that_differ(workdirs, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert cli.main(["report", *map(str, workdirs), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    text = out.read_text()
    assert not re.search(r'(src|href)="(?!#|data:)', text)  # nothing from elsewhere
    for name in ("first", "second", "third"):
        assert f"<th>{name}</th>" in text
    assert "0.125" in text and "objective.caption_weight" in text
    assert "objective.contrastive_weight" not in text  # the same in all


def test_lines_and_numbers_are_those_of_the_runs(workdirs):
    runs = [load.load(path) for path in workdirs]
    loss = next(c for c in compare.training(runs) if c.title == "Loss")
    assert [s.label for s in loss.series] == ["first", "second", "third"]
    for run, series in zip(runs, loss.series):
        assert series.y.tolist() == [row.values["loss"] for row in run.train]
    kind = next(k for k, row in runs[0].latest().items() if "i2t/R@1" in row.values)
    for run in runs:
        shown = f"{100 * run.latest()[kind].values['i2t/R@1']:.1f}%"
        assert shown in {
            cell[0] for t in compare.evaluations(runs) for line in t.lines for cell in line
        }


def test_a_run_without_evaluations_has_a_line_of_dashes(workdirs):
    path = workdirs[2] / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows if r["kind"] == "train"))
    text = html.comparison([load.load(p) for p in workdirs])
    assert re.search(r"<th>third</th>(<td>–</td>)+</tr>", text)


def test_a_confusion_table_is_shown_as_a_heat_map(tmp_path):
    run = fake_run.write(tmp_path / "run", num_rows=20)
    artefact = {"kind": "zeroshot", "label": "tone", "split": "test", "classes": ["a", "<b>"],
                "confusion": [[3, 1], [0, 5]]}  # fmt: skip
    (run / "evals" / "zeroshot_tone_test.json").write_text(json.dumps(artefact))
    text = html.page(load.load(run))
    assert "Zero-shot classification" in text and "&lt;b&gt;" in text
    assert '--share:0.250">1</td>' in text and "<td>75%</td>" in text
    assert tables.confusion({"kind": "zeroshot", "classes": ["a"]}) is None
