"""Assembles the page. `write(workdir)` is the whole of `vlp report`.

One file, nothing from the network. What a reader compares comes first and is short: what is over a
few rows of cards is folded. A section whose data is missing is replaced by one line that says so.
"""

import contextlib
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from vlp.core import check, pages
from vlp.report import compare, curves, gallery, load, names, style, summary, svg, tables

MAX_CARDS = 6  # of a section, before the rest is folded: two rows on a wide page


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
    if out.exists() and out.suffix.lower() not in (".html", ".htm"):
        got = f"{str(out)!r}, which exists and is no page"
        raise check.error("report.out", got, "a new file or an .html", "choose another name")
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
        ("runs", "Runs", compare.overview(runs)),
        (
            "evaluation",
            "Last evaluations",
            compare.evaluations(runs) or _missing("none in any run"),
        ),
        ("settings", "Settings that differ", compare.settings(runs)),
        ("courses", "Evaluations over the runs", _curves(compare.courses(runs))),
        ("training", "Training", _curves(compare.training(runs)) or _missing("no training rows")),
        ("attribution", "Attribution", "".join(dict.fromkeys(map(_attribution, runs)))),
    ]
    notes = tuple(f"{run.path}: {note}" for run in runs for note in run.notes)
    paths = ", ".join(str(run.path) for run in runs)
    return _fill("vlp runs", " · ".join(compare.labels(runs)), paths, parts, notes)


def _fill(
    kind: str, title: str, path: str, parts: list[tuple[str, str, str]], notes: Sequence[str]
) -> str:
    end = "".join(f'<p class="missing">{pages.text(note)}</p>' for note in notes)
    end += "<p>Written by <code>vlp report</code>. This file asks nothing of the network.</p>"
    return pages.document(
        kind=kind,
        title=title,
        path=path,
        sections=parts,
        end=end,
        css=style.CSS,
        script=style.SCRIPT,
    )


# --- sections: each returns its body, or "" to leave the section out


def _summary(run: load.Run) -> str:
    return summary.paragraph(run) + summary.tiles(run)


def _training(run: load.Run) -> str:
    body = _curves(curves.train_charts(run))
    return body and _how_to_read(run) + body or _missing("no training rows in metrics.jsonl")


def _how_to_read(run: load.Run) -> str:
    parts = ["thin: as recorded; bold: a running mean"]
    parts += ["▲: an evaluation"] if run.evals else []
    return f'<p class="hint">{pages.title("; ".join(parts))}.</p>'


def _throughput(run: load.Run) -> str:
    body = tables.stages(run) + _curves(curves.time_charts(run), MAX_CARDS // 2)
    return body or _missing("no time/… values in metrics.jsonl")


def _evaluations(run: load.Run) -> str:
    if not run.evals:
        return _missing("no evaluation rows in metrics.jsonl")
    kinds = list(run.latest())
    rows = [[row for row in run.evals if (row.eval, row.split) == kind] for kind in kinds]
    rows.sort(key=lambda found: len(found[-1].values))  # short tables share a column
    charts = [c for kind in kinds for c in curves.eval_charts(run, *kind) if svg.is_curve(c)]
    most = MAX_CARDS if len(rows) <= MAX_CARDS // 2 else MAX_CARDS // 2
    hint = ""
    if any(len(found) > 1 for found in rows):
        hint = (
            '<p class="hint"><b>Bold</b>: the best value of a run. <span class="near">Dotted</span>: '
            "within two standard errors of it.</p>"
        )
    return (
        hint
        + _cards([tables.evaluation(found) for found in rows], "evaluations", layout="stack")
        + _cards([svg.figure(chart) for chart in charts], "curves", most)
    )


def _retrieval(run: load.Run) -> str:
    return _galleries(run, "retrieval", gallery.retrieval)


def _zeroshot(run: load.Run) -> str:
    found = {n: a for n, a in run.artefacts.items() if a.get("kind") == "zeroshot"}
    return "".join(f"<h3>{_title(n, a)}</h3>{tables.confusion(a)}" for n, a in found.items())


def _captions(run: load.Run) -> str:
    return _galleries(run, "captions", gallery.captions)


def _config(run: load.Run) -> str:
    return tables.config(run.config) if run.config else _missing("no config.json")


def _versions(run: load.Run) -> str:
    return tables.versions(run.versions) if run.versions else _missing("no versions.json")


def _attribution(run: load.Run) -> str:
    return "".join(
        f'<p class="attribution">{pages.text(text, 20_000)}</p>' for text in run.attribution
    )


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


def _curves(charts: Sequence[svg.Chart], most: int = MAX_CARDS) -> str:
    """Returns charts where there is a curve to draw, and the numbers of the others."""
    drawn = [svg.figure(chart) for chart in charts if svg.is_curve(chart)]
    told = tables.points([chart for chart in charts if not svg.is_curve(chart)])
    return _cards(drawn, "curves", most) + (_fold(told, "numbers") if told and drawn else told)


def _cards(cards: Sequence[str], what: str, most: int = MAX_CARDS, layout: str = "cards") -> str:
    if not cards:
        return ""
    shown, rest = cards[:most], cards[most:]
    if len(rest) == 1 and len(shown) % 3:
        shown, rest = cards, []
    more = (
        _fold(f'<div class="{layout}">{"".join(rest)}</div>', f"{len(rest)} {what}") if rest else ""
    )
    return f'<div class="{layout}">{"".join(shown)}</div>{more}'


def _fold(body: str, what: str) -> str:
    return f'<details class="more"><summary>more: {what}</summary>{body}</details>'


def _galleries(run: load.Run, kind: str, render: Callable[..., str]) -> str:
    found = {name: a for name, a in run.artefacts.items() if a.get("kind") == kind}
    if not found:
        return _missing(f"no evals/{kind}_….json; the evaluator writes one when it keeps examples")
    return "".join(
        f"<h3>{_title(name, artefact)}</h3>{render(name, artefact)}"
        for name, artefact in found.items()
    )


def _title(name: str, artefact: dict) -> str:
    """Returns what an artefact is of: its label and split, or else the name of its file in words."""
    label, split = artefact.get("label"), artefact.get("split")
    kind = str(artefact.get("kind", ""))
    if isinstance(split, str) and split:
        return pages.text(names.evaluation(label if isinstance(label, str) else kind, split), 200)
    return pages.text(pages.title(pages.words(name)), 200)


def _missing(what: str) -> str:
    return f'<p class="missing">Left out: {what}.</p>'
