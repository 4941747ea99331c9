/* The page: texts as they are written, why each token was drawn, forks, checkpoints, differences. */

const MODES = { text: "Complete", chat: "Chat", learn: "Watch it learn", two: "Two models" };
const SLIDERS = [ // field, label, least, most, step, at the start, what it does
  ["temperature", "temperature", 0, 2, 0.05, 1, "logits are divided by it; 0 takes the likeliest token"],
  ["top_k", "top-k", 0, 200, 1, 50, "draw from so many of the likeliest tokens; 0: from all"],
  ["top_p", "top-p", 0.05, 1, 0.01, 1, "draw from the fewest tokens that together have this probability"],
  ["min_p", "min-p", 0, 0.5, 0.01, 0, "draw from tokens of at least this share of the likeliest one's probability"],
  ["max_tokens", "new tokens", 1, 400, 1, 100, "at most so many"],
  ["n", "samples", 1, 4, 1, 1, "side by side, with the seeds that follow"],
];
const DRAWING = ["temperature", "top_k", "top_p", "min_p"];
const HINT = "Point at a token, or reach it with Tab and the arrow keys, to see how it was drawn. Click it, or press Enter, to choose another one: the text is written on from there, with the same noise.";
const state = { mode: "text", models: [], panels: [], turns: [], pinned: null, film: null, step: null };
const written = new Map(); // of the checkpoints: what was asked → panel
let token = sessionStorage.getItem("regpt-token") || "", wanted = 0;

// ---- the server

async function call(path, body, signal) {
  const headers = { ...(token && { Authorization: `Bearer ${token}` }), ...(body && { "Content-Type": "application/json" }) };
  let answer;
  try {
    answer = await fetch(path, { method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body) });
  } catch (error) {
    throw signal?.aborted ? error : new Error("The server does not answer; is it still running?");
  }
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => null);
  throw Object.assign(new Error(said?.error?.message ?? `The server answered ${answer.status}.`), { status: answer.status });
}

/** The events of a stream. */
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let held = ""; ;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The server ended the text early; is it still running?");
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.slice(part.indexOf("data: ") + 6);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

/** Tokens of a chunk, of both paths. */
function tokensOf({ logprobs }) {
  if (!logprobs) return [];
  if (logprobs.content) return logprobs.content.map((one) => ({ id: one.token_id, logprob: one.logprob, bytes: one.bytes }));
  return logprobs.token_ids.map((id, i) => ({ id, logprob: logprobs.token_logprobs[i], bytes: logprobs.bytes[i] }));
}

const modelOf = (id) => state.models.find((one) => one.id === id) ?? state.models.find((one) => one.id === id.slice(0, id.lastIndexOf(":")));

// ---- a text

class Panel {
  /** `ask`: model, seed, options, most, and prompt or messages; `start`: the tokens of a fork, `ids` of its prompt. */
  constructor(ask, start = [], ids = null, stops = []) {
    Object.assign(this, { ask, ids, stops, tokens: [], others: null, done: false, abort: null });
    this.forked = start.length - 1;
    this.decoder = new TextDecoder();
    this.body = make("div", "text");
    if (ask.prompt !== undefined) this.body.append(make("span", "prompt", printable(ask.prompt)));
    this.note = make("p", "soft");
    this.name = make("h3", "", ask.model);
    this.seed = make("span", "soft", `seed ${ask.seed}`);
    this.head = make("div", "head", this.name, this.seed);
    this.element = make("article", "card panel", this.head, this.body, this.note);
    listen(this.body, (element) => state.pinned || why(this, Number(element.dataset.i)), (element, event) => pin(this, Number(element.dataset.i), event));
    for (const one of start) this.add(one);
    if (start.length) this.tokens[this.forked].element.classList.add("forked");
  }

  add({ id, logprob, bytes }) {
    const spelling = this.decoder.decode(new Uint8Array(bytes), { stream: true });
    const element = tokenElement(spelling, this.tokens.length);
    element.setAttribute("aria-label", `${spelling}, ${percent(Math.exp(logprob))}`);
    this.tokens.push({ id, logprob, bytes, spelling, element, why: null });
    this.paint(this.tokens.length - 1);
    this.body.append(element);
  }

