/* Numbers as text, on axes and in legends. */

const SI = [[1e15, "P"], [1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"], [1, ""]];
const TIME = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];

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

/** 6e-4, 2.15e17 */
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
  flops: rate,
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
      flops: () => rate,
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
