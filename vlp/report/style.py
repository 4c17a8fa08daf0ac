"""The page's CSS and JavaScript as text. Light, dark, paper; charts answer pointer and arrow keys.

Without the script the page loses the readouts and the search box, nothing else.
"""

CSS = """
:root {
  --page: #f4f5f8; --card: #ffffff; --ink: #1a2130; --soft: #596275; --line: #dfe3ea;
  --accent: #2459c4; --good: #0a6b4b; --good-bg: #e1f4ea; --chip-bg: #edf0f5; --mark: #b04a06;
  --band0: #eaf0fb; --band1: #fbf0e2; --bad: #b3261e;
  --shadow: 0 1px 2px #1a213014, 0 4px 14px #1a21300d;
  --s0: #2459c4; --s1: #c2540a; --s2: #0b7a60; --s3: #8a3db6; --s4: #b01c54; --s5: #67660a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #10131a; --card: #191e28; --ink: #e7eaf1; --soft: #9ba5b8; --line: #2d3443;
    --accent: #86b1ff; --good: #6fdcae; --good-bg: #16382b; --chip-bg: #262d3b; --mark: #ffae70;
    --band0: #1d2738; --band1: #2b2622; --bad: #ff8a80; --shadow: 0 0 0 1px #262d3b;
    --s0: #78a9ff; --s1: #ff9e58; --s2: #43d0a6; --s3: #cf97f3; --s4: #ff85a5; --s5: #cfcb55;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system,
  "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", Arial, sans-serif; }
header, main, footer.end { max-width: 1180px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 40px; }
code { font: .86em ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, monospace;
  overflow-wrap: anywhere; }
h1 { font-size: 2.1rem; line-height: 1.15; margin: 0; letter-spacing: -.02em;
  overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; letter-spacing: -.01em; margin: 0 0 14px; }
h3 { font-size: 1.02rem; margin: 22px 0 10px; }
h2 + h3 { margin-top: 0; }
h4 { font-size: .84rem; margin: 0 0 10px; color: var(--soft); font-weight: 600; }
.kind { margin: 0 0 4px; color: var(--accent); font-weight: 650; font-size: .84rem;
  letter-spacing: .06em;
  text-transform: uppercase; }
.path { color: var(--soft); margin: 6px 0 0; }
nav { display: flex; flex-wrap: wrap; gap: 6px 18px; margin: 18px 0 0; padding-bottom: 14px;
  border-bottom: 1px solid var(--line); font-size: .92rem; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
main > section { padding-top: 30px; }
.lead { font-size: 1.1rem; line-height: 1.6; max-width: 76ch; margin: 0 0 22px; }
.hint, .note, .missing { color: var(--soft); font-size: .88rem; }
.missing { border-left: 3px solid var(--line); padding-left: 10px; margin: 0 0 8px; }
.hint { margin: 8px 0 14px; max-width: 86ch; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }

.tiles { list-style: none; margin: 0; padding: 0; display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); }
.tiles li { background: var(--card); border-radius: 12px; box-shadow: var(--shadow);
  padding: 14px 16px 12px;
  display: flex; flex-direction: column; min-height: 122px; }
.tiles .what { color: var(--soft); font-size: .84rem; }
.tiles b { font-size: 1.75rem; line-height: 1.2; letter-spacing: -.02em; font-weight: 650;
  font-variant-numeric: tabular-nums; }
.tiles .than { color: var(--soft); font-size: .8rem; }
.spark { width: 100%; height: 24px; margin-top: auto; padding-top: 4px; display: block; }
.spark polyline { fill: none; stroke: var(--accent); stroke-width: 1.5; opacity: .75;
  vector-effect: non-scaling-stroke; }

.charts { display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
.charts > figure:only-child { max-width: 640px; }
.chart { margin: 0; background: var(--card); border-radius: 12px; box-shadow: var(--shadow);
  padding: 14px 16px 8px; min-width: 0; display: flex; flex-direction: column; }
.chart figcaption { display: flex; flex-wrap: wrap; align-items: baseline; gap: 2px 12px;
  margin-bottom: 6px; }
.chart figcaption code { color: var(--soft); }
.chart .note { font-size: .78rem; margin-left: auto; }
.legend { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: 0 14px;
  font-size: .84rem; }
.swatch { width: 26px; height: 8px; margin-right: 6px; vertical-align: middle; }
.plot { position: relative; margin-top: auto; }
.plot svg { display: block; width: 100%; height: auto; overflow: visible; touch-action: pan-y; }
.grid { stroke: var(--line); stroke-width: 1; }
.axis { stroke: var(--soft); stroke-width: 1; opacity: .7; }
.tick, .label, text.band, text.level { font-size: 11.5px; fill: var(--soft); }
text.tick { font-variant-numeric: tabular-nums; }
text.band { font-size: 11px; font-weight: 600; }
rect.b0 { fill: var(--band0); } rect.b1 { fill: var(--band1); }
.mark { fill: var(--soft); }
line.level { stroke: var(--soft); stroke-dasharray: 2 4; }
.lost { stroke: var(--bad); stroke-width: 2; fill: none; }
.line, .raw { fill: none; stroke-linejoin: round; stroke-linecap: round; stroke-width: 2; }
.raw { stroke-width: 1; opacity: .28; stroke-dasharray: none !important; }
.s0 { stroke: var(--s0); } .s1 { stroke: var(--s1); stroke-dasharray: 7 4;
  } .s2 { stroke: var(--s2); stroke-dasharray: 1.5 4; }
.s3 { stroke: var(--s3); stroke-dasharray: 10 3 2 3; } .s4 { stroke: var(--s4);
  stroke-dasharray: 3 3; }
.s5 { stroke: var(--s5); stroke-dasharray: 12 5; }
.dot { fill: var(--card); stroke-width: 2; stroke-dasharray: none; }
.cursor line { stroke: var(--ink); stroke-width: 1; opacity: .45; }
.cursor circle { stroke-width: 2; stroke-dasharray: none; fill: var(--card); }
.tip { position: absolute; top: 6%; pointer-events: none; background: var(--ink);
  color: var(--card);
  padding: 6px 10px; border-radius: 8px; font-size: .8rem; line-height: 1.4; white-space: nowrap;
  z-index: 2;
  font-variant-numeric: tabular-nums; }
.tip b { font-weight: 650; }
.tip div:first-child { opacity: .75; }
details > summary { cursor: pointer; color: var(--soft); font-size: .84rem; padding: 4px 0;
  width: fit-content; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
.numbers { font-variant-numeric: tabular-nums; }
.numbers th, .numbers td { text-align: right; padding: 5px 14px 5px 0;
  border-bottom: 1px solid var(--line);
  white-space: nowrap; }
.numbers th:first-child { text-align: left; font-weight: 500; }
.numbers thead th { color: var(--soft); font-weight: 500; font-size: .84rem; }
section > .scroll > .numbers, section > .scroll > .settings { background: var(--card);
  border-radius: 12px; }
section > .scroll { background: var(--card); border-radius: 12px; box-shadow: var(--shadow);
  padding: 8px 18px;
  width: fit-content; max-width: 100%; }
section > .scroll tr:last-child > *, .settings tr:last-child > * { border-bottom: 0; }
.confusion .heat { text-align: center; padding: 6px 10px;
  background: color-mix(in srgb, var(--accent) calc(var(--share) * 75%), transparent); }
.confusion .diagonal { font-weight: 650; box-shadow: inset 0 0 0 1px var(--line); }
.similarity img { width: 36px; height: 36px; display: block; margin: 0 auto; }
.similarity .heat { padding: 6px 4px; font-size: 12px; }
.similarity .diagonal { box-shadow: inset 0 0 0 1.5px var(--ink); }
.settings { width: 100%; }
.settings th, .settings td { text-align: left; vertical-align: top; padding: 4px 26px 4px 0;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
.settings th { font-weight: 400; color: var(--soft); }
.config { background: var(--card); border-radius: 12px; box-shadow: var(--shadow);
  padding: 10px 18px; }
.config > summary { font-size: .95rem; color: var(--ink); }
.config input { width: min(100%, 360px); margin: 8px 0 10px; padding: 8px 12px; font: inherit;
  color: inherit;
  background: var(--page); border: 1px solid var(--line); border-radius: 8px; }
[hidden] { display: none !important; }

.filter { border: 0; margin: 0 0 14px; padding: 0; display: flex; flex-wrap: wrap; gap: 4px 16px;
  font-size: .9rem; }
.filter legend { float: left; color: var(--soft); margin-right: 12px; padding: 0; }
.filter input { accent-color: var(--accent); }
.gallery:has(input[value=missed]:checked) .hit, .gallery:has(input[value=hit]:checked) .missed {
  display: none; }
.queries { display: grid; gap: 14px; }
.query { background: var(--card); border-radius: 12px; box-shadow: var(--shadow);
  padding: 16px 18px 10px;
  display: grid; grid-template-columns: 1fr 1fr; gap: 4px 30px; }
.query > footer { grid-column: 1 / -1; color: var(--soft); font-size: .82rem; text-align: right; }
.query > section { min-width: 0; }
img, .no-image { border-radius: 8px; background: #fff; object-fit: contain; display: block;
  width: 96px; height: 96px;
  border: 1px solid var(--line); }
.no-image { display: grid; place-items: center; background: var(--chip-bg); color: var(--soft);
  font-size: .75rem; }
.ask { display: flex; gap: 16px; align-items: flex-start; }
.ask > img, .ask > .no-image { width: 128px; height: 128px; flex: none; }
.query ol { margin: 0; padding: 0; list-style: none; }
.ask ol { flex: 1; min-width: 0; counter-reset: rank; }
.ask li { counter-increment: rank; display: flex; gap: 10px; justify-content: space-between;
  padding: 3px 8px;
  border-left: 3px solid transparent; font-size: .92rem; line-height: 1.4; }
.ask li > span:first-child { overflow-wrap: anywhere; }
.ask li > span:first-child::before { content: counter(rank) ". "; color: var(--soft); }
.ask li.is-right { border-left-color: var(--good); background: var(--good-bg);
  border-radius: 0 6px 6px 0; }
.score { color: var(--soft); font-size: .8rem; font-variant-numeric: tabular-nums; flex: none; }
.right { color: var(--good); font-weight: 650; font-size: .82rem; white-space: nowrap; }
blockquote { margin: 0 0 10px; padding: 0; font-size: 1rem; overflow-wrap: anywhere; }
blockquote::before { content: "\\201C"; } blockquote::after { content: "\\201D"; }
.thumbs { display: grid; grid-template-columns: repeat(5, minmax(0, 1fr)); gap: 8px; }
.thumbs li { display: flex; flex-direction: column; align-items: center; gap: 2px; padding: 5px;
  border-radius: 10px; }
.thumbs li.is-right { background: var(--good-bg); box-shadow: inset 0 0 0 2px var(--good); }
.thumbs img, .thumbs .no-image { width: 100%; height: auto; max-width: 96px; aspect-ratio: 1; }
.chip { display: inline-block; font-size: .76rem; font-weight: 600; padding: 1px 9px;
  border-radius: 99px;
  background: var(--chip-bg); color: var(--soft); margin-left: 4px; white-space: nowrap; }
.chip.good { background: var(--good-bg); color: var(--good); }
.captions { display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); }
.captioned { background: var(--card); border-radius: 12px; box-shadow: var(--shadow);
  padding: 14px 16px;
  display: flex; gap: 16px; }
.captioned img, .captioned .no-image { flex: none; width: 104px; height: 104px; }
.captioned > div { min-width: 0; flex: 1; }
.captioned .chip { margin: 0 0 6px; }
.captioned dl { margin: 0 0 4px; font-size: .92rem; line-height: 1.4; overflow-wrap: anywhere; }
.captioned dt { color: var(--soft); font-size: .75rem; }
.captioned dd { margin: 0 0 4px; }
.captioned code { color: var(--soft); font-size: .74rem; }
mark { background: none; color: var(--mark); text-decoration: underline;
  text-decoration-thickness: 2px;
  text-underline-offset: 3px; }
.attribution { white-space: pre-line; font-size: .9rem; max-width: 86ch; margin: 0 0 8px;
  overflow-wrap: anywhere; }
footer.end { margin-top: 40px; padding-top: 14px; padding-bottom: 40px; color: var(--soft);
  font-size: .84rem; }
footer.end p { margin: 0 0 6px; }

@media (max-width: 760px) {
  header { padding-top: 24px; }
  header, main, footer.end { padding-left: 14px; padding-right: 14px; }
  h1 { font-size: 1.6rem; }
  .tiles { grid-template-columns: repeat(auto-fill, minmax(148px, 1fr)); gap: 10px; }
  .query { grid-template-columns: 1fr; gap: 18px; padding: 14px; }
  .chart { padding: 12px 12px 6px; }
  .tick, .label, text.level { font-size: 16px; }
  text.band { font-size: 15px; }
  .ask > img, .ask > .no-image { width: 88px; height: 88px; }
  .ask { gap: 8px; }
}
@media print {
  :root { --page: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #ccc; --accent: #2459c4;
    --good: #0a6b4b;
    --good-bg: #fff; --chip-bg: #fff; --band0: #f0f3fa; --band1: #faf3ea; --mark: #b04a06;
    --bad: #b3261e;
    --shadow: 0 0 0 1px #ccc; --s0: #2459c4; --s1: #c2540a; --s2: #0b7a60; --s3: #8a3db6;
    --s4: #b01c54; --s5: #67660a; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { font-size: 11pt; }
  header { padding-top: 0; }
  nav, .filter, .chart details, .config input { display: none; }
  .charts { grid-template-columns: 1fr 1fr; }
  .chart, .query, .captioned, .tiles li { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
}
"""

