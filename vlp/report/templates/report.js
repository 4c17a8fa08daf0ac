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
    const words = input.value.toLowerCase().split(/\s+/);
    for (const row of input.parentElement.querySelectorAll("tr"))
      row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
  });
}
