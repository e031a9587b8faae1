// The page of a server: a conversation, and what its row of the cache costs and keeps. It asks this server only.
const at = (id) => document.getElementById(id);
const state = { model: null, messages: [], memory: [], running: null };

function element(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function drawn(tag, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function inBytes(count) {
  const units = ["B", "KiB", "MiB", "GiB"];
  let unit = 0;
  while (count >= 1024 && unit < units.length - 1) [count, unit] = [count / 1024, unit + 1];
  return `${count.toLocaleString("en", { maximumFractionDigits: unit ? 2 : 0 })} ${units[unit]}`;
}

const inNumber = (count) => count.toLocaleString("en");

function headers() {
  const key = at("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

function complain(text) {
  at("problem").textContent = text;
  at("problem").hidden = !text;
}

async function failure(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

async function findModel() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) throw new Error(await failure(response));
  const model = (await response.json()).data[0], ours = model.retention;
  const facts = [["model", model.id], ["policy", ours.policy], ["kept for each layer and head", inNumber(ours.budget)], ["newest tokens", inNumber(ours.recent)], ["a row", inBytes(ours.row_bytes)]];
  at("facts").replaceChildren(...facts.map(([name, value]) => {
    const pair = element("div");
    pair.append(element("dt", name), element("dd", value));
    return pair;
  }));
  state.model = model;
}

function addTurn(role, text) {
  const turn = element("p", undefined, { class: `turn ${role}` });
  const said = element("span", text);
  turn.append(element("b", role === "user" ? "You" : "Model"), said);
  at("turns").append(turn);
  at("turns").scrollTop = at("turns").scrollHeight;
  return said;
}

// Server-sent events of a response, as objects.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the connection ended before the answer did");
    text += value;
    for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
      const data = text.slice(0, end).replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function send(text) {
  if (state.model === null) await findModel();
  state.messages.push({ role: "user", content: text });
  addTurn("user", text);
  const begun = performance.now(), turn = { first: null, ending: null, usage: null };
  const body = {
    model: state.model.id, messages: state.messages, stream: true, stream_options: { include_usage: true },
    max_tokens: Number(at("limit").value), temperature: Number(at("temperature").value), retention: { show_kept: true },
  };
  const said = addTurn("assistant", "");
  let reply = "";
  try {
    const response = await fetch("v1/chat/completions", { method: "POST", headers: headers(), body: JSON.stringify(body), signal: state.running.signal });
    if (!response.ok) throw new Error(await failure(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) turn.usage = event.usage;
      for (const choice of event.choices) {
        if (choice.delta.content) {
          turn.first ??= performance.now() - begun;
          said.textContent = reply += choice.delta.content;
          at("turns").scrollTop = at("turns").scrollHeight;
        }
        if (choice.retention) turn.ending = choice.retention;
      }
    }
  } catch (error) {
    if (!reply) {  // nothing was said: the turn did not happen, and can be sent again
      state.messages.pop();
      said.parentElement.previousSibling.remove();
      said.parentElement.remove();
      at("say").value = text;
    } else state.messages.push({ role: "assistant", content: reply });
    throw error;
  }
  state.messages.push({ role: "assistant", content: reply });
  state.memory.push(turn);
  show();
}

function show() {
  const turns = state.memory;
  at("numbers").replaceChildren(...turns.map(({ ending, usage, first }, i) => {
    const row = element("tr"), cached = usage.prompt_tokens_details.cached_tokens;
    const cells = [inNumber(usage.total_tokens), inNumber(usage.prompt_tokens - cached), inNumber(ending.kept), inBytes(ending.budget_bytes), inBytes(ending.full_bytes), first === null ? "none" : `${(first / 1000).toFixed(2)} s`];
    row.append(element("th", String(i + 1), { scope: "row" }), ...cells.map((cell) => element("td", cell)));
    return row;
  }));
  drawChart(turns);
  const ending = turns.length ? turns[turns.length - 1].ending : {};
  showHeads(ending.by_head ?? []);
  showTokens(ending.tokens ?? [], ending.by_token ?? []);
}

function drawChart(turns) {
  const left = 78, right = 548, top = 12, bottom = 224;
  const most = Math.max(1, ...turns.flatMap(({ ending }) => [ending.budget_bytes, ending.full_bytes]));
  const tokens = Math.max(1, ...turns.map(({ usage }) => usage.total_tokens));
  const x = (count) => left + (right - left) * count / tokens, y = (bytes) => bottom - (bottom - top) * bytes / most;
  const parts = [];
  for (const share of [0, 0.5, 1]) {
    parts.push(drawn("path", { class: "grid", d: `M${left} ${y(share * most)}H${right}` }));
    parts.push(drawn("text", { x: left - 6, y: y(share * most) + 4, "text-anchor": "end" }, turns.length || !share ? inBytes(Math.round(share * most)) : ""));
  }
  parts.push(drawn("text", { x: (left + right) / 2, y: 254, "text-anchor": "middle" }, turns.length ? `tokens of the conversation, 0 to ${inNumber(tokens)}` : "tokens of the conversation"));
  for (const [name, field] of [["full-line", "full_bytes"], ["row-line", "budget_bytes"]]) {
    const points = turns.map(({ ending, usage }) => [x(usage.total_tokens), y(ending[field])]);
    const start = field === "full_bytes" ? [x(0), y(0)] : points.length && [x(0), points[0][1]];
    if (points.length) parts.push(drawn("path", { class: name, d: "M" + [start, ...points].map((p) => p.join(" ")).join("L") }));
    parts.push(...points.map(([cx, cy]) => drawn("circle", { class: name, cx, cy, r: 3 })));
  }
  at("chart").replaceChildren(...parts);
}

// The shade is never so strong that text on it could not be read in either theme.
const shaded = (cell, share) => { cell.style.background = `rgba(var(--shade), ${share.toFixed(3)})`; };

function showHeads(byHead) {
  const most = Math.max(1, ...byHead.flat()), title = element("tr");
  title.append(element("td"), ...(byHead[0] ?? []).map((_, i) => element("th", `head ${i}`, { scope: "col" })));
  at("heads").replaceChildren(title);
  at("layers").replaceChildren(...byHead.map((heads, layer) => {
    const row = element("tr");
    row.append(element("th", `layer ${layer}`, { scope: "row" }), ...heads.map((count) => {
      const cell = element("td", inNumber(count));
      shaded(cell, 0.55 * count / most);
      return cell;
    }));
    return row;
  }));
}

function showTokens(tokens, byToken) {
  const heads = state.model ? state.model.retention.layers * state.model.retention.heads : 1;
  at("tokens").replaceChildren(...tokens.map((token, i) => {
    const made = element("span", token, { class: byToken[i] ? "tok" : "tok gone", title: `token ${i}: kept by ${byToken[i]} of ${heads} heads` });
    if (byToken[i]) shaded(made, 0.1 + 0.5 * byToken[i] / heads);
    return made;
  }));
}

function busy(controller) {
  state.running = controller;
  at("send").disabled = at("reset").disabled = controller !== null;
  at("stop").disabled = controller === null;
}

at("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = at("say").value.trim();
  if (!text || state.running) return;
  complain("");
  busy(new AbortController());
  at("say").value = "";
  try {
    await send(text);
  } catch (error) {
    if (error.name !== "AbortError") complain(error.message);
  }
  busy(null);
  at("say").focus();
});
at("say").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  at("form").requestSubmit();
});
at("stop").addEventListener("click", () => state.running?.abort());
at("reset").addEventListener("click", () => {
  [state.messages, state.memory] = [[], []];
  at("turns").replaceChildren();
  complain("");
  show();
});
at("key-form").addEventListener("submit", (event) => event.preventDefault());
at("key").addEventListener("change", () => findModel().then(() => complain(""), (error) => complain(error.message)));

show();
findModel().catch((error) => complain(error.message));