SCRIPT = """
"use strict";
const NS = document.querySelector("svg")?.namespaceURI;
const nearest = (xs, x) =>
  xs.reduce((best, v, i) => Math.abs(v - x) < Math.abs(xs[best] - x) ? i : best, 0);
const add = (parent, name, attrs) => {
  const node = document.createElementNS(NS, name);
  for (const key in attrs) node.setAttribute(key, attrs[key]);
  parent.append(node);
};
for (const fig of document.querySelectorAll("[data-chart]")) {
  const data = JSON.parse(fig.dataset.chart), [left, right, top, bottom, width] = data.box;
  const svg = fig.querySelector(".plot > svg"), cursor = svg.querySelector(".cursor");
  const tip = fig.querySelector(".tip");
  let at = data.at.length - 1;
  const show = (i) => {
    if (i < 0 || i >= data.at.length) return;
    at = i;
    const x = data.at[i];
    cursor.replaceChildren();
    tip.replaceChildren();
    add(cursor, "line", {x1: x, x2: x, y1: top, y2: bottom});
    const rows = [data.named[i]];
    data.series.forEach((s, k) => {
      if (!s.x.length) return;
      const j = nearest(s.x, x);
      rows.push((data.series.length > 1 ? s.label + ": " : "") + s.text[j]);
      if (s.y[j] === null) return;
      add(cursor, "circle", {cx: s.x[j], cy: s.y[j], r: 3.5, class: "s" + k % 6});
    });
    for (const row of rows) {
      const div = document.createElement("div");
      div.textContent = row;
      tip.append(div);
    }
    tip.hidden = false;
    const far = x > (left + right) / 2, share = 100 * x / width;
    tip.style.left = far ? "auto" : "calc(" + share + "% + 10px)";
    tip.style.right = far ? "calc(" + (100 - share) + "% + 10px)" : "auto";
  };
  const hide = () => { tip.hidden = true; cursor.replaceChildren(); };
  const point = (event) => {
    const box = svg.getBoundingClientRect();
    show(nearest(data.at, (event.clientX - box.left) / box.width * width));
  };
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const move = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (!move) return;
    event.preventDefault();
    show(tip.hidden ? at : at + move);
  });
}
for (const input of document.querySelectorAll(".config input")) {
  input.hidden = false;
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\\s+/);
    for (const row of input.parentElement.querySelectorAll("tr"))
      row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
  });
}
"""
