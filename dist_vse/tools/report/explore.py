"""The page's script: values under the pointer, runs to choose, examples to filter and to sort.

The page is whole without it: a reader who blocks scripts sees the same curves and examples. It
writes text with `textContent` only, since captions are whatever somebody wrote.
"""

SCRIPT = """
"use strict";
const make = (tag, props) => Object.assign(document.createElement(tag), props);
const short = value => Number(value.toPrecision(4)).toString();

// Curves: the nearest step's values, under the pointer or by the arrow keys.
for (const svg of document.querySelectorAll("svg[data-axis]")) {
  const [low, high, left, right, width, top, bottom] = JSON.parse(svg.dataset.axis);
  const lines = [...svg.querySelectorAll("path[data-points]")].map(path => (
    { path, label: path.dataset.label, points: JSON.parse(path.dataset.points) }));
  const steps = [...new Set(lines.flatMap(l => l.points.map(p => p[0])))].sort((a, b) => a - b);
  const rule = document.createElementNS(svg.namespaceURI, "path");
  rule.setAttribute("class", "rule");
  svg.append(rule);
  const box = make("output", { className: "values" });
  svg.after(box);
  svg.tabIndex = 0;
  let at = steps.length - 1;
  const show = () => {
    const x = left + (steps[at] - low) / (high - low || 1) * (right - left);
    rule.setAttribute("d", `M${x} ${top}V${bottom}`);
    const shown = lines.filter(line => !line.path.classList.contains("off")).map(line => {
      const near = line.points.reduce((best, p) => (
        Math.abs(p[0] - steps[at]) < Math.abs(best[0] - steps[at]) ? p : best));
      return `${line.label} ${short(near[1])}`;
    });
    box.textContent = `${short(steps[at])}: ${shown.join(", ")}`;
  };
  svg.addEventListener("pointermove", event => {
    const { left: from, width: size } = svg.getBoundingClientRect();
    const x = (event.clientX - from) / size * width;
    const step = low + (x - left) / (right - left) * (high - low);
    at = steps.reduce((best, s, i) => (
      Math.abs(s - step) < Math.abs(steps[best] - step) ? i : best), 0);
    show();
  });
  svg.addEventListener("keydown", event => {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -at, End: steps.length }[event.key];
    if (move === undefined) return;
    event.preventDefault();
    at = Math.min(Math.max(at + move, 0), steps.length - 1);
    show();
  });
  svg.addEventListener("focus", show);
  for (const leave of ["pointerleave", "blur"]) svg.addEventListener(leave, () => {
    rule.removeAttribute("d");
    box.textContent = "";
  });
}

// Runs side by side: each name in the legend shows or hides its curves.
for (const name of document.querySelectorAll("h1 + .legend > span")) {
  const button = make("button", { type: "button" });
  button.append(...name.childNodes);
  button.setAttribute("aria-pressed", "true");
  const style = button.querySelector("[class]:not(svg)").classList[1];
  button.addEventListener("click", () => {
    const on = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(on));
    for (const mark of document.querySelectorAll(`figure svg[data-axis] .${style}`))
      mark.classList.toggle("off", !on);
  });
  name.append(button);
}

// Examples: filter by a word or an image, sort by rank.
const queries = [...document.querySelectorAll(".examples > li[data-rank]")];
if (queries.length) {
  const bar = make("form", { className: "tools", role: "search" });
  const word = make("input", { type: "search", placeholder: "a word, or an image's key" });
  word.setAttribute("aria-label", "Show examples that hold this word or image");
  const worst = make("button", { type: "button", textContent: "Worst rank first" });
  worst.setAttribute("aria-pressed", "false");
  const count = make("output", {});
  bar.append(word, worst, count);
  queries[0].closest("ul").before(bar);
  const keys = query => [...query.querySelectorAll("[data-key]")].map(e => e.dataset.key);
  const filter = () => {
    const wanted = word.value.trim().toLowerCase();
    for (const query of queries)
      query.hidden = ![query.textContent, ...keys(query)].some(
        text => text.toLowerCase().includes(wanted));
    const left = queries.filter(query => !query.hidden).length;
    count.textContent = wanted ? `${left} of ${queries.length} examples` : "";
  };
  word.addEventListener("input", filter);
  bar.addEventListener("submit", event => event.preventDefault());
  const lists = [...new Set(queries.map(query => query.parentElement))];
  const drawn = lists.map(list => [...list.children]);
  worst.addEventListener("click", () => {
    const on = worst.getAttribute("aria-pressed") !== "true";
    worst.setAttribute("aria-pressed", String(on));
    lists.forEach((list, i) => list.append(...(on
      ? [...drawn[i]].sort((a, b) => b.dataset.rank - a.dataset.rank)
      : drawn[i])));
  });
  for (const image of document.querySelectorAll(".thumb[data-key]")) {
    image.tabIndex = 0;
    image.setAttribute("role", "button");
    const choose = () => { word.value = image.dataset.key; filter(); bar.scrollIntoView(); };
    image.addEventListener("click", choose);
    image.addEventListener("keydown", event => { if (event.key === "Enter") choose(); });
  }
}
"""
