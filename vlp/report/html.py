"""Assembles the page. `write(workdir)` is the whole of `vlp report`.

One file, nothing from the network: CSS, SVG, images and script are inline, and the page's policy
forbids the rest. A section whose data is missing is replaced by one line that says so.
"""

import base64
import contextlib
import hashlib
import os
import uuid
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from vlp.core import check
from vlp.report import compare, curves, gallery, load, style, summary, svg, tables

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'; script-src 'sha256-{digest}'">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<header><p class="kind">{kind}</p><h1>{title}</h1><p class="path"><code>{path}</code></p>
<nav>{nav}</nav></header>
<main>{main}</main>
<footer class="end">{notes}
<p>Written by <code>vlp report</code>. This file asks nothing of the network.</p></footer>
<script>{script}</script>
</body>
</html>
"""


def write(workdir: Path, out: Path | None = None) -> Path:
    """Writes the report of one workdir, by default to workdir/report.html, and returns its path.

    The file appears whole or not at all. Raises: UserError without a workdir or its metrics.jsonl.
    """
    run = load.load(Path(workdir))
    return _publish(page(run), Path(out) if out is not None else run.path / "report.html")


def write_comparison(workdirs: Sequence[Path], out: Path | None = None) -> Path:
    """Writes one page about several runs, by default to ./compare.html, and returns its path."""
    runs = [load.load(Path(workdir)) for workdir in workdirs]
    return _publish(comparison(runs), Path(out) if out is not None else Path("compare.html"))


def _publish(text: str, out: Path) -> Path:
    if out.is_dir():
        raise check.error("report.out", f"the folder {str(out)!r}", "a file", "add a file name")
    # A captioner may emit lone surrogates, which no encoding of text can hold.
    data = text.encode("utf-8", "replace")
    part = out.with_name(f".{out.name}.{uuid.uuid4().hex}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        os.replace(part, out)
    except OSError as e:
        do = "give another --out"
        raise check.error("report.out", f"{str(out)!r} ({e})", "a path to write", do) from e
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    return out


def page(run: load.Run) -> str:
    """Returns the report as text."""
    parts = [(name, title, render(run)) for name, title, render in SECTIONS]
    return _fill("vlp run", run.name, str(run.path), parts, run.notes)


def comparison(runs: Sequence[load.Run]) -> str:
    """Returns the page of several runs as text."""
    parts = [
        (
            "evaluation",
            "Last evaluations",
            compare.evaluations(runs) or _missing("none in any run"),
        ),
        ("courses", "Evaluations over the runs", _grid(compare.courses(runs))),
        ("training", "Training", _grid(compare.training(runs)) or _missing("no training rows")),
        ("settings", "Settings that differ", compare.settings(runs)),
        ("attribution", "Attribution", "".join(dict.fromkeys(map(_attribution, runs)))),
    ]
    notes = tuple(f"{run.path}: {note}" for run in runs for note in run.notes)
    names = compare.names(runs)
    paths = ", ".join(str(run.path) for run in runs)
    return _fill("vlp runs", " · ".join(names), paths, parts, notes)


def _fill(
    kind: str, title: str, path: str, parts: Sequence[tuple[str, str, str]], notes: Sequence[str]
) -> str:
    nav = "".join(f'<a href="#{name}">{title}</a>' for name, title, body in parts if body)
    main = "".join(
        f'<section id="{name}"><h2>{title}</h2>{body}</section>'
        for name, title, body in parts
        if body
    )
    digest = hashlib.sha256(style.SCRIPT.encode()).digest()
    return _PAGE.format(
        digest=base64.b64encode(digest).decode(),
        kind=kind,
        title=escape(title),
        path=escape(path),
        css=style.CSS,
        script=style.SCRIPT,
        nav=nav,
        main=main,
        notes="".join(f'<p class="missing">{escape(note)}</p>' for note in notes),
    )


# --- sections: each returns its body, or "" to leave the section out


def _summary(run: load.Run) -> str:
    return summary.paragraph(run) + summary.tiles(run)


def _training(run: load.Run) -> str:
    return _grid(curves.train_charts(run)) or _missing("no training rows in metrics.jsonl")


def _throughput(run: load.Run) -> str:
    return _grid(curves.time_charts(run)) or _missing("no time/… values in metrics.jsonl")


def _evaluations(run: load.Run) -> str:
    if not run.evals:
        return _missing("no evaluation rows in metrics.jsonl")
    return "".join(
        f"<h3>{escape(name)}{f' · {escape(split)}' if split else ''}</h3>"
        f"{tables.evaluation(row)}{_grid(curves.eval_charts(run, name, split))}"
        for (name, split), row in run.latest().items()
    )


def _retrieval(run: load.Run) -> str:
    return _galleries(run, "retrieval", gallery.retrieval)


def _zeroshot(run: load.Run) -> str:
    found = {n: a for n, a in run.artefacts.items() if a.get("kind") == "zeroshot"}
    return "".join(
        f"<h3>{escape(str(a.get('label', name)))} · {escape(str(a.get('split', '')))}</h3>"
        f"{tables.confusion(a)}"
        for name, a in found.items()
    )


def _captions(run: load.Run) -> str:
    return _galleries(run, "captions", gallery.captions)


def _config(run: load.Run) -> str:
    return tables.config(run.config) if run.config else _missing("no config.json")


def _versions(run: load.Run) -> str:
    return tables.versions(run.versions) if run.versions else _missing("no versions.json")


def _attribution(run: load.Run) -> str:
    return "".join(f'<p class="attribution">{escape(text)}</p>' for text in run.attribution)


SECTIONS: tuple[tuple[str, str, Callable[[load.Run], str]], ...] = (
    ("summary", "Summary", _summary),
    ("evaluation", "Evaluation", _evaluations),
    ("training", "Training", _training),
    ("throughput", "Throughput", _throughput),
    ("retrieval", "Retrieval examples", _retrieval),
    ("zeroshot", "Zero-shot classification", _zeroshot),
    ("captions", "Generated captions", _captions),
    ("config", "Config", _config),
    ("versions", "Versions", _versions),
    ("attribution", "Attribution", _attribution),
)


def _grid(charts: list[svg.Chart]) -> str:
    return f'<div class="charts">{"".join(map(svg.figure, charts))}</div>' if charts else ""


def _galleries(run: load.Run, kind: str, render: Callable[..., str]) -> str:
    found = {name: a for name, a in run.artefacts.items() if a.get("kind") == kind}
    if not found:
        return _missing(f"no evals/{kind}_….json; the evaluator writes one when it keeps examples")
    title = "<h3>{}</h3>".format if len(found) > 1 else lambda name: ""
    return "".join(title(escape(name)) + render(name, artefact) for name, artefact in found.items())


def _missing(what: str) -> str:
    return f'<p class="missing">Left out: {what}.</p>'
