// The live page: it follows the files of the runs. Readers register in window.castalia.readers.
window.castalia.readers = []; // {id, title, init(box, live), refresh(live), open()}
(() => {
  const { parts, address, readers } = window.castalia;
  const EVERY = 1000; // ms between two questions for the version
  const AGAIN = 2000; // after the server did not answer
  let version = "";
  let pressed = false; // a redraw would end a zoom that the reader is drawing

  // --- elements, and questions to the server
  const make = (tag, settings = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), settings);
    element.append(...children.filter((child) => child !== null));
    return element;
  };
  const ask = async (path, { query = null, body, seconds = 120 } = {}) => {
    const words = query ? `?${new URLSearchParams(query)}` : "";
    const post = body === undefined ? {} : { method: "POST", body: JSON.stringify(body),
      headers: { "Content-Type": "application/json" } };
    const signal = AbortSignal.timeout(1000 * seconds);
    const answer = await fetch(path + words, { ...post, signal });
    const value = await answer.json();
    if (!answer.ok) throw Object.assign(new Error(value.error), { status: answer.status });
    return value;
  };
  Object.assign(window.castalia, { make, ask });

  // --- the line that says whether the page is live
  const dot = make("span", { className: "dot" });
  const state = make("span", { role: "status" }); // read out when it changes, not every second
  const since = make("span", { className: "since" });
  const say = (kind, text) => {
    dot.dataset.kind = kind;
    if (state.textContent !== text) state.textContent = text;
  };
  const clock = () => new Date().toLocaleTimeString("en-GB");

  // --- the runs and how far they are
  const runs = make("div", { className: "states" });
  const drawRuns = (live) => {
    const scrolled = runs.scrollTop;
    runs.replaceChildren(...live.runs.map((run) => {
      const share = run.steps ? run.step / run.steps : 0;
      const of = run.steps ? ` of ${run.steps.toLocaleString("en")}` : "";
      const line = make("div", { className: "state" },
        make("span", { className: "name" }, run.name),
        make("span", { className: `kind ${run.state.replace(" ", "-")}` }, run.state),
        make("span", { className: "count" }, `step ${run.step.toLocaleString("en")}${of}`),
        make("span", { className: "count" },
          run.loss === null ? "" : `loss ${run.loss.toFixed(4)}`),
        make("span", { className: "bar" }));
      line.lastChild.style.setProperty("--share", `${100 * Math.min(1, share)}%`);
      if (run.error) line.append(make("p", { className: "wrong" }, run.error));
      return line;
    }), ...live.problems.map((text) => make("p", { className: "state wrong" }, text)));
    runs.scrollTop = scrolled;
  };

  // --- tabs: the report and the readers
  const tabs = make("div", { className: "tabs", role: "tablist", ariaLabel: "what to read" });
  const boxes = new Map(); // id -> its box
  const show = (id) => {
    for (const tab of tabs.children) {
      const isOn = tab.value === id;
      tab.setAttribute("aria-selected", String(isOn));
      tab.tabIndex = isOn ? 0 : -1;
    }
    for (const [each, box] of boxes) box.hidden = each !== id;
    address.set("tab", id === "report" ? null : id);
    readers.find((reader) => reader.id === id)?.open();
    // Charts that were drawn while they were hidden have no width.
    window.dispatchEvent(new Event("resize"));
  };
  const addTab = (id, title, box) => {
    const tab = make("button", { type: "button", role: "tab", value: id, id: `tab-${id}`,
      textContent: title, onclick: () => show(id) });
    tab.setAttribute("aria-controls", box.id);
    box.setAttribute("role", "tabpanel");
    box.setAttribute("aria-labelledby", tab.id);
    boxes.set(id, box);
    tabs.append(tab);
  };
  tabs.onkeydown = (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!move) return;
    const all = [...tabs.children];
    const next = all.at((all.indexOf(document.activeElement) + move) % all.length);
    next.focus();
    show(next.value);
    event.preventDefault();
  };

  // --- new data
  // The tables below the charts come as HTML. Only what differs is replaced; parts that the reader
  // has opened stay open, and tables stay where they were scrolled to.
  const renew = (place, html) => {
    const template = make("template");
    template.innerHTML = html;
    const fresh = [...template.content.children];
    const old = [...place.children];
    fresh.forEach((element, i) => {
      if (!old[i]) return place.append(element);
      const sent = element.outerHTML;
      if (old[i].sent === sent) return;
      keep(old[i], element);
      element.sent = sent;
      old[i].replaceWith(element);
      restore(element);
    });
    old.slice(fresh.length).forEach((element) => element.remove());
  };
  const wordsOf = (details) => details.querySelector("summary").textContent.replace(/\d/g, "");
  const inside = (element, selector) =>
    [...(element.matches(selector) ? [element] : []), ...element.querySelectorAll(selector)];
  const keep = (old, fresh) => {
    const open = new Set(inside(old, "details[open]").map(wordsOf));
    for (const details of inside(fresh, "details")) details.open = open.has(wordsOf(details));
    const scrolled = inside(old, ".wide, pre");
    inside(fresh, ".wide, pre").forEach((element, i) => {
      element.scrolled = [scrolled[i]?.scrollLeft ?? 0, scrolled[i]?.scrollTop ?? 0];
    });
  };
  const restore = (element) => {
    for (const each of inside(element, ".wide, pre")) each.scrollTo(...each.scrolled);
  };
  const renewTiles = (html) => {
    const template = make("template");
    template.innerHTML = html;
    const fresh = template.content.querySelector(".tiles");
    document.querySelector("#report > .tiles")?.remove();
    if (fresh) document.getElementById("report").prepend(fresh);
  };
  const apply = (fresh) => {
    version = fresh.live.version;
    document.title = fresh.live.title;
    document.querySelector("h1").textContent = fresh.live.title;
    document.querySelector("header p").textContent = fresh.live.lead;
    renewTiles(fresh.live.charts);
    window.castalia.refresh(fresh);
    renew(document.getElementById("parts"), fresh.live.parts);
  };

  // --- asking, as long as the page is seen
  let timer = 0;
  let asking = false;
  const poll = async () => {
    clearTimeout(timer);
    if (asking || document.hidden) return;
    asking = true;
    let wait = EVERY;
    try {
      const answer = await ask("/version", { seconds: 30 });
      if (answer.version !== version && !pressed) {
        apply(await ask("/data"));
        since.textContent = `as of ${clock()}`;
      }
      say("live", "live");
    } catch (error) {
      // A fetch that finds no server is a TypeError, one that takes too long a TimeoutError.
      const isGone = error.name === "TypeError" || error.name === "TimeoutError";
      say("gone", isGone ? "not connected; trying again" : `the page cannot be renewed: ${error}`);
      wait = AGAIN;
    }
    asking = false;
    timer = setTimeout(poll, wait);
  };
  document.addEventListener("visibilitychange", poll);
  for (const kind of ["pointerdown", "pointerup", "pointercancel"]) {
    window.addEventListener(kind, () => (pressed = kind === "pointerdown"), true);
  }

  const init = (data) => {
    version = data.live.version;
    const header = document.querySelector("header");
    header.append(make("p", { id: "live" }, dot, state, since), runs, tabs);
    addTab("report", "Report", document.getElementById("report"));
    for (const reader of readers) {
      const box = make("section", { id: reader.id, className: "reader", hidden: true });
      document.getElementById("readers").append(box);
      addTab(reader.id, reader.title, box);
      reader.init(box, data.live);
    }
    for (const element of document.getElementById("parts").children) {
      element.sent = element.outerHTML;
    }
    drawRuns(data.live);
    since.textContent = `as of ${clock()}`;
    show(boxes.has(address.get("tab")) ? address.get("tab") : "report");
    poll();
  };
  const refresh = (data) => {
    document.getElementById("scores").classList.toggle("alone", !data.runs.length);
    drawRuns(data.live);
    for (const reader of readers) reader.refresh(data.live);
  };
  parts.push({ init, refresh });
})();
