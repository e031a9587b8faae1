"use strict";
// What the page holds of traces, unpacked. A trace's `lives` are bytes, `windows` counts; both are [shown heads x tokens].
const FOREVER = 255;

async function unpack(text) {
  const raw = atob(text), bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}

async function readTrace(packed) {
  const names = JSON.parse(new TextDecoder().decode(await unpack(packed.names)));
  const counts = await unpack(packed.windows);
  const half = packed.half_lives;
  return {
    ...packed,
    names,
    windows: packed.window_bytes === 2 ? new Uint16Array(counts) : new Uint32Array(counts),
    lives: half === null ? null : new Uint8Array(await unpack(half.values)),
  };
}

// Tokens read when an entry was evicted; Infinity if it never was.
function evictedAt(trace, row, at) {
  const count = trace.windows[row * trace.length + at];
  return count === 0 ? Infinity : Math.min((Math.floor(at / trace.recent) + count) * trace.recent, trace.length);
}

// As the score counts it: the newest token has age 1 ... seen - pos, and 1 more, as `policies.py` says.
const age = (seen, at) => seen + 1 - at;

const halfLife = (trace, byte) => (byte === FOREVER ? Infinity : 2 ** (trace.half_lives.first + byte * trace.half_lives.step));

function brief(value) {
  if (value === Infinity) return "∞";
  if (value >= 9999.5) return value.toExponential(1).replace("e+", "e");
  return value >= 99.5 ? String(Math.round(value)) : String(Number(value.toPrecision(2)));
}

// Rows of `trace.heads` that a choice stands for; "all" is every one.
const rowsOf = (trace, choice) => (choice === "all" ? trace.heads.map((_, i) => i) : [Number(choice)]);

function tableRow(...cells) {
  const row = document.createElement("tr");
  for (const cell of cells) row.append(Object.assign(document.createElement("td"), { textContent: cell }));
  return row;
}
