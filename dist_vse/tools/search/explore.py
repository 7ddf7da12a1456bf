"""The sheet's script: answers to filter by a word and a score, to sort, and to click."""

from dist_vse.tools.report.explore import NEIGHBOURS, START

_ANSWERS = """
{
  const lists = [...document.querySelectorAll(".found")];
  const answers = lists.flatMap(list => [...list.children]);
  const bar = make("form", { className: "tools", role: "search" });
  const word = make("input", { type: "search", placeholder: "a word, or an image's key" });
  word.setAttribute("aria-label", "Show answers that hold this word or image");
  const scores = answers.map(answer => Number(answer.dataset.score));
  const least = make("input", { type: "range", step: "0.01", className: "least" });
  least.min = Math.floor(Math.min(...scores) * 100) / 100;
  least.max = Math.max(...scores);
  least.value = least.min;
  least.title = "Least cosine similarity";
  least.setAttribute("aria-label", least.title);
  const order = make("select", {});
  order.setAttribute("aria-label", "Order of the answers");
  for (const [value, text] of [
    ["place", "Best first"], ["caption", "By caption"], ["key", "By key"]])
    order.append(make("option", { value, textContent: text }));
  const count = make("output", {});
  bar.append(word, least, order, count);
  document.querySelector(".examples").before(bar);

  const filter = () => {
    const wanted = word.value.trim().toLowerCase();
    for (const answer of answers)
      answer.hidden = Number(answer.dataset.score) < Number(least.value)
        || ![answer.dataset.caption, answer.dataset.key].some(
          text => text.toLowerCase().includes(wanted));
    for (const list of lists)
      list.parentElement.hidden = [...list.children].every(answer => answer.hidden);
    const left = answers.filter(answer => !answer.hidden).length;
    count.textContent = `${left} of ${answers.length} answers, from ${
      Number(least.value).toFixed(2)}`;
  };
  const sort = () => {
    const name = order.value;
    for (const list of lists)
      list.append(...[...list.children].sort((a, b) => name === "place"
        ? a.dataset.place - b.dataset.place
        : a.dataset[name].localeCompare(b.dataset[name])));
  };
  word.addEventListener("input", filter);
  least.addEventListener("input", filter);
  order.addEventListener("change", sort);
  bar.addEventListener("submit", event => event.preventDefault());
  filter();
  showWhere = key => {
    word.value = key;
    least.value = least.min;
    filter();
    bar.scrollIntoView();
    word.focus();
  };
}
"""

SCRIPT = START + _ANSWERS + NEIGHBOURS
