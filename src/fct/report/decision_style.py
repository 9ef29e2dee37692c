"""How the decision page looks, and the one thing that it does."""

from __future__ import annotations

__all__ = ["SCRIPT", "STYLE"]

STYLE = """
:root { color-scheme: light dark; --line: #d5d9e0; --muted: #5b6270; --good: #18794e; --bad: #b42318;
  --open: #9a6700;
  --s0: #2563eb; --s1: #c2410c; --s2: #15803d; --s3: #7e22ce; }
@media (prefers-color-scheme: dark) { :root { --line: #3a404b; --muted: #a0a8b5; --good: #4cc38a;
  --bad: #ff8b7d;
  --open: #e2b341; --s0: #7aa7ff; --s1: #ff9d6b; --s2: #5fd38d; --s3: #c79bff; } }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 74rem; margin: 2rem auto; padding: 0 1rem;
  overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
.verdict { font-size: 1.1rem; border-left: 4px solid var(--open); padding: .4rem 1rem; margin: 1.2rem 0; }
.verdict.go { border-color: var(--good); } .verdict.no-go { border-color: var(--bad); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .95rem; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap;
  }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: Canvas; }
@media (max-width: 600px) { th:first-child, td:first-child { white-space: normal; min-width: 8rem; max-width: 9rem; } }
.scroll:focus-visible { outline: 2px solid var(--s0); }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid var(--s0); }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
tr.best td { font-weight: 600; }
p.note, figcaption, .legend { color: var(--muted); font-size: .9rem; margin: .4rem 0; }
figure { margin: 1rem 0; } svg { width: 100%; max-width: 40rem; height: auto; }
svg text { font: 13px system-ui, sans-serif; fill: var(--muted); }
@media (max-width: 600px) { svg text { font-size: 20px; } }
svg .band { fill: var(--line); opacity: .55; } .legend .band { background: var(--line); }
table.facts td { text-align: left; white-space: normal; } table.facts th { text-align: left; }
svg .grid { stroke: var(--line); } polyline { fill: none; stroke-width: 2; }
.broken { stroke-dasharray: 5 5; }
.s0 { stroke: var(--s0); fill: var(--s0); } .s1 { stroke: var(--s1); fill: var(--s1); }
.s2 { stroke: var(--s2); fill: var(--s2); } .s3 { stroke: var(--s3); fill: var(--s3); }
polyline.s0, polyline.s1, polyline.s2, polyline.s3 { fill: none; } circle.hollow { fill: Canvas; }
.legend span { margin-right: 1.2rem; }
.legend i { display: inline-block; width: .8rem; height: .8rem; margin-right: .4rem; }
.legend .s0 { background: var(--s0); } .legend .s1 { background: var(--s1); }
.legend .s2 { background: var(--s2); } .legend .s3 { background: var(--s3); }
.near { border-bottom: 1px solid var(--line); padding: .6rem 0; }
.near ol { margin: .2rem 0 .6rem 1.4rem; padding: 0; }
.near li.kept { color: var(--good); } .near li.kept::after { content: " \\2713"; }
.asked { display: flex; gap: .7rem; align-items: center; }
.near img { width: 4.5rem; height: 4.5rem; object-fit: contain; background: #fff; border: 1px solid var(--line);
  border-radius: 4px; flex: none; }
.near ol.pictures { list-style: none; margin: .3rem 0 .8rem; display: flex; flex-wrap: wrap; gap: .5rem; }
.pictures li { width: 4.5rem; font-size: .8rem; line-height: 1.3; }
.pictures li span { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 4; overflow: hidden; }
.pictures li img { display: block; margin-bottom: .15rem; }
.pictures li.kept img { border: 2px solid var(--good); }
.columns { display: grid; gap: 0 1.5rem; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); }
a { color: var(--s0); }
"""
# Sorts a table by the column whose heading is pressed. The only script; everything is there without it.
SCRIPT = """
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const th = button.closest("th"), body = th.closest("table").tBodies[0], at = th.cellIndex;
  const up = th.getAttribute("aria-sort") !== "ascending";
  for (const other of th.parentNode.cells) other.removeAttribute("aria-sort");
  th.setAttribute("aria-sort", up ? "ascending" : "descending");
  const isName = row => Number.isNaN(Number(row.cells[0].textContent.replaceAll(",", "")));
  const names = at === 0 && [...body.rows].some(isName);
  const value = row => { const text = row.cells[at].textContent, n = parseFloat(text.replaceAll(",", ""));
    return names || /^\\d{4}-\\d/.test(text) ? [0, text] : Number.isNaN(n) ? [1, text] : [0, n]; };
  const order = (a, b) => a[0] - b[0] || (up ? 1 : -1) * (a[1] < b[1] ? -1 : a[1] > b[1] ? 1 : 0);
  for (const row of [...body.rows].sort((a, b) => order(value(a), value(b)))) body.append(row);
});
"""
