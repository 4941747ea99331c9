/* Draws the run that page.py embedded: charts with one shared cursor and zoom, and a slider over the samples. */
(() => {
  "use strict";

  const run = JSON.parse(document.getElementById("data").textContent);
  const AXES = { tokens: "tokens", step: "steps", seconds: "time" };
  const TITLES = { tokens: "tokens", step: "step", seconds: "time in training" };
  const SI = [[1e15, "P"], [1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"], [1, ""]];
  const TIME = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
  const SKIP = 0.05; // of a run: the first fall of the loss, which would squeeze everything after it
  const FONT = 12;
  const view = { axis: Object.keys(AXES).find((axis) => run.axes[axis]), log: false, whole: false };
  let plots = [];

  // ---- numbers as text

  const unitOf = (value, units) => units.find(([scale]) => Math.abs(value) >= scale * 0.9995) || units[units.length - 1];
  const trim = (text) => (text.includes(".") ? text.replace(/\.?0+$/, "") : text);

  function si(value) {
    const [scale, prefix] = unitOf(value, SI);
    return trim((value / scale).toPrecision(3)) + prefix;
  }

  /** The two units that matter: 9.5 s, 45 s, 1 min 32 s, 2 h 05 min, 3 d 4 h. */
  function duration(seconds) {
    if (seconds < 60) return `${trim(seconds.toFixed(seconds < 10 ? 1 : 0))} s`;
    const [scale, unit] = unitOf(seconds, TIME);
    const [small, name] = TIME[TIME.findIndex(([each]) => each === scale) + 1];
    const total = Math.round(seconds / small), each = scale / small;
    return `${Math.floor(total / each)} ${unit} ${String(total % each).padStart(unit === "d" ? 1 : 2, "0")} ${name}`;
  }

  function rate(value) {
    if (value === 0) return "0";
    const [digits, power] = value.toExponential(2).split("e");
    return `${trim(digits)}e${Number(power)}`;
  }

  const FORMS = {
    loss: (value) => value.toFixed(4),
    norm: (value) => value.toPrecision(3),
    rate,
    count: si,
    percent: (value) => `${(100 * value).toFixed(1)} %`,
    gib: (value) => `${value.toFixed(2)} GiB`,
    score: (value) => value.toFixed(4),
    tokens: si,
    step: (value) => Math.round(value).toLocaleString("en"),
    seconds: duration,
  };

  /** Labels of the ticks of an axis: one unit for all of them, and as many decimals as their distance needs. */
  function ticks(form) {
    return (u, values, axis, space, distance) => {
      const shown = values.filter((value) => value !== null);
      const largest = Math.max(...shown.map(Math.abs));
      const write = {
        tokens: () => scaled(unitOf(largest, SI), distance),
        step: () => scaled(unitOf(largest, SI), distance),
        count: () => scaled(unitOf(largest, SI), distance),
        seconds: () => scaled(TIME.find(([scale]) => distance % scale === 0) || [1, "s"], distance, " "),
        percent: () => (value) => `${trim((100 * value).toFixed(1))} %`,
        rate: () => rate,
      }[form];
      const text = write ? write() : (value) => value.toFixed(decimals(distance));
      return values.map((value) => (value === null ? "" : text(value)));
    };
  }

  /** Decimals that write `distance` exactly: 1 for 0.5, 2 for 0.25. */
  function decimals(distance) {
    let digits = 0;
    while (digits < 9 && Math.abs(distance - Number(distance.toFixed(digits))) > 1e-6 * distance) digits++;
    return digits;
  }

  function scaled([scale, unit], distance, space = "") {
    return (value) => (value === 0 ? "0" : (value / scale).toFixed(decimals(distance / scale)) + space + unit);
  }

  // ---- the page

  function make(tag, className, content) {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (content !== undefined) element.textContent = content; // never innerHTML: samples can say anything
    return element;
  }

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const font = () => `${FONT}px ${getComputedStyle(document.body).fontFamily}`;

  function button(label, pressed, press) {
    const element = make("button", "", label);
    element.type = "button";
    element.setAttribute("aria-pressed", String(pressed));
    element.addEventListener("click", () => press(element));
    return element;
  }

  function controls() {
    const bar = make("div", "bar");
    const choice = make("div", "choice");
    choice.setAttribute("role", "group");
    choice.setAttribute("aria-label", "Horizontal axis");
    for (const [axis, label] of Object.entries(AXES).filter(([axis]) => run.axes[axis])) {
      choice.append(
        button(label, axis === view.axis, (self) => {
          for (const other of choice.children) other.setAttribute("aria-pressed", String(other === self));
          view.axis = axis;
          draw();
        })
      );
    }
    bar.append(choice);
    for (const [key, label] of [["log", "log x"], ["whole", "whole y range"]]) {
      const toggle = button(label, view[key], (self) => {
        view[key] = !view[key];
        self.setAttribute("aria-pressed", String(view[key]));
        draw();
      });
      toggle.classList.add("toggle");
      bar.append(toggle);
    }
    bar.append(make("span", "hint", "drag to zoom, double-click to reset"));
    return bar;
  }

  // ---- one chart

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
      const focus = !view.whole && !view.log;
      const skipTo = u.data[0][0] + SKIP * (u.data[0][last] - u.data[0][0]);
      const begin = focus && from === 0 ? u.data[0].findIndex((x) => x >= skipTo) : from;
      const extents = panel.series.map((series, i) => (u.series[i + 1].show ? extent(u.data[i + 1], begin, to) : null));
      if (focus && panel.series[0].role === "raw" && extents[0]) extents[0] = tamed(extents[0], u.data[1], begin, to);
      const all = extents.filter(Boolean).flat();
      if (panel.reference && (panel.form === "loss" || panel.reference.value < 1.5 * Math.max(...all))) all.push(panel.reference.value);
      if (["count", "rate", "gib", "norm", "percent"].includes(panel.form)) all.push(0);
      let least = Math.min(...all), greatest = Math.max(...all);
      if (!all.length) return [0, 1];
      if (least === greatest) [least, greatest] = [least - Math.abs(least || 1) * 0.1, greatest + Math.abs(greatest || 1) * 0.1];
      const room = (greatest - least) * 0.05;
      const crowned = panel.reference && panel.reference.value === greatest; // room for two lines of labels above it
      return [least === 0 ? 0 : least - room, greatest + (crowned ? ((greatest - least) * 50) / (u.height - 60) : room)];
    };
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
    const count = values.reduce((sum, value) => sum + (value !== null), 0);
    const hue = colour(one.role === "points" ? "val" : "train") + (one.role === "raw" ? "66" : "");
    const few = one.role === "points" ? count <= 60 : count === 1;
    return {
      label: one.label,
      scale: "y",
      spanGaps: true,
      stroke: hue,
      width: one.role === "raw" ? 1 : 2,
      points: { show: few, size: 7, width: 1.5, fill: colour("card"), stroke: hue },
      value: (u, value, index, at) => {
        const found = newest(u.data[index], at);
        return found === null ? "–" : FORMS[panel.form](found);
      },
    };
  }

  // A logarithmic x axis: lines at 1, 2 and 5 of each power of ten, or at the powers alone where there are many.
  function logSplits(u, axis, least, greatest) {
    const digits = greatest / least > 1e3 ? [1] : [1, 2, 5];
    const found = [];
    for (let power = Math.floor(Math.log10(least)); power <= Math.log10(greatest); power++) {
      found.push(...digits.map((digit) => digit * 10 ** power).filter((value) => value >= least && value <= greatest));
    }
    return found;
  }
  const logTicks = (u, values) => values.map((value) => (view.axis === "seconds" ? duration(value) : si(value)));

  const timeSteps = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200];
  const increments = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, ...timeSteps, ...[1, 2, 5, 10, 20, 50, 100].map((days) => days * 86400)];

  function axes(panel) {
    const common = { stroke: colour("soft"), font: font(), grid: { stroke: colour("grid"), width: 1 }, ticks: { show: false } };
    const x = { ...common, values: ticks(view.axis), label: TITLES[view.axis], labelFont: font(), labelSize: 18, size: 24, space: 56, labelGap: 0, gap: 6 };
    if (view.log) Object.assign(x, { splits: logSplits, filter: (u, splits) => splits, values: logTicks });
    else if (view.axis === "seconds") x.incrs = increments;
    return [x, { ...common, scale: "y", values: ticks(panel.form), size: 54, space: 36, gap: 8 }];
  }

  /** Horizontal reference and vertical event marks, on the canvas under the cursor. */
  function marks(panel, main) {
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
      eventMarks(u, dpr, main);
      if (panel.reference) reference(u, dpr, panel);
      ctx.restore();
    };
  }

  function eventMarks(u, dpr, main) {
    const { ctx, bbox } = u;
    ctx.setLineDash([2 * dpr, 4 * dpr]);
    let free = -Infinity; // labels do not overlap: one that finds no room is left out, the table below names it
    for (const event of run.events) {
      const x = Math.round(u.valToPos(event[view.axis], "x", true));
      if (!(x >= bbox.left && x <= bbox.left + bbox.width)) continue;
      line(ctx, x, bbox.top, x, bbox.top + bbox.height);
      const width = ctx.measureText(event.name).width + 6 * dpr;
      if (!main || x < free) continue;
      const left = x + width > bbox.left + bbox.width;
      if (left && x - width < free) continue;
      say(ctx, event.name, x + (left ? -5 : 5) * dpr, bbox.top + FONT * dpr, left ? "right" : "left");
      free = x + (left ? 0 : width);
    }
  }

  function reference(u, dpr, panel) {
    const { ctx, bbox } = u;
    const { label, value } = panel.reference;
    const y = Math.round(u.valToPos(value, "y", true));
    if (!(y >= bbox.top && y <= bbox.top + bbox.height)) return;
    ctx.setLineDash([6 * dpr, 5 * dpr]);
    line(ctx, bbox.left, y, bbox.left + bbox.width, y);
    const below = y - bbox.top < 20 * dpr;
    say(ctx, `${label} ${trim(value.toFixed(3))}`, bbox.left + bbox.width - 4 * dpr, y + (below ? 1.4 * FONT : -8) * dpr, "right");
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

  function plot(panel, card, main) {
    const box = card.querySelector(".plot"), top = card.querySelector(".top");
    const positive = view.log ? run.axes[view.axis].findIndex((x) => x > 0) : 0; // a logarithm has no place for step 0
    const data = [run.axes[view.axis], ...panel.series.map((one) => run.columns[one.column])].map((values) => values.slice(positive));
    const height = () => (main ? (box.clientWidth < 600 ? 300 : 400) : 230);
    const chart = new uPlot(
      {
        width: box.clientWidth,
        height: height(),
        padding: [8, 14, 0, 0],
        scales: { x: { time: false, distr: view.log ? 3 : 1, range: xRange }, y: { range: yRange(panel) } },
        series: [
          { label: TITLES[view.axis], value: (u, value, index, at) => FORMS[view.axis](newest(u.data[0], at)) },
          ...panel.series.map((one, i) => series(one, panel, data[i + 1])),
        ],
        axes: axes(panel),
        cursor: { sync: { key: "run", setSeries: false, scales: ["x", null] }, y: false, drag: { x: true, y: false }, points: { size: 8, fill: (u, i) => u.series[i].points.stroke(), width: 0 } },
        legend: { live: true, mount: (u, legend) => top.append(legend), markers: { width: 2.5 } },
        hooks: { draw: [marks(panel, main)] },
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

  /** Rows of three small charts; two or four left over make rows of two, one alone takes the width. */
  function width(i) {
    const small = run.panels.length - 1, wide = { 0: 0, 1: Math.min(small, 4), 2: 2 }[small % 3];
    if (i === 0) return "main";
    if (small === 1) return "alone";
    return i > small - wide ? "half" : "third";
  }

  function card(panel, i) {
    const element = make("div", `card panel ${width(i)}`);
    const top = make("div", "top"), title = make("h3", "", panel.title), box = make("div", "plot");
    title.append(make("span", "", panel.unit));
    top.append(title);
    box.setAttribute("role", "img");
    box.setAttribute("aria-label", `${panel.title} ${panel.unit}, ` + panel.series.map((one) => describe(one, panel)).join("; "));
    element.append(top, box);
    return element;
  }

  function describe(one, panel) {
    const last = newest(run.columns[one.column], null);
    return `${one.label}: last value ${last === null ? "none" : FORMS[panel.form](last)}`;
  }

  const charts = document.getElementById("charts");
  const cards = run.panels.map((panel, i) => card(panel, i));

  function draw() {
    for (const old of plots) old.destroy();
    plots = run.panels.map((panel, i) => plot(panel, cards[i], i === 0));
  }

  // ---- samples

  function sampleText(prompt, text) {
    const block = make("pre", "text");
    const starts = prompt && text.startsWith(prompt);
    if (prompt) block.append(make("span", "prompt", prompt));
    block.append(starts ? text.slice(prompt.length) : text);
    return block;
  }

  function place(group) {
    const at = make("div", "at");
    const step = make("b", "", `step ${FORMS.step(group[0].step)}`);
    at.append(step);
    if (group[0].tokens !== undefined) at.append(make("span", "", `${si(group[0].tokens)} tokens`));
    if (group[0].seconds !== undefined) at.append(make("span", "", duration(group[0].seconds)));
    const until = run.axes.step.findLastIndex((step) => step <= group[0].step);
    const loss = run.columns.val_loss && until >= 0 ? newest(run.columns.val_loss, until) : null;
    if (loss !== null) at.append(make("span", "", `validation loss ${FORMS.loss(loss)}`));
    return at;
  }

  function samples() {
    const section = document.getElementById("samples");
    if (!run.samples.length) return section.remove();
    const steps = [...new Set(run.samples.map((row) => row.step))];
    const reel = make("div", "card reel"), dial = make("div", "dial"), shown = make("div");
    const slider = make("input");
    Object.assign(slider, { type: "range", min: 0, max: steps.length - 1, step: 1 });
    slider.setAttribute("aria-label", "Step of the samples");
    const show = () => {
      const step = steps[Number(slider.value)];
      const group = run.samples.filter((row) => row.step === step);
      const texts = make("div", "texts");
      for (const row of group) texts.append(...row.texts.map((text) => sampleText(row.prompt, text)));
      slider.setAttribute("aria-valuetext", `step ${step}`);
      shown.replaceChildren(place(group), texts);
    };
    const move = (by) => {
      slider.value = Number(slider.value) + by;
      show();
    };
    const [back, on] = [["‹", -1, "Earlier samples"], ["›", 1, "Later samples"]].map(([label, by, name]) => {
      const arrow = make("button", "step", label);
      arrow.type = "button";
      arrow.setAttribute("aria-label", name);
      arrow.addEventListener("click", () => move(by));
      return arrow;
    });
    slider.addEventListener("input", show);
    dial.append(back, slider, on);
    reel.append(...(steps.length > 1 ? [dial] : []), shown);
    section.append(make("h2", "", "Samples while it learned"), reel);
    slider.value = steps.length - 1;
    show();
  }

  charts.append(controls(), ...cards);
  draw();
  samples();
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
})();
