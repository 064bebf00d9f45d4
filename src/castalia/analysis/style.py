"""The style sheet of report pages: light or dark by the reader's setting, nothing external."""

STYLE = """
:root { color-scheme: light dark; --page:#fbfaf8; --card:#ffffff; --ink:#1d2430; --soft:#5d6675;
  --edge:#e4e1da;
  --grid:#ece9e2; --code:#f5f3ee; --accent:#9a4a1c;
  --c0:#2563c9; --c1:#c2600a; --c2:#0b8457; --c3:#b4307f; --c4:#6d4bd0; --c5:#0e7f95; --c6:#8a6d0a;
  --c7:#6b7280; }
@media (prefers-color-scheme: dark) { :root { --page:#14171c; --card:#1b1f26; --ink:#e6e8ec;
  --soft:#9aa3b2;
  --edge:#2c323c; --grid:#272c35; --code:#12151a; --accent:#e8a06f;
  --c0:#74a7ff; --c1:#f5a55a; --c2:#4fcf9b; --c3:#f087c2; --c4:#b39dff; --c5:#5cc8dd; --c6:#d9bd55;
  --c7:#a3abb9; } }
* { box-sizing:border-box; }
body { margin:0; background:var(--page); color:var(--ink); line-height:1.5;
  font:16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width:880px; margin:0 auto; padding:40px 20px 64px; }
header p { color:var(--soft); margin:4px 0 0; max-width:62ch; }
h1 { font-size:30px; line-height:1.2; margin:0; letter-spacing:-.01em; }
h2 { font-size:20px; margin:44px 0 4px; }
h3 { font-size:15px; margin:22px 0 8px; font-weight:600; }
.about { color:var(--soft); margin:0 0 12px; max-width:70ch; font-size:15px; }
.tiles { display:grid; grid-template-columns:repeat(auto-fit, minmax(128px, 1fr));
  gap:10px; margin:24px 0 0; padding:0; }
.tiles div { background:var(--card); border:1px solid var(--edge); border-radius:10px; padding:12px
  14px; }
.tiles dt { color:var(--soft); font-size:13px; }
.tiles dd { margin:2px 0 0; font-size:21px; font-weight:600; font-variant-numeric:tabular-nums; }
.chart, .wide { background:var(--card); border:1px solid var(--edge); border-radius:12px;
  padding:14px;
  overflow-x:auto; }
.chart svg { display:block; width:100%; min-width:520px; height:auto; }
.legend { display:none; position:sticky; left:0; margin:0 0 6px; font-size:13px; font-weight:600; }
.legend span { margin-right:12px; }
.grid { stroke:var(--grid); } .mark { stroke:var(--soft); stroke-opacity:.5; }
.tick { fill:var(--soft); font-size:12px; font-variant-numeric:tabular-nums; }
.name { fill:var(--soft); font-size:13px; } .label { font-size:13px; font-weight:600; }
.line { fill:none; stroke-width:2; stroke-linejoin:round; stroke-linecap:round; }
.faint { stroke-width:1; stroke-opacity:.35; }
.dot { stroke:var(--card); stroke-width:1.2; } .dot:hover { stroke:var(--ink); stroke-width:2; }
.band { stroke:var(--card); stroke-width:.6; } .band:hover { stroke:var(--ink); stroke-width:1.5; }
.heat { fill:var(--c0); } .heat rect:hover { stroke:var(--ink); }
.small { opacity:0; } .small:hover { opacity:1; }
.wide { padding:0; margin-top:12px; }
table { border-collapse:collapse; width:100%; font-size:14px; font-variant-numeric:tabular-nums; }
th, td { text-align:right; padding:7px 14px; border-top:1px solid var(--edge); white-space:nowrap; }
thead th { border-top:0; color:var(--soft); font-weight:500; font-size:13px; }
th:first-child, td:first-child { text-align:left; white-space:normal; }
.words td, .code td { text-align:left; white-space:normal; overflow-wrap:anywhere;
  vertical-align:top; }
.words td:first-child, .code td:first-child { white-space:nowrap; color:var(--soft);
  overflow-wrap:normal; }
.code td:last-child { white-space:pre-wrap; background:var(--code);
  font:13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; }
.sample { display:grid; grid-template-columns:86px minmax(0, 1fr); background:var(--card);
  border:1px solid var(--edge); border-radius:10px; margin:8px 0; overflow:hidden; }
.sample span { color:var(--soft); font-size:13px; padding:10px 0 10px 14px;
  font-variant-numeric:tabular-nums; }
pre { font:13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace;
  margin:0;
  padding:10px 14px; background:var(--code); white-space:pre-wrap; overflow-wrap:anywhere; }
.sample pre { max-height:17em; overflow-y:auto; }
pre b { color:var(--accent); font-weight:600; }
details { margin-top:14px; border:1px solid var(--edge); border-radius:10px; background:var(--card);
  overflow:hidden; }
summary { cursor:pointer; padding:9px 14px; color:var(--soft); font-size:14px; }
details .wide { border:0; border-top:1px solid var(--edge); border-radius:0; margin:0; }
footer { color:var(--soft); font-size:13px; margin-top:48px; }
@media (max-width:560px) { main { padding:24px 14px 48px; } h1 { font-size:25px; }
  .sample { grid-template-columns:1fr; } .sample span { padding:8px 14px; } .tiles dd {
  font-size:18px; }
  .tiles { grid-template-columns:repeat(2, 1fr); } .chart { padding:8px; } .legend { display:block;
  }
  .label, .tick, .name { font-size:15px; } }
"""
