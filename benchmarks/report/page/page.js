"use strict";
// Sorting of the tables, and the charts, drawn from the JSON beside this script.
const DATA = JSON.parse(document.getElementById("data").textContent);
const W = 460, H = 320, LEFT = 46, RIGHT = 14, TOP = 10, BOTTOM = 40;
const dark = matchMedia("(prefers-color-scheme: dark)");
const order = [...new Set(DATA.flatMap(s => s.methods))];

function color(method) {
  // Hues by the golden angle: neighbours in the list differ, and a method keeps its own.
  const hue = (order.indexOf(method) * 137.5 + 174) % 360;
  return `hsl(${hue.toFixed(0)} ${dark.matches ? "62% 64%" : "66% 37%"})`;
}

function node(parent, name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find(m => m * power >= rough) * power;
  const found = [];
  for (let t = Math.ceil(low / step); t * step <= high + 1e-9; t++) found.push(t * step);
  return found;
}

function frame(holder, xs, ys, titles, title) {
  const pad = (ys[1] - ys[0]) * 0.06 || 1;
  const [y0, y1] = [ys[0] - pad, ys[1] + pad];
  const svg = node(holder, "svg", {viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": title});
  const x = v => LEFT + (v - xs[0]) / (xs[1] - xs[0] || 1) * (W - LEFT - RIGHT);
  const y = v => H - BOTTOM - (v - y0) / (y1 - y0) * (H - TOP - BOTTOM);
  const short = v => Math.abs(v) >= 1000 ? `${v / 1000}k` : String(+v.toPrecision(4));
  for (const t of ticks(y0, y1, 5)) {
    node(svg, "line", {class: "grid", x1: LEFT, x2: W - RIGHT, y1: y(t), y2: y(t)});
    node(svg, "text", {x: LEFT - 6, y: y(t) + 4, "text-anchor": "end"}, short(t));
  }
  for (const t of ticks(xs[0], xs[1], 5)) {
    node(svg, "text", {x: x(t), y: H - BOTTOM + 16, "text-anchor": "middle"}, short(t));
  }
  node(svg, "text", {x: (LEFT + W - RIGHT) / 2, y: H - 6, "text-anchor": "middle"}, titles[0]);
  return {svg, x, y};
}

function range(values) { return [Math.min(...values), Math.max(...values)]; }

function smooth(points) {
  // The mean of five neighbouring values: single batches are noisy.
  return points.map(([step], i) => {
    const near = points.slice(Math.max(0, i - 2), i + 3);
    return [step, near.reduce((sum, p) => sum + p[1], 0) / near.length];
  });
}

function curves(section) {
  const holder = document.querySelector(`#${section.id} .curves`);
  if (!holder) return;
  const lines = section.curves.map(c => ({...c, points: smooth(c.points)}));
  const all = lines.flatMap(c => c.points);
  // From a fifth of the way: the first steps would take all of the height.
  const last = Math.max(...all.map(p => p[0]));
  const late = all.filter(p => p[0] >= last / 5).map(p => p[1]).sort((a, b) => a - b);
  const top = late[Math.floor(late.length * 0.985)];
  const {svg, x, y} = frame(holder, [0, last], [late[0], top], ["step"], "training loss by step");
  const id = `clip-${section.id}`;
  const clip = node(svg, "clipPath", {id});
  node(clip, "rect", {x: LEFT, y: TOP, width: W - LEFT - RIGHT, height: H - TOP - BOTTOM});
  const legend = document.createElement("div");
  legend.className = "legend";
  for (const line of lines) {
    const path = line.points.map((p, i) => `${i ? "L" : "M"}${x(p[0]).toFixed(1)} ${y(p[1]).toFixed(1)}`);
    const drawn = node(svg, "path", {d: path.join(""), fill: "none", "stroke-width": 1.6,
      "stroke-linejoin": "round", "clip-path": `url(#${id})`, "data-method": line.method,
      "stroke-dasharray": line.protocol === "paper" ? "4 3" : "none"});
    node(drawn, "title", {}, line.label);
    const button = document.createElement("button");
    button.setAttribute("aria-pressed", "true");
    button.innerHTML = `<span class="dot" data-method="${line.method}"></span>`;
    button.append(line.label);
    button.addEventListener("click", () => {
      const shown = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(shown));
      drawn.style.display = shown ? "" : "none";
    });
    button.addEventListener("pointerenter", () => drawn.setAttribute("stroke-width", 3.5));
    button.addEventListener("pointerleave", () => drawn.setAttribute("stroke-width", 1.6));
    legend.append(button);
  }
  holder.append(legend);
}

function front(section) {
  const holder = document.querySelector(`#${section.id} .front`);
  if (!holder) return;
  const points = section.front;
  const xs = range(points.map(p => p.x)), room = (xs[1] - xs[0]) * 0.14 || 1;
  const ys = range(points.flatMap(p => [p.y - p.spread, p.y + p.spread]));
  const {svg, x, y} = frame(holder, [xs[0] - room, xs[1] + room], ys,
    ["parameters + state of the 60M Llama, bf16 (MB)"], "perplexity, as a ratio, against memory");
  const taken = [];
  for (const p of points) {
    const cx = x(p.x), cy = y(p.y), mine = {"data-method": p.method, "stroke-width": 1.8};
    const what = `${p.label}, ${p.paper ? "paper" : "ours"}: ${p.x.toFixed(0)} MB, ${p.y.toFixed(3)}`;
    if (p.spread) node(svg, "line", {...mine, x1: cx, x2: cx, y1: y(p.y - p.spread), y2: y(p.y + p.spread)});
    const mark = node(svg, "circle", {...mine, cx, cy, r: p.paper ? 4 : 4.5,
      class: p.paper ? "hollow" : "solid"});
    node(mark, "title", {}, what);
    if (p.paper) continue;
    // A label goes where no earlier one is: right, left, above or below its point.
    const width = p.label.length * 6.1;
    const places = [[cx + 8, cy + 4], [cx - 8 - width, cy + 4], [cx - width / 2, cy - 9],
      [cx - width / 2, cy + 17], [cx + 8, cy - 9], [cx + 8, cy + 16]];
    const free = places.find(([a, b]) => a > 0 && a + width < W &&
      !taken.some(t => a < t[0] + t[2] && t[0] < a + width && Math.abs(b - t[1]) < 12));
    if (!free) continue;
    taken.push([...free, width]);
    node(svg, "text", {class: "label", x: free[0], y: free[1]}, p.label);
  }
}

function paint() {
  for (const it of document.querySelectorAll("[data-method]")) {
    const hue = color(it.dataset.method);
    if (it.tagName === "SPAN") it.style.background = hue;
    else { it.style.stroke = hue; if (it.classList.contains("solid")) it.style.fill = hue; }
  }
}

function sortable(table) {
  table.querySelectorAll("th button").forEach((button, column) => {
    button.addEventListener("click", () => {
      const head = button.parentElement, up = head.getAttribute("aria-sort") !== "ascending";
      for (const th of table.querySelectorAll("th")) th.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const [p, q] = [key(a), key(b)], numbers = [Number(p), Number(q)];
        if (p === "" || q === "") return (p === "") - (q === "");
        const ahead = numbers.some(Number.isNaN) ? p.localeCompare(q) : numbers[0] - numbers[1];
        return up ? ahead : -ahead;
      });
      table.tBodies[0].append(...rows);
    });
  });
}

for (const section of DATA) { curves(section); front(section); }
document.querySelectorAll("table").forEach(sortable);
paint();
dark.addEventListener("change", paint);