  paint(i) {
    const { element, logprob } = this.tokens[i], colour = $("colour").value;
    if (colour === "d") shade(element, logprob, this.others?.[i] ?? logprob);
    else shade(element, colour === "p" ? logprob : 0);
  }

  numbers() {
    return this.tokens.map((one) => one.id);
  }

  /** Its text, without the token that ended it. */
  content() {
    return (this.ended ? this.tokens.slice(0, -1) : this.tokens).map((one) => one.spelling).join("");
  }

  start() {
    return this.ask.messages ? { messages: this.ask.messages } : { prompt: this.ask.prompt };
  }

  async write() {
    const { model, seed, options, most, messages } = this.ask, room = most - this.tokens.length;
    const began = performance.now(), given = this.tokens.length;
    let first = null;
    this.abort = new AbortController();
    this.note.className = "soft";
    this.note.textContent = "…";
    try {
      if (room > 0) {
        const chat = messages && !this.ids, body = { model, seed, ...options, stream: true, max_tokens: room };
        Object.assign(body, chat ? { messages, logprobs: true } : { prompt: this.ids ? [...this.ids, ...this.numbers()] : this.ask.prompt, logprobs: 0 });
        const answer = await call(`/v1/${chat ? "chat/" : ""}completions`, body, this.abort.signal);
        for await (const { choices: [choice], regpt } of events(answer)) {
          if (regpt?.sources) this.sources = regpt.sources.map(({ place }, k) => `[${k + 1}] ${place}`).join("; ");
          if (!choice) continue;
          for (const one of tokensOf(choice)) {
            first ??= performance.now() - began;
            if (!this.ended) this.add(one);
            this.ended ||= this.stops.includes(one.id);
          }
          this.ended ||= choice.finish_reason === "stop";
          if (this.ended && this.stops.length) break;
        }
      }
      this.done = true;
      const count = this.tokens.length - given, rest = (performance.now() - began - first) / 1000;
      const speed = count > 1 ? `first token ${first.toFixed(0)} ms · ${((count - 1) / rest).toFixed(0)} tokens/s` : "";
      this.note.textContent = [speed, `${this.tokens.length} tokens`, this.ended ? "ended by itself" : "", this.sources && `from ${this.sources}`].filter(Boolean).join(" · ");
      if ($("colour").value === "d") await this.compare();
    } catch (error) {
      if (this.abort.signal.aborted) this.note.textContent = `stopped after ${this.tokens.length} tokens`;
      else this.fail(error);
    } finally {
      this.abort.abort();
    }
  }

  fail(error) {
    this.note.className = "bad";
    this.note.textContent = error.message;
  }

  /** How the token at `i` was drawn. */
  explanation(i, top = 12) {
    const { model, seed, options } = this.ask, body = { model, seed, ...options, ...this.start(), top };
    return call("/v1/explain", { ...body, tokens: this.numbers().slice(0, i) }).then((answer) => answer.json());
  }

  /** The log-probabilities that the other model gives this text. */
  async compare() {
    let other = $("second").value;
    if (other === this.ask.model) other = $("model").value;
    const [own, its] = [modelOf(this.ask.model), modelOf(other)];
    try {
      if (other === this.ask.model) throw new Error(`${other} is the other model, too; choose another one to see differences.`);
      if (own.tokenizer_sha256 !== its.tokenizer_sha256) throw new Error(`${own.id} and ${its.id} have different tokenizers: their tokens cannot be compared.`);
      this.ids ??= (await this.explanation(0, 1)).prompt_token_ids;
      const body = { model: other, prompt: [...this.ids, ...this.numbers()], max_tokens: 0, echo: true, logprobs: 0 };
      const found = await (await call("/v1/completions", body)).json();
      this.others = found.choices[0].logprobs.token_logprobs.slice(this.ids.length);
      this.other = other;
      this.tokens.forEach((_, i) => this.paint(i));
    } catch (error) {
      this.fail(error);
    }
  }
}

// ---- why a token was drawn

async function why(panel, i) {
  const mine = ++wanted, one = panel.tokens[i];
  document.querySelector(".tok.on")?.classList.remove("on");
  one.element.classList.add("on");
  if (!one.why) await new Promise((after) => setTimeout(after, 60)); // the pointer may only pass
  if (mine !== wanted) return;
  try {
    one.why ??= panel.explanation(i);
    const found = await one.why;
    if (mine === wanted) showWhy(panel, i, found);
  } catch (error) {
    one.why = null;
    if (mine !== wanted) return;
    $("why").replaceChildren(button("×", "Close", unpin), make("p", "bad", error.message));
    $("why").classList.add("open");
  }
}

