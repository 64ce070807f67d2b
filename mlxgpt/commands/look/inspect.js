"use strict";
// Draws what the page of `mlxgpt inspect` holds in #data; text goes into the page as text, never as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const count = data.ids.length, depth = data.norms.attn.length;
const dark = window.matchMedia("(prefers-color-scheme: dark)");
let chosen = count - 1, pinned = chosen;

function make(tag, text = "", name = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  if (name) made.className = name;
  return made;
}

function token(id, hit = false) {
  const made = make("bdi", data.names[id], hit ? "token hit" : "token");
  made.title = `${data.names[id]} (id ${id})`;
  return made;
}

const percent = (p) => (p >= 0.001 ? `${(100 * p).toFixed(1)} %` : p.toExponential(1));
const place = (n) => (n ? `layer ${n - 1}` : "embedding");
const named = (t) => `token ${t} “${data.names[data.ids[t]]}”`;

// the details of the chosen token

function bars(box, rows, share, say) {
  box.replaceChildren();
  for (const [before, id, value, hit] of rows) {
    const bar = make("i");
    bar.style.width = `${100 * Math.max(0, Math.min(1, share(value)))}%`;
    const track = make("span");
    track.append(bar);
    if (before !== null) box.append(make("span", before, "soft"));
    box.append(token(id, hit), track, make("span", say(value), "n"));
  }
}

function details() {
  const t = chosen, id = data.ids[t], target = data.ids[t + 1];
  $("name").replaceChildren(`Token ${t}: `, token(id), ` (id ${id})`);
  const loss = data.losses[t];
  const facts = loss === null ? "given: nothing predicts it" : `loss ${loss.toFixed(3)}, probability ${percent(Math.exp(-loss))}, rank ${data.ranks[t]}`;
  $("facts").textContent = `${facts}; entropy of what follows ${data.entropies[t].toFixed(3)} nats`;
  bars($("next"), data.next.ids[t].map((i, n) => [null, i, data.next.values[t][n], i === target]), (p) => p, percent);
  bars($("lens"), data.lens.ids.map((ids, n) => [place(n), ids[t], data.lens.values[n][t], ids[t] === target]), (p) => p, percent);
  const [ids, cosines] = data.neighbors[id];
  bars($("neighbors"), ids.map((i, n) => [null, i, cosines[n], false]), (c) => c, (c) => c.toFixed(3));
}

// attention: bytes of a layer, head by head the rows up to their own token; a weight is (byte / 255) squared

const unpacked = new Map();
const half = (count * (count + 1)) / 2;
const layers = Object.keys(data.attention);

function bytes(layer) {
  if (!unpacked.has(layer)) unpacked.set(layer, Uint8Array.from(atob(data.attention[layer]), (c) => c.charCodeAt(0)));
  return unpacked.get(layer);
}

function weight(head, row, column) {
  if (column > row) return 0;
  const codes = bytes($("layer").value), at = (row * (row + 1)) / 2 + column, heads = codes.length / half;
  if (head !== "mean") return (codes[head * half + at] / 255) ** 2;
  let sum = 0;
  for (let h = 0; h < heads; h++) sum += (codes[h * half + at] / 255) ** 2;
  return sum / heads;
}

function draw(canvas, head) {
  canvas.width = canvas.height = count;
  const context = canvas.getContext("2d"), image = context.createImageData(count, count);
  const tint = getComputedStyle(document.documentElement).getPropertyValue("--cool").trim().split(" ").map(Number);
  for (let row = 0, at = 0; row < count; row++) {
    for (let column = 0; column < count; column++, at += 4) {
      image.data.set(tint, at);
      image.data[at + 3] = 255 * Math.cbrt(weight(head, row, column));
    }
  }
  context.putImageData(image, 0, 0);
}

function heads() {
  const number = bytes($("layer").value).length / half, names = ["mean", ...Array(number).keys()];
  const before = $("head").value || "mean";
  $("head").replaceChildren(...names.map((name) => new Option(name === "mean" ? "mean of all" : name, name)));
  $("head").value = before;
  $("heads").replaceChildren(...names.map((name) => {
    const button = make("button"), canvas = make("canvas");
    button.type = "button";
    button.dataset.head = name;
    button.append(canvas, String(name));
    button.onclick = () => { $("head").value = name; map(); };
    draw(canvas, name);
    return button;
  }));
  map();
}

function map() {
  for (const button of $("heads").children) button.classList.toggle("chosen", button.dataset.head === $("head").value);
  draw($("map"), $("head").value);
  looks();
}

function looks() {
  if (!layers.length) return;
  const head = $("head").value, to = $("way").value === "to";
  const shares = data.ids.map((_, t) => (to ? weight(head, chosen, t) : weight(head, t, chosen)));
  [...$("looks").querySelectorAll("button")].forEach((button, t) => {
    button.style.setProperty("--a", (0.75 * Math.cbrt(shares[t])).toFixed(3));
    button.title = `${named(t)}: ${percent(shares[t])}`;
  });
  const most = shares.indexOf(Math.max(...shares));
  $("said").textContent = to
    ? `${named(chosen)} looks most at ${named(most)}: ${percent(shares[most])}`
    : `${named(most)} looks most at ${named(chosen)}: ${percent(shares[most])}`;
}

function under(event) {
  const box = $("map").getBoundingClientRect();
  const column = Math.floor(((event.clientX - box.left) / box.width) * count);
  const row = Math.floor(((event.clientY - box.top) / box.height) * count);
  return row < 0 || row >= count || column < 0 || column >= count ? null : [row, column];
}

// the logit lens as a grid, and norms as lines

