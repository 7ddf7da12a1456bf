"""The report's style sheet: light and dark, from a phone to a desk."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f5f2; --card: #ffffff; --ink: #1c2024; --soft: #5a626b; --line: #e3e1dc;
  --right: #14794a; --right-soft: #e4f3ea;
  --s1: #2458b8; --s2: #b3530e; --c3: #14794a; --c4: #8a3ab0; --c5: #a8326a; --c6: #6b6a1d;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --card: #1c2024; --ink: #e9eaec; --soft: #a3abb4; --line: #30363c;
    --right: #5cc78d; --right-soft: #17352a;
    --s1: #86aff5; --s2: #f0a264; --c3: #6fce9b; --c4: #cf9bf0; --c5: #f290bb; --c6: #d3d06a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  -webkit-text-size-adjust: 100%;
}
main { max-width: 1040px; margin: 0 auto; padding: 48px 20px 64px; }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -.015em; margin: 0;
  overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; letter-spacing: -.01em; margin: 56px 0 6px; }
h3 { font-size: .95rem; font-weight: 600; margin: 0; }
p { margin: 0 0 12px; }
.lead { color: var(--soft); font-size: 1.05rem; max-width: 44em; margin-top: 10px; }
.note, figcaption, .unit { color: var(--soft); font-size: .875rem; }
.note { max-width: 48em; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }

.figures { display: grid; grid-template-columns: repeat(4, 1fr); gap: 12px; margin: 28px 0 0; }
.figures div { padding: 16px 18px; }
.figures dt { color: var(--soft); font-size: .875rem; }
.figures dd { margin: 2px 0 0; font-size: 1.75rem; font-weight: 600; line-height: 1.25;
  letter-spacing: -.02em; font-variant-numeric: tabular-nums; }
.figures .unit { font-weight: 400; letter-spacing: 0; display: block; line-height: 1.4; }

.scroll { overflow-x: auto; }
.scroll + .scroll { margin-top: 16px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: 16px 18px 4px; font-weight: 600; }
th, td { padding: 8px 18px; text-align: right; border-top: 1px solid var(--line); }
thead td { border-top: 0; }
thead th { border-top: 0; color: var(--soft); font-size: .875rem; font-weight: 500; }
tbody th { text-align: left; font-weight: 400; }
td.trained { font-weight: 700; }
tr.group th { border-top: 1px solid var(--line); padding-top: 14px; padding-bottom: 2px;
  font-weight: 600; font-size: .875rem; }
tr.group + tr th, tr.group + tr td { border-top: 0; }

.charts { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px; }
figure { margin: 0; padding: 16px 16px 10px; display: flex; flex-direction: column; }
figure header { display: flex; gap: 10px; align-items: baseline; margin-bottom: 8px; }
svg { display: block; width: 100%; height: auto; margin-top: auto; }
.legend { display: grid; grid-template-columns: repeat(2, auto); justify-content: start;
  gap: 0 18px; font-size: .8125rem; margin-bottom: 8px; color: var(--soft); }
.legend svg { display: inline-block; width: 24px; height: 8px; margin-right: 6px; }
h1 + .legend { margin-top: 12px; }
.wide { margin-top: 16px; }
.wide .legend { display: flex; flex-wrap: wrap; gap: 2px 18px; }
svg text { fill: var(--soft); font: 11.5px system-ui, sans-serif;
  font-variant-numeric: tabular-nums; }
svg .grid { stroke: var(--line); stroke-width: 1; fill: none; }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
svg .band { opacity: .18; stroke: none; }
.line.s1, .line.s3 { stroke: var(--s1); } .dot.s1, .band.s1, .dot.s3 { fill: var(--s1); }
.line.s2, .line.s4 { stroke: var(--s2); } .dot.s2, .band.s2, .dot.s4 { fill: var(--s2); }
.line.c1 { stroke: var(--s1); } .dot.c1, .band.c1, .bar.c1 { fill: var(--s1); }
.line.c2 { stroke: var(--s2); } .dot.c2, .band.c2, .bar.c2 { fill: var(--s2); }
.line.c3 { stroke: var(--c3); } .dot.c3, .band.c3, .bar.c3 { fill: var(--c3); }
.line.c4 { stroke: var(--c4); } .dot.c4, .band.c4, .bar.c4 { fill: var(--c4); }
.line.c5 { stroke: var(--c5); } .dot.c5, .band.c5, .bar.c5 { fill: var(--c5); }
.line.c6 { stroke: var(--c6); } .dot.c6, .band.c6, .bar.c6 { fill: var(--c6); }
.bar.c7 { fill: var(--soft); } .bar.c8 { fill: var(--line); }
svg .line.s3, svg .line.s4 { stroke-dasharray: 2 5; }
svg[data-axis]:focus-visible { outline: 2px solid var(--s1); border-radius: 6px; }
svg .rule { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 3 3; fill: none; }
.off { visibility: hidden; }
.values { min-height: 1.5em; color: var(--soft); font-size: .8125rem;
  font-variant-numeric: tabular-nums; }
button, input, select { font: inherit; font-size: .875rem; color: inherit; background: var(--card);
  border: 1px solid var(--line); border-radius: 8px; padding: 5px 12px; }
button { cursor: pointer; }
button[aria-pressed=true] { border-color: var(--s1); }
.legend button[aria-pressed=false] { opacity: .45; }
.tools { display: flex; flex-wrap: wrap; gap: 10px; align-items: center; margin-top: 12px; }
.tools input { flex: 1 1 240px; max-width: 360px; }
.tools .least { flex: 0 1 140px; padding: 0; accent-color: var(--s1); }
.answers.found { grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)); margin-top: 12px; }
.thumb[role=button] { cursor: pointer; }
.examples > li[hidden], .answers > li[hidden] { display: none; }
.thumb[role=button]:focus-visible { outline: 3px solid var(--s1); outline-offset: 2px; }
dialog.near { color: inherit; width: min(640px, calc(100vw - 28px)); padding: 18px; }
dialog.near::backdrop { background: #000a; }
dialog.near > .thumb { width: 112px; float: left; margin: 0 16px 8px 0; }
dialog.near h3 { overflow-wrap: anywhere; }
dialog.near .answers { clear: both; grid-template-columns: repeat(4, minmax(0, 1fr)); }
dialog.near .answers li { overflow-wrap: anywhere; }
dialog.near .tools { justify-content: end; }

.examples { display: grid; gap: 12px; padding: 0; margin: 16px 0 0; list-style: none; }
.examples > li { padding: 16px 18px; }
.query { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 720px); gap: 20px; }
.query q { display: block; font-weight: 600; line-height: 1.4; overflow-wrap: anywhere; }
.rank { color: var(--soft); font-size: .875rem; white-space: nowrap; }
.rank.first { color: var(--right); font-weight: 600; }
.answers { display: grid; grid-template-columns: repeat(6, minmax(0, 112px)); gap: 10px;
  padding: 0; margin: 0; list-style: none; }
.answers li { position: relative; text-align: center; color: var(--soft); font-size: .8125rem;
  line-height: 1.5; }
.thumb { display: block; width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: 8px;
  background: #fff; outline: 1px solid var(--line); margin-bottom: 5px; }
span.thumb { display: grid; place-items: center; background: var(--page); color: var(--soft);
  padding: 4px; overflow: hidden; overflow-wrap: anywhere; font-size: .6875rem; line-height: 1.2; }
.answers .right .thumb { outline: 3px solid var(--right); outline-offset: 1px; }
.answers .missed .thumb { outline: 2px dashed var(--right); outline-offset: 1px; }
.answers .right, .answers .missed { color: var(--right); font-weight: 600; }
.check { position: absolute; top: 5px; right: 5px; width: 22px; height: 22px; border-radius: 50%;
  background: #14794a; color: #fff; font-size: 13px; line-height: 22px; font-weight: 700;
  box-shadow: 0 0 0 2px #fff; }

.pairs { grid-template-columns: repeat(2, minmax(0, 1fr)); }
.pairs > li { display: grid; grid-template-columns: 112px minmax(0, 1fr); gap: 4px 18px;
  align-content: start; }
.pairs > li > .rank { grid-column: 2; }
.pairs > li > .thumb { grid-row: span 2; margin: 0; }
.texts { margin: 0; padding: 0; list-style: none; font-size: .9375rem; line-height: 1.4; }
.texts li { display: grid; grid-template-columns: 1.3em minmax(0, 1fr) auto; gap: 6px;
  padding: 3px 0; overflow-wrap: anywhere; }
.texts .score { color: var(--soft); font-size: .8125rem; font-variant-numeric: tabular-nums; }
.texts .right { color: var(--right); font-weight: 600; }
.texts .right::before { content: "\\2713"; }
.texts li:not(.right)::before { content: ""; }

.facts { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px; }
.facts dl { display: grid; grid-template-columns: auto minmax(0, 1fr); gap: 4px 18px; margin: 0;
  padding: 16px 18px; font-size: .9375rem; align-content: start; }
.facts dl h3 { grid-column: 1 / -1; margin-bottom: 4px; }
.facts dt { color: var(--soft); }
.facts dd { margin: 0; text-align: right; overflow-wrap: anywhere;
  font-variant-numeric: tabular-nums; }
details { margin-top: 16px; }
summary { cursor: pointer; padding: 14px 18px; font-weight: 600; border-radius: 12px; }
summary:focus-visible { outline: 2px solid var(--s1); }
pre { margin: 0; padding: 2px 18px 18px; overflow-x: auto; font: .8125rem/1.5 ui-monospace,
  SFMono-Regular, Menlo, Consolas, monospace; }
code { white-space: nowrap; }
footer { margin-top: 48px; color: var(--soft); font-size: .875rem; }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }

@media (max-width: 720px) {
  main { padding: 28px 14px 48px; }
  h1 { font-size: 1.6rem; }
  h2 { margin-top: 44px; }
  .figures { grid-template-columns: repeat(2, 1fr); }
  .figures div { padding: 12px 14px; }
  .figures dd { font-size: 1.45rem; }
  .legend { font-size: .75rem; gap: 0 10px; white-space: nowrap; }
  .legend svg { width: 18px; margin-right: 4px; }
  .charts, .facts, .pairs { grid-template-columns: minmax(0, 1fr); }
  th, td { padding: 7px 8px; font-size: .9375rem; }
  th:first-child, caption { padding-left: 14px; }
  td:last-child, th:last-child { padding-right: 14px; }
  .examples > li { padding: 14px; }
  .query { grid-template-columns: minmax(0, 1fr); gap: 12px; }
  .query > div { display: flex; justify-content: space-between; align-items: baseline; gap: 12px; }
  .answers { grid-template-columns: repeat(3, minmax(0, 1fr)); }
  .pairs > li { grid-template-columns: 84px minmax(0, 1fr); gap: 4px 14px; }
}
@media print {
  body { background: #fff; }
  .card, figure { break-inside: avoid; }
}
"""
