"""Makes the pages of `vlp report` and writes them: `write` of one run, `write_comparison` of several.

A page is one file and needs nothing from the network. Its layout is in templates/run.html.j2 and comparison.html.j2.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from vlp.core import check, pages, paths
from vlp.report import compare, curves, gallery, load, names, summary, svg, tables


def write(workdir: paths.Path, out: paths.Path | None = None) -> paths.Path:
    """Writes the report of one workdir, by default to workdir/report.html, and returns its path.

    The file appears whole or not at all.

    Raises:
        UserError: there is no workdir, no metrics.jsonl with a readable row, or `out` cannot be written.
    """
    run = load.load(workdir)
    return _publish(page(run), out if out is not None else run.path / "report.html")


def write_comparison(workdirs: Sequence[paths.Path], out: paths.Path | None = None) -> paths.Path:
    """Writes one page about several runs, by default to ./compare.html, and returns its path. Raises as `write`."""
    runs = [load.load(workdir) for workdir in workdirs]
    return _publish(comparison(runs), out if out is not None else Path("compare.html"))


def check_out(workdirs: Sequence[paths.Path], out: paths.Path | None = None) -> None:
    """Raises UserError if the page of these runs cannot be written at `out` (default: as `write`). Reads no run."""
    if out is None and not all(map(paths.is_dir, workdirs)):
        return  # the answer is about the workdir
    out = out or (workdirs[0] / "report.html" if len(workdirs) == 1 else Path("compare.html"))
    if paths.is_dir(out):
        do = f"give {str(out / 'report.html')!r}"
        raise check.error("report.out", f"the folder {str(out)!r}", "a file", do)
    if not paths.is_remote(out):
        place = check.output_file if os.path.isdir(out.parent) else check.output_dir  # is made
        place("report.out", out)
    if paths.exists(out) and out.suffix.lower() not in (".html", ".htm"):
        got = f"{str(out)!r}, which exists and is not a page"
        raise check.error("report.out", got, "a new file or an .html file", "name a new file")


def _publish(text: str, out: paths.Path) -> paths.Path:
    check_out([], out)
    # A captioner may emit lone surrogates, which no encoding can hold.
    data = text.encode("utf-8", "replace")
    try:
        paths.write(out, data)
    except OSError as e:
        do = "give --out a file in a folder that you may write to"
        raise check.error("report.out", f"{str(out)!r} ({e})", "a path to write", do) from e
    return out


def page(run: load.Run) -> str:
    """Returns the report of one run as text."""
    kinds = list(run.latest())
    rows = [[row for row in run.evals if (row.eval, row.split) == kind] for kind in kinds]
    rows.sort(key=lambda found: len(found[-1].values))  # short tables share a column
    courses = [chart for kind in kinds for chart in curves.eval_charts(run, *kind)]
    artefacts = {
        kind: [(name, found) for name, found in run.artefacts.items() if found.get("kind") == kind]
        for kind in ("retrieval", "zeroshot", "captions")
    }
    return pages.render(
        "vlp.report",
        "run.html.j2",
        title=run.name,
        path=str(run.path),
        said=summary.sentences(run),
        figures=summary.figures(run),
        evaluations=[tables.evaluation(found) for found in rows],
        repeated=any(len(found) > 1 for found in rows),
        courses=_curves(courses)["figures"],
        training=_curves(curves.train_charts(run)),
        stages=tables.stages(run),
        times=_curves(curves.time_charts(run)),
        retrievals=[(_title(n, a), gallery.retrieval(n, a)) for n, a in artefacts["retrieval"]],
        zeroshots=[
            (_title(n, a, run.config), tables.confusion(a)) for n, a in artefacts["zeroshot"]
        ],
        captionings=[(_title(n, a), gallery.captions(a)) for n, a in artefacts["captions"]],
        config=list(tables.flat(run.config)),
        versions=tables.versions(run.versions),
        attributions=run.attribution,
        notes=run.notes,
    )


def comparison(runs: Sequence[load.Run]) -> str:
    """Returns the page of several runs as text."""
    return pages.render(
        "vlp.report",
        "comparison.html.j2",
        title=" · ".join(compare.labels(runs)),
        path=", ".join(str(run.path) for run in runs),
        labels=compare.short_labels(runs),
        overview=compare.overview(runs),
        evaluations=compare.evaluations(runs),
        settings=compare.settings(runs),
        courses=_curves(compare.courses(runs)),
        training=_curves(compare.training(runs)),
        attributions=list(dict.fromkeys(text for run in runs for text in run.attribution)),
        notes=[f"{run.path}: {note}" for run in runs for note in run.notes],
    )


def _curves(charts: Sequence[svg.Chart]) -> dict[str, Sequence[object]]:
    """Returns drawings of the charts that have a curve, and tables of the values of the others."""
    return {
        "figures": [svg.figure(chart) for chart in charts if svg.is_curve(chart)],
        "points": tables.points([chart for chart in charts if not svg.is_curve(chart)]),
    }


def _title(name: str, artefact: dict, config: dict | None = None) -> str:
    """Returns the evaluation and the split of an artefact as a title, or else the name of its file in words.

    An evaluation is called as in the tables, by its key in `config`: the one that the artefact names, or the one that
    has the artefact's label.
    """
    if isinstance(key := artefact.get("eval"), str):
        artefact = artefact | {"label": key}
    label, split = artefact.get("label"), artefact.get("split")
    kind = str(artefact.get("kind", ""))
    evals = (config or {}).get("evals")
    for key, section in evals.items() if isinstance(evals, dict) else ():
        if isinstance(section, dict) and label and section.get("label") == label:
            label = key
            break
    if isinstance(split, str) and split:
        name = names.evaluation(label if isinstance(label, str) else kind, split)
    else:
        name = pages.title(pages.words(name))
    return pages.visible(name, 200)