async function pin(panel, i, event) {
  state.pinned = panel.tokens[i].element;
  await why(panel, i);
  panel.tokens[i].element.scrollIntoView({ block: "nearest" }); // on a phone above the sheet that has just opened
  if (event.type === "keydown") $("why").querySelector("td button")?.focus();
}

function unpin() {
  const element = state.pinned;
  state.pinned = null;
  wanted += 1;
  document.querySelector(".tok.on")?.classList.remove("on");
  $("why").replaceChildren(make("p", "soft", HINT));
  $("why").classList.remove("open");
  element?.focus();
}

const ordinal = (n) => `${n.toLocaleString("en")}${n % 100 - n % 10 === 10 ? "th" : ["th", "st", "nd", "rd"][n % 10] ?? "th"}`;
const FILTERS = { top_k: "top-k", top_p: "top-p", min_p: "min-p" };

function showWhy(panel, i, found) {
  const one = panel.tokens[i], own = found.tokens.find((item) => item.token === one.id), drawn = found.tokens.find((item) => item.token === found.drawn);
  const close = button("×", "Close", unpin), title = make("div", "head", make("h2", "", quoted(own?.text ?? (one.spelling || `token ${one.id}`))), close);
  const parts = [title, make("p", "", verdict(panel, i, found, own, drawn))];
  if (panel.others && panel.others[i] !== undefined) parts.push(make("p", "soft", `${panel.other} gives it ${percent(Math.exp(panel.others[i]))}, ${panel.ask.model} ${percent(Math.exp(one.logprob))}.`));
  if (own) parts.push(path(panel.ask.options, found, own));
  parts.push(make("p", "soft", state.pinned ? "Choose another token, and the text is written on from there:" : "Click the token to choose another one."), picture(panel, i, found));
  $("why").replaceChildren(...parts);
  $("why").classList.add("open");
}

function verdict(panel, i, found, own, drawn) {
  const p = `The model gave it ${percent(Math.exp(panel.tokens[i].logprob))}`;
  if (found.drawn !== panel.tokens[i].id) {
    const chosen = i === panel.forked ? "you chose it" : "in this number format another forward rounds differently";
    return `${p}; ${chosen}, the draw gives ${quoted(drawn.text)}.`;
  }
  if (!found.temperature) return `${p}; at temperature 0 the likeliest token is taken, without noise.`;
  if (found.kept === 1) return `${p}; no other token was left to draw from.`;
  return own.rank === 1 ? `${p}, more than any other, and the draw kept it first.` : `${p}: the ${ordinal(own.rank)} likeliest. Its noise, ${signed(own.noise)}, decided.`;
}

/** logit → temperature → top-k → top-p → min-p → draw, of one token. */
function path(options, found, own) {
  const list = make("ol", "path"), add = (name, text, off) => list.append(make("li", off ? "off" : "", make("b", "", name), ` ${text}`));
  add("logit", `${own.logit.toFixed(2)}, probability ${percent(Math.exp(own.logprob))}, ${own.rank === 1 ? "the likeliest" : `${ordinal(own.rank)} likeliest`}`);
  if (!found.temperature) {
    add("temperature", "0: the likeliest token is taken, nothing is drawn");
    return list;
  }
  add("temperature", `÷ ${options.temperature}: ${own.score === 0 ? "the highest score, 0" : `${Math.abs(own.score).toFixed(2)} below the likeliest`}`);
  let dropped = false;
  for (const [key, name] of Object.entries(FILTERS)) {
    const off = { top_k: !options.top_k, top_p: options.top_p === 1, min_p: !options.min_p }[key];
    const here = own.dropped_by === key;
    add(name, off ? "off" : `${options[key]}: ${here ? "dropped here" : dropped ? "–" : "stays"}`, off || dropped);
    dropped ||= here;
  }
  if (dropped) return list;
  add("left", `${found.kept.toLocaleString("en")} ${found.kept === 1 ? "token" : "tokens"}; among them it is drawn with ${percent(own.probability)}`);
  add("noise", `${signed(own.score)} ${signed(own.noise)} = ${signed(own.score + own.noise)}${own.token === found.drawn ? ", the largest sum: drawn" : ""}`);
  return list;
}

