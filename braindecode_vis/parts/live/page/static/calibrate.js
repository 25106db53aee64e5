"use strict";
// Shows a block of images and tells the program when each of them appeared, on the program's clock.
(() => {
  const $ = (id) => document.getElementById(id);
  const GOOD_CLOCK = 0.005;  // s; worse is said
  const AHEAD = 3;  // images that are decoded before they are needed
  let socket = null, plan = null, next = 0, verdict = null, ready = false, refused = false, tries = 0;
  let running = false, looping = false, finishing = false, lit = false, early = "";
  let pings = [];  // {offset, apart, at}: the program's clock minus ours, and half the round trip, in s
  let frame = 1 / 60;
  const images = new Map();

  const say = (text, bad = false) => {
    if ($("words").textContent !== text) $("words").textContent = text;
    $("words").className = bad ? "bad" : "";
  };
  const send = (message) => { if (socket && socket.readyState === 1) socket.send(JSON.stringify(message)); };

  // The shortest round trip of the last half minute says most; clocks drift less than its half in that time.
  const bestPing = () => pings.reduce((best, one) => (!best || one.apart < best.apart ? one : best), null);
  const ping = () => send({ type: "ping", sent: performance.now() });
  const readPong = (message) => {
    const now = performance.now();
    pings.push({ offset: message.server - (message.sent + now) / 2000, apart: (now - message.sent) / 2000, at: now });
    pings = pings.filter((one) => now - one.at < 30_000);
    ready = message.ready;
    refresh();
  };

  const measureFrame = () => {  // the median of the last steps between frames
    const steps = [];
    let last = null;
    const look = (now) => {
      if (last !== null && document.visibilityState === "visible") steps.push(now - last);
      last = now;
      if (steps.length > 60) steps.shift();
      if (steps.length > 10) frame = [...steps].sort((a, b) => a - b)[steps.length >> 1] / 1000;
      requestAnimationFrame(look);
    };
    requestAnimationFrame(look);
  };

  const load = (index) => {
    if (index >= plan.length) return Promise.resolve(null);
    const id = plan[index].stimulus_id;
    if (!images.has(id)) {
      const image = new Image();
      image.alt = "";
      image.src = "/image?of=calibration&id=" + encodeURIComponent(id);
      images.set(id, image.decode().then(() => {
        if (Math.max(image.naturalWidth, image.naturalHeight) < 128) image.className = "pixelated";
        $("stage").append(image);
        return image;
      }).catch(() => { images.delete(id); throw new Error("The image " + id + " could not be loaded."); }));
    }
    return images.get(id);
  };
  const nextFrame = () => new Promise(requestAnimationFrame);
  const wait = (seconds) => new Promise((done) => setTimeout(done, Math.max(0, 1000 * seconds)));
  // Waits to the frame that is nearest to a time, in ms: a timer first, then frame by frame.
  const frameAt = async (time) => {
    await wait((time - performance.now()) / 1000 - 2.5 * frame);
    let now = await nextFrame();
    while (now < time - 500 * frame && running) now = await nextFrame();
    return now;
  };

  const runBlock = async () => {
    $("talk").hidden = true;
    looping = true;
    early = "";
    let at = (await nextFrame()) + 1500;  // a moment of quiet
    try {
      while (running && next < plan.length) {
        const index = next, one = plan[index];
        const image = await load(index);
        for (let i = 1; i <= AHEAD; i++) load(index + i).catch(() => 0);
        at = Math.max(at + 1000 * one.pause, performance.now() + 100);
        await frameAt(at);
        if (!running) break;
        image.classList.add("on");
        $("cross").classList.add("off");
        lit = !lit;
        $("diode").classList.toggle("on", lit);
        const onset = await nextFrame();  // what was changed in the last frame is on its way to the screen now
        const best = bestPing();
        send({ type: "onset", index, time: onset / 1000 + best.offset, uncertainty: best.apart + frame });
        next = index + 1;
        show();
        at = onset + 1000 * one.duration;
        await frameAt(at);
        image.classList.remove("on");
        $("cross").classList.remove("off");
        ping();
      }
    } catch (error) {
      running = false;
      say(error.message, true);
    }
    for (const image of $("stage").querySelectorAll("img")) image.classList.remove("on");
    $("cross").classList.remove("off");
    $("talk").hidden = false;
    looping = false;
    if (next >= plan.length) finish(); else refresh();
    $("go").focus();
  };
  const finish = () => {
    if (finishing || verdict !== null) return;
    running = false;
    finishing = true;
    say("Learning from the recorded trials: this takes a moment.");
    send({ type: "finish" });
    show();
  };
  const toggle = () => {
    if (running) { running = false; return; }
    if ($("go").disabled || looping) return;
    running = true;
    if (!document.fullscreenElement) document.documentElement.requestFullscreen?.().catch(() => 0);
    runBlock();
  };
  const stop = () => {
    if (!plan || verdict !== null || finishing) return;
    running = false;
    if (next) setTimeout(finish, 50);  // once the onset of what is shown has gone
    else say("No image was shown yet.");
  };

  const show = () => {
    const total = plan ? plan.length : 0;
    $("n").textContent = total ? next + " of " + total : "–";
    const left = plan ? plan.slice(next).reduce((sum, one) => sum + one.duration + one.pause, 0) : 0;
    $("minutes").textContent = total ? (left >= 90 ? Math.ceil(left / 60) + " min" : Math.ceil(left) + " s") : "–";
    $("bar").setAttribute("aria-valuemax", total || 1);
    $("bar").setAttribute("aria-valuenow", next);
    $("bar").firstElementChild.style.width = (total ? (100 * next) / total : 0) + "%";
  };
  const refresh = () => {
    show();
    const best = bestPing();
    $("clock").textContent = best ? "± " + (1000 * best.apart).toFixed(1) + " ms" : "–";
    $("screen").textContent = (1 / frame).toFixed(0) + " Hz";
    const open = Boolean(plan && verdict === null && !finishing && ready && pings.length >= 5 && socket.readyState === 1);
    $("go").disabled = !open;
    $("stop").disabled = !open || !next;
    $("go").textContent = next ? "Go on" : "Start";
    if (refused || running || finishing) return;
    if (verdict !== null) say(verdict);
    else if (!plan) say("Connecting.");
    else if (!ready) say("Waiting for the stream.", true);
    else if (pings.length < 5) say("Measuring the clock.");
    else if (best.apart > GOOD_CLOCK) say("Ready, but times are only known to " + (1000 * best.apart).toFixed(0) + " ms: open this page on the machine that decodes.", true);
    else say(early || (next ? "Paused." : "Ready."));
  };

  const handlers = {
    plan: (message) => {
      plan = message.showings;
      next = message.next;
      verdict = message.verdict;
      finishing = message.learning;
      if (finishing) say("Learning from the recorded trials: this takes a moment.");
      load(next).catch((error) => { refused = true; say(error.message, true); });
      for (let i = 1; i <= AHEAD; i++) load(next + i).catch(() => 0);
      refresh();
    },
    pong: readPong,
    repeat: (message) => { next = message.next; },
    finished: (message) => {
      if (message.complete) verdict = message.sentence;
      else early = message.sentence + " Press space to continue.";
      finishing = false;
      refresh();
    },
    refused: (message) => { refused = true; running = false; say(message.sentence, true); },
  };
  const connect = () => {
    socket = new WebSocket((location.protocol === "https:" ? "wss://" : "ws://") + location.host + "/calibration");
    socket.onopen = () => { tries = 0; pings = []; for (let i = 0; i < 12; i++) setTimeout(ping, 60 * i); };
    socket.onmessage = (message) => { const event = JSON.parse(message.data); handlers[event.type]?.(event); };
    socket.onclose = () => {
      if (refused) return;
      running = false;
      if (verdict === null) say("The program is not reachable; trying again.", true);
      $("go").disabled = true;
      setTimeout(connect, Math.min(3000, 200 * 2 ** tries++));
    };
  };
  $("go").addEventListener("click", toggle);
  $("stop").addEventListener("click", stop);
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === " ") { event.preventDefault(); toggle(); }
    if (event.key === "Escape") stop();
    if (event.key === "f") document.documentElement.requestFullscreen?.();
  });
  // Esc leaves the full screen before a page hears of it.
  addEventListener("fullscreenchange", () => { if (!document.fullscreenElement && running) stop(); });
  // A hidden page has no frames, and would show nothing.
  addEventListener("visibilitychange", () => { if (document.visibilityState === "hidden") running = false; });
  setInterval(() => { if (!running) ping(); }, 1000);
  measureFrame();
  connect();
})();
