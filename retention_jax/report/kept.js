// The picture of positions against time, and its table.
const MARGIN = { left: 62, top: 10, right: 12, bottom: 40 };

function drawKept(canvas, trace, choice, time, palette) {
  const style = getComputedStyle(document.documentElement), pen = canvas.getContext("2d");
  const width = canvas.width - MARGIN.left - MARGIN.right, height = canvas.height - MARGIN.top - MARGIN.bottom;
  const across = Math.min(width, trace.length), down = Math.min(height, trace.length), T = trace.length;
  const rows = rowsOf(trace, choice), steps = new Float32Array(down * (across + 1)), many = new Float32Array(down);
  // A column is the last moment after evictions in its stretch of time.
  const moments = Array.from({ length: across }, (_, x) => Math.min(Math.ceil(((x + 1) * T) / across / trace.recent) * trace.recent, T));
  const first = new Uint32Array(T + 2);
  for (let seen = 0, x = 0; seen <= T + 1; seen++) { while (x < across && moments[x] < seen) x++; first[seen] = x; }
  for (let at = 0; at < T; at++) {
    const y = Math.floor((at * down) / T);
    many[y] += rows.length;
    for (const row of rows) {
      const gone = evictedAt(trace, row, at);
      steps[y * (across + 1) + first[at + 1]] += 1;
      if (gone !== Infinity) steps[y * (across + 1) + first[gone]] -= 1;
    }
  }
  const picture = new ImageData(across, down);
  for (let y = 0; y < down; y++) {
    for (let x = 0, kept = 0; x < across; x++) {
      kept += steps[y * (across + 1) + x];
      if (kept <= 0) continue; // what is not kept is the colour of the page
      const color = parseInt(palette[Math.min(255, Math.round((255 * kept) / many[y]))].slice(1), 16);
      picture.data.set([color >> 16, (color >> 8) & 255, color & 255, 255], 4 * (y * across + x));
    }
  }
  const small = Object.assign(document.createElement("canvas"), { width: across, height: down });
  small.getContext("2d").putImageData(picture, 0, 0);
  pen.clearRect(0, 0, canvas.width, canvas.height);
  pen.imageSmoothingEnabled = false;
  pen.drawImage(small, MARGIN.left, MARGIN.top, width, height);
  pen.strokeStyle = style.getPropertyValue("--soft");
  pen.fillStyle = style.getPropertyValue("--ink");
  pen.strokeRect(MARGIN.left, MARGIN.top, width, height);
  pen.font = "13px system-ui, sans-serif";
  for (let i = 0; i <= 4; i++) {
    const label = Math.round((i * T) / 4).toLocaleString("en");
    pen.textAlign = ["left", "center", "center", "center", "right"][i];
    pen.fillText(label, MARGIN.left + (i * width) / 4, MARGIN.top + height + 16);
    pen.textAlign = "right";
    pen.fillText(label, MARGIN.left - 6, MARGIN.top + (i * height) / 4 + (i === 0 ? 10 : i === 4 ? 0 : 4));
  }
  pen.textAlign = "center";
  pen.fillText("tokens read", MARGIN.left + width / 2, canvas.height - 6);
  pen.save();
  pen.translate(12, MARGIN.top + height / 2);
  pen.rotate(-Math.PI / 2);
  pen.fillText("position", 0, 0);
  pen.restore();
  pen.strokeStyle = style.getPropertyValue("--c1");
  pen.lineWidth = 2;
  pen.beginPath();
  pen.moveTo(MARGIN.left + (time / T) * width, MARGIN.top);
  pen.lineTo(MARGIN.left + (time / T) * width, MARGIN.top + height);
  pen.stroke();
  pen.lineWidth = 1;
}

function fillKeptTable(body, trace, choice) {
  const rows = rowsOf(trace, choice), T = trace.length, found = [];
  for (let i = 1; i <= 8; i++) {
    const seen = Math.min(Math.ceil((i * T) / 8 / trace.recent) * trace.recent, T);
    const counts = new Uint32Array(seen); // kept entries by position
    for (const row of rows) for (let at = 0; at < seen; at++) if (evictedAt(trace, row, at) > seen) counts[at]++;
    const kept = counts.reduce((a, b) => a + b, 0);
    let middle = seen - 1;
    for (let left = kept / 2; middle >= 0 && (left -= counts[middle]) > 0; ) middle--;
    const oldest = counts.findIndex((n) => n > 0), all = seen * rows.length, say = (n) => n.toLocaleString("en");
    found.push(tableRow(say(seen), say(kept), `${((100 * kept) / all).toFixed(1)} %`, kept ? say(age(seen, middle)) : "", kept ? say(oldest) : ""));
  }
  body.replaceChildren(...found);
}
