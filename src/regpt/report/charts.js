/* The charts, with one shared cursor and zoom. */

const page = JSON.parse(document.getElementById("data").textContent);
const AXES = { tokens: "tokens", flops: "FLOPs", step: "steps", seconds: "time" };
const TITLES = { tokens: "tokens", flops: "FLOPs", step: "step", seconds: "time in training" };
const SKIP = 0.05; // of a run: the first fall of the loss, which would squeeze everything after it
const FONT = 12;
const HUES = 8; // colours of the palette; lines beyond them are dashed
const several = page.runs.length > 1;
const axisNames = Object.keys(AXES).filter((axis) => page.runs.every((run) => run.axes[axis]));
const view = { axis: axisNames[0], log: false, whole: false, hidden: new Set() };

function make(tag, className, content) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (content !== undefined) element.textContent = content; // never innerHTML: samples can say anything
  return element;
}

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const font = () => `${FONT}px ${getComputedStyle(document.body).fontFamily}`;
const hueOf = (hue) => colour(typeof hue === "number" ? `c${hue % HUES}` : hue);

/** [least, greatest] of the numbers among `values[begin..end]`; null where there are none. */
function extent(values, begin, end) {
  let least = Infinity, greatest = -Infinity;
  for (let i = begin; i <= end; i++) {
    if (values[i] === null || values[i] === undefined) continue;
    least = Math.min(least, values[i]);
    greatest = Math.max(greatest, values[i]);
  }
  return least <= greatest ? [least, greatest] : null;
}

/**
 * The y range of the visible part. A linear view of the whole run leaves out its first steps, and raw lines
 * may leave the frame where the smoothed line stays in it, unless "whole y range" is on.
 */
function yRange(panel) {
  return (u) => {
    const last = u.data[0].length - 1;
    const [from, to] = u.series[0].idxs || [0, last];
    const focus = !view.whole && !view.log && panel.form !== "score"; // a score has no steep start
    const skipTo = u.data[0][0] + SKIP * (u.data[0][last] - u.data[0][0]);
    const begin = focus && from === 0 ? u.data[0].findIndex((x) => x >= skipTo) : from;
    const extents = panel.series.map((series, i) => (u.series[i + 1].show ? extent(u.data[i + 1], begin, to) : null));
    if (focus && panel.series[0].role === "raw" && extents[0]) extents[0] = tamed(extents[0], u.data[1], begin, to);
    const all = extents.filter(Boolean).flat();
    if (!all.length) return panel.log ? [1e-4, 1e-2] : [0, 1];
    const top = Math.max(...all);
    if (panel.log) return logRange(panel, all.filter((value) => value > 0));
    const near = panel.references.map((one) => one.value).filter((value) => panel.form === "loss" || value < 1.5 * top);
    all.push(...near);
    if (["count", "rate", "gib", "norm", "percent"].includes(panel.form)) all.push(0);
    let least = Math.min(...all), greatest = Math.max(...all);
    if (least === greatest) [least, greatest] = [least - Math.abs(least || 1) * 0.1, greatest + Math.abs(greatest || 1) * 0.1];
    const room = (greatest - least) * 0.05;
    const crowned = near.includes(greatest); // room for two lines of labels above it
    return [least === 0 ? 0 : least - room, greatest + (crowned ? ((greatest - least) * 50) / (u.height - 60) : room)];
  };
}

/** Around all values, and the references that are not far from them. */
function logRange(panel, all) {
  if (!all.length) return [1e-4, 1e-2];
  const least = Math.min(...all), greatest = Math.max(...all);
  const near = panel.references.map((one) => one.value).filter((value) => value > least / 10 && value < greatest * 10);
  return [Math.min(least, ...near) / 1.6, Math.max(greatest, ...near) * 1.6];
}

/** A raw line's range without single spikes: the middle 98 % of its values and half as much again on either side. */
function tamed([low, high], values, begin, end) {
  const sorted = values.slice(begin, end + 1).filter((value) => value !== null).sort((a, b) => a - b);
  const at = (share) => sorted[Math.round(share * (sorted.length - 1))];
  const reach = (at(0.99) - at(0.01)) / 2;
  return [Math.max(low, at(0.01) - reach), Math.min(high, at(0.99) + reach)];
}

function xRange(u, least, greatest) {
  if (least === null) return [0, 1];
  return least === greatest ? [least * 0.9, greatest * 1.1 + 1e-9] : [least, greatest];
}

/** The newest number at or before `at`: the value of a sparse series under the cursor; the last one without a cursor. */
function newest(values, at) {
  for (let i = at === null ? values.length - 1 : at; i >= 0; i--) if (values[i] !== null && values[i] !== undefined) return values[i];
  return null;
}

