/* The offline page: the texts of each checkpoint under a slider. */

const data = JSON.parse($("data").textContent);
const bytesOf = (id) => Uint8Array.from(data.tokens[id], (one) => one.charCodeAt(0));
const spell = (id) => new TextDecoder().decode(bytesOf(id));
const chance = ([id, logprob]) => `${quoted(spell(id))} ${percent(Math.exp(logprob))}`;

function card(prompt, written) {
  const text = make("div", "text", make("span", "prompt", printable(prompt))), decoder = new TextDecoder();
  written.forEach(([id, logprob], i) => {
    const element = tokenElement(decoder.decode(bytesOf(id), { stream: true }), i);
    shade(element, logprob);
    text.append(element);
  });
  const show = (element) => {
    document.querySelector(".tok.on")?.classList.remove("on");
    element.classList.add("on");
    const [id, logprob, top] = written[element.dataset.i], others = top.filter((one) => one[0] !== id);
    $("why").replaceChildren(make("b", "", chance([id, logprob])), others.length ? `, and not ${others.map(chance).join(", ")}` : "");
  };
  listen(text, show, show);
  return make("article", "card", text);
}

function show(step) {
  const { loss, texts } = data.steps.find((one) => one.step === step);
  const when = loss?.step === step ? "" : ` (step ${loss?.step.toLocaleString("en")})`;
  $("loss").textContent = loss === null ? "" : `validation loss ${loss.loss.toFixed(3)}${when}`;
  $("texts").replaceChildren(...data.prompts.map((prompt, i) => card(prompt, texts[i])));
}

const loss = make("span", "soft"), film = dial(data.steps.map((one) => one.step), data.steps.length - 1, show);
loss.id = "loss";
film.box.append(loss);
$("film").append(film.box);
$("meaning").append(legend());
film.go();
