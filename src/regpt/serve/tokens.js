/* Tokens as coloured text, and a slider over steps: for the page of the server and for the offline one. */

const $ = (id) => document.getElementById(id);
const RARE = 8; // nats of surprise with the full colour: a probability of 1 in 3,000
const APART = 3; // nats of difference with the full colour: 20 times as likely

/** An element; text children are text nodes, so whatever a model writes stays text. */
function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

function button(label, name, press) {
  const element = make("button", "", label);
  element.type = "button";
  element.setAttribute("aria-label", name);
  element.addEventListener("click", press);
  return element;
}

/** Control characters by the pictures Unicode has for them; line ends and tabs stay. */
const printable = (text) => text.replace(/[\0-\x08\x0b-\x1f\x7f]/g, (one) => String.fromCharCode(one === "\x7f" ? 0x2421 : 0x2400 + one.charCodeAt(0)));

/** A token between quotes, white space visible. */
const quoted = (text) => `“${printable(text).replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/ /g, "␣")}”`;

function percent(p) {
  const value = 100 * p, digits = value >= 9.95 ? 0 : value >= 0.995 ? 1 : 2;
  return value < 0.00995 ? "< 0.01\u00a0%" : `${value.toFixed(digits)}\u00a0%`;
}

const signed = (value, digits = 2) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(digits);

/** One token of a text; `spelling` is "" where it only begins a character. */
function tokenElement(spelling, index) {
  const shown = spelling === "" ? "▫" : printable(spelling), end = shown.endsWith("\n");
  const element = make("span", end ? "tok end" : "tok", shown);
  element.dataset.i = index;
  element.setAttribute("role", "button");
  element.tabIndex = index ? -1 : 0;
  return element;
}

/** Colour a token by its probability, or by how much likelier it is here than elsewhere. */
function shade(element, logprob, other) {
  const difference = other === undefined ? null : logprob - other;
  const strength = difference === null ? -logprob / RARE : Math.abs(difference) / APART;
  element.style.setProperty("--h", `${Math.round(100 * Math.min(1, Math.max(0, strength)))}%`);
  element.classList.toggle("here", difference !== null && difference > 0);
  element.classList.toggle("there", difference !== null && difference <= 0);
}

/** What the colours mean; `other` names the model of the differences. */
function legend(other) {
  const samples = other
    ? [["20 times likelier here", 0, -APART], ["the same", -1, -1], [`20 times likelier under ${other}`, -APART, 0]]
    : [["probability 100 %", 0], ["10 %", Math.log(0.1)], ["1 %", Math.log(0.01)], ["0.03 %", -RARE]];
  const line = make("p", "legend");
  for (const [label, here, there] of samples) {
    const element = make("span", "tok", label);
    shade(element, here, there);
    line.append(element, " ");
  }
  return line;
}

/** Pointing at a token, or reaching it with the arrow keys, shows it; a click or Enter picks it. */
function listen(text, show, pick) {
  const tokenOf = (event) => event.target.closest?.(".tok");
  const on = (name, act) => text.addEventListener(name, (event) => {
    const token = tokenOf(event);
    if (token) act(token, event);
  });
  on("mouseover", show);
  on("focusin", show);
  on("click", pick);
  on("keydown", (token, event) => {
    const all = [...text.querySelectorAll(".tok")], at = all.indexOf(token);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1 }[event.key];
    if (event.key === "Enter" || event.key === " ") pick(token, event);
    else if (to === undefined) return;
    else if (all[to]) {
      token.tabIndex = -1;
      all[to].tabIndex = 0;
      all[to].focus();
    }
    event.preventDefault();
  });
}

/** A slider over `steps`, with arrows and a button that plays them; `show(step)` may return a promise to wait for. */
function dial(steps, start, show) {
  const slider = make("input"), label = make("b", "step"), box = make("div", "dial");
  Object.assign(slider, { type: "range", min: 0, max: steps.length - 1, step: 1, value: start });
  slider.setAttribute("aria-label", "Checkpoint");
  let playing = 0;
  const go = (to) => {
    slider.value = to;
    const step = steps[Number(slider.value)];
    label.textContent = `step ${step.toLocaleString("en")}`;
    slider.setAttribute("aria-valuetext", `step ${step}`);
    return show(step);
  };
  const stop = () => {
    playing += 1;
    play.textContent = "▶ play";
  };
  const by = (step) => () => {
    stop();
    go(Number(slider.value) + step);
  };
  const play = button("▶ play", "Play the checkpoints", async () => {
    if (play.textContent !== "▶ play") return stop();
    const mine = ++playing;
    play.textContent = "■ stop";
    let at = Number(slider.value) === steps.length - 1 ? -1 : Number(slider.value);
    while (playing === mine && ++at < steps.length) {
      await go(at);
      await new Promise((after) => setTimeout(after, 600));
    }
    if (playing === mine) stop();
    return null;
  });
  slider.addEventListener("input", () => {
    stop();
    go(slider.value);
  });
  box.append(play, button("‹", "Earlier checkpoint", by(-1)), slider, button("›", "Later checkpoint", by(1)), label);
  return { box, go: () => go(slider.value), stop, step: () => steps[Number(slider.value)] };
}
