"""The page's script: values under the pointer, runs to choose, examples to filter and to sort.

The page is whole without it: a reader who blocks scripts sees the same curves and examples. It
writes text with `textContent` only, since captions are whatever somebody wrote.
"""

START = """
"use strict";
const make = (tag, props) => Object.assign(document.createElement(tag), props);
let showWhere = null;  // shows an image's key where it was found
"""

CURVES = """
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

"""

EXAMPLES = """
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
  showWhere = key => { word.value = key; filter(); bar.scrollIntoView(); word.focus(); };
}
"""

NEIGHBOURS = """
// An image: its nearest others, in a dialog; where these are not known, where it was found.
{
  const near = document.querySelector("#neighbours");
  const nearest = new Map(Object.entries(near ? JSON.parse(near.dataset.neighbours) : {}));
  const pictured = key => document.querySelector(`.thumb[data-key="${CSS.escape(key)}"]`);
  const named = image => image.alt || image.dataset.key;
  const open = image => {
    if (nearest.has(image.dataset.key) || showWhere) {
      image.tabIndex = 0;
      image.setAttribute("role", "button");
    }
  };
  document.querySelectorAll("main .thumb[data-key]").forEach(open);

  const dialog = make("dialog", { className: "card near" });
  document.querySelector("main").append(dialog);
  const copied = key => {
    const copy = pictured(key).cloneNode(true);
    for (const name of ["tabindex", "role"]) copy.removeAttribute(name);
    return copy;
  };
  const showNearest = key => {
    const name = named(pictured(key));
    const title = make("h3", { id: "near-title", textContent: `Nearest to ${name}` });
    const note = "By the images' features; numbers are cosine similarities.";
    const list = make("ol", { className: "answers" });
    for (const [other, score] of nearest.get(key)) {
      const item = make("li", {}), image = copied(other);
      if (nearest.has(other)) open(image);
      item.append(image, named(image), make("br", {}), (Number(score.toFixed(2)) || 0).toFixed(2));
      list.append(item);
    }
    const close = make("button", { type: "button", textContent: "Close" });
    close.addEventListener("click", () => dialog.close());
    const tools = make("div", { className: "tools" });
    if (showWhere) {
      const where = make("button", { type: "button", textContent: "Show where it was found" });
      where.addEventListener("click", () => { dialog.close(); showWhere(key); });
      tools.append(where);
    }
    tools.append(close);
    dialog.setAttribute("aria-labelledby", title.id);
    dialog.replaceChildren(
      copied(key), title, make("p", { className: "note", textContent: note }), list, tools);
    if (!dialog.open) dialog.showModal();
    close.focus();
  };
  const choose = event => {
    const image = event.target.closest?.(".thumb[data-key]");
    if (!image || !(event.type === "click" || event.key === "Enter" || event.key === " ")) return;
    if (nearest.has(image.dataset.key)) showNearest(image.dataset.key);
    else if (showWhere && !dialog.open) showWhere(image.dataset.key);
    else return;
    event.preventDefault();
  };
  document.addEventListener("click", choose);
  document.addEventListener("keydown", choose);
}
"""

SCRIPT = START + CURVES + EXAMPLES + NEIGHBOURS
