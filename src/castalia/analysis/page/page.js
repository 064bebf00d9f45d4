// Draws the panels of a report. The data say what there is; nothing here knows a metric by name.
(async () => {
  const COLOURS = 8;
  const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
  const SYMBOLS = ["circle", "diamond", "square", "triangle-up", "x", "cross"];
  const AXES = { steps: "steps", tokens: "tokens", seconds: "time", flops: "FLOPs" };
  const TIMES = [[1, "seconds"], [60, "minutes"], [3600, "hours"], [86400, "days"]];
  const isNarrow = () => window.innerWidth < 600;
  const isCoarse = window.matchMedia("(pointer: coarse)").matches;

  const { look, faded, plain, address } = window.castalia;
  if (window.castalia.isOld) {
    document.getElementById("controls")?.append("The charts need a browser of 2023 or newer.");
    return;
  }
  // --- numbers: steps come as differences
  const cumulated = (differences) => {
    let sum = 0;
    return differences.map((each) => (sum += each));
  };
  const prepared = (fresh) => {
    const times = new Map();
    for (const panel of fresh.panels) {
      // What a panel is called across refreshes; several may have one title.
      const time = times.get(panel.title) ?? 0;
      times.set(panel.title, time + 1);
      panel.key = time ? `${panel.title} ${time}` : panel.title;
      for (const series of panel.series) {
        for (const curve of [series.points, ...Object.values(series.fits)]) {
          curve.steps = cumulated(curve.steps);
        }
      }
    }
    return fresh;
  };
  let data = prepared(await window.castalia.data());
  const WINDOWS = [0, ...data.windows]; // of the slider; 0 draws the values themselves
  let boxes = [...document.querySelectorAll(".panel[data-panel]")];
  // Other scripts of the page draw parts of their own: {init(data), refresh(data)}.
  const { parts } = window.castalia;
  if (!boxes.length && !parts.length) return;
  await window.castalia.plotly();

  // --- what the reader chose; it is in the address too, so that a view can be passed on
  const state = { x: "steps", xscale: "linear", yscale: "auto", smooth: 0.05 };
  for (const key of Object.keys(state)) {
    const value = address.get(key);
    if (value !== null) state[key] = key === "smooth" ? Number(value) : value;
  }
  if (!(state.x in AXES) || data.runs.every((run) => !run.axes[state.x])) state.x = "steps";
  if (!WINDOWS.includes(state.smooth)) state.smooth = 0.05;
  const chosenRuns = window.castalia.runChoice(COLOURS, () => redraw());
  // curves of a panel that are switched off: at first all but the few that it names
  const switched = new Map();
  const hiddenIn = (panel) => {
    if (!switched.has(panel.key)) switched.set(panel.key, { known: new Set(), off: new Set() });
    const { known, off: names } = switched.get(panel.key);
    for (const { name } of panel.series) {
      if (!known.has(name) && panel.few.length && !panel.few.includes(name)) names.add(name);
      known.add(name);
    }
    return names;
  };
  let view = null; // the x range that the reader zoomed to, in the units of the axis
  const heights = new Map(); // y ranges that the reader zoomed to, by panel
  const drawn = new Map(); // boxes with a chart, and their panels
  const panelOf = (box) => data.panels[Number(box.dataset.panel)];

  // The place of a step on an axis, between its neighbours that the axis has.
  const placeOn = (steps, places, step) => {
    if (!steps.length || step <= 0) return 0;
    let low = 0;
    let high = steps.length - 1;
    if (step >= steps[high]) return (places[high] * step) / steps[high];
    if (step <= steps[0]) return (places[0] * step) / steps[0];
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] <= step) low = middle;
      else high = middle;
    }
    const share = (step - steps[low]) / (steps[high] - steps[low]);
    return places[low] + share * (places[high] - places[low]);
  };
  const largest = (axis) =>
    Math.max(0, ...data.runs.map((run) => (run.axes[axis] || [0]).at(-1) || 0));
  const timeUnit = () => TIMES.filter(([size]) => largest("seconds") >= 2 * size).at(-1) || TIMES[0];
  const unitOf = (axis) => (axis === "seconds" ? timeUnit()[0] : 1);
  const firstPlace = (run) => {
    const place = (run.axes[state.x] || []).find((each) => each > 0);
    return (place || 1) / unitOf(state.x);
  };
  // On a logarithmic axis step 0 stands at half of the first step.
  const placesOf = (run, steps) => {
    const places = run.axes[state.x];
    if (!places) return null;
    const zero = state.xscale === "log" ? firstPlace(run) / 2 : 0;
    if (state.x === "steps") return steps.map((step) => step || zero);
    const unit = unitOf(state.x);
    return steps.map((step) => placeOn(run.axes.steps, places, step) / unit || zero);
  };
  const fullRange = () => {
    const lasts = data.panels.flatMap((panel) =>
      panel.series.map((series) => {
        const places = placesOf(data.runs[series.run], [series.points.steps.at(-1) || 0]);
        return places ? places[0] : 0;
      }));
    const last = Math.max(...lasts, largest(state.x) / unitOf(state.x)) || 1;
    const first = Math.min(...data.runs.map(firstPlace));
    if (state.xscale === "log") return [Math.log10(first / 2.2), Math.log10(last * 1.1)];
    return [-0.015 * last, last * 1.015];
  };

  // --- looks
  const colourOf = (series) => look(`--c${(series.colour ?? series.run) % COLOURS}`);
  // More sources than colours: the second round of colours has other dashes.
  const dashOf = (series) =>
    DASHES[(series.dash + Math.floor((series.colour ?? series.run) / COLOURS)) % DASHES.length];
  const label = (series) =>
    plain(data.runs.length > 1 ? `${data.runs[series.run].name} · ${series.name}` : series.name);

  // --- traces
  const hover = (what) =>
    `${what} <b>%{y:.5~g}</b>${state.x === "steps" ? "" : " · step %{customdata:,}"}<extra></extra>`;
  const lineTrace = (series, curve, what, width, opacity) => ({
    x: placesOf(data.runs[series.run], curve.steps),
    y: curve.values,
    customdata: curve.steps,
    mode: series.marks && curve.steps.length <= 60 ? "lines+markers" : "lines",
    line: { color: colourOf(series), width, dash: dashOf(series) },
    marker: { size: 6, symbol: SYMBOLS[series.run % SYMBOLS.length] },
    opacity,
    hovertemplate: hover(what),
  });
  const lines = (shown) => {
    const traces = [];
    for (const series of shown) {
      const fit = state.smooth > 0 && series.fits[state.smooth];
      const many = shown.length > 4 * data.runs.length;
      const each = series.whole ? "each step" : "smallest and largest";
      if (!fit) {
        const name = series.marks || series.points.steps.length < 3 ? "" : ` (${each})`;
        traces.push(lineTrace(series, series.points, label(series) + name, 1.5, 1));
        continue;
      }
      // Behind many smooth curves the values themselves would hide everything.
      if (!many) {
        traces.push(lineTrace(series, series.points, `${label(series)} (${each})`, 1, 0.3));
      }
      traces.push(lineTrace(series, fit, `${label(series)} (smoothed)`, 2.2, 1));
    }
    return traces;
  };
  const shares = (shown) =>
    shown.map((series) => ({
      ...lineTrace(series, series.points, label(series), 0.6, 1),
      mode: "lines",
      stackgroup: "whole",
      fillcolor: faded(colourOf(series), [0.85, 0.6, 0.4, 0.25][
        Math.floor((series.colour ?? 0) / COLOURS) % 4]),
      hovertemplate: `${label(series)} <b>%{y:.3~g}%</b><extra></extra>`,
    }));
  const heat = (shown) => {
    const rows = [...shown].reverse(); // the first row is drawn at the bottom
    return [{
      type: "heatmap",
      x: placesOf(data.runs[rows[0].run], rows[0].points.steps),
      // The number keeps rows apart: Plotly merges categories of one name.
      y: rows.map((series, row) => `${row} ${plain(series.name)}`),
      z: rows.map((series) => series.points.values),
      colorscale: [[0, look("--card")], [0.15, faded(look("--c0"), 0.35)], [1, look("--c0")]],
      zmin: 0,
      showscale: !isNarrow(),
      colorbar: { thickness: 10, outlinewidth: 0, ticksuffix: "%" },
      hovertemplate: "%{y} <b>%{z:.3~g}%</b><extra></extra>",
    }];
  };
  const events = (shown) =>
    shown.map((series) => ({
      ...lineTrace(series, series.points, "", 0, 1),
      y: series.points.values.map((lane) => lane + 0.12 * series.run),
      mode: "markers",
      marker: { size: 9, symbol: SYMBOLS[series.points.values[0] % SYMBOLS.length],
        color: look(`--c${data.runs.length > 1 ? series.run : series.points.values[0]}`) },
      text: series.texts.map((text, i) =>
        `${label(series)} · step ${series.points.steps[i].toLocaleString("en")} · ${plain(text)}`),
      hovertemplate: "%{text}<extra></extra>",
    }));
  const KINDS = { lines, shares, heat, events };

  // --- layout
  const isLog = (panel) => (state.yscale === "auto" ? panel.log : state.yscale === "log");
  const yAxis = (panel, shown, traces) => {
    const axis = { gridcolor: look("--grid"), linecolor: look("--edge"), zeroline: false,
      automargin: true };
    if (panel.kind === "heat") {
      const names = [...shown].reverse().map((series) => plain(short(series.name)));
      return { ...axis, tickvals: traces[0].y, ticktext: names,
        tickfont: { size: 10 }, showgrid: false };
    }
    if (panel.kind === "events") {
      const lanes = [...new Map(shown.map((s) => [s.points.values[0], s.name]))];
      return { ...axis, tickvals: lanes.map(([lane]) => lane),
        ticktext: lanes.map(([, name]) => name), fixedrange: true,
        range: [Math.min(...lanes.map(([l]) => l)) - 0.6, Math.max(...lanes.map(([l]) => l)) + 0.8] };
    }
    if (panel.kind === "shares") return { ...axis, range: [0, 100], fixedrange: true };
    const log = isLog(panel) && traces.some((trace) => trace.y.some((value) => value > 0));
    const range = heights.get(panel.key) || (!view && rangeAfterStart(panel, traces, log))
      || rangeWithin(traces, view || fullRange(), log) || [0, 1];
    const top = log ? 10 ** range[1] : range[1];
    const ticks = { nticks: 7, tickformat: top >= 1e4 ? ".4~s" : ".5~g" };
    // Plotly labels every digit of two decades, one over the other.
    if (log && range[1] - range[0] > 0.7) ticks.dtick = logTick(range[1] - range[0]);
    return { ...axis, ...ticks, type: log ? "log" : "linear", range };
  };
  const logTick = (decades) => (decades > 1.5 ? Math.ceil(decades / 6) : "D2");
  // A steep start flattens everything after it on linear axes. Where it does, the chart is fitted to
  // what comes after the first 2%; null elsewhere.
  const START = 0.02;
  const rangeAfterStart = (panel, traces, log) => {
    const isSmoothed = panel.series.some((series) => Object.keys(series.fits).length);
    if (state.yscale !== "auto" || state.xscale === "log" || log || !isSmoothed) return null;
    const [from, to] = fullRange();
    const all = rangeWithin(traces, [from, to], log);
    const later = rangeWithin(traces, [START * to, to], log);
    return all && later && all[1] - all[0] > 2 * (later[1] - later[0]) ? later : null;
  };
  const short = (text) =>
    text.length > 18 ? `${text.slice(0, 8)}…${text.slice(-9)}` : text;
  // What the curves reach inside the range of x, with a margin; null where they have no point.
  const rangeWithin = (traces, range, log) => {
    const [from, to] = range.map((each) => (state.xscale === "log" ? 10 ** each : each));
    let low = Infinity;
    let high = -Infinity;
    for (const trace of traces) {
      trace.x.forEach((x, i) => {
        const y = trace.y[i];
        if (x < from || x > to || (log && y <= 0)) return;
        low = Math.min(low, log ? Math.log10(y) : y);
        high = Math.max(high, log ? Math.log10(y) : y);
      });
    }
    if (low > high) return null;
    const margin = 0.06 * (high - low) || 0.05 * Math.abs(high) || 1;
    return [low - margin, high + margin];
  };
  const heightOf = (panel, shown) => {
    if (panel.kind === "heat") return Math.max(260, 60 + 13 * shown.length);
    if (panel.kind === "events") {
      return 70 + 24 * new Set(shown.map((series) => series.points.values[0])).size;
    }
    return (isNarrow() ? 240 : 280) * (panel.wide && !isNarrow() ? 1.3 : 1);
  };
  const xTitle = () => (state.x === "seconds" ? timeUnit()[1] : AXES[state.x]);
  const xFormat = () => {
    if (state.x === "flops") return ".1~e";
    if (state.x === "seconds") return ",.4~g";
    return largest(state.x) / unitOf(state.x) < 1e5 ? "," : ".4~s";
  };
  // Where a step 0 is drawn at another place, each line of the hover box says its step.
  const isMoved = (shown) => state.x === "steps" && state.xscale === "log"
    && shown.some((series) => series.points.steps[0] === 0);
  const sayStep = (trace) => {
    trace.hovertemplate = trace.hovertemplate?.replace("<extra>", " · step %{customdata:,}<extra>");
  };
  const hoverTitle = (shown) => {
    if (state.x !== "steps") return `%{x} ${xTitle()}`;
    return isMoved(shown) ? " " : "step %{x:,}";
  };
  const layoutOf = (panel, shown, traces) => ({
    height: heightOf(panel, shown),
    margin: { l: 52, r: 14, t: isCoarse ? 30 : 6, b: 40 },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: look("--soft"), activecolor: look("--ink") },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: look("--soft"), size: 12, family: "system-ui, sans-serif" },
    xaxis: {
      type: state.xscale,
      range: view || fullRange(),
      title: { text: xTitle(), standoff: 6 },
      gridcolor: look("--grid"),
      linecolor: look("--edge"),
      zeroline: false,
      nticks: isNarrow() ? 5 : 8,
      tickformat: xFormat(),
      hoverformat: { steps: ",.0f", tokens: ".4~s", seconds: ",.4~g", flops: ".3~e" }[state.x],
      unifiedhovertitle: { text: hoverTitle(shown) },
      showspikes: true,
      spikemode: "across",
      spikethickness: 1,
      spikedash: "solid",
      spikecolor: look("--soft"),
    },
    yaxis: yAxis(panel, shown, traces),
    hovermode: panel.kind === "heat" || panel.kind === "events" ? "closest" : "x unified",
    hoverlabel: { bgcolor: look("--card"), bordercolor: look("--edge"), align: "left",
      font: { color: look("--ink"), size: 12 } },
    hoverdistance: 40,
    showlegend: false,
    // A finger on a chart scrolls the page; it zooms with the buttons.
    dragmode: isCoarse ? false : "zoom",
  });
  const CONFIG = {
    responsive: true,
    displaylogo: false,
    displayModeBar: isCoarse ? true : "hover",
    doubleClick: false,
    // Plotly's own reset would move this chart alone.
    modeBarButtons: [["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", { name: "reset",
      title: "Reset zoom", icon: Plotly.Icons.home, click: () => resetView() }, "toImage"]],
    toImageButtonOptions: { scale: 2 },
  };

  // --- a panel on the page
  const draw = (box) => {
    const panel = panelOf(box);
    const here = panel.series.filter((series) => chosenRuns.isShown(data.runs[series.run].name)
      && data.runs[series.run].axes[state.x]);
    const shown = here.filter((series) => !hiddenIn(panel).has(series.name));
    const plot = box.querySelector(".plot");
    drawKeys(box, panel, here);
    box.classList.toggle("empty", !here.length);
    if (!shown.length) {
      Plotly.purge(plot);
      plot.textContent = here.length ? "" : `No ${AXES[state.x]} are recorded here.`;
      drawn.delete(box);
      return;
    }
    if (!drawn.has(box)) plot.textContent = "";
    const traces = KINDS[panel.kind](shown);
    if (isMoved(shown) && panel.kind !== "events") traces.forEach(sayStep);
    const layout = layoutOf(panel, shown, traces);
    box.querySelector(".cut").hidden = panel.kind !== "lines" || !isCut(traces, layout.yaxis);
    Plotly.react(plot, traces, layout, CONFIG);
    if (!drawn.has(box)) listen(box, plot);
    drawn.set(box, panel);
  };
  const isCut = (traces, axis) => {
    const top = axis.type === "log" ? 10 ** axis.range[1] : axis.range[1];
    return !view && traces.some((trace) => trace.y.some((y) => y > top));
  };
  const drawKeys = (box, panel, here) => {
    const keys = box.querySelector(".keys");
    const switchedOff = hiddenIn(panel);
    const isFirst = (series) => panel.few.includes(series.name);
    const ordered = [...here.filter(isFirst), ...here.filter((series) => !isFirst(series))];
    const names = new Map(ordered.map((series) => [series.name, series]));
    // Drawn again, the names stay where they were scrolled to, and the key in focus keeps it.
    const focused = keys.contains(document.activeElement) && document.activeElement.textContent;
    const scrolled = keys.scrollTop;
    keys.replaceChildren();
    if (names.size < 2 || panel.kind === "heat" || panel.kind === "events") return;
    for (const [name, series] of names) {
      const key = toggle(name, !switchedOff.has(name), (on) => {
        switchedOff[on ? "delete" : "add"](name);
        draw(box);
      });
      const own = series.colour !== null;
      key.title = "click: on or off; double click: this one alone";
      key.ondblclick = () => {
        for (const other of names.keys()) switchedOff.add(other);
        switchedOff.delete(name);
        draw(box);
      };
      key.style.setProperty("--key", own ? colourOf(series) : look("--soft"));
      key.dataset.dash = dashOf(own ? { ...series, dash: 0 } : series);
      keys.append(key);
      if (name === focused) key.focus({ preventScroll: true });
    }
    keys.scrollTop = scrolled;
    const places = [...new Set(here.map((series) => series.run))];
    if (places.length < 2 || here[0].colour === null) return;
    // The colours are those of the sources here: say which dash is which run.
    for (const place of places) {
      const note = document.createElement("span");
      note.className = "key note";
      note.textContent = data.runs[place].name;
      note.dataset.dash = DASHES[place % DASHES.length];
      note.style.setProperty("--key", look("--soft"));
      keys.append(note);
    }
  };
  const toggle = (text, on, act) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "key";
    button.textContent = text;
    button.setAttribute("aria-pressed", String(on));
    button.onclick = () => act(button.getAttribute("aria-pressed") !== "true");
    return button;
  };
  const listen = (box, plot) => {
    plot.removeAllListeners?.("plotly_relayout");
    plot.on("plotly_relayout", (change) => {
      const [from, to] = [change["xaxis.range[0]"], change["xaxis.range[1]"]];
      if (from === undefined) return;
      view = [from, to];
      // A rectangle also chooses the y range of its own chart; elsewhere y fits what is left.
      const isRectangle = change["yaxis.range[0]"] !== undefined;
      heights.clear();
      if (isRectangle) {
        heights.set(panelOf(box).key, [change["yaxis.range[0]"], change["yaxis.range[1]"]]);
      }
      for (const other of drawn.keys()) if (other !== box || !isRectangle) draw(other);
      showReset();
    });
    plot.on("plotly_doubleclick", resetView);
    plot.on("plotly_hover", (event) => {
      hovered = { box, event };
      follow(box, event);
    });
    plot.on("plotly_unhover", () => {
      hovered = null;
      follow(box, null);
    });
  };
  // The crosshair stands at the same place in every chart on the screen.
  let following = false;
  let hovered = null; // the box under the pointer, and Plotly's event
  const follow = (box, event) => {
    if (following) return;
    following = true;
    for (const [other, panel] of drawn) {
      if (other === box || panel.kind === "heat" || panel.kind === "events") continue;
      const plot = other.querySelector(".plot");
      const { top, bottom } = plot.getBoundingClientRect();
      if (bottom < 0 || top > window.innerHeight) continue;
      if (event && event.xvals) Plotly.Fx.hover(plot, { xval: event.xvals[0], yval: 0 }, ["xy"]);
      else Plotly.Fx.unhover(plot);
    }
    following = false;
  };

  // --- controls
  const controls = document.getElementById("controls");
  const choice = (key, title, options) => {
    const group = document.createElement("fieldset");
    group.innerHTML = `<legend>${title}</legend>`;
    for (const [value, text, off] of options) {
      const option = document.createElement("label");
      option.innerHTML = `<input type="radio" name="${key}" value="${value}"><span>${text}</span>`;
      const input = option.firstChild;
      input.checked = state[key] === value;
      input.disabled = Boolean(off);
      if (off) option.title = off;
      input.onchange = () => set(key, value);
      group.append(option);
    }
    controls.append(group);
  };
  const set = (key, value) => {
    state[key] = value;
    if (key === "x" || key === "xscale") view = null;
    if (key !== "smooth") heights.clear();
    address.set(key, value);
    redraw();
  };
  const redraw = () => {
    showReset();
    for (const box of [...drawn.keys()]) draw(box);
    for (const box of boxes) if (box.classList.contains("empty")) draw(box);
  };
  const resetView = () => {
    view = null;
    heights.clear();
    redraw();
  };
  const reset = document.createElement("button");
  const showReset = () => (reset.hidden = !view);
  const words = () =>
    state.smooth ? `± ${100 * state.smooth}% of the step` : "off";
  const build = () => {
    choice("x", "x axis", Object.entries(AXES).map(([axis, text]) => [axis, text,
      data.runs.some((run) => run.axes[axis]?.length) ? "" : `metrics.jsonl has no ${text}`]));
    choice("xscale", "x scale", [["linear", "linear"], ["log", "log"]]);
    choice("yscale", "y scale", [["auto", "auto"], ["linear", "linear"], ["log", "log"]]);
    const group = document.createElement("fieldset");
    group.className = "smooth";
    group.innerHTML = '<legend>smoothing</legend><label><input type="range" min="0" step="1"'
      + ` max="${WINDOWS.length - 1}" aria-label="smoothing"><output></output></label>`;
    const [slider, output] = group.querySelectorAll("input, output");
    slider.value = WINDOWS.indexOf(state.smooth);
    const say = () => {
      output.textContent = words();
      slider.setAttribute("aria-valuetext", words());
    };
    slider.oninput = () => {
      set("smooth", WINDOWS[slider.value]);
      say();
    };
    say();
    controls.append(group);
    reset.type = "button";
    reset.className = "reset";
    reset.textContent = "reset zoom";
    reset.onclick = resetView;
    controls.append(reset);
    showReset();
    if (data.runs.length > 1) controls.append(chosenRuns.build(data.runs));
  };
  // Charts are drawn when they come near the screen: a page of thirty opens at once.
  const near = new Set();
  const stale = new Set(); // boxes whose chart shows older data
  const watch = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      near[isIntersecting ? "add" : "delete"](target);
      const isDue = stale.has(target)
        || (!drawn.has(target) && !target.classList.contains("empty"));
      if (isIntersecting && isDue) drawFresh(target);
    }
  }, { rootMargin: "600px" });
  const drawFresh = (box) => {
    stale.delete(box);
    draw(box);
  };

  // --- new data: what the reader chose, zoomed and scrolled to stays
  const signature = () => JSON.stringify(data.runs.map((run) =>
    [run.name, ...Object.keys(AXES).map((axis) => Boolean(run.axes[axis]?.length))]));
  let built = "";
  const rebuild = () => {
    if (!boxes.length || built === signature()) return;
    const focused = controls.contains(document.activeElement) && document.activeElement;
    const scrolled = controls.querySelector(".ticks")?.scrollTop;
    controls.replaceChildren();
    build();
    built = signature();
    if (scrolled) controls.querySelector(".ticks")?.scrollTo(0, scrolled);
    if (!focused) return;
    const same = (each) => each.name === focused.name && each.value === focused.value
      && each.type === focused.type && each.className === focused.className;
    [...controls.querySelectorAll("input, button")].find(same)?.focus({ preventScroll: true });
  };
  const refresh = (fresh) => {
    const old = new Map(boxes.map((box) => [panelOf(box).key, box]));
    data = prepared(fresh);
    const template = document.createElement("template");
    template.innerHTML = fresh.live.charts;
    boxes = [...template.content.querySelectorAll("[data-panel]")].map((box) => {
      const known = old.get(panelOf(box).key);
      if (!known) return box;
      known.dataset.panel = box.dataset.panel;
      known.className = box.className;
      const spoken = box.querySelector(".plot").getAttribute("aria-label");
      known.querySelector(".plot").setAttribute("aria-label", spoken);
      return known;
    });
    const place = document.querySelector(".panels");
    // Elements that are moved lose their scroll positions, so they are only where a panel is new.
    if (boxes.some((box, i) => place.children[i] !== box) || place.children.length > boxes.length) {
      place.replaceChildren(...boxes);
    }
    for (const box of old.values()) if (!boxes.includes(box)) forget(box);
    rebuild();
    for (const box of boxes) {
      if (![...old.values()].includes(box)) watch.observe(box);
      else if (near.has(box)) draw(box);
      else if (drawn.has(box) || box.classList.contains("empty")) stale.add(box);
    }
    if (hovered) Plotly.Fx.hover(hovered.box.querySelector(".plot"),
      { xval: hovered.event.xvals?.[0], yval: 0 }, ["xy"]);
  };
  const forget = (box) => {
    watch.unobserve(box);
    Plotly.purge(box.querySelector(".plot"));
    for (const set of [drawn, near, stale]) set.delete(box);
    if (hovered?.box === box) hovered = null;
  };

  rebuild();
  boxes.forEach((box) => watch.observe(box));
  parts.unshift({ init: () => {}, refresh });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  window.addEventListener("beforeprint", () => boxes.forEach(draw));
  for (const part of parts) await part.init(data);
  document.documentElement.dataset.ready = "yes";
})().catch((error) => {
  document.documentElement.dataset.ready = "no";
  document.getElementById("controls")?.append(`The charts could not be drawn: ${error}`);
});
