'use strict';
// The errors of the page itself are written into its root element, where a test reads them.
const errors = [];
addEventListener('error', event => errors.push(event.message || 'resource ' + event.target.tagName), true);
addEventListener('load', () => {
  for (const image of document.images) if (!image.complete || !image.naturalWidth) errors.push('picture ' + image.alt);
  document.documentElement.dataset.check = errors.length ? 'failed: ' + errors.join('; ') : 'ok';
});

// Numbers sort from the largest, texts from A, and the other way round the next time.
for (const table of document.querySelectorAll('table.sortable')) {
  for (const head of table.querySelectorAll('th.key')) {
    head.querySelector('button').addEventListener('click', () => {
      const at = +head.dataset.column, rows = [...table.tBodies[0].rows];
      const numbers = rows.every(row => row.cells[at].dataset.value !== undefined);
      const first = numbers ? 'descending' : 'ascending';
      const order = head.getAttribute('aria-sort') != first ? first : numbers ? 'ascending' : 'descending';
      for (const other of table.querySelectorAll('th.key')) other.setAttribute('aria-sort', 'none');
      head.setAttribute('aria-sort', order);
      const sign = order == 'ascending' ? 1 : -1, cell = row => row.cells[at];
      rows.sort((a, b) => sign * (numbers
        ? parseFloat(cell(a).dataset.value) - parseFloat(cell(b).dataset.value)
        : cell(a).textContent.localeCompare(cell(b).textContent)));
      table.tBodies[0].append(...rows);
    });
  }
}

const holder = document.querySelector('.map');
if (holder) {
  const data = JSON.parse(document.getElementById('map-data').textContent);
  const canvas = holder.querySelector('canvas'), tip = holder.querySelector('.tip');
  const legend = holder.querySelector('.legend'), [layout, color] = holder.querySelectorAll('select');
  const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const most = Math.log1p(Math.max(...data.popularity, 1));
  const kinds = Object.values(data.colors).filter(Boolean);
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

  // A finger covers more than a mouse points at, and its tip stays until it touches elsewhere.
  function show(event) {
    const {offsetX: left, offsetY: top} = event, reach = event.pointerType == 'touch' ? 24 : 10;
    let best = -1, least = reach * reach;
    places.forEach(([x, y], at) => {
      const distance = (x - left) ** 2 + (y - top) ** 2;
      if (distance < least) [best, least] = [at, distance];
    });
    tip.style.display = best < 0 ? 'none' : 'block';
    if (best < 0) return;
    const labels = kinds.map(kind => kind.labels[kind.index[best]]);
    tip.textContent = [data.titles[best], ...labels, data.popularity[best] + ' training interactions'].join(' · ');
    tip.style.left = Math.max(0, Math.min(left + 14, canvas.clientWidth - tip.offsetWidth)) + 'px';
    tip.style.top = canvas.offsetTop + top + 14 + 'px';
  }
  canvas.addEventListener('pointermove', show);
  canvas.addEventListener('pointerdown', show);
  canvas.addEventListener('pointerleave', event => {
    if (event.pointerType != 'touch') tip.style.display = 'none';
  });

  // Made when it is first opened: thousands of rows.
  const points = document.querySelector('.points'), body = points.querySelector('tbody');
  function fill() {
    if (!points.open) return;
    for (const head of points.querySelectorAll('th')) head.setAttribute('aria-sort', 'none');
    body.replaceChildren(...data.titles.map((title, at) => {
      const row = document.createElement('tr'), [x, y] = data.layouts[layout.value][at];
      for (const text of [title, ...kinds.map(kind => kind.labels[kind.index[at]])]) row.insertCell().textContent = text;
      for (const number of [data.popularity[at], x, y]) {
        const cell = row.insertCell();
        cell.textContent = number.toLocaleString('en');
        cell.dataset.value = number;
      }
      return row;
    }));
  }
  points.addEventListener('toggle', fill);
  layout.addEventListener('change', fill);
  for (const choice of [layout, color]) choice.addEventListener('change', draw);
  addEventListener('resize', draw);
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', draw);
  draw();
}
