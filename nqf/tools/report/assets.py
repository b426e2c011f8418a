"""Style and script of the report's page."""

STYLE = """
:root {color-scheme: light dark; --bg: #f5f6f8; --card: #ffffff; --ink: #17202c; --muted: #5a6675; --rule: #dfe4ea;
  --soft: #eef1f5; --c0: #2563eb; --c1: #7c3aed; --c2: #d97706; --c3: #0d9488; --c4: #db2777; --c5: #64748b;
  --c6: #16a34a; --c7: #92580e; --c8: #0284c7; --c9: #a3a9b3}
@media (prefers-color-scheme: dark) {:root {--bg: #0d1219; --card: #151c27; --ink: #e5eaf1; --muted: #95a1b2;
  --rule: #2a3443; --soft: #1d2633; --c0: #6aa5ff; --c1: #b493fb; --c2: #f5ab4b; --c3: #4fcfc2; --c4: #f284b6;
  --c5: #94a3b8; --c6: #63d08a; --c7: #d3a06a; --c8: #5bc0f5; --c9: #6b7686}}
* {box-sizing: border-box}
body {margin: 0; background: var(--bg); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif}
main, header > div {max-width: 1200px; margin: 0 auto; padding: 0 24px}
header {background: var(--card); border-bottom: 1px solid var(--rule); padding: 26px 0 22px; margin-bottom: 26px}
h1 {margin: 0; font-size: 27px; letter-spacing: -0.02em}
h2 {margin: 34px 0 4px; font-size: 19px; letter-spacing: -0.01em}
h3 {margin: 0 0 8px; font-size: 15px}
p {margin: 4px 0 12px; color: var(--muted); max-width: 78ch}
.panel {background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 16px 18px; margin: 12px 0}
.two {display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 14px}
.two .panel {margin: 0}
.tiles {display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 12px; margin-top: 18px}
.tile {border: 1px solid var(--rule); border-radius: 10px; padding: 12px 14px; background: var(--bg)}
.tile b {display: block; font-size: 25px; line-height: 1.2; letter-spacing: -0.02em}
.tile span {color: var(--muted); font-size: 12.5px; display: block}
.tile.main b {color: var(--c0)}
svg {display: block; width: 100%; height: auto}
svg text {font-family: inherit !important}
.scroll {overflow-x: auto}
table {border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px}
th {font-weight: 600; color: var(--muted); text-align: right; padding: 6px 10px; border-bottom: 1px solid var(--rule);
  vertical-align: bottom; white-space: nowrap}
td {text-align: right; padding: 6px 10px; border-bottom: 1px solid var(--rule); white-space: nowrap}
tr:last-child td {border-bottom: 0}
th:first-child, td:first-child {text-align: left}
td small {display: block; color: var(--muted); font-size: 11.5px}
td.bar {background: linear-gradient(var(--c0), var(--c0)) no-repeat 0 100% / var(--share) 3px}
th.group {text-align: center}
tr.main td {font-weight: 600}
tr.main td small {font-weight: 400}
table.sortable th.key {cursor: pointer}
table.sortable th.key:hover {color: var(--ink)}
th.sorted::after {content: " ↓"}
th.sorted.up::after {content: " ↑"}
ul {margin: 6px 0 6px; padding-left: 20px}
ul.warn li {color: var(--c2)}
details summary {cursor: pointer; color: var(--c0)}
pre {overflow-x: auto; background: var(--soft); border-radius: 8px; padding: 12px 14px; font-size: 12.5px;
  margin: 10px 0 0}
code {background: var(--soft); border-radius: 4px; padding: 1px 5px; font-size: 13px; overflow-wrap: anywhere}
.map {position: relative}
.map canvas {width: 100%; height: 480px; display: block}
.map .tip {position: absolute; pointer-events: none; background: var(--ink); color: var(--card); border-radius: 6px;
  padding: 4px 8px; font-size: 12.5px; display: none; max-width: 300px; z-index: 2}
.choices {display: flex; flex-wrap: wrap; gap: 6px 16px; align-items: center; margin-bottom: 8px; color: var(--muted);
  font-size: 13px}
select {font: inherit; color: var(--ink); background: var(--card); border: 1px solid var(--rule); border-radius: 6px;
  padding: 3px 6px}
.legend {display: flex; flex-wrap: wrap; gap: 4px 14px; font-size: 13px; color: var(--muted)}
.legend i {display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 5px}
.user + .user {border-top: 1px solid var(--rule); padding-top: 16px; margin-top: 16px}
.panel .nqf-cards {color: var(--ink)}
.panel .nqf-cards .row {display: grid; grid-template-columns: repeat(auto-fill, minmax(118px, 1fr))}
.panel .nqf-cards .card {width: auto}
.panel .nqf-cards h4, .panel .nqf-cards .line {color: var(--muted)}
.panel .nqf-cards .card {background: var(--card); border-color: var(--rule)}
.panel .nqf-cards .card.marked {border-color: var(--c6); box-shadow: 0 0 0 1px var(--c6)}
.panel .nqf-cards .picture {background: var(--soft)}
.panel .nqf-cards .note {color: var(--c6)}
footer {color: var(--muted); font-size: 13px; padding: 26px 0 40px}
@media print {body {background: #fff} .panel {break-inside: avoid}}
"""

