// The text, of which only the lines in sight are in the document.
const GUTTER = 96, SEEN_BEYOND = 6; // px; lines above and below what is in sight
const PICTURES = { "\n": "⏎", "\t": "⇥", "\r": "␍" };

function visible(name) {
  if (name === "") return "∅";
  return name.replace(/[\u0000-\u001f\u007f]/g, (c) => PICTURES[c] ?? String.fromCharCode(c === "\x7f" ? 0x2421 : 0x2400 + c.charCodeAt(0)));
}

class TokenView {
  constructor(box, lines, palette, onToken) {
    Object.assign(this, { box, lines, palette, onToken, shown: new Map(), widths: new Map(), here: 0 });
    this.pen = document.createElement("canvas").getContext("2d");
    this.inks = palette.map((color) => {
      const n = parseInt(color.slice(1), 16);
      return 0.299 * (n >> 16) + 0.587 * ((n >> 8) & 255) + 0.114 * (n & 255) > 125 ? "#000" : "#fff";
    });
    box.addEventListener("scroll", () => { this.waiting ??= requestAnimationFrame(() => { this.waiting = null; this.draw(); }); }, { passive: true });
    lines.addEventListener("pointerover", (event) => { const span = event.target.closest("[data-at]"); if (span) this.onToken(Number(span.dataset.at)); });
    lines.addEventListener("click", (event) => { const span = event.target.closest("[data-at]"); if (span) this.goTo(Number(span.dataset.at)); });
    box.addEventListener("keydown", (event) => this.key(event));
  }

  // state: {trace, rows, colour: "half" | "kept", time, numbers}
  set(state) {
    const before = this.state;
    this.state = state;
    if (!before || before.trace !== state.trace || before.numbers !== state.numbers) this.layout();
    else this.redraw();
  }

  width(text, font) {
    const known = this.widths.get(font + text);
    if (known !== undefined) return known;
    this.pen.font = font;
    const width = this.pen.measureText(text).width;
    this.widths.set(font + text, width);
    return width;
  }

  layout() {
    const { trace, numbers } = this.state, room = this.box.clientWidth - GUTTER - 12, starts = [0];
    this.height = numbers ? 42 : 28;
    let used = 0;
    for (let at = 0; at < trace.length; at++) {
      const width = Math.min(Math.max(this.width(visible(trace.names[at]), "14px ui-monospace, Consolas, monospace"), numbers ? 34 : 4) + 9, room);
      if (used + width > room && used > 0) { starts.push(at); used = 0; }
      used += width;
      if (trace.names[at].endsWith("\n") && at + 1 < trace.length) { starts.push(at + 1); used = 0; }
    }
    this.starts = Int32Array.from(starts);
    this.here = Math.min(this.here, trace.length - 1);
    this.lines.style.height = `${this.starts.length * this.height}px`;
    this.lines.classList.toggle("tall", numbers);
    this.redraw();
  }

  redraw() { this.shown.clear(); this.lines.replaceChildren(); this.draw(); }

  draw() {
    const from = Math.max(0, Math.floor(this.box.scrollTop / this.height) - SEEN_BEYOND);
    const to = Math.min(this.starts.length, Math.ceil((this.box.scrollTop + this.box.clientHeight) / this.height) + SEEN_BEYOND);
    for (const [line, row] of this.shown) if (line < from || line >= to) { row.remove(); this.shown.delete(line); }
    for (let line = from; line < to; line++) {
      if (this.shown.has(line)) continue;
      const row = this.row(line);
      this.shown.set(line, row);
      this.lines.append(row);
    }
    const here = document.getElementById(`token-${this.here}`);
    if (here) this.box.setAttribute("aria-activedescendant", here.id); else this.box.removeAttribute("aria-activedescendant");
  }

  row(line) {
    const row = document.createElement("div"), label = document.createElement("span");
    row.className = "row";
    row.setAttribute("role", "presentation");
    row.style.transform = `translateY(${line * this.height}px)`;
    label.className = "at";
    label.setAttribute("aria-hidden", "true");
    label.textContent = this.starts[line].toLocaleString("en");
    row.append(label);
    const end = line + 1 < this.starts.length ? this.starts[line + 1] : this.state.trace.length;
    for (let at = this.starts[line]; at < end; at++) row.append(this.token(at));
    return row;
  }

  // Of the chosen heads: share that keeps the token, mean colour, and the number that stands for the colour.
  facts(at) {
    const { trace, rows, colour, time } = this.state;
    let kept = 0, sum = 0, number = 0;
    for (const row of rows) {
      const gone = evictedAt(trace, row, at);
      if (gone > time) kept++;
      if (colour === "half") sum += trace.lives[row * trace.length + at];
      else { const lived = gone === Infinity ? trace.length : age(gone, at); sum += (255 * Math.log(lived)) / Math.log(trace.length + 1); }
    }
    const level = sum / rows.length;
    if (colour === "half") number = level > 254 ? Infinity : halfLife(trace, level);
    else number = Math.exp((level / 255) * Math.log(trace.length + 1));
    return { kept: kept / rows.length, level: Math.max(0, Math.min(255, Math.round(level))), number };
  }

  token(at) {
    const { trace, rows, time, numbers } = this.state, span = document.createElement("span"), { kept, level, number } = this.facts(at);
    span.id = `token-${at}`;
    span.dataset.at = at;
    span.setAttribute("role", "option");
    span.setAttribute("aria-selected", at === this.here);
    span.textContent = visible(trace.names[at]);
    const kind = at >= time ? "unread" : kept === 0 ? "gone" : "kept";
    span.className = `tok ${kind}${at === this.here ? " here" : ""}`;
    span.style.backgroundColor = this.palette[level];
    span.style.color = this.inks[level];
    if (numbers) {
      span.style.minWidth = "43px";
      span.append(Object.assign(document.createElement("small"), { textContent: brief(number) }));
    }
    if (rows.length > 1 && kind === "kept") span.style.borderImage = `linear-gradient(to right, var(--ink) ${100 * kept}%, transparent ${100 * kept}%) 0 0 3 0`;
    return span;
  }

  lineOf(at) {
    let low = 0, high = this.starts.length;
    while (high - low > 1) { const middle = (low + high) >> 1; if (this.starts[middle] <= at) low = middle; else high = middle; }
    return low;
  }

  goTo(at) {
    const before = document.getElementById(`token-${this.here}`);
    if (before) { before.classList.remove("here"); before.setAttribute("aria-selected", "false"); }
    this.here = Math.max(0, Math.min(this.state.trace.length - 1, at));
    const top = this.lineOf(this.here) * this.height;
    if (top < this.box.scrollTop) this.box.scrollTop = top;
    if (top + this.height > this.box.scrollTop + this.box.clientHeight) this.box.scrollTop = top + this.height - this.box.clientHeight;
    this.draw();
    const here = document.getElementById(`token-${this.here}`);
    here.classList.add("here");
    here.setAttribute("aria-selected", "true");
    this.onToken(this.here);
  }

  key(event) {
    const line = this.lineOf(this.here), page = Math.max(1, Math.floor(this.box.clientHeight / this.height) - 1);
    const by = (lines) => this.starts[Math.max(0, Math.min(this.starts.length - 1, line + lines))] + (this.here - this.starts[line]);
    const to = { ArrowLeft: this.here - 1, ArrowRight: this.here + 1, ArrowUp: by(-1), ArrowDown: by(1), PageUp: by(-page), PageDown: by(page), Home: 0, End: this.state.trace.length - 1 }[event.key];
    if (to === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    this.goTo(to);
  }
}
