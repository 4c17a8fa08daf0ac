"""Pages of one HTML file: the frame, the style that all of them share, and text that can do no harm.

`document` makes a page that asks nothing of the network: its policy allows inline style, images given
as data, and the one script that is passed. Whatever comes from a file goes through `text`.
"""

import base64
import hashlib
import html

MAX_CHARS = 2_000  # of one text; the rest is cut

# Control characters become visible: C0 as control pictures (␛), the others by number. Those that turn
# the direction of a text are among them: they can make a file name read as another one.
_VISIBLE: dict[int, str] = {i: chr(0x2400 + i) for i in range(32) if chr(i) not in "\n\t"}
_VISIBLE |= {0x7F: "\N{SYMBOL FOR DELETE}"}
_VISIBLE |= {
    i: f"\N{MATHEMATICAL LEFT ANGLE BRACKET}{i:02X}\N{MATHEMATICAL RIGHT ANGLE BRACKET}"
    for i in (*range(0x80, 0xA0), 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A))
}
_SURROGATES = {i: "\N{REPLACEMENT CHARACTER}" for i in range(0xD800, 0xE000)}  # in no encoding
_VISIBLE |= _SURROGATES


def visible(value: object, most: int = MAX_CHARS) -> str:
    """Returns at most `most` characters of a text, control characters as visible signs; not escaped."""
    whole = str(value)
    cut = whole if len(whole) <= most else whole[:most] + "…"
    return cut.translate(_VISIBLE)


def text(value: object, most: int = MAX_CHARS) -> str:
    """Returns `visible` text, escaped for HTML and its attributes."""
    return html.escape(visible(value, most))


def words(identifier: str) -> str:
    """Returns an identifier as words: "skin_tone" as "skin tone", "val+test" as "val + test"."""
    return " ".join(identifier.replace("_", " ").replace("+", " + ").split())


def title(label: str) -> str:
    """Returns a label that begins with a capital."""
    return label[:1].upper() + label[1:]


def tiles(items: list[tuple[str, str, str, str]]) -> str:
    """Returns figures in large type: (label, value, note, HTML below) of each."""
    body = "".join(
        f'<li><span class="what">{text(label)}</span><b>{text(value)}</b>'
        f'<span class="than">{text(note)}</span>{below}</li>'
        for label, value, note, below in items
    )
    return f'<ul class="tiles">{body}</ul>'