/** The likeliest tokens, and where their scores come to by their noise: the one furthest to the right is drawn. */
function picture(panel, i, found) {
  const random = found.temperature > 0, kept = found.tokens.filter((one) => !one.dropped_by);
  const ends = kept.flatMap((one) => [one.score, one.score + one.noise]).filter((value) => value > -30);
  const low = Math.min(...ends), width = Math.max(...ends) - low || 1, place = (value) => `${Math.max(0, (100 * (value - low)) / width)}%`;
  const table = make("table", "draw"), head = make("tr");
  for (const name of ["token", "model", "drawn with", random ? "score → with noise" : "score"]) head.append(make("th", "", name));
  table.append(make("thead", "", head));
  const body = make("tbody");
  for (const one of found.tokens) {
    const now = one.token === panel.tokens[i].id, name = quoted(one.text), total = one.score + one.noise;
    const choose = button(name, `Continue with ${name}`, () => fork(panel, i, one, found));
    choose.disabled = now || !state.pinned;
    const cell = make("td", "sum");
    if (one.dropped_by) cell.append(make("span", "soft", `dropped by ${FILTERS[one.dropped_by]}`));
    else {
      const bar = make("i"), tip = make("b");
      const [from, to] = [Math.max(low, Math.min(one.score, total)), Math.max(low, one.score, total)];
      Object.assign(bar.style, { left: place(from), width: `${(100 * (to - from)) / width}%` });
      bar.className = total < one.score ? "less" : "more";
      tip.style.left = place(total);
      cell.append(make("span", "track", bar, tip));
      cell.title = random ? `${signed(one.score)} ${signed(one.noise)} = ${signed(total)}` : signed(one.score);
    }
    const row = make("tr", one.token === found.drawn ? "won" : one.dropped_by ? "out" : "", make("td", "", choose), make("td", "", percent(Math.exp(one.logprob))), make("td", "", one.probability ? percent(one.probability) : "–"), cell);
    body.append(row);
  }
  table.append(body);
  const said = random ? make("p", "soft", "A bar leads from a token's score to its sum with the noise; the sum furthest to the right is drawn.") : "";
  return make("div", "scroll", table, said);
}

/** Write the text on with another token at `i`, in a panel of its own; in a chat in place of the answer. */
async function fork(panel, i, chosen, found) {
  const start = [...panel.tokens.slice(0, i), { id: chosen.token, logprob: chosen.logprob, bytes: chosen.bytes }];
  const other = new Panel(panel.ask, start, found.prompt_token_ids, found.stop_token_ids);
  const said = `fork: ${quoted(chosen.text)} instead of ${quoted(panel.tokens[i].spelling)}`;
  const turn = state.turns.findIndex((one) => one.panel === panel);
  other.ended = found.stop_token_ids.includes(chosen.token);
  if (state.mode === "chat" && turn >= 0) {
    panel.abort.abort();
    state.turns.length = turn + 1;
    state.turns[turn].panel = other;
    showTurns();
  } else {
    panel.element.after(other.element);
    other.head.append(button("×", "Remove this fork", () => {
      other.abort.abort();
      other.element.remove();
      state.panels = state.panels.filter((one) => one !== other);
    }));
    state.panels.push(other);
  }
  other.seed.append(` · ${said}`);
  unpin();
  other.tokens[i].element.focus({ preventScroll: true });
  other.element.scrollIntoView({ block: "nearest", behavior: "smooth" });
  if (other.ended) other.note.textContent = "ended by the token you chose";
  else await busy([other]);
}

// ---- what is written

function settings() {
  const value = (name) => Number($(`s-${name}`).value);
  return { options: Object.fromEntries(DRAWING.map((name) => [name, value(name)])), most: value("max_tokens"), n: value("n"), seed: value("seed") };
}

/** What the texts of this mode ask for. */
function asks() {
  const { n, seed, ...rest } = settings(), prompt = $("prompt").value, model = $("model").value;
  const models = { two: [model, $("second").value], learn: [`${model}:${state.step}`] }[state.mode] ?? [model];
  return Array.from({ length: n }, (_, k) => models.map((one) => ({ model: one, seed: seed + k, prompt, ...rest }))).flat();
}