# The errors of the page itself are written into its root element, where a test reads them.
SCRIPT = """
'use strict';
const errors = [];
addEventListener('error', event => errors.push(event.message || 'resource ' + event.target.tagName), true);
addEventListener('load', () => {
  for (const image of document.images) if (!image.complete || !image.naturalWidth) errors.push('picture ' + image.alt);
  document.documentElement.dataset.check = errors.length ? 'failed: ' + errors.join('; ') : 'ok';
});

for (const table of document.querySelectorAll('table.sortable')) {
  for (const head of table.querySelectorAll('th.key')) head.addEventListener('click', () => {
    const up = head.classList.contains('sorted') && !head.classList.contains('up'), at = +head.dataset.column;
    for (const other of table.querySelectorAll('th')) other.classList.remove('sorted', 'up');
    head.classList.add('sorted');
    head.classList.toggle('up', up);
    const rows = [...table.tBodies[0].rows], value = row => parseFloat(row.cells[at].dataset.value);
    rows.sort((a, b) => (up ? 1 : -1) * (value(a) - value(b)));
    table.tBodies[0].append(...rows);
  });
}

const holder = document.querySelector('.map');
if (holder) {
  const data = JSON.parse(document.getElementById('map-data').textContent);
  const canvas = holder.querySelector('canvas'), tip = holder.querySelector('.tip');
  const legend = holder.querySelector('.legend'), [layout, color] = holder.querySelectorAll('select');
  const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const most = Math.log1p(Math.max(...data.popularity, 1));
  let places = [];

  function draw() {
    const width = canvas.clientWidth, height = canvas.clientHeight, scale = devicePixelRatio || 1, edge = 14;
    canvas.width = width * scale;
    canvas.height = height * scale;
    const pen = canvas.getContext('2d'), points = data.layouts[layout.value], kind = data.colors[color.value];
    pen.scale(scale, scale);
    const shades = [...Array(10).keys()].map(index => css('--c' + index));
    legend.textContent = '';
    const shade = index => shades[kind.rest && index == kind.labels.length - 1 ? 9 : index];
    (kind ? kind.labels : ['no training interaction', 'few', 'many']).forEach((label, index) => {
      const entry = document.createElement('span'), dot = document.createElement('i');
      dot.style.background = kind ? shade(index) : [css('--c9'), css('--c0'), css('--c0')][index];
      dot.style.opacity = kind || index != 1 ? 1 : 0.25;
      entry.append(dot, label);
      legend.append(entry);
    });
    const across = (width - 2 * edge) / 1000, down = (height - 2 * edge) / 1000;
    places = points.map(([x, y]) => [edge + x * across, height - edge - y * down]);
    places.forEach(([x, y], at) => {
      const share = Math.log1p(data.popularity[at]) / most;
      pen.globalAlpha = kind ? 0.75 : data.popularity[at] ? 0.15 + 0.85 * share : 0.6;
      pen.fillStyle = kind ? shade(kind.index[at]) : data.popularity[at] ? shades[0] : shades[9];
      pen.beginPath();
      pen.arc(x, y, 2.6, 0, 7);
      pen.fill();
    });
  }

  canvas.addEventListener('mousemove', event => {
    const {offsetX: left, offsetY: top} = event;
    let best = -1, least = 100;
    places.forEach(([x, y], at) => {
      const distance = (x - left) ** 2 + (y - top) ** 2;
      if (distance < least) [best, least] = [at, distance];
    });
    tip.style.display = best < 0 ? 'none' : 'block';
    if (best < 0) return;
    const kinds = Object.values(data.colors).filter(Boolean).map(kind => kind.labels[kind.index[best]]);
    tip.textContent = [data.titles[best], ...kinds, data.popularity[best] + ' training interactions'].join(' · ');
    tip.style.left = Math.min(left + 14, canvas.clientWidth - 250) + 'px';
    tip.style.top = canvas.offsetTop + top + 14 + 'px';
  });
  canvas.addEventListener('mouseleave', () => { tip.style.display = 'none'; });
  for (const choice of [layout, color]) choice.addEventListener('change', draw);
  addEventListener('resize', draw);
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', draw);
  draw();
}
"""