def document(
    *,
    kind: str,
    title: str,
    path: str,
    sections: list[tuple[str, str, str]],
    end: str,
    css: str = "",
    script: str = "",
) -> str:
    """Returns the page. kind, title, path: plain text. sections: (id, heading, HTML); those without HTML are left out.

    end: HTML of the foot. css comes after the shared style; script is the only one that may run.
    """
    shown = [section for section in sections if section[2]]
    nav = "".join(f'<a href="#{name}">{text(heading)}</a>' for name, heading, _ in shown)
    main = "".join(
        f'<section id="{name}"><h2>{text(heading)}</h2>{body}</section>'
        for name, heading, body in shown
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f"; script-src 'sha256-{digest}'" if script else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'{allowed}">
<title>{text(title, 200)}</title>
<style>{CSS}{css}</style>
</head>
<body>
<header><p class="kind">{text(kind)}</p><h1>{text(title, 200)}</h1>\
<p class="path"><code>{text(path)}</code></p>
<nav>{nav}</nav></header>
<main>{main}</main>
<footer class="end">{end}</footer>
{f"<script>{script}</script>" if script else ""}
</body>
</html>
"""


CSS = """
:root {
  --page: #fbfbfa; --card: #ffffff; --ink: #1b1f27; --soft: #5d6470; --line: #e2e4e8;
  --accent: #2459c4; --good: #0a6b4b; --good-bg: #e6f4ec; --chip-bg: #f0f1f3; --mark: #a84605;
  --bad: #b3261e; --band0: #ffffff00; --band1: #f6f1e8;
  --s0: #2459c4; --s1: #c2540a; --s2: #0b7a60; --s3: #8a3db6; --s4: #b01c54; --s5: #67660a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #121419; --card: #181b22; --ink: #e4e6eb; --soft: #9aa1ae; --line: #2b303a;
    --accent: #86b1ff; --good: #6fdcae; --good-bg: #17352a; --chip-bg: #252a33; --mark: #ffae70;
    --bad: #ff8a80; --band1: #24221e;
    --s0: #78a9ff; --s1: #ff9e58; --s2: #43d0a6; --s3: #cf97f3; --s4: #ff85a5; --s5: #cfcb55;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.55 system-ui,
  -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", Arial, sans-serif; }
header, main, footer.end { max-width: 1180px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 36px; }
code { font: .88em ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, monospace;
  overflow-wrap: anywhere; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0; letter-spacing: -.02em; font-weight: 650;
  overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; letter-spacing: -.01em; margin: 0 0 12px; font-weight: 650; }
h3 { font-size: 1rem; margin: 24px 0 8px; font-weight: 650; }
h2 + h3 { margin-top: 0; }
h4 { font-size: .87rem; margin: 0 0 8px; color: var(--soft); font-weight: 600; }
.kind { margin: 0 0 2px; color: var(--soft); font-weight: 600; font-size: .8rem; letter-spacing: .08em;
  text-transform: uppercase; }
.path { color: var(--soft); margin: 4px 0 0; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 14px 0 0; font-size: .9rem; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
main > section { margin-top: 26px; padding-top: 18px; border-top: 1px solid var(--line); }
.lead { font-size: 1.08rem; line-height: 1.6; max-width: 78ch; margin: 0 0 18px; }
.hint, .note, .missing { color: var(--soft); font-size: .87rem; }
.hint { margin: 8px 0 12px; max-width: 90ch; }
.missing { border-left: 2px solid var(--line); padding-left: 10px; margin: 0 0 8px; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }

.tiles { list-style: none; margin: 0; padding: 0; display: grid; gap: 14px 28px;
  grid-template-columns: repeat(auto-fill, minmax(min(45%, 230px), 1fr)); }
.tiles li { border-top: 1px solid var(--line); padding-top: 8px; display: flex; min-width: 0;
  flex-direction: column; }
.tiles .what, .tiles .than { color: var(--soft); font-size: .82rem; overflow-wrap: anywhere; }
.tiles b { font-size: 1.65rem; line-height: 1.25; letter-spacing: -.02em; font-weight: 600;
  font-variant-numeric: tabular-nums; }

.cards { display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); }
.stack { columns: 320px 3; column-gap: 14px; margin-bottom: 0; }
.stack > .card { break-inside: avoid; }
.stack .numbers thead th { white-space: normal; }
.stack > .card + .card { margin-top: 14px; }
.cards + .cards, .cards + details, details + .cards { margin-top: 14px; }
.card { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 12px 14px; min-width: 0; }
.card > .hint { margin: 8px 0 0; font-size: .8rem; }
.card > h3 { margin: 0 0 6px; font-size: .95rem; }
.card > h3 span { color: var(--soft); font-weight: 400; }
.wide { width: fit-content; max-width: 100%; }
.wide + .wide, .wide + .cards { margin-top: 14px; }
details > summary { cursor: pointer; color: var(--soft); font-size: .84rem; padding: 3px 0;
  width: fit-content; }
.more { margin-top: 10px; }
.more > summary { color: var(--accent); font-size: .9rem; }
.more[open] > summary { margin-bottom: 8px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .87rem; }
.numbers { font-variant-numeric: tabular-nums; }
.card .numbers { width: 100%; }
.numbers th, .numbers td { text-align: right; padding: 3px 0 3px 12px; font-weight: 400;
  border-bottom: 1px solid var(--line); white-space: nowrap; }
.numbers th:first-child { text-align: left; padding-left: 0; }
.numbers tbody th:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 6.5em; }
.wide + .stack, .stack + .cards, .stack + details { margin-top: 14px; }
.numbers thead th { color: var(--soft); font-size: .93em; vertical-align: bottom; }
.numbers tbody .group th { color: var(--soft); padding-top: 6px; border-bottom-color: var(--soft); }
.numbers tbody tr.group:first-child th { padding-top: 0; }
.numbers thead .group { text-align: center; border-bottom-color: var(--soft); }
.numbers tbody tr:last-child > *, .settings tr:last-child > * { border-bottom: 0; }
td.best { font-weight: 700; }
td.near { text-decoration: underline dotted; text-underline-offset: 3px; }
.pictures { display: grid; gap: 18px 14px;
  grid-template-columns: repeat(auto-fill, minmax(min(45%, 168px), 1fr)); }
.pictures figure { margin: 0; min-width: 0; }
.pictures img, .pictures .no-image { width: 100%; height: auto; aspect-ratio: 1; }
.pictures figcaption { font-size: .84rem; line-height: 1.4; margin-top: 6px;
  overflow-wrap: anywhere; }
.pictures p { margin: 0 0 2px; }
.pictures code, .pictures .note { color: var(--soft); font-size: .78rem; }
.pictures .tag { color: var(--soft); }
img, .no-image { border-radius: 6px; background: #fff; object-fit: contain; display: block;
  width: 96px; height: 96px; border: 1px solid var(--line); }
.no-image { display: grid; place-items: center; background: var(--chip-bg); color: var(--soft);
  font-size: .75rem; text-align: center; }
[hidden] { display: none !important; }
footer.end { margin-top: 36px; padding-top: 12px; padding-bottom: 36px; color: var(--soft);
  font-size: .84rem; }
footer.end p { margin: 0 0 6px; }

@media (max-width: 760px) {
  header { padding-top: 22px; }
  header, main, footer.end { padding-left: 14px; padding-right: 14px; }
  h1 { font-size: 1.6rem; }
  .lead { font-size: 1rem; }
  .tiles { gap: 12px 18px; }
  .tiles b { font-size: 1.4rem; }
  .numbers th, .numbers td { padding-left: 9px; }
  .settings th, .settings td { min-width: 7.5em; }
  .scroll th:first-child { position: sticky; left: 0; background: var(--card); }
}
@media print {
  :root { --page: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #ccc; --accent: #2459c4;
    --good: #0a6b4b; --good-bg: #fff; --chip-bg: #fff; --band1: #f6f1e8; --mark: #a84605;
    --bad: #b3261e; --s0: #2459c4; --s1: #c2540a; --s2: #0b7a60; --s3: #8a3db6; --s4: #b01c54;
    --s5: #67660a; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { font-size: 10.5pt; }
  header { padding-top: 0; }
  nav { display: none; }
  .card, .tiles li, .pictures figure { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
}
"""
