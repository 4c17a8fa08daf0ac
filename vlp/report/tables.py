"""Tables of the report: the latest evaluation, the config with its search box, the versions."""

import json
import math
from collections.abc import Iterator
from html import escape
from typing import Any

from vlp.report import curves, load, numbers, summary


def evaluation(row: load.Row) -> str:
    """Returns the numbers of one evaluation: a row a direction or prefix, a column a metric."""
    cells: dict[str, dict[str, str]] = {}
    for key, value in row.values.items():
        head, _, tail = key.rpartition("/")
        if head != "time":
            cells.setdefault(head, {})[tail] = _metric(tail, value)
    if any(tail.startswith("R@") for tails in cells.values() for tail in tails):
        cells |= _chance(row, cells)
    size = cells.pop("", {}) if len(cells) > 1 else {}
    columns = list(dict.fromkeys(tail for tails in cells.values() for tail in tails))
    head = "".join(f"<th>{escape(curves.METRIC_LABELS.get(c, c))}</th>" for c in columns)
    body = "".join(
        f"<tr><th>{escape(curves.LABELS.get(name, name))}</th>"
        + "".join(f"<td>{tails.get(c, '')}</td>" for c in columns)
        + "</tr>"
        for name, tails in cells.items()
    )
    others = " · ".join(f"{escape(curves.METRIC_LABELS.get(k, k))} {v}" for k, v in size.items())
    at = f"step {numbers.count(row.step)}, {numbers.si(float(row.samples))} samples seen"
    return (
        f'<div class="scroll"><table class="numbers"><thead><tr><th></th>{head}</tr></thead>'
        f'<tbody>{body}</tbody></table></div><p class="hint">{at}'
        f"{' · ' + others if others else ''}</p>"
    )


def config(values: dict[str, Any]) -> str:
    """Returns the config flattened to one row a setting; the script shows the search box."""
    rows = [
        f"<tr><th><code>{escape(key)}</code></th><td><code>{escape(value)}</code></td></tr>"
        for key, value in flat(values, "")
    ]
    return (
        f"<details class=config><summary>{len(rows)} settings</summary>"
        '<input type="search" placeholder="find a setting or value" aria-label="find" hidden>'
        f"{_settings(rows)}</details>"
    )


def versions(values: dict[str, Any]) -> str:
    """Returns what the run ran with; attribution has its own section."""
    rows = [
        f"<tr><th>{escape(str(key))}</th><td>{escape(_version(key, value))}</td></tr>"
        for key, value in values.items()
        if key != "attribution"
    ]
    return _settings(rows)


def _settings(rows: list[str]) -> str:
    body = "".join(rows)
    return f'<div class="scroll"><table class="settings"><tbody>{body}</tbody></table></div>'


def _chance(row: load.Row, cells: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    columns = dict.fromkeys(tail for tails in cells.values() for tail in tails)
    ks = {c: summary.chance(row, int(c[2:])) for c in columns if c[:2] == "R@" and c[2:].isdigit()}
    found = {c: numbers.percent(value, 2) for c, value in ks.items() if value is not None}
    return {"chance": found} if found else {}


def confusion(artefact: dict[str, Any]) -> str:
    """Returns how often each class (row) was taken for each (column) as a heat map with numbers."""
    names, rows = artefact.get("classes"), artefact.get("confusion")
    if not (isinstance(names, list) and isinstance(rows, list) and len(names) == len(rows)):
        return ""
    if len(names) > 40:
        return f'<p class="missing">Left out: a table of {len(names)} × {len(names)} classes.</p>'
    head = "".join(f"<th>{escape(str(name))}</th>" for name in names)
    body = ""
    for i, (name, row) in enumerate(zip(names, rows, strict=True)):
        total = sum(row) or 1
        cells = "".join(
            f'<td class="heat{" diagonal" * (i == j)}" style="--share:{n / total:.3f}">{n}</td>'
            for j, n in enumerate(row)
        )
        right = numbers.percent(row[i] / total, 0)
        body += f"<tr><th>{escape(str(name))}</th>{cells}<td>{right}</td></tr>"
    return (
        f'<div class="scroll"><table class="numbers confusion"><thead><tr><th>is ↓ taken for →</th>'
        f"{head}<th>right</th></tr></thead><tbody>{body}</tbody></table></div>"
    )


def _metric(name: str, value: float) -> str:
    if name.startswith(("R@", "exact_match", "accuracy", "top5", "mean_per_class")):
        return numbers.percent(value)
    whole = math.isfinite(value) and value == int(value)
    return numbers.count(int(value)) if whole else numbers.si(value, 4)


def _version(key: str, value: object) -> str:
    if key == "devices":
        return summary.devices(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def flat(value: object, path: str) -> Iterator[tuple[str, str]]:
    """Yields ("a.b.c", "value") for every leaf; lists of plain values are one leaf."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from flat(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for i, item in enumerate(value):
            yield from flat(item, f"{path}[{i}]")
    elif path:
        yield path, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