/** Let panels write, while the buttons say so. */
async function busy(panels) {
  $("stop").disabled = false;
  await Promise.all(panels.map((one) => one.write()));
  $("stop").disabled = everyPanel().every((one) => one.abort === null || one.abort.signal.aborted);
}

const everyPanel = () => [...state.panels, ...state.turns.map((one) => one.panel)];

function stopAll() {
  for (const one of everyPanel()) one.abort?.abort();
}

async function write() {
  alert("");
  stopAll();
  unpin();
  if (state.mode === "chat") return send();
  state.film?.stop();
  written.clear();
  if (state.mode === "learn") return state.film?.go();
  return showPanels(asks().map((ask) => new Panel(ask)));
}

async function showPanels(panels) {
  stopAll();
  state.panels = panels;
  $("texts").replaceChildren(...panels.map((one) => one.element));
  $("texts").className = panels.length > 1 ? "several" : "";
  await busy(panels.filter((one) => !one.done));
}

/** The same prompt and noise by another checkpoint; what was written stays written. */
async function showStep(step) {
  state.step = step;
  await new Promise((after) => setTimeout(after, written.size ? 80 : 0)); // a slider that only passes by
  if (state.step !== step) return;
  const panels = asks().map((ask) => {
    const name = JSON.stringify(ask), found = written.get(name)?.done ? written.get(name) : new Panel(ask);
    written.set(name, found);
    return found;
  });
  unpin();
  await showPanels(panels);
}

async function send() {
  const said = $("prompt").value.trim(), { n, ...rest } = settings();
  if (!said) return alert("Write a message first.");
  const before = state.turns.flatMap(({ user, panel }) => [{ role: "user", content: user }, { role: "assistant", content: panel.content() }]);
  const panel = new Panel({ model: $("model").value, ...rest, messages: [...before, { role: "user", content: said }] });
  state.turns.push({ user: said, panel });
  $("prompt").value = "";
  showTurns();
  const writing = busy([panel]);
  $("ask").scrollIntoView({ block: "end" });
  await writing;
  return $("ask").scrollIntoView({ block: "end", behavior: "smooth" });
}

function showTurns() {
  const again = button("New chat", "New chat", () => {
    stopAll();
    state.turns = [];
    showTurns();
  });
  $("texts").className = "";
  $("texts").replaceChildren(...state.turns.flatMap(({ user, panel }) => [make("p", "card said", printable(user)), panel.element]), ...(state.turns.length ? [again] : []));
}

// ---- controls

function alert(text) {
  $("alert").textContent = text;
  $("alert").hidden = !text;
}

/** A choice of models; `all` with the checkpoints of their runs. */
function fillModels(select, all) {
  const before = select.value;
  select.replaceChildren();
  for (const { id, checkpoints } of state.models) {
    select.append(make("option", "", id));
    if (!all || !checkpoints) continue;
    const group = make("optgroup");
    group.label = `checkpoints of ${id}`;
    for (const step of checkpoints) group.append(make("option", "", `${id}:${step}`));
    select.append(group);
  }
  select.value = before;
  if (!select.value) select.value = (modelOf(before) ?? state.models[0]).id; // of a checkpoint its run
}

function slider([name, label, least, most, step, start, help]) {
  const input = make("input"), shown = make("output"), box = make("label", "", `${label} `, shown, input);
  Object.assign(input, { type: "range", id: `s-${name}`, min: least, max: most, step, value: start });
  const show = () => {
    shown.textContent = name === "top_k" && input.value === "0" ? "all" : input.value;
  };
  box.title = `${label}: ${help}`;
  input.addEventListener("input", show);
  show();
  return box;
}

