"""The look of a page: one style sheet, light and dark, for wide screens and for phones.

Colours of text have a contrast of at least 4.5 to 1 against what is behind them and those of lines 3 to 1, in both
schemes (WCAG 2.2, 1.4.3 and 1.4.11); tests compute it in a browser.
"""

SHEET = """
:root { color-scheme: light dark;
  --back: #ffffff; --panel: #f6f8fa; --text: #1b1f24; --muted: #505862; --edge: #d5dae0; --mark: #8a1c1c;
  --c0: #1f5fa8; --c1: #b93d0c; --c2: #13703a; --c3: #7a22c4; --c4: #855d06; --c5: #0c6580; --c6: #b01758;
  --c7: #4b5563; }
@media (prefers-color-scheme: dark) { :root {
  --back: #12161b; --panel: #1a2027; --text: #e6e9ed; --muted: #a3adb8; --edge: #343c46; --mark: #ff9d94;
  --c0: #6cb2ff; --c1: #ff9b6a; --c2: #5fd38d; --c3: #c9a2ff; --c4: #e6c34a; --c5: #56cfe1; --c6: #ff8fc7;
  --c7: #b6bec9; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
main, header, footer { max-width: 76rem; margin: 0 auto; padding: 0 1rem; }
header { padding-top: 1.5rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .4rem; overflow-wrap: anywhere; }
p { margin: .25rem 0; overflow-wrap: anywhere; }
.note, figcaption, footer, .path { color: var(--muted); font-size: .875rem; }
.bad { color: var(--mark); font-weight: 600; }
.scroll { overflow-x: auto; border: 1px solid var(--edge); border-radius: 6px; background: var(--panel); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .35rem .7rem; border-top: 1px solid var(--edge);
  white-space: pre-line; overflow-wrap: break-word; min-width: 4.5rem; max-width: 34rem; }
td { min-width: 7rem; }
thead th { border-top: 0; color: var(--muted); font-weight: 600; }
tbody th { font-weight: 500; }
.key { background: currentColor; display: inline-block; width: .7rem; height: .7rem; border-radius: 2px;
  margin-right: .4rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .6rem .8rem; border: 1px solid var(--edge); border-radius: 6px; background: var(--panel);
  min-width: 0; }
figure > svg { display: block; width: 100%; height: auto; }
.grid { stroke: var(--edge); stroke-width: 1; }
.tick { fill: var(--muted); font: 12px system-ui, sans-serif; }
.series polyline { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round; }
.dot { fill: currentColor; }
.spot { fill: currentColor; opacity: 0; }
.spot:hover { opacity: 1; }
.d1 polyline { stroke-dasharray: 7 3; } .d2 polyline { stroke-dasharray: 2 3; }
.d3 polyline { stroke-dasharray: 9 3 2 3; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); } .c3 { color: var(--c3); }
.c4 { color: var(--c4); } .c5 { color: var(--c5); } .c6 { color: var(--c6); } .c7 { color: var(--c7); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .4rem 0 0; padding: 0;
  font-size: .875rem; }
.legend li { display: flex; align-items: center; gap: .4rem; min-width: 0; overflow-wrap: anywhere; }
.legend svg { width: 34px; height: 12px; flex: none; }
footer { padding: 1.5rem 1rem 2rem; margin-top: 2rem; border-top: 1px solid var(--edge); }
@media print { body { background: #fff; } figure, .scroll { break-inside: avoid; } }
"""
