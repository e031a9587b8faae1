// Legends of charts, and the controls of the viewer.
const byId = (id) => document.getElementById(id);

for (const button of document.querySelectorAll("[data-toggle]")) {
  button.addEventListener("click", () => {
    const on = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", on);
    for (const part of document.querySelectorAll(`[data-policy="${button.dataset.toggle}"]`)) part.classList.toggle("off", !on);
  });
}

function option(select, value, text) { select.append(Object.assign(document.createElement("option"), { value, textContent: text })); }

function drawScale(box, trace, colour, palette) {
  const T = trace.length, half = colour === "half";
  const value = (share) => (half ? halfLife(trace, 254 * share) : Math.exp(share * Math.log(T + 1)));
  const labels = [0, 0.25, 0.5, 0.75, 1].map((share) => brief(value(share)));
  const bar = document.createElement("div"), text = document.createElement("div");
  bar.style.background = `linear-gradient(to right, ${palette.filter((_, i) => i % 15 === 0).join(", ")})`;
  for (const label of labels) text.append(Object.assign(document.createElement("span"), { textContent: label }));
  const what = half ? "half life, in tokens" : "age at eviction, in tokens; the sequence's length where it was never evicted";
  box.replaceChildren(bar, Object.assign(document.createElement("div"), { textContent: what }), text);
  box.setAttribute("aria-label", `Colours from ${labels[0]} to ${labels[4]}: ${what}`);
}

function describe(trace, state, at) {
  const rows = state.rows, say = (n) => n.toLocaleString("en"), times = rows.map((row) => evictedAt(trace, row, at));
  let fate;
  if (rows.length === 1) {
    fate = times[0] === Infinity ? "never evicted" : `evicted when ${say(times[0])} tokens were read, at age ${say(age(times[0], at))}`;
  } else {
    const gone = times.filter((time) => time !== Infinity), kept = times.filter((time) => time > state.time).length;
    fate = at < state.time ? `kept by ${kept} of ${rows.length} heads then; ` : "not read yet then; ";
    fate += `${rows.length - gone.length} never evict it`;
    if (gone.length) fate += `, the others when ${say(Math.min(...gone))} to ${say(Math.max(...gone))} tokens were read`;
  }
  const half = trace.lives === null ? "" : `half life ${brief(state.view.facts(at).number)} tokens${rows.length > 1 ? " (geometric mean)" : ""}; `;
  byId("facts").textContent = `Token ${say(at)}, “${visible(trace.names[at])}”: ${state.colour === "half" ? half : ""}${fate}.`;
  byId("fact-rows").replaceChildren(...rows.map((row, i) => tableRow(
    ...trace.heads[row].map(String),
    trace.lives === null ? "no score" : brief(halfLife(trace, trace.lives[row * trace.length + at])),
    times[i] === Infinity ? "never" : say(times[i]),
    times[i] === Infinity ? "" : say(age(times[i], at)),
  )));
}

async function viewer() {
  const data = JSON.parse(byId("data").textContent);
  if (!data.traces.length) return;
  const choices = ["trace", "head", "colour", "time", "time-number", "numbers"].map(byId);
  const [traceBox, headBox, colourBox, slider, number, numbers] = choices, unpacked = new Map();
  const state = { trace: null, rows: [], colour: "half", time: 0, numbers: false };
  const view = new TokenView(byId("text"), byId("lines"), data.palette, (at) => describe(state.trace, state, at));
  state.view = view;
  data.traces.forEach((trace, i) => option(traceBox, i, `${trace.policy}, ${trace.budget} entries: ${trace.title}`));

  function drawHead() {
    state.rows = rowsOf(state.trace, headBox.value);
    state.colour = colourBox.value;
    state.numbers = numbers.checked;
    byId("bar-hint").hidden = state.rows.length === 1;
    drawScale(byId("scale"), state.trace, state.colour, data.palette);
    fillKeptTable(byId("kept-numbers"), state.trace, headBox.value);
    drawTime(Number(slider.value));
  }

  function drawTime(time) {
    state.time = Math.max(0, Math.min(state.trace.length, Math.round(time) || 0));
    slider.value = number.value = state.time;
    let kept = 0;
    for (const row of state.rows) for (let at = 0; at < state.time; at++) if (evictedAt(state.trace, row, at) > state.time) kept++;
    byId("summary").textContent = `${kept.toLocaleString("en")} of ${(state.time * state.rows.length).toLocaleString("en")} entries are kept`;
    drawKept(byId("kept"), state.trace, headBox.value, state.time, data.palette);
    view.set({ ...state });
    describe(state.trace, state, view.here);
  }

  async function openTrace() {
    const packed = data.traces[traceBox.value];
    if (!unpacked.has(packed)) unpacked.set(packed, await readTrace(packed));
    const trace = (state.trace = unpacked.get(packed)), before = colourBox.value;
    headBox.replaceChildren();
    option(headBox, "all", trace.heads.length > 1 ? `all ${trace.heads.length}, mean` : "the only one");
    trace.heads.forEach(([layer, head], i) => option(headBox, i, `layer ${layer}, head ${head}`));
    colourBox.replaceChildren();
    if (trace.lives !== null) option(colourBox, "half", "half life");
    option(colourBox, "kept", "age at eviction");
    if (before && [...colourBox.options].some((o) => o.value === before)) colourBox.value = before;
    slider.max = number.max = trace.length; // before the value, which it bounds
    slider.value = trace.length;
    const left = trace.all_heads - trace.heads.length;
    byId("left-out").hidden = left === 0;
    byId("left-out").textContent = `Here are ${trace.heads.length} of the ${trace.all_heads} layers and heads, spread evenly.`;
    drawHead();
  }

  traceBox.addEventListener("change", openTrace);
  for (const box of [headBox, colourBox, numbers]) box.addEventListener("change", drawHead);
  let waiting = null;
  slider.addEventListener("input", () => { waiting ??= requestAnimationFrame(() => { waiting = null; drawTime(Number(slider.value)); }); });
  number.addEventListener("change", () => drawTime(Number(number.value)));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawTime(state.time));
  let wide = byId("text").clientWidth;
  new ResizeObserver(() => { if (state.trace && byId("text").clientWidth !== wide) { wide = byId("text").clientWidth; view.layout(); } }).observe(byId("text"));
  await openTrace();
}

viewer().catch((error) => {
  byId("problem").textContent = `The traces cannot be shown: ${error.message}`;
  byId("problem").hidden = false;
  console.error(error);
});
