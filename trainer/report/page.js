// Read-outs: a line through all charts at the tokens under the pointer, with the values there. The page is whole without it.
"use strict";
const areas = [...document.querySelectorAll(".area[data-lines]")].map((area) => {
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  tip.append(document.createElement("p"));
  area.append(tip);
  return { area, tip, lines: JSON.parse(area.dataset.lines) };
});
const first = Number(document.body.dataset.first), last = Number(document.body.dataset.last);

function short(value) {
  const size = Math.abs(value);
  for (const [limit, unit] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
    if (size >= limit) return (value / limit).toPrecision(4) + unit;
  }
  return size && size < 1e-3 ? value.toExponential(2) : String(value);
}

function nearest(points, tokens) {
  let low = 0, high = points.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] <= tokens) low = middle; else high = middle;
  }
  return tokens - points[low][0] <= points[high][0] - tokens ? points[low] : points[high];
}

function show(share, under) {
  const tokens = first + share * (last - first);
  for (const { area, tip, lines } of areas) {
    const known = lines.filter((line) => line.p.length);
    if (!known.length) continue;
    tip.hidden = false;
    tip.style.left = 100 * share + "%";
    tip.classList.toggle("left", share > 0.6);
    const text = tip.firstChild;
    text.textContent = "";
    if (area !== under) { text.hidden = true; continue; }
    text.hidden = false;
    text.append(short(Math.round(tokens)) + " tokens");
    for (const line of known) {
      const row = document.createElement("span");
      row.className = "t" + line.c;
      row.textContent = short(nearest(line.p, tokens)[1]) + " " + line.n;
      text.append(document.createElement("br"), row);
    }
  }
}

for (const { area } of areas) {
  area.addEventListener("pointermove", (event) => {
    const box = area.getBoundingClientRect();
    show(Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1), area);
  });
  area.addEventListener("pointerleave", () => areas.forEach(({ tip }) => { tip.hidden = true; }));
}

// On paper nothing can be unfolded.
window.addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));
