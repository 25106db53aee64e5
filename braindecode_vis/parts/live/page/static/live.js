"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const make = (tag, cls, text) => {
    const node = document.createElement(tag);
    if (cls) node.className = cls;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const SVG = "http://www.w3.org/2000/svg";
  const draw = (tag, cls, attributes) => {
    const node = document.createElementNS(SVG, tag);
    if (cls) node.setAttribute("class", cls);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    return node;
  };
  const percent = (p) => {
    if (p === null || p === undefined) return "–";
    const value = 100 * p;
    return (value > 99.5 ? ">99" : value >= 10 ? value.toFixed(0) : value >= 0.095 ? value.toFixed(1) : "<0.1") + " %";
  };
  const share = (p) => (p === 0 ? "0 %" : p === 1 ? "100 %" : percent(p));  // of counts, where none and all are exact
  const milliseconds = (ms) => (ms === null || ms === undefined ? "–" : ms < 10 ? ms.toFixed(1) + " ms" : ms < 1000 ? ms.toFixed(0) + " ms" : (ms / 1000).toFixed(2) + " s");
  // A stimulus is called by its file; the whole id stands in the title.
  const nameOf = (id) => id.replace(/^.*\//, "").replace(/\.(jpe?g|png|webp|bmp)$/i, "").replaceAll("_", " ");
  const KEPT = 200, STRIP = 60, MESSAGES = 60, EVIDENCE = 300;
  const SHAPES = ["good", "noisy", "railed", "flat", "missing"];

  let stream = null, facts = {}, summary = null, session = "";
  let decisions = new Map(), histories = new Map(), messages = [];
  let score = null, latency = null, lost = [], shownNumber = null, held = false, painted = false;
  let amplitude = [], link = {}, work = null, workAt = 0, recording = null, noted = null;
  let quality = [], age = null, ageAt = 0, socket = null, connected = false, refused = "", tries = 0;
  let traces = null;  // {columns, next, origin, low, high}
  const dirty = new Set();

  // --- colours and canvases ------------------------------------------------------------------------------------
  let colours = {};
  const readColours = () => {
    const style = getComputedStyle(document.documentElement);
    for (const name of ["ink", "muted", "line", "accent", "accent-soft", "chance", "bad", "good", "c2", "c3", "c4", "c5", "panel", "wash", "control"]) {
      colours[name] = style.getPropertyValue("--" + name).trim();
    }
    colours.kinds = { good: colours.good, noisy: colours.c2, railed: colours.c3, flat: colours.bad, missing: colours.muted };
    colours.lines = [colours.accent, colours.c2, colours.c3, colours.c4, colours.c5];
  };
  const prepare = (id) => {
    const canvas = $(id), ratio = Math.min(devicePixelRatio || 1, 2);
    const width = canvas.clientWidth, height = canvas.clientHeight;
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
    }
    const pen = canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    pen.font = "12px system-ui, sans-serif";
    pen.lineJoin = "round";
    return { canvas, pen, width, height };
  };
  const say = (canvas, text) => { if (canvas.getAttribute("aria-label") !== text) canvas.setAttribute("aria-label", text); };
  const tell = (pen, text, x, y, { colour = colours.muted, align = "left", base = "middle" } = {}) => {
    pen.fillStyle = colour;
    pen.textAlign = align;
    pen.textBaseline = base;
    pen.fillText(text, x, y);
  };

  // --- traces ---------------------------------------------------------------------------------------------------
  const startTraces = () => {
    const rows = stream.channels.length, columns = stream.columns;
    traces = { rows, columns, next: 0, origin: null, low: new Float32Array(rows * columns).fill(NaN), high: new Float32Array(rows * columns).fill(NaN) };
    const select = $("rows");
    const size = matchMedia("(max-width: 700px)").matches ? 16 : 32;
    select.replaceChildren();
    if (rows <= size * 1.5) select.append(new Option(rows === 1 ? "1" : "all " + rows, "0-" + rows));
    else {
      for (let from = 0; from < rows; from += size) {
        const to = Math.min(rows, from + size);
        select.append(new Option(stream.channels[from] + " – " + stream.channels[to - 1], from + "-" + to));
      }
      if (rows <= 128) select.append(new Option("all " + rows, "0-" + rows));
    }
    select.append(new Option("not good", "bad"));
    const gain = $("gain");
    gain.replaceChildren(new Option("fitted", ""));
    if (stream.unit === "µV") for (const value of [10, 20, 50, 100, 200, 500]) gain.append(new Option("± " + value + " µV", value));
  };
  const readTraces = (frame) => {
    if (!traces) return;
    const text = atob(frame.data), bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    const values = new DataView(bytes.buffer);
    const width = frame.next - frame.first, rows = frame.centre.length;
    if (rows !== traces.rows) return;
    for (let row = 0; row < rows; row++) {
      for (let side = 0; side < 2; side++) {
        const into = side ? traces.high : traces.low;
        for (let i = 0; i < width; i++) {
          const whole = values.getInt16(2 * ((row * 2 + side) * width + i), true);
          into[row * traces.columns + (frame.first + i) % traces.columns] = whole === -32768 ? NaN : frame.centre[row] + whole * frame.step;
        }
      }
    }
    traces.next = frame.next;
    traces.origin = frame.origin;
    if (frame.quality.join() !== quality.join()) {
      quality = frame.quality;
      dirty.add("sensors");
    }
    if (frame.amplitude.join() !== amplitude.join() || (frame.link.impedance || []).join() !== (link.impedance || []).join()) dirty.add("sensors");
    ({ amplitude, link } = frame);
    age = frame.age;
    ageAt = performance.now();
    if (width > 1 || frame.first !== frame.next - 1) dirty.add("traces");
  };
  const pickRows = () => {
    const choice = $("rows").value;
    if (choice === "bad") return quality.map((word, row) => (word === "good" ? -1 : row)).filter((row) => row >= 0);
    const [from, to] = choice.split("-").map(Number);
    return Array.from({ length: to - from }, (_, i) => from + i);
  };
  const drawTraces = () => {
    const { canvas, pen, width, height } = prepare("traces");
    if (!traces) return;
    const rows = pickRows(), columns = traces.columns, left = 52, right = width - 4, top = 4, bottom = height - 18;
    const first = Math.max(0, traces.next - columns), place = (right - left) / (columns - 1);
    const xOf = (column) => right - (traces.next - 1 - column) * place;
    // seconds below
    for (let s = 0; s * stream.rate < columns; s++) {
      if (s % Math.max(1, Math.ceil((columns / stream.rate) / ((right - left) / 60)))) continue;
      const x = xOf(traces.next - 1 - s * stream.rate);
      pen.strokeStyle = colours.line;
      pen.lineWidth = 1;
      pen.beginPath(); pen.moveTo(x, top); pen.lineTo(x, bottom); pen.stroke();
      tell(pen, s ? "−" + s + " s" : "now", Math.min(x, right), height - 8, { align: s ? "center" : "right" });
    }
    // images that appeared
    pen.strokeStyle = colours.chance;
    pen.setLineDash([3, 4]);
    if (traces.origin !== null) for (const one of [...decisions.values()].slice(-40)) {
      const x = xOf((one.onset - traces.origin) * stream.rate);
      if (x > left && x <= right) { pen.beginPath(); pen.moveTo(x, top); pen.lineTo(x, bottom); pen.stroke(); }
    }
    pen.setLineDash([]);
    const step = (bottom - top) / Math.max(rows.length, 1);
    const lines = rows.map((row) => {
      const at = row * columns, seen = [];
      for (let c = first; c < traces.next; c++) {
        const low = traces.low[at + c % columns];
        if (low === low) seen.push((low + traces.high[at + c % columns]) / 2);
      }
      seen.sort((a, b) => a - b);
      return { row, at, middle: seen[seen.length >> 1] || 0, extent: seen.length ? seen[Math.floor(seen.length * 0.98)] - seen[Math.floor(seen.length * 0.02)] : 0 };
    });
    const extents = lines.map((line) => line.extent).filter((e) => e > 0).sort((a, b) => a - b);
    const half = Number($("gain").value) || 0.75 * (extents[extents.length >> 1] || 1);
    lines.forEach((line, n) => {
      const word = quality[line.row] || "good", y = top + (n + 0.5) * step;
      pen.strokeStyle = word === "good" ? colours.ink : colours.kinds[word];
      pen.globalAlpha = word === "good" ? 0.85 : 1;
      pen.lineWidth = 1;
      pen.beginPath();
      let open = false;
      for (let c = first; c < traces.next; c++) {
        const low = traces.low[line.at + c % columns], high = traces.high[line.at + c % columns];
        if (low !== low) { open = false; continue; }
        const x = xOf(c), clip = (v) => y - Math.max(-1.6, Math.min(1.6, (v - line.middle) / half)) * step * 0.5;
        if (open) pen.lineTo(x, clip(low)); else pen.moveTo(x, clip(low));
        pen.lineTo(x, clip(high));
        open = true;
      }
      pen.stroke();
      pen.globalAlpha = 1;
      if (step >= 8 || n % Math.ceil(9 / step) === 0) {
        pen.font = (step < 11 ? 9 : 11) + "px system-ui, sans-serif";
        tell(pen, stream.channels[line.row].slice(0, 8), left - 6, y, { align: "right", colour: word === "good" ? colours.muted : colours.kinds[word] });
      }
    });
    if (!rows.length) tell(pen, "every channel is good", width / 2, height / 2, { align: "center" });
    const tall = half >= 1 ? half.toPrecision(2) : half.toExponential(1);
    $("signal-sub").textContent = rows.length ? "one row is ± " + (half >= 10 ? Math.round(half) : tall) + " " + (stream.unit || "units") : "";
    say(canvas, "Traces of " + rows.length + " of " + stream.channels.length + (stream.modality === "fmri" ? " regions" : " channels") + " over the last " + Math.round(columns / stream.rate) + " seconds");
  };

  // --- quality of channels ----------------------------------------------------------------------------------
  const shape = (pen, word, x, y, r) => {
    pen.beginPath();
    if (word === "good" || word === "missing") pen.arc(x, y, r * (word === "good" ? 0.8 : 1), 0, 7);
    else if (word === "flat") pen.rect(x - r, y - r * 0.55, 2 * r, 1.1 * r);
    else if (word === "railed") { pen.moveTo(x, y - r * 1.2); pen.lineTo(x + r * 1.15, y + r * 0.9); pen.lineTo(x - r * 1.15, y + r * 0.9); pen.closePath(); }
    else { pen.moveTo(x, y - r * 1.25); pen.lineTo(x + r * 1.25, y); pen.lineTo(x, y + r * 1.25); pen.lineTo(x - r * 1.25, y); pen.closePath(); }
    if (word === "missing") { pen.strokeStyle = colours.kinds.missing; pen.lineWidth = 2; pen.stroke(); }
    else { pen.fillStyle = colours.kinds[word] || colours.control; pen.fill(); }
  };
  // What is drawn of a good electrode: its impedance where the stream tells it, else its amplitude; darker is more.
  const measure = () => {
    const told = (link.impedance || []).some((value) => value !== null);
    const values = told ? link.impedance : amplitude, unit = told ? "kΩ" : stream.unit || "units";
    const good = values.filter((value, i) => value !== null && value > 0 && quality[i] !== "missing");
    const low = Math.min(...good), high = Math.max(...good);
    const write = (value) => (value === null || value === undefined ? "–" : value >= 100 ? value.toFixed(0) : value.toPrecision(2)) + " " + unit;
    const share = (i) => (values[i] > 0 && high > low ? Math.log(values[i] / low) / Math.log(high / low) : 0.5);
    return { words: told ? "impedance, as the stream reports it" : "amplitude of the last 2 s (standard deviation)", values, good, low, high, write, share };
  };
  const drawSensors = () => {
    const { canvas, pen, width, height } = prepare("sensors");
    if (!stream) return;
    $("quality").hidden = !stream.judged;
    const scale = measure();
    const dot = (i, x, y, r) => {
      const word = quality[i] || "none";
      if (word === "good" && scale.good.length) {
        pen.fillStyle = colours.good;
        pen.globalAlpha = 0.2 + 0.8 * scale.share(i);
        pen.beginPath(); pen.arc(x, y, r, 0, 7); pen.fill();
        pen.globalAlpha = 1;
        pen.strokeStyle = colours.good;
        pen.lineWidth = 1;
        pen.stroke();
      } else shape(pen, word, x, y, r);
    };
    const n = stream.channels.length, places = stream.places || [];
    const placed = places.filter(Boolean).length;
    if (placed >= n / 2 && placed > 2) {
      const far = Math.max(1.05, ...places.filter(Boolean).map(([x, y]) => Math.hypot(x, y)));
      const unit = (Math.min(width, height) / 2 - 16) / far, cx = width / 2, cy = height / 2 + 4;
      pen.strokeStyle = colours.control;
      pen.lineWidth = 1.5;
      pen.beginPath(); pen.arc(cx, cy, unit, 0, 7); pen.stroke();
      pen.beginPath(); pen.moveTo(cx - unit * 0.12, cy - unit * 0.99); pen.lineTo(cx, cy - unit * 1.14); pen.lineTo(cx + unit * 0.12, cy - unit * 0.99); pen.stroke();
      const r = Math.max(3.5, Math.min(8, unit / Math.sqrt(n) / 1.1));
      const outside = [];
      stream.channels.forEach((name, i) => {
        if (!places[i]) { outside.push(i); return; }
        const x = cx + places[i][0] * unit, y = cy - places[i][1] * unit, word = quality[i] || "none";
        dot(i, x, y, r);
        if (word !== "good" && word !== "none") tell(pen, name, x, y - r - 7, { align: "center", colour: colours.ink });
      });
    } else {
      const across = Math.max(1, Math.floor(width / Math.max(14, Math.sqrt((width * height) / n))));
      const cell = width / across;
      stream.channels.forEach((name, i) => {
        const x = (i % across + 0.5) * cell, y = (Math.floor(i / across) + 0.5) * cell;
        dot(i, x, y - (cell > 34 ? 5 : 0), Math.min(7, cell / 4));
        if (cell > 34) tell(pen, name.slice(0, 7), x, y + 10, { align: "center" });
      });
    }
    const key = $("quality-key");
    key.replaceChildren();
    const bad = [];
    for (const word of SHAPES) {
      const members = stream.channels.filter((_, i) => quality[i] === word);
      if (!members.length && word !== "good") continue;
      const item = make("li"), icon = draw("svg", "", { viewBox: "-6 -6 12 12", "aria-hidden": "true" });
      const points = { noisy: "0,-6 6,0 0,6 -6,0", railed: "0,-5 5,4 -5,4" }[word];
      if (points) icon.append(draw("polygon", "q-" + word, { points }));
      else if (word === "flat") icon.append(draw("rect", "q-flat", { x: -5, y: -3, width: 10, height: 6 }));
      else icon.append(draw("circle", "q-" + word, { r: 4.5 }));
      item.append(icon, make("span", "", members.length + " " + word));
      key.append(item);
      if (word !== "good" && members.length) bad.push(word + ": " + members.slice(0, 12).join(", ") + (members.length > 12 ? " and " + (members.length - 12) + " more" : ""));
    }
    $("bad").textContent = quality.length ? bad.join(" · ") : "rated after two seconds of signal";
    $("quality-sub").textContent = scale.good.length ? scale.words + ": " + scale.write(scale.low) + " (light) to " + scale.write(scale.high) : "";
    $("values").textContent = stream.channels.map((name, i) => name + " " + scale.write(scale.values[i])).join(" · ");
    say(canvas, quality.length ? "Quality of " + n + " channels: " + [...key.children].map((item) => item.textContent).join(", ") + "; " + $("quality-sub").textContent : "Quality of channels: not rated yet");
  };

  // --- decisions ----------------------------------------------------------------------------------------------
  const picture = (id) => {
    const image = make("img");
    image.alt = nameOf(id);
    image.title = id;
    image.decoding = "async";
    image.onload = () => { if (Math.max(image.naturalWidth, image.naturalHeight) < 128) image.className = "pixelated"; };
    image.onerror = () => image.replaceWith(make("span", "fine", nameOf(id)));
    image.src = "/image?id=" + encodeURIComponent(id) + "&s=" + session;
    return image;
  };
  const fill = (figure, node, key) => {  // nothing is loaded again that stands there
    const frame = figure.querySelector(".frame");
    if (frame.dataset.key === key) return;
    frame.dataset.key = key;
    frame.replaceChildren(node());
  };
  const best = (one) => (one.n_evidence > 1 && one.posterior.length ? one.posterior : one.top);
  const drawDecision = () => {
    const one = decisions.get(shownNumber);
    if (!one) return;
    const [first] = best(one);
    $("number").textContent = "no. " + (one.number + 1) + (one.marker && one.marker !== one.shown ? " · marker " + one.marker : "") + (held ? " · held" : "");
    const name = $("name"), verdict = $("verdict");
    if (one.lost) {
      fill($("best"), () => make("span", "", "not decided"), "lost");
      name.textContent = "Not decided";
      $("probability").textContent = "";
      $("evidence").textContent = "";
      verdict.className = "verdict lost";
      verdict.textContent = one.lost;
    } else if (first) {
      fill($("best"), () => picture(first[0]), first[0]);
      name.textContent = nameOf(first[0]);
      $("probability").textContent = percent(first[1]);
      $("evidence").textContent = one.n_evidence > 1 ? "from " + one.n_evidence + " decisions together; this one alone: " + nameOf(one.top[0][0]) + ", " + percent(one.top[0][1]) : "from one decision";
      const right = one.shown === null ? null : first[0] === one.shown;
      $("best").className = right === null ? "" : right ? "right" : "wrong";
      verdict.className = "verdict " + (right === null ? "" : right ? "right" : "wrong");
      verdict.textContent = one.shown === null ? "" : right ? "✓ right" : "✗ shown was " + nameOf(one.shown) + (one.rank ? (one.n_evidence > 1 ? ", which this decision alone ranks " : ", ranked ") + one.rank + (facts.gallery_size ? " of " + facts.gallery_size : "") : ", which is not in the gallery");
    }
    if (one.lost) $("best").className = "";
    name.classList.toggle("long", name.textContent.length > 16);
    name.title = first ? first[0] : "";
    $("shown").hidden = one.shown === null;
    if (one.shown !== null) fill($("shown"), () => picture(one.shown), one.shown);
    $("painted").hidden = !painted && !facts.reconstructs;
    if (one.image) fill($("painted"), () => {
      const image = make("img");
      image.alt = "Reconstruction of decision " + (one.number + 1);
      image.onload = () => { if (Math.max(image.naturalWidth, image.naturalHeight) < 128) image.className = "pixelated"; };
      image.src = "/reconstruction/" + one.number + "?s=" + session;
      return image;
    }, "r" + one.number);
    else fill($("painted"), () => make("span", "fine", one.lost ? "not decided" : facts.reconstructs ? "being made, or skipped for lack of time" : "none of this one"), "none");
    $("notes").textContent = one.notes.join(" ");
    drawList(one);
  };
  const drawList = (one) => {
    const list = $("list"), alone = new Map(one.top), all = new Map(one.posterior);
    const order = best(one).slice(0, 8);
    while (list.children.length > order.length) list.lastChild.remove();
    order.forEach(([id], n) => {
      let item = list.children[n];
      if (!item) {
        item = make("li");
        const text = make("div"), meter = make("div", "meter"), bar = draw("svg", "", { viewBox: "0 0 100 8", preserveAspectRatio: "none", "aria-hidden": "true" });
        bar.append(draw("rect", "back", { width: 100, height: 8 }), draw("rect", "all", { height: 8, width: 0 }), draw("rect", "alone", { height: 6.5, y: 0.75, x: 0.4, width: 0, "vector-effect": "non-scaling-stroke" }));
        meter.append(bar);
        text.append(make("span", "label"), meter);
        item.append(make("div", "thumb"), text, make("span", "value"));
        list.append(item);
      }
      const probability = all.has(id) ? all.get(id) : alone.get(id);
      if (item.dataset.id !== id) {
        item.dataset.id = id;
        item.querySelector(".thumb").replaceChildren(picture(id));
        item.querySelector(".thumb img").alt = "";
        item.querySelector(".label").textContent = nameOf(id);
        item.title = id;
      }
      item.className = id === one.shown ? "is-shown" : "";
      item.querySelector(".value").textContent = percent(probability);
      item.querySelector(".all").setAttribute("width", 100 * (probability || 0));
      item.querySelector(".alone").setAttribute("width", Math.max(0, 100 * (alone.get(id) || 0) - 0.8));
    });
  };
  const remember = (one) => {  // for the growing posterior
    if (one.lost || !one.posterior.length) return;
    const key = one.marker || "";
    let line = histories.get(key);
    if (!line || line[line.length - 1].n >= one.n_evidence) line = [];
    line.push({ n: one.n_evidence, p: new Map(one.posterior) });
    if (line.length > EVIDENCE) line.shift();
    histories.delete(key);
    histories.set(key, line);
    if (histories.size > 500) histories.delete(histories.keys().next().value);
  };
  const drawPosterior = () => {
    const { canvas, pen, width, height } = prepare("posterior");
    const one = decisions.get(shownNumber), line = one && !one.lost ? histories.get(one.marker || "") : null;
    if (!line) return;
    const seen = line.filter((point) => point.n <= one.n_evidence);
    const left = 46, right = width - 10, top = 8, bottom = height - 20;
    const low = seen[0].n, high = Math.max(seen[seen.length - 1].n, low + 1);
    const xOf = (n) => left + ((n - low) / (high - low)) * (right - left), yOf = (p) => bottom - p * (bottom - top);
    pen.lineWidth = 1;
    for (const p of [0, 0.5, 1]) {
      pen.strokeStyle = colours.line;
      pen.beginPath(); pen.moveTo(left, yOf(p)); pen.lineTo(right, yOf(p)); pen.stroke();
      tell(pen, 100 * p + " %", left - 6, yOf(p), { align: "right" });
    }
    if (score && score.chance) {
      pen.strokeStyle = colours.chance;
      pen.setLineDash([3, 3]);
      pen.beginPath(); pen.moveTo(left, yOf(score.chance)); pen.lineTo(right, yOf(score.chance)); pen.stroke();
      pen.setLineDash([]);
    }
    const key = $("posterior-key");
    key.replaceChildren();
    one.posterior.slice(0, 5).map(([id], n) => ({ id, n })).reverse().forEach(({ id, n }) => {
      pen.strokeStyle = pen.fillStyle = colours.lines[n];
      pen.lineWidth = n ? 1.8 : 3;
      pen.beginPath();
      let open = false;
      for (const point of seen) {
        const p = point.p.get(id);
        if (p === undefined || p === null) { open = false; continue; }
        if (open) pen.lineTo(xOf(point.n), yOf(p)); else pen.moveTo(xOf(point.n), yOf(p));
        open = true;
      }
      pen.stroke();
      const last = seen[seen.length - 1];
      if (typeof last.p.get(id) === "number") { pen.beginPath(); pen.arc(xOf(last.n), yOf(last.p.get(id)), n ? 3.5 : 5, 0, 7); pen.fill(); }
      const item = make("li"), icon = draw("svg", "", { viewBox: "0 0 12 12", "aria-hidden": "true" });
      icon.append(draw("rect", "k" + n, { y: 4, width: 12, height: 4 }));
      item.append(icon, make("span", "", nameOf(id)));
      key.prepend(item);
    });
    tell(pen, String(low), xOf(low), height - 8, { align: "left" });
    if (seen.length > 1) tell(pen, String(seen[seen.length - 1].n), xOf(seen[seen.length - 1].n), height - 8, { align: "right" });
    tell(pen, "decisions together", (left + right) / 2, height - 8, { align: "center" });
    $("growing-sub").textContent = one.marker ? "for the present image" : "of this stretch";
    say(canvas, "Probability over evidence: after " + one.n_evidence + " decisions " + one.posterior.slice(0, 3).map(([id, p]) => nameOf(id) + " " + percent(p)).join(", "));
  };
  const drawStrip = () => {
    const strip = $("strip"), wanted = [...decisions.values()].slice(-STRIP).reverse();
    const present = new Map([...strip.children].map((item) => [Number(item.dataset.number), item]));
    for (const [number, item] of present) if (!wanted.some((one) => one.number === number)) item.remove();
    wanted.forEach((one, n) => {
      if (present.has(one.number)) return;
      const item = make("li"), pair = make("div", "pair");
      item.dataset.number = one.number;
      const [first] = best(one);
      const right = one.shown === null || !first ? null : first[0] === one.shown;
      item.className = one.lost ? "lost" : right === null ? "" : right ? "right" : "wrong";
      if (one.lost) pair.append(make("span", "", "lost"));
      else if (first) pair.append(picture(first[0]));
      item.title = one.lost || (first ? nameOf(first[0]) + (right === null ? "" : right ? ", right" : ", shown was " + nameOf(one.shown)) : "");
      item.append(pair, make("span", "", one.lost ? "no. " + (one.number + 1) : (right === null ? "" : right ? "✓ " : "✗ ") + (first ? percent(best(one)[0][1]) : "")));
      item.addEventListener("click", () => { hold(true); shownNumber = one.number; mark(); });
      strip.insertBefore(item, strip.children[n] || null);
    });
  };

  // --- score, latency, messages -------------------------------------------------------------------------------
  const drawScore = () => {
    if (!score) return;
    $("n-decided").textContent = score.decided;
    $("n-lost").textContent = score.lost;
    $("n-lost").className = score.lost ? "some" : "";
    const { scored, top1, top5, chance, interval } = score, words = $("score-words"), bar = $("score-bar");
    if (!scored) return;
    const value = top1 / scored;
    $("score-value").replaceChildren(share(value), make("small", "", "  " + top1 + " of " + scored + " single decisions right"));
    const xOf = (p) => 4 + 292 * p;
    const ends = interval || [value, value];
    bar.replaceChildren(draw("line", "axis", { x1: 4, x2: 296, y1: 13, y2: 13 }), draw("line", "ci", { x1: xOf(ends[0]), x2: xOf(ends[1]), y1: 13, y2: 13 }), draw("line", "dot", { x1: xOf(value) - 2, x2: xOf(value) + 2, y1: 13, y2: 13 }));
    if (chance) bar.append(draw("line", "chance", { x1: xOf(chance), x2: xOf(chance), y1: 2, y2: 24 }));
    const range = interval ? "95 % interval " + share(interval[0]).replace(" %", "") + " to " + share(interval[1]) : "no interval before a second picture is shown";
    const verdict = !chance || !interval ? "" : interval[0] > chance ? "The interval is above chance." : interval[1] < chance ? "The interval is below chance." : "The interval includes chance.";
    words.replaceChildren(range + (chance ? "; chance is " + percent(chance) + " (1 of " + facts.gallery_size + "). " : ". "), make("span", interval && interval[0] > chance ? "clear" : "unsure", verdict));
    $("score-more").textContent = "Among the first five: " + share(top5 / scored) + (chance ? " (guessing " + share(Math.min(1, 5 * chance)) + ")" : "") + "." + (score.pooled ? " First by all evidence so far: " + score.pooled1 + " of " + score.pooled + "." : "");
    bar.setAttribute("aria-label", "Correct at first: " + share(value) + ", " + range + (chance ? ", guessing " + percent(chance) : ""));
  };
  const drawEnd = () => {  // the session's own numbers, whose intervals resample pictures
    const found = summary?.scores?.top1;
    $("score-end").hidden = !found;
    if (found) $("score-end").textContent = "At the end: " + share(found.value) + (found.ci_low === undefined ? "" : ", 95 % interval " + share(found.ci_low).replace(" %", "") + " to " + share(found.ci_high) + ", resampling pictures") + "; chance is " + percent(found.chance) + ".";
  };
  const drawLatency = () => {
    const { canvas, pen, width, height } = prepare("histogram");
    if (!latency || !latency.n) return;
    $("p50").textContent = milliseconds(latency.p50);
    $("p99").textContent = milliseconds(latency.p99);
    const counts = latency.counts;
    let from = counts.findIndex((n) => n), to = counts.length - 1;
    while (to > from && !counts[to]) to--;
    from = Math.max(0, from - 1);
    to = Math.min(counts.length - 1, Math.max(to + 1, from + 5));
    const most = Math.max(...counts), bottom = height - 18, wide = (width - 8) / (to - from + 1);
    for (let i = from; i <= to; i++) {
      const tall = counts[i] ? Math.max(2, ((bottom - 4) * counts[i]) / most) : 0, x = 4 + (i - from) * wide;
      pen.fillStyle = colours.accent;
      pen.fillRect(x + 1, bottom - tall, wide - 2, tall);
      const edge = latency.edges[i];
      if ((i - from) % Math.ceil(30 / wide) === 0 && x < width - 34) tell(pen, edge >= 1000 ? edge / 1000 + " s" : String(edge), x, height - 8, { align: i === from ? "left" : "center" });
    }
    pen.strokeStyle = colours.line;
    pen.beginPath(); pen.moveTo(0, bottom + 0.5); pen.lineTo(width, bottom + 0.5); pen.stroke();
    tell(pen, "ms", width - 2, height - 8, { align: "right" });
    say(canvas, "Latency of the last " + latency.n + " decisions: median " + milliseconds(latency.p50) + ", 99th percentile " + milliseconds(latency.p99));
    const one = decisions.get(shownNumber);
    if (one && !one.lost) {
      const names = { preprocess: "preprocessing", predict: "prediction", rank: "ranking", delay: "delay of filters" };
      $("parts").textContent = "This one: " + Object.entries(names).filter(([name]) => one.latency[name] !== undefined).map(([name, word]) => word + " " + milliseconds(one.latency[name])).join(", ");
    }
  };
  const clock = (at) => new Date(at * 1000).toTimeString().slice(0, 8);
  const drawMessages = () => {
    const list = $("messages");
    list.replaceChildren(...messages.slice(-MESSAGES).reverse().map((message) => {
      const item = make("li", message.level);
      item.append(make("time", "", clock(message.at)), make("span", "", (message.level === "info" ? "" : message.level + ": ") + message.sentence));
      return item;
    }));
    const box = $("losses");
    box.replaceChildren(...lost.map(({ reason, n }) => make("p", "", n + " lost: " + reason)));
  };
  const drawLink = () => {
    const { samples, missing, recent, battery } = link;
    if (!samples) return;
    const parts = [missing ? missing + " samples did not arrive (" + (100 * missing / (samples + missing)).toPrecision(2) + " %), " + recent + " of them in the last minute" : "Every sample has arrived", battery === undefined ? "the stream does not report a battery" : "battery " + Math.round(100 * battery) + " %"];
    const text = parts.join("; ") + ".";
    if ($("link").textContent !== text) $("link").textContent = text;
  };
  const drawRecording = () => {
    const button = $("record-button"), state = $("record-state"), over = Boolean(summary);
    button.hidden = $("note-form").hidden = !recording || over;
    if (!recording) return;
    state.className = recording.on ? "on" : "";
    state.textContent = recording.on ? "Recording into " + recording.where : recording.where ? "Not recording; the last recording is " + recording.where : "Not recording yet.";
    button.textContent = recording.on ? "Stop recording" : "Start recording";
  };
  const send = (message) => {
    if (socket?.readyState === 1) socket.send(JSON.stringify(message));
    else handlers.answer({ sentence: "The program is not reachable now; try again." });
  };
  const drawEpoch = () => {
    const { canvas, pen, width, height } = prepare("regions");
    const one = [...decisions.values()].reverse().find((each) => Object.keys(each.epoch).length);
    if (!one) return;
    const regions = Object.entries(one.epoch), left = 70, right = width - 6, bottom = height - 20, step = (bottom - 4) / regions.length;
    const most = Math.max(1e-12, ...regions.flatMap(([, values]) => values.map((v) => Math.abs(v || 0))));
    const { tmin, tmax } = facts, timed = typeof tmin === "number" && typeof tmax === "number" && tmax > tmin;
    if (timed && tmin < 0) {
      const x = left + ((0 - tmin) / (tmax - tmin)) * (right - left);
      pen.strokeStyle = colours.chance;
      pen.setLineDash([3, 3]);
      pen.beginPath(); pen.moveTo(x, 2); pen.lineTo(x, bottom); pen.stroke();
      pen.setLineDash([]);
    }
    regions.forEach(([name, values], n) => {
      const y = 4 + (n + 0.5) * step;
      pen.strokeStyle = colours.line;
      pen.lineWidth = 1;
      pen.beginPath(); pen.moveTo(left, y); pen.lineTo(right, y); pen.stroke();
      pen.strokeStyle = colours.lines[n % 5];
      pen.lineWidth = 1.8;
      pen.beginPath();
      values.forEach((v, i) => pen.lineTo(left + (i / Math.max(1, values.length - 1)) * (right - left), y - ((v || 0) / most) * step * 0.48));
      pen.stroke();
      tell(pen, name.slice(0, 10), left - 6, y, { align: "right" });
    });
    if (timed) {
      const spread = tmax - tmin, tick = [0.1, 0.2, 0.25, 0.5, 1, 2, 5, 10].find((t) => spread / t <= (right - left) / 48) || 20;
      for (let t = Math.ceil(tmin / tick) * tick; t <= tmax + 1e-9; t += tick) {
        const x = left + ((t - tmin) / spread) * (right - left);
        tell(pen, spread > 3 ? t.toFixed(0) : String(Math.round(1000 * t)).replace("-", "−"), x, height - 8, { align: x > right - 12 ? "right" : "center" });
      }
      tell(pen, spread > 3 ? "s" : "ms", left - 24, height - 8, { align: "right" });
    }
    say(canvas, "Last epoch, mean of each region: " + regions.map(([name]) => name).join(", "));
  };
  const drawFacts = () => {
    const box = $("facts");
    const names = { gallery_size: "images in the gallery", tmin: "epoch from (s)", tmax: "epoch to (s)", delay_ms: "delay of causal filters (ms)", sfreq: "sampling rate of the encoder (Hz)", every: "a window every (s)", reconstructs: "images are reconstructed" };
    const silent = new Set(["stream", "modality", "stream_sfreq", "n_top", "n_times", "chance", "run", "unit", "temperature", "name", "calibrated_on", "probabilities"]);
    const rows = stream ? [["stream", stream.name + ", " + stream.modality.toUpperCase().replace("FMRI", "fMRI") + ", " + stream.channels.length + (stream.modality === "fmri" ? " traces" : " channels") + ", " + Number(stream.sfreq.toPrecision(4)) + " Hz"], ["markers", stream.markers || "none: sliding windows"]] : [];
    const write = (value) => (Array.isArray(value) ? value.slice(0, 12).map(write).join(", ") + (value.length > 12 ? ", and " + (value.length - 12) + " more" : "") : value && typeof value === "object" ? Object.entries(value).slice(0, 8).map(([k, v]) => k + " " + write(v)).join(", ") : typeof value === "number" ? String(Number(value.toPrecision(5))) : value === true ? "yes" : value === false ? "no" : String(value ?? "–"));
    for (const [name, value] of Object.entries(facts)) if (!silent.has(name) && value !== null && value !== false && value !== "" && value?.length !== 0) rows.push([names[name] || name.replaceAll("_", " "), write(value)]);
    if (facts.probabilities) $("calibrated").textContent = facts.probabilities;
    box.replaceChildren(...rows.map(([name, value]) => {
      const row = make("div");
      row.append(make("dt", "", name), make("dd", "", value));
      return row;
    }));
  };

  // --- connection ---------------------------------------------------------------------------------------------
  const alert = (text) => { if ($("alert").textContent !== text) $("alert").textContent = text; $("alert").hidden = !text; };
  let alertUntil = 0;
  const drawStatus = () => {
    const pill = $("status");
    let kind = "live", text = "live";
    const silent = age === null ? null : age + (performance.now() - ageAt) / 1000;
    if (refused) [kind, text] = ["gone", "not connected"];
    else if (summary) [kind, text] = ["wait", "session ended"];
    else if (!connected) [kind, text] = ["gone", "program not reachable, trying again"];
    else if (work) [kind, text] = ["wait", work.what];
    else if (!stream) [kind, text] = ["wait", "waiting for the stream"];
    else if (silent === null) [kind, text] = ["wait", "connected, no samples yet"];
    else if (silent > Math.max(1.5, 3 / stream.sfreq)) [kind, text] = ["wait", "no samples for " + Math.round(silent) + " s"];
    drawLink();
    $("elapsed").textContent = work && text === work.what ? (work.total ? work.done + " of " + work.total + ", " : "") + Math.round(work.seconds + (performance.now() - workAt) / 1000) + " s" : "";
    if (pill.className !== "pill " + kind) pill.className = "pill " + kind;
    if (pill.lastElementChild.textContent !== text) pill.lastElementChild.textContent = text;
    if (refused) alert(refused);
    else if (summary) alert("The session has ended; this page keeps its present content.");
    else if (performance.now() > alertUntil) alert("");
  };
  const mark = () => ["decision", "posterior", "strip", "score", "latency", "epoch", "traces"].forEach((name) => dirty.add(name));
  const hold = (on) => {
    held = on;
    $("hold").setAttribute("aria-pressed", String(on));
    $("hold").textContent = on ? "Follow again" : "Hold";
    if (!on && decisions.size) shownNumber = [...decisions.keys()].pop();
    mark();
  };
  const count = (event) => ({ score, latency, lost } = event);
  const handlers = {
    refused: (event) => { refused = event.sentence; },
    state: (event) => {
      ({ stream, facts, messages, summary, session, recording } = event);
      handlers.work(event);
      drawRecording();
      if (!stream.name) stream = null;
      decisions = new Map(event.decisions.map((one) => [one.number, one]));
      histories = new Map();
      $("strip").replaceChildren();
      event.decisions.forEach(remember);
      painted = event.decisions.some((one) => one.image);
      if (!held || !decisions.has(shownNumber)) shownNumber = decisions.size ? [...decisions.keys()].pop() : null;
      count(event);
      handlers.begin(event);
      mark();
      dirty.add("messages");
      drawEnd();
    },
    begin: (event) => {
      stream = event.stream.name ? event.stream : null;
      facts = event.facts;
      $("to-calibration").hidden = !event.calibration;
      summary = event.summary || null;
      age = null;
      quality = [];
      if (stream) {
        startTraces();
        $("stream").textContent = stream.name + " · " + { eeg: "EEG", meg: "MEG", fmri: "fMRI" }[stream.modality] + " · " + (stream.modality === "fmri" ? "a volume every " + Number((1 / stream.sfreq).toPrecision(3)) + " s" : stream.channels.length + " channels at " + Number(stream.sfreq.toPrecision(5)) + " Hz");
        document.title = stream.name + " · live decoding";
      }
      ["traces", "sensors", "facts", "posterior"].forEach((name) => dirty.add(name));
    },
    work: (event) => { work = event.work; workAt = performance.now(); drawStatus(); },
    recording: (event) => { recording = event.recording; drawRecording(); },
    answer: (event) => {
      const box = $("record-answer"), wrong = Boolean(event.sentence);
      box.className = wrong ? "fine wrong" : "fine";
      box.textContent = event.sentence || "Done.";
      if (!wrong && $("note").value === noted) $("note").value = "";
    },
    signal: readTraces,
    decision: (event) => {
      const one = event.decision;
      if (!event.again) for (const each of decisions.values()) each.epoch = {};
      decisions.set(one.number, one);
      if (decisions.size > KEPT) decisions.delete(decisions.keys().next().value);
      if (!event.again) remember(one);
      painted = painted || one.image;
      if (!held && !event.again) shownNumber = one.number;
      mark();
    },
    count: (event) => {
      count(event);
      ["score", "latency", "posterior", "messages"].forEach((name) => dirty.add(name));
    },
    message: (event) => {
      messages.push(event.message);
      if (messages.length > MESSAGES) messages.shift();
      if (event.message.level === "error") { alert(event.message.sentence); alertUntil = performance.now() + 20_000; }
      dirty.add("messages");
    },
    end: (event) => { summary = event.summary; drawEnd(); drawRecording(); },
  };
  const connect = () => {
    socket = new WebSocket((location.protocol === "https:" ? "wss://" : "ws://") + location.host + "/live");
    socket.onopen = () => { connected = true; tries = 0; drawStatus(); };
    socket.onmessage = (message) => { for (const event of JSON.parse(message.data)) handlers[event.type]?.(event); };
    socket.onclose = () => {
      connected = false;
      drawStatus();
      if (!summary && !refused) setTimeout(connect, Math.min(3000, 200 * 2 ** tries++));
    };
  };

  const painters = { traces: drawTraces, sensors: drawSensors, decision: drawDecision, posterior: drawPosterior, strip: drawStrip, score: drawScore, latency: drawLatency, messages: drawMessages, epoch: drawEpoch, facts: drawFacts };
  let paintedAt = 0;
  const paint = (now) => {
    if (dirty.size && now - paintedAt >= 45) {  // 20 times a second is enough, and cool on a phone
      paintedAt = now;
      const names = [...dirty];
      dirty.clear();
      for (const name of names) painters[name]();
    }
    requestAnimationFrame(paint);
  };
  const all = () => { readColours(); Object.keys(painters).forEach((name) => dirty.add(name)); };
  const setScheme = (scheme) => {
    document.documentElement.dataset.scheme = scheme;
    $("scheme").textContent = scheme === "dark" ? "Light" : "Dark";
    try { localStorage.setItem("scheme", scheme); } catch { /* a private window */ }
    all();
  };
  let stored = "dark";
  try { stored = localStorage.getItem("scheme") || "dark"; } catch { /* a private window */ }
  setScheme(stored === "light" ? "light" : "dark");
  const otherScheme = () => setScheme(document.documentElement.dataset.scheme === "dark" ? "light" : "dark");
  const fullScreen = () => (document.fullscreenElement ? document.exitFullscreen() : document.documentElement.requestFullscreen?.());
  $("scheme").addEventListener("click", otherScheme);
  $("full").addEventListener("click", fullScreen);
  $("hold").addEventListener("click", () => hold(!held));
  $("record-button").addEventListener("click", () => send({ type: "record", on: !recording.on }));
  $("note-form").addEventListener("submit", (event) => {
    event.preventDefault();
    noted = $("note").value;
    send({ type: "note", text: noted });
  });
  $("rows").addEventListener("change", () => dirty.add("traces"));
  $("gain").addEventListener("change", () => dirty.add("traces"));
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || /^(BUTTON|SELECT|A|INPUT)$/.test(event.target.tagName)) return;
    if (event.key === " ") { event.preventDefault(); hold(!held); }
    if ((event.key === "ArrowLeft" || event.key === "ArrowRight") && decisions.size) {
      const numbers = [...decisions.keys()], next = numbers.indexOf(shownNumber) + (event.key === "ArrowLeft" ? -1 : 1);
      hold(true);
      shownNumber = numbers[Math.max(0, Math.min(numbers.length - 1, next))];
      event.preventDefault();
    }
    if (event.key === "d") otherScheme();
    if (event.key === "f") fullScreen();
  });
  addEventListener("resize", all);
  setInterval(drawStatus, 500);
  connect();
  requestAnimationFrame(paint);
})();