function grid() {
  const head = make("tr");
  head.append(make("th", "after"), ...data.ids.map((id, t) => {
    const cell = make("th");
    cell.dataset.t = t;
    cell.append(token(id));
    return cell;
  }));
  $("grid").append(make("thead"), make("tbody"));
  $("grid").tHead.append(head);
  data.lens.ids.forEach((ids, n) => {
    const row = make("tr");
    row.append(make("th", place(n)), ...ids.map((id, t) => {
      const cell = make("td");
      cell.dataset.t = t;
      cell.append(make("bdi", data.names[id]));
      cell.style.setProperty("--a", (0.65 * data.lens.values[n][t]).toFixed(3));
      cell.title = `after ${named(t)}, ${place(n)}: “${data.names[id]}” ${percent(data.lens.values[n][t])}`
        + (t + 1 < count ? `; “${data.names[data.ids[t + 1]]}”, which follows: ${percent(data.targets[n][t])}` : "");
      return cell;
    }));
    $("grid").tBodies[0].append(row);
  });
}

const LINES = [["stream", "--one", 0], ["attn", "--two", 1], ["mlp", "--three", 1]];

function norms() {
  const box = $("norms"), all = LINES.flatMap(([name]) => data.norms[name].flat()).filter((v) => v > 0);
  const low = Math.floor(Math.log10(Math.min(...all.length ? all : [1]))), high = Math.ceil(Math.log10(Math.max(...all.length ? all : [1])) + 1e-9);
  const wide = Math.max(280, box.parentNode.clientWidth - 28), right = wide - 18;
  const x = (n) => 52 + (n / Math.max(1, depth)) * (right - 52);
  const y = (v) => 262 - ((Math.log10(Math.max(v, 10 ** low)) - low) / Math.max(1, high - low)) * 246;
  const put = (tag, settings, text = "") => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(settings)) made.setAttribute(key, value);
    made.textContent = text;
    box.append(made);
  };
  box.replaceChildren();
  box.setAttribute("viewBox", `0 0 ${wide} 300`);
  for (let power = low; power <= high; power++) {
    put("line", { x1: 52, x2: right, y1: y(10 ** power), y2: y(10 ** power), class: "grid" });
    put("text", { x: 44, y: y(10 ** power) + 4, "text-anchor": "end" }, power < -3 || power > 4 ? `1e${power}` : String(10 ** power));
  }
  const every = Math.max(1, Math.ceil((depth * 100) / (right - 52)));
  for (let n = 0; n <= depth; n += every) put("text", { x: x(n), y: 284, "text-anchor": n === depth ? "end" : n ? "middle" : "start" }, place(n));
  for (const [name, color, first] of LINES) {
    const mean = data.norms[name].map((row) => row.reduce((a, b) => a + b, 0) / count);
    const path = (values) => values.map((v, n) => `${n ? "L" : "M"}${x(n + first).toFixed(1)} ${y(v).toFixed(1)}`).join("");
    const style = (more) => ({ fill: "none", style: `stroke: var(${color})`, ...more });
    put("path", style({ d: path(mean), "stroke-width": 2.5 }));
    put("path", style({ d: path(data.norms[name].map((row) => row[chosen])), "stroke-width": 1.5, "stroke-dasharray": "5 4" }));
    mean.forEach((v, n) => put("circle", { cx: x(n + first), cy: y(v), r: 3, style: `fill: var(${color})` }));
  }
}

// choosing

function choose(t, keep = false) {
  if (t < 0 || t >= count) return;
  chosen = t;
  if (keep) pinned = t;
  for (const id of ["text", "looks"]) [...$(id).querySelectorAll("button")].forEach((button, n) => button.classList.toggle("chosen", n === t));
  for (const cell of $("grid").querySelectorAll(".chosen")) cell.classList.remove("chosen");
  for (const cell of $("grid").querySelectorAll(`[data-t="${t}"]`)) cell.classList.add("chosen");
  const frame = $("grid").parentNode, column = $("grid").tHead.rows[0].cells[t + 1];
  if (!frame.matches(":hover")) frame.scrollLeft = column.offsetLeft - frame.clientWidth / 2;
  details();
  looks();
  norms();
}

$("looks").append(...[...$("text").childNodes].map((node) => node.cloneNode(true)));
for (const id of ["text", "looks"]) {
  const buttons = [...$(id).querySelectorAll("button")];
  buttons.forEach((button, t) => {
    button.onclick = () => choose(t, true);
    button.onpointerenter = (event) => event.pointerType === "mouse" && choose(t);
    button.onkeydown = (event) => {
      const next = t + { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!(next in buttons)) return;
      event.preventDefault();
      buttons[next].focus();
      choose(next, true);
    };
  });
  $(id).onpointerleave = () => choose(pinned);
}
grid();
$("grid").onclick = (event) => {
  const cell = event.target.closest("[data-t]");
  if (cell) choose(Number(cell.dataset.t), true);
};
if (layers.length) {
  $("layer").replaceChildren(...layers.map((layer) => new Option(layer, layer)));
  $("layer").onchange = heads;
  $("head").onchange = map;
  $("way").onchange = looks;
  $("map").onpointermove = (event) => {
    const at = under(event);
    if (at) $("said").textContent = `${named(at[0])} looks at ${named(at[1])}: ${percent(weight($("head").value, ...at))}`;
  };
  $("map").onpointerleave = looks;
  $("map").onclick = (event) => { const at = under(event); if (at) choose(at[0], true); };
  dark.addEventListener("change", heads);
  heads();
} else {
  $("attention").remove();
  $("no-attention").textContent = "No layer's attention was kept; --layers names some.";
}
window.addEventListener("resize", norms);
choose(chosen, true);
