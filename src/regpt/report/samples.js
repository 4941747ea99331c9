/* The texts that the runs wrote, under a slider over their steps. */

function sampleText(prompt, text) {
  const block = make("pre", "text");
  const starts = prompt && text.startsWith(prompt);
  if (prompt) block.append(make("span", "prompt", prompt));
  block.append(starts ? text.slice(prompt.length) : text);
  return block;
}

function place(run, row) {
  const at = make("div", "at");
  at.append(make("b", "", `step ${FORMS.step(row.step)}`));
  if (row.tokens !== undefined) at.append(make("span", "", `${si(row.tokens)} tokens`));
  if (row.seconds !== undefined) at.append(make("span", "", duration(row.seconds)));
  const until = run.axes.step.findLastIndex((step) => step <= row.step);
  const loss = run.columns.val_loss && until >= 0 ? newest(run.columns.val_loss, until) : null;
  if (loss !== null) at.append(make("span", "", `validation loss ${FORMS.loss(loss)}`));
  return at;
}

/** The slider over the steps of one run, and the texts of the step it stands at. */
function reel(run) {
  const steps = [...new Set(run.samples.map((row) => row.step))];
  const found = make("div"), dial = make("div", "dial"), shown = make("div"), slider = make("input");
  Object.assign(slider, { type: "range", min: 0, max: steps.length - 1, step: 1, value: steps.length - 1 });
  slider.setAttribute("aria-label", "Step of the samples");
  const show = () => {
    const step = steps[Number(slider.value)];
    const group = run.samples.filter((row) => row.step === step);
    const texts = make("div", "texts");
    for (const row of group) texts.append(...row.texts.map((text) => sampleText(row.prompt, text)));
    slider.setAttribute("aria-valuetext", `step ${step}`);
    shown.replaceChildren(place(run, group[0]), texts);
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
  found.append(...(steps.length > 1 ? [dial] : []), shown);
  show();
  return found;
}

function samples() {
  const section = document.getElementById("samples");
  const runs = page.runs.filter((run) => run.samples.length);
  if (!runs.length) return section.remove();
  const card = make("div", "card reel"), holder = make("div");
  const choose = (run) => holder.replaceChildren(reel(run));
  if (runs.length > 1) card.append(choice("Run", runs.map((run) => [run.name, () => choose(run)])));
  card.append(holder);
  section.append(make("h2", "", "Samples while it learned"), card);
  choose(runs[0]);
}