function series(one, panel, values) {
  const count = values.reduce((sum, value) => sum + (value !== null && value !== undefined), 0);
  const hue = hueOf(one.hue) + (one.role === "raw" ? "66" : "");
  const few = one.role === "points" ? count <= 60 : count === 1;
  return {
    label: one.label,
    scale: "y",
    spanGaps: true,
    show: !view.hidden.has(one.run),
    stroke: hue,
    width: one.role === "raw" ? 1 : 2,
    dash: typeof one.hue === "number" && one.hue >= HUES ? [6, 4] : undefined,
    points: { show: few, size: several ? 5 : 7, width: 1.5, fill: colour("card"), stroke: hue },
    value: (u, value, index, at) => {
      const found = newest(u.data[index], at);
      return found === null ? "–" : FORMS[panel.form](found);
    },
  };
}

// A logarithmic x axis: lines at 1, 2 and 5 of each power of ten, or at the powers alone where there are many.
function logSplits(u, axis, least, greatest) {
  const digits = greatest / least > 1e3 ? [1] : greatest / least > 20 ? [1, 3] : [1, 2, 5];
  const found = [];
  for (let power = Math.floor(Math.log10(least)); power <= Math.log10(greatest); power++) {
    found.push(...digits.map((digit) => digit * 10 ** power).filter((value) => value >= least && value <= greatest));
  }
  return found;
}
const logTicks = (u, values) => values.map((value) => (view.axis === "seconds" ? duration(value) : FORMS[view.axis](value)));

const timeSteps = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200];
const increments = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, ...timeSteps, ...[1, 2, 5, 10, 20, 50, 100].map((days) => days * 86400)];

function axes(panel) {
  const common = { stroke: colour("soft"), font: font(), grid: { stroke: colour("grid"), width: 1 }, ticks: { show: false } };
  const x = { ...common, values: ticks(view.axis), label: TITLES[view.axis], labelFont: font(), labelSize: 18, size: 24, space: 56, labelGap: 0, gap: 6 };
  const y = { ...common, scale: "y", values: ticks(panel.form), size: 54, space: 36, gap: 8 };
  if (view.log) Object.assign(x, { splits: logSplits, filter: (u, splits) => splits, values: logTicks });
  else if (view.axis === "seconds") x.incrs = increments;
  if (panel.log) Object.assign(y, { splits: logSplits, filter: (u, splits) => splits, values: (u, values) => values.map(FORMS[panel.form]) });
  return [x, y];
}

/** A hook that draws inside the frame, in the marks' colour. */
function inFrame(draw) {
  return (u) => {
    const { ctx, bbox } = u;
    const dpr = window.devicePixelRatio;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    ctx.font = `${FONT * dpr}px ${getComputedStyle(document.body).fontFamily}`;
    ctx.fillStyle = ctx.strokeStyle = colour("mark");
    ctx.lineWidth = dpr;
    draw(u, dpr);
    ctx.restore();
  };
}

/** Vertical marks of all runs in sight. */
function marks(u, dpr, main) {
  page.runs.forEach((run, i) => view.hidden.has(i) || eventMarks(u, dpr, run, main && !several, several ? hueOf(i) : colour("mark")));
}

function eventMarks(u, dpr, run, named, hue) {
  const { ctx, bbox } = u;
  ctx.setLineDash([2 * dpr, 4 * dpr]);
  ctx.strokeStyle = hue;
  const groups = eventGroups(u, 12 * dpr, run);
  for (const { from, to } of groups) {
    line(ctx, from, bbox.top, from, bbox.top + bbox.height);
    if (to > from) band(ctx, from, to, bbox, hue);
  }
  // Labels do not overlap: the most frequent first; one that finds no room is left out, the table below names it.
  const taken = [];
  for (const { name, from, n } of named ? [...groups].sort((a, b) => b.n - a.n) : []) {
    const label = n > 1 ? `${name} × ${n}` : name;
    const width = ctx.measureText(label).width + 6 * dpr;
    const left = from + width > bbox.left + bbox.width;
    const begin = left ? from - width : from;
    if (taken.some(([a, b]) => begin < b && begin + width > a)) continue;
    say(ctx, label, from + (left ? -5 : 5) * dpr, bbox.top + FONT * dpr, left ? "right" : "left");
    taken.push([begin, begin + width]);
  }
}

/** The events in sight; those of one name that lie closer than `gap` pixels are one. */
function eventGroups(u, gap, run) {
  const groups = [], newestOf = new Map();
  for (const event of run.events) {
    const x = Math.round(u.valToPos(event[view.axis], "x", true)), last = newestOf.get(event.name);
    if (!(x >= u.bbox.left && x <= u.bbox.left + u.bbox.width)) continue;
    if (last && x - last.to < gap) {
      last.to = x;
      last.n += 1;
    } else {
      newestOf.set(event.name, { name: event.name, from: x, to: x, n: 1 });
      groups.push(newestOf.get(event.name));
    }
  }
  return groups;
}

