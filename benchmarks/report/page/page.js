"use strict";
// Sorting of the tables, and the charts, drawn from the JSON beside this script.
const DATA = JSON.parse(document.getElementById("data").textContent);
const W = 460, H = 320, LEFT = 46, RIGHT = 14, TOP = 10, BOTTOM = 40;
// Around a point, at which sides and how far off a name may stand.
const SIDES = [1, .5, 0, -.5, -1].flatMap(a => [0, .5, -.5, 1, -1].map(b => [a, b]))
  .filter(([a, b]) => Math.max(Math.abs(a), Math.abs(b)) === 1);
const DISTANCES = [6, 9, 13, 18, 24, 31, 39, 48, 60, 75, 95, 120];

function node(parent, name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

function colored(section, method) {
  return {"data-method": method, style: `--color: ${section.colors[method]}`};
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
      "stroke-linejoin": "round", "clip-path": `url(#${id})`, ...colored(section, line.method),
      "stroke-dasharray": line.protocol === "paper" ? "4 3" : "none"});
    node(drawn, "title", {}, line.label);
    const button = document.createElement("button");
    button.setAttribute("aria-pressed", "true");
    const dot = document.createElement("span");
    dot.className = "dot";
    dot.style.setProperty("--color", section.colors[line.method]);
    button.append(dot, line.label);
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

const box = (x, y, w, h) => [x, y, x + w, y + h];
const area = (a, b) => Math.max(0, Math.min(a[2], b[2]) - Math.max(a[0], b[0])) *
  Math.max(0, Math.min(a[3], b[3]) - Math.max(a[1], b[1]));

function nearest([x, y], [x0, y0, x1, y1]) {
  return [Math.min(Math.max(x, x0), x1), Math.min(Math.max(y, y0), y1)];
}

function leader(point, place) {
  // Small boxes along the line from a point to its name.
  const end = nearest(point, place);
  return [.25, .4, .55, .7, .85, 1].map(t =>
    box(point[0] + t * (end[0] - point[0]) - .5, point[1] + t * (end[1] - point[1]) - .5, 1, 1));
}

function places(names, marks, lines) {
  // As in benchmarks/experiments/labels.py: each name in turn takes the cheapest place.
  const made = names.map(n => box(...n.point, 0, 0));
  for (let round = 0; round < 15; round++) {
    const before = JSON.stringify(made);
    names.forEach(({point, size: [w, h]}, i) => {
      const others = names.map((_, j) => j).filter(j => j !== i);
      const near = others.map(j => [made[j][0] - 2, made[j][1] - 1, made[j][2] + 2, made[j][3] + 1]);
      const hard = [...marks, ...near, ...others.flatMap(j => leader(names[j].point, made[j]))];
      const core = box(point[0] - 1, point[1] - 1, 2, 2);
      const crossed = [...near, ...marks.filter(m => !area(m, core))];
      let least = Infinity;
      for (const far of DISTANCES) for (const [a, b] of SIDES) {
        const tried = box(point[0] + a * (w / 2 + far) - w / 2, point[1] + b * (h / 2 + far) - h / 2, w, h);
        const inside = area(tried, [LEFT + 2, TOP, W - 2, H - BOTTOM - 2]);
        const sum = (boxes, one) => boxes.reduce((total, other) => total + area(one, other), 0);
        const cost = far + 50 * (w * h - inside + sum(hard, tried)) + 4 * sum(lines, tried) +
          50 * leader(point, tried).reduce((total, spot) => total + sum(crossed, spot), 0);
        if (cost < least) [least, made[i]] = [cost, tried];
      }
    });
    if (JSON.stringify(made) === before) break;
  }
  return made;
}

function front(section) {
  const holder = document.querySelector(`#${section.id} .front`);
  if (!holder) return;
  holder.querySelector("svg")?.remove();
  const points = section.front;
  const xs = range(points.map(p => p.x)), room = (xs[1] - xs[0]) * 0.14 || 1;
  const ys = range(points.flatMap(p => [p.y - p.spread, p.y + p.spread]));
  const {svg, x, y} = frame(holder, [xs[0] - room, xs[1] + room], ys,
    ["parameters + state of the 60M Llama, bf16 (MB)"], "perplexity, as a ratio, against memory");
  const best = points.filter(p => p.best).sort((p, q) => p.x - q.x);
  const steps = best.map((p, i) => i ? `H${x(p.x)}V${y(p.y)}` : `M${x(p.x)} ${y(p.y)}`);
  if (best.length) node(svg, "path", {class: "frontier", d: `${steps.join("")}H${W - RIGHT}`});
  const ends = best.map((p, i) => best[i + 1] ?? {x: xs[1] + room, y: p.y});
  const lines = best.flatMap((p, i) => [
    [x(p.x), y(p.y) - 1, x(ends[i].x), y(p.y) + 1],
    [x(ends[i].x) - 1, y(p.y), x(ends[i].x) + 1, y(ends[i].y)]]);
  for (const p of points) {
    const cx = x(p.x), cy = y(p.y), mine = {...colored(section, p.method), "stroke-width": 1.8};
    const what = `${p.label}, ${p.paper ? "paper" : "ours"}: ${p.x.toFixed(0)} MB, ${p.y.toFixed(3)}`;
    const [high, low] = [y(p.y + p.spread), y(p.y - p.spread)];
    if (p.spread) node(svg, "line", {...mine, x1: cx, x2: cx, y1: low, y2: high});
    lines.push([cx - 1, high, cx + 1, low]);
    const mark = node(svg, "circle", {...mine, cx, cy, r: p.paper ? 4 : 4.5,
      class: p.paper ? "hollow" : "solid"});
    node(mark, "title", {}, what);
  }
  const names = points.filter(p => !p.paper).map(p => {
    const text = node(svg, "text", {class: p.best ? "label best" : "label"}, p.label);
    const {width, height, y: above} = text.getBBox();
    return {text, above, point: [x(p.x), y(p.y)], size: [width, height]};
  });
  const marks = points.map(p => box(x(p.x) - 5, y(p.y) - 5, 10, 10));
  places(names, marks, lines).forEach((place, i) => {
    const {text, above, point} = names[i], [ex, ey] = nearest(point, place);
    text.setAttribute("x", place[0]);
    text.setAttribute("y", place[1] - above);
    const far = Math.hypot(ex - point[0], ey - point[1]);
    if (far <= 10) return;
    const [sx, sy] = [0, 1].map(k => point[k] + ([ex, ey][k] - point[k]) * 5 / far);
    node(svg, "line", {class: "leader", x1: sx, y1: sy, x2: ex, y2: ey});
  });
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
// Text is larger on a narrow screen (page.css), so names stand elsewhere.
matchMedia("(max-width: 30rem)").addEventListener("change", () => DATA.forEach(front));