function makeControls() {
  for (const [mode, label] of Object.entries(MODES)) {
    const one = button(label, label, () => enter(mode));
    one.dataset.mode = mode;
    $("modes").append(one);
  }
  const seed = make("input"), next = button("another", "Another seed", () => {
    seed.value = Math.floor(Math.random() * 1e6);
    seed.dispatchEvent(new Event("change", { bubbles: true }));
  });
  Object.assign(seed, { type: "number", id: "s-seed", min: 0, max: 2 ** 53 - 9, step: 1, value: 1337, required: true });
  $("sliders").append(...SLIDERS.map(slider), make("div", "seed", make("label", "", "seed ", seed), next));
  $("sliders").addEventListener("change", () => { // the same noise again, drawn in another way
    if (!$("s-seed").checkValidity()) return alert("The seed must be a whole number from 0 to 9,007,199,254,740,983.");
    if (state.mode !== "chat" && state.panels.length) write();
    return null;
  });
  $("write").addEventListener("click", write);
  $("stop").addEventListener("click", () => {
    state.film?.stop();
    stopAll();
  });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.isComposing || !(event.ctrlKey || event.metaKey || (state.mode === "chat" && !event.shiftKey))) return;
    event.preventDefault();
    if (!$("write").disabled) write();
  });
  document.addEventListener("keydown", (event) => event.key === "Escape" && state.pinned && unpin());
  $("model").addEventListener("change", () => {
    fitLength();
    enter(state.mode);
  });
  $("second").addEventListener("change", recolour);
  $("colour").addEventListener("change", recolour);
  $("settings").open = matchMedia("(min-width: 900px)").matches;
}

/** No more new tokens than a prompt of the same length leaves room for. */
function fitLength() {
  const most = $("s-max_tokens"), { max_model_len } = modelOf($("model").value);
  most.max = Math.min(1000, max_model_len - 1);
  most.value = Math.min(100, max_model_len >> 1);
  most.dispatchEvent(new Event("input"));
}

function recolour() {
  const differences = $("colour").value === "d";
  $("other").hidden = !differences && state.mode !== "two";
  $("meaning").replaceChildren($("colour").value === "n" ? "" : legend(differences ? "the other" : ""));
  for (const panel of everyPanel()) {
    panel.others = null;
    panel.tokens.forEach((_, i) => panel.paint(i));
    if (differences && panel.done) panel.compare();
  }
}

function enter(mode) {
  stopAll();
  state.film?.stop();
  Object.assign(state, { mode, panels: [], film: null });
  $("work").dataset.mode = mode;
  for (const one of $("modes").children) one.setAttribute("aria-pressed", String(one.dataset.mode === mode));
  fillModels($("model"), mode !== "learn");
  const model = modelOf($("model").value), steps = model.checkpoints ?? [], chat = mode === "chat";
  const kind = model.chat_template ? "has a chat template" : "a base model: it continues text, and is not tuned to answer";
  const problem = {
    chat: model.chat_template ? "" : `${model.id} has no chat template: it is untuned and only continues text. Use Complete, or start the server with --chat-template FILE.`,
    learn: steps.length > 1 ? "" : `The server knows no checkpoints of ${model.id}. Serve a run folder that keeps some: regpt train … --checkpoint.keep-last 0, then regpt serve RUN.`,
  }[mode] ?? "";
  $("about").textContent = problem || `${$("model").value} · ${kind} · reads ${model.max_model_len.toLocaleString("en")} tokens`;
  $("about").className = problem ? "bad" : "soft";
  $("write").disabled = Boolean(problem);
  $("write").textContent = chat ? "Send" : "Write";
  $("prompt").placeholder = chat ? "Say something (Enter sends)" : "How the text begins (Ctrl+Enter writes)";
  $("s-n").parentElement.hidden = chat;
  if (mode === "two" && $("second").value === $("model").value) $("second").selectedIndex = ($("model").selectedIndex + 1) % $("second").options.length;
  $("film").hidden = mode !== "learn" || Boolean(problem);
  if (!$("film").hidden) {
    state.film = dial(steps, steps.length - 1, showStep);
    state.step = steps[steps.length - 1];
    $("film").replaceChildren(make("p", "soft", "The same prompt and the same noise, written by each checkpoint: what changes is what was learned."), state.film.box);
  }
  $("texts").replaceChildren();
  if (chat) showTurns();
  unpin();
  recolour();
}

async function begin() {
  alert("");
  try {
    state.models = (await (await call("/v1/models")).json()).data;
  } catch (error) {
    if (error.status !== 401) return alert(error.message);
    if (token) alert(error.message);
    $("key").hidden = false;
    return $("token").focus();
  }
  $("key").hidden = true;
  $("work").hidden = false;
  sessionStorage.setItem("regpt-token", token);
  for (const name of ["model", "second"]) fillModels($(name), true);
  fitLength();
  return enter("text");
}

$("key").addEventListener("submit", (event) => {
  event.preventDefault();
  token = $("token").value.trim();
  begin();
});
makeControls();
begin();