/** A pale stretch that ends in a line. */
function band(ctx, from, to, bbox, hue) {
  ctx.save();
  ctx.globalAlpha = 0.12;
  ctx.fillStyle = hue;
  ctx.fillRect(from, bbox.top, to - from, bbox.height);
  ctx.restore();
  line(ctx, to, bbox.top, to, bbox.top + bbox.height);
}

/** Dashed lines with their names at the right, or at the left where the one before is close. */
function references(u, dpr, panel) {
  const { ctx, bbox } = u;
  let before = Infinity, side = "right";
  for (const { label, value } of [...panel.references].sort((a, b) => a.value - b.value)) {
    const y = Math.round(u.valToPos(value, "y", true));
    if (!(y >= bbox.top && y <= bbox.top + bbox.height)) continue;
    ctx.setLineDash([6 * dpr, 5 * dpr]);
    line(ctx, bbox.left, y, bbox.left + bbox.width, y);
    side = Math.abs(before - y) < 18 * dpr && side === "right" ? "left" : "right";
    const below = y - bbox.top < 20 * dpr;
    const text = `${label} ${panel.form === "rate" ? rate(value) : trim(value.toFixed(4))}`;
    const x = side === "right" ? bbox.left + bbox.width - 4 * dpr : bbox.left + 4 * dpr;
    say(ctx, text, x, y + (below ? 1.4 * FONT : -6) * dpr, side);
    before = y;
  }
}

/** Text with a halo in the card's colour, so that lines behind it do not strike it out. */
function say(ctx, text, x, y, align) {
  ctx.save();
  ctx.textAlign = align;
  ctx.setLineDash([]);
  ctx.lineJoin = "round";
  ctx.lineWidth *= 4;
  ctx.strokeStyle = colour("card");
  ctx.strokeText(text, x, y);
  ctx.fillText(text, x, y);
  ctx.restore();
}

function line(ctx, x0, y0, x1, y1) {
  ctx.beginPath();
  ctx.moveTo(x0, y0);
  ctx.lineTo(x1, y1);
  ctx.stroke();
}

/** The x values and the columns of a panel's lines; those of several runs on the union of their x values. */
function dataOf(panel) {
  const tables = [];
  for (const { run, column } of panel.series) {
    if (!tables.length || tables[tables.length - 1].run !== run) tables.push({ run, data: [page.runs[run].axes[view.axis]] });
    tables[tables.length - 1].data.push(page.runs[run].columns[column]);
  }
  const data = tables.length > 1 ? uPlot.join(tables.map((table) => table.data)) : tables[0].data;
  const positive = view.log ? Math.max(0, data[0].findIndex((x) => x > 0)) : 0; // a logarithm has no place for step 0
  return data.map((values) => values.slice(positive));
}

function plot(panel, card) {
  const box = card.querySelector(".plot"), top = card.querySelector(".top");
  const main = card.classList.contains("main"), lead = main || card.classList.contains("lead");
  const data = dataOf(panel);
  const height = () => (main ? (box.clientWidth < 600 ? 300 : 400) : lead ? 310 : 230);
  const chart = new uPlot(
    {
      width: box.clientWidth,
      height: height(),
      padding: [8, 14, 0, 0],
      scales: { x: { time: false, distr: view.log ? 3 : 1, range: xRange }, y: { range: yRange(panel), distr: panel.log ? 3 : 1 } },
      series: [
        { label: TITLES[view.axis], value: (u, value, index, at) => FORMS[view.axis](newest(u.data[0], at)) },
        ...panel.series.map((one, i) => series(one, panel, data[i + 1])),
      ],
      axes: axes(panel),
      cursor: { sync: { key: "run", setSeries: false, scales: ["x", null] }, y: false, drag: { x: true, y: false }, points: { size: 8, fill: (u, i) => u.series[i].points.stroke(), width: 0 } },
      legend: { live: true, mount: (u, legend) => top.append(legend), markers: { width: 2.5 } },
      hooks: {
        drawAxes: [inFrame((u, dpr) => references(u, dpr, panel))], // the lines stay above their labels
        draw: [inFrame((u, dpr) => marks(u, dpr, main))],
      },
    },
    data,
    box
  );
  chart.setLegend({ idx: null });
  const observer = new ResizeObserver(() => {
    if (box.clientWidth && box.clientWidth !== chart.width) chart.setSize({ width: box.clientWidth, height: height() });
  });
  observer.observe(box);
  return {
    destroy() {
      observer.disconnect();
      chart.destroy();
      top.querySelector(".u-legend")?.remove();
    },
  };
}
