/* The page: controls, cards, and what happens when something is pressed. */

let plots = [];

function button(label, pressed, press) {
  const element = make("button", "", label);
  element.type = "button";
  element.setAttribute("aria-pressed", String(pressed));
  element.addEventListener("click", () => press(element));
  return element;
}

/** Buttons of which one is pressed, the first to begin with. `options`: [label, what to do] each. */
function choice(name, options) {
  const group = make("div", "choice");
  group.setAttribute("role", "group");
  group.setAttribute("aria-label", name);
  for (const [label, act] of options) {
    const press = (self) => {
      for (const other of group.children) other.setAttribute("aria-pressed", String(other === self));
      act();
    };
    group.append(button(label, !group.children.length, press));
  }
  return group;
}

function controls() {
  const bar = make("div", "bar");
  const use = (axis) => () => {
    view.axis = axis;
    draw();
  };
  bar.append(choice("Horizontal axis", axisNames.map((axis) => [AXES[axis], use(axis)])));
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
  if (several) bar.append(runToggles());
  return bar;
}

/** A button a run, which hides its lines everywhere. */
function runToggles() {
  const group = make("div", "runs");
  page.runs.forEach((run, i) => {
    const toggle = button("", true, (self) => {
      view.hidden.delete(i) || view.hidden.add(i);
      self.setAttribute("aria-pressed", String(!view.hidden.has(i)));
      draw();
    });
    const swatch = make("span", "swatch");
    swatch.dataset.hue = i % HUES;
    toggle.append(swatch, run.name);
    toggle.classList.add("toggle");
    group.append(toggle);
  });
  return group;
}

/** Rows of three small charts; two or four left over make rows of two, one alone takes the width. */
function width(i) {
  const leads = several ? Math.min(2, page.panels.length) : 1;
  const small = page.panels.length - leads, wide = { 0: 0, 1: Math.min(small, 4), 2: 2 }[small % 3];
  if (i < leads) return leads === 1 ? "main" : "half lead";
  if (small === 1) return "alone";
  return i >= page.panels.length - wide ? "half" : "third";
}

function card(panel, i) {
  const element = make("div", `card panel ${width(i)}`);
  const top = make("div", "top"), title = make("h3", "", panel.title), box = make("div", "plot");
  title.append(make("span", "", panel.unit));
  top.append(title);
  box.setAttribute("role", "img");
  box.setAttribute("aria-label", `${panel.title} ${panel.unit}, ` + panel.series.map((one) => describe(one, panel)).join("; "));
  element.append(top, box);
  if (panel.note) element.append(make("p", "note", panel.note));
  return element;
}

function describe(one, panel) {
  const last = newest(page.runs[one.run].columns[one.column], null);
  return `${one.label}: last value ${last === null ? "none" : FORMS[panel.form](last)}`;
}

const cards = page.panels.map((panel, i) => card(panel, i));

function draw() {
  for (const old of plots) old.destroy();
  plots = page.panels.map((panel, i) => plot(panel, cards[i]));
}

document.getElementById("charts").append(controls(), ...cards);
draw();
samples();
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
