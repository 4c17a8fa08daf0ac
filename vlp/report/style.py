"""What the report adds to the shared style (vlp/core/pages.py), and its script. Charts answer pointer and arrow keys.

Without the script the page loses the readouts and the search box, nothing else.
"""

CSS = """
.spark { width: 100%; max-width: 230px; height: 22px; margin-top: 4px; display: block; }
.spark polyline { fill: none; stroke: var(--accent); stroke-width: 1.5; opacity: .7;
  vector-effect: non-scaling-stroke; }
.chart { padding-bottom: 6px; display: flex; flex-direction: column; }
.chart figcaption { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 12px;
  margin-bottom: 4px; font-size: .93rem; line-height: 1.4; }
.chart strong { font-weight: 650; }
.chart .of { color: var(--soft); font-size: .82rem; }
.chart .note { font-size: .78rem; margin-left: auto; }
.legend { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: 0 12px;
  font-size: .8rem; flex-basis: 100%; }
.legend li { overflow-wrap: anywhere; }
.swatch { width: 20px; height: 8px; margin-right: 5px; vertical-align: middle; }
.plot { position: relative; margin-top: auto; }
.plot svg { display: block; width: 100%; height: auto; overflow: visible; touch-action: pan-y; }
.grid { stroke: var(--line); stroke-width: 1; }
.axis { stroke: var(--soft); stroke-width: 1; opacity: .6; }
.tick, .label, text.band { font-size: 11px; fill: var(--soft); }
text.tick { font-variant-numeric: tabular-nums; }
text.band { font-size: 10.5px; font-weight: 600; }
rect.b0 { fill: var(--band0); } rect.b1 { fill: var(--band1); }
.mark { fill: var(--soft); opacity: .75; }
.level { fill: none; stroke: var(--soft); stroke-dasharray: 2 4; }
.lost { stroke: var(--bad); stroke-width: 2; fill: none; }
.line, .raw { fill: none; stroke-linejoin: round; stroke-linecap: round; stroke-width: 1.75; }
.raw { stroke-width: 1; opacity: .28; stroke-dasharray: none !important; }
.s0 { stroke: var(--s0); }
.s1 { stroke: var(--s1); stroke-dasharray: 6 3.5; }
.s2 { stroke: var(--s2); stroke-dasharray: 1.5 3.5; }
.s3 { stroke: var(--s3); stroke-dasharray: 9 3 2 3; }
.s4 { stroke: var(--s4); stroke-dasharray: 3 3; }
.s5 { stroke: var(--s5); stroke-dasharray: 11 5; }
.dot { fill: var(--card); stroke-width: 1.75; stroke-dasharray: none; }
.chart details > summary { font-size: .76rem; padding: 0; }
.cursor line { stroke: var(--ink); stroke-width: 1; opacity: .45; }
.cursor circle { stroke-width: 2; stroke-dasharray: none; fill: var(--card); }
.tip { position: absolute; top: 6%; pointer-events: none; background: var(--ink);
  color: var(--card); padding: 5px 9px; border-radius: 6px; font-size: .78rem; line-height: 1.4;
  white-space: nowrap; z-index: 2; font-variant-numeric: tabular-nums; }
.tip div:first-child { opacity: .75; }
span.near { text-decoration: underline dotted; text-underline-offset: 3px; }
.confusion .heat { text-align: center; padding: 5px 9px;
  background: color-mix(in srgb, var(--accent) calc(var(--share) * 60%), transparent); }
.confusion .diagonal { font-weight: 650; box-shadow: inset 0 0 0 1px var(--soft); }
.similarity img, .similarity .no-image { width: 36px; height: 36px; display: block; margin: 0 auto;
  font-size: 0; }
.similarity .heat { padding: 6px 4px; font-size: 12px; }
.settings { width: 100%; }
.settings th, .settings td { text-align: left; vertical-align: top; padding: 4px 26px 4px 0;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere; font-weight: 400; }
.settings th { color: var(--soft); }
.config > summary { font-size: .95rem; color: var(--ink); }
.config input { width: min(100%, 360px); margin: 8px 0 10px; padding: 7px 11px; font: inherit;
  color: inherit; background: var(--page); border: 1px solid var(--line); border-radius: 6px; }

.filter { border: 0; margin: 0 0 12px; padding: 0; display: flex; flex-wrap: wrap; gap: 4px 16px;
  font-size: .9rem; }
.filter legend { float: left; color: var(--soft); margin-right: 12px; padding: 0; }
.filter input { accent-color: var(--accent); }
.gallery:has(input[value=missed]:checked) .hit, .gallery:has(input[value=hit]:checked) .missed {
  display: none; }
.queries { display: grid; gap: 14px; }
.query { display: grid; grid-template-columns: 1fr 1fr; gap: 4px 30px; }
.query > footer { grid-column: 1 / -1; color: var(--soft); font-size: .8rem; text-align: right; }
.query > section { min-width: 0; }
.ask { display: flex; gap: 16px; align-items: flex-start; }
.ask > img, .ask > .no-image { width: 128px; height: 128px; flex: none; }
.query ol { margin: 0; padding: 0; list-style: none; }
.ask ol { flex: 1; min-width: 0; counter-reset: rank; }
.ask li { counter-increment: rank; display: flex; gap: 10px; justify-content: space-between;
  padding: 3px 8px; border-left: 3px solid transparent; font-size: .9rem; line-height: 1.4; }
.ask li > span:first-child { overflow-wrap: anywhere; }
.ask li > span:first-child::before { content: counter(rank) ". "; color: var(--soft); }
.ask li.is-right { border-left-color: var(--good); background: var(--good-bg);
  border-radius: 0 6px 6px 0; }
.score { color: var(--soft); font-size: .8rem; font-variant-numeric: tabular-nums; flex: none; }
.right { color: var(--good); font-weight: 650; font-size: .8rem; white-space: nowrap; }
blockquote { margin: 0 0 10px; padding: 0; overflow-wrap: anywhere; }
blockquote::before { content: "\\201C"; } blockquote::after { content: "\\201D"; }
.thumbs { display: grid; grid-template-columns: repeat(5, minmax(0, 1fr)); gap: 8px; }
.thumbs li { display: flex; flex-direction: column; align-items: center; gap: 2px; padding: 5px;
  border-radius: 8px; min-width: 0; }
.thumbs li.is-right { background: var(--good-bg); box-shadow: inset 0 0 0 1.5px var(--good); }
.thumbs img, .thumbs .no-image { width: 100%; height: auto; max-width: 96px; aspect-ratio: 1; }
.chip { display: inline-block; font-size: .75rem; font-weight: 600; padding: 1px 9px;
  border-radius: 99px; background: var(--chip-bg); color: var(--soft); margin-left: 4px;
  white-space: nowrap; }
.chip.good { background: var(--good-bg); color: var(--good); }
.captions { display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); }
.captioned { display: flex; gap: 14px; }
.captioned img, .captioned .no-image { flex: none; width: 96px; height: 96px; }
.captioned > div { min-width: 0; flex: 1; }
.captioned .chip { margin: 0 0 6px; }
.captioned dl { margin: 0 0 4px; font-size: .9rem; line-height: 1.4; overflow-wrap: anywhere; }
.captioned dt { color: var(--soft); font-size: .75rem; }
.captioned dd { margin: 0 0 4px; }
.captioned code { color: var(--soft); font-size: .74rem; }
mark { background: none; color: var(--mark); text-decoration: underline;
  text-decoration-thickness: 1.5px; text-underline-offset: 3px; }
.attribution { white-space: pre-line; font-size: .9rem; max-width: 86ch; margin: 0 0 8px;
  overflow-wrap: anywhere; }

@media (max-width: 760px) {
  .query { grid-template-columns: minmax(0, 1fr); gap: 18px; }
  .ask > img, .ask > .no-image { width: 88px; height: 88px; }
  .ask { gap: 8px; }
}
@media print {
  .filter, .chart details, .config input { display: none; }
  .cards { grid-template-columns: 1fr 1fr; }
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
