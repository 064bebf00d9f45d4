"use strict";
// The part of a page about evaluations: what the reader chose, the controls, and what they redraw.
(() => {
  const S = window.castalia.scores;
  const { make } = S;
  const { radios, radiosOf, switches, select, toggles } =
    S.controls(() => view, (changes) => set(changes));
  const HEADLINES = ["lambada_openai", "lambada_standard", "bits per byte by source"];
  const FEW = 8; // models that are all drawn at first
  let view = null;
  let parts = {};
  let drawing = 0; // the number of the newest redraw; an older one that still unpacks stops

  // --- what the reader chose: in the address, so that a view can be passed on
  const KEYS = ["tasks", "metric", "shots", "setting", "axis", "scale", "yvalues", "off", "small",
    "seeds", "bands", "references", "against", "at", "columns", "sort", "a", "b", "pairs",
    "anyway"];
  const defaults = (results) => {
    // On a page about runs, a task that they have.
    const best = Math.max(...results.tasks.map(({ own }) => own));
    const tasks = results.tasks.filter(({ own }) => own === best);
    const most = Math.max(...tasks.map(({ models }) => models));
    const task = HEADLINES.find((name) => tasks.some((each) => each.name === name))
      ?? tasks.find(({ models }) => models === most).name;
    const metric = results.metricFor(task, null);
    return { tasks: [task], metric, shots: results.shots([task])[0], setting: "all",
      axis: "step", scale: "log", yvalues: "auto", seeds: results.hasSeeds ? "median" : "each",
      bands: true, references: false, against: "parameters", at: null, columns: "all",
      sort: ["model", "up"], a: null, b: null, pairs: null, anyway: false };
  };
  // The first view has the runs of the page; of many models without a run those of the lineage with
  // the most numbers. It has what is published, too.
  const firstLineages = (results) => {
    const own = results.lineages.filter(({ isReference }) => !isReference);
    const count = own.reduce((sum, { models }) => sum + models.length, 0);
    const runs = own.filter(({ models }) => models.some((model) => model.own));
    const first = runs.length ? runs : own.slice(0, 1);
    const isFirst = (lineage) => count <= FEW || lineage.isReference || first.includes(lineage);
    return new Set(results.lineages.filter(isFirst).map(({ name }) => name));
  };
  // Names of tasks and models may have any character.
  const textOf = (names) => names.map((name) => name.replace(/[%|]/g, encodeURIComponent)).join("|");
  const listOf = (text) => text.split("|").filter(Boolean).map((name) =>
    name.replace(/%25|%7C/g, decodeURIComponent));
  const READ = { shots: (text) => (text === "" ? null : Number(text)),
    at: (text) => (text === "last" ? null : Number(text)), bands: (text) => text === "true",
    references: (text) => text === "true", anyway: (text) => text === "true",
    tasks: (text) => listOf(text), sort: (text) => listOf(text) };
  const readView = (results) => {
    const chosen = { ...defaults(results), results, lineages: firstLineages(results),
      offSizes: new Set() };
    const address = new URLSearchParams(location.hash.slice(1));
    for (const key of KEYS) {
      if (address.has(key)) chosen[key] = (READ[key] ?? String)(address.get(key));
    }
    const named = (key) => new Set(listOf(address.get(key) ?? ""));
    const off = named("off");
    if (address.has("off")) {
      chosen.lineages = new Set(results.lineages.map(({ name }) => name)
        .filter((name) => !off.has(name)));
    }
    chosen.offSizes = named("small");
    chosen.tasks = chosen.tasks.filter((name) => results.has(name)).slice(0, S.MOST);
    if (!chosen.tasks.length) chosen.tasks = defaults(results).tasks;
    if (!(chosen.axis in S.AXES)) chosen.axis = "step";
    chosen.yscale = chosen.yvalues;
    chosen.isOn = ({ lineage, size }) => chosen.lineages.has(lineage)
      && !chosen.offSizes.has(size);
    return chosen;
  };
  const write = () => {
    const address = new URLSearchParams(location.hash.slice(1));
    for (const key of KEYS) {
      const value = view[key];
      if (Array.isArray(value)) address.set(key, textOf(value));
      else if (key === "at") address.set(key, value ?? "last");
      else if (value !== null && value !== undefined) address.set(key, value);
      else address.delete(key);
    }
    const off = view.results.lineages.map(({ name }) => name)
      .filter((name) => !view.lineages.has(name));
    address.set("off", textOf(off));
    address.set("small", textOf([...view.offSizes]));
    for (const [key, value] of [...address]) if (value === "") address.delete(key);
    if (!off.length) address.set("off", "");
    history.replaceState(null, "", `#${address}`);
  };
  const set = (changes) => {
    Object.assign(view, changes);
    view.yscale = view.yvalues;
    view.places = S.placesOfSizes(view.results, view.lineages);
    const metrics = view.results.metrics(view.tasks);
    if (!metrics.includes(view.metric)) [view.metric] = metrics;
    const shots = view.results.shots(view.tasks);
    if (!shots.includes(view.shots)) [view.shots] = shots;
    write();
    showControls();
    return redraw();
  };

  // --- controls
  const lineageToggles = () => {
    const { lineages, sizes } = view.results;
    return toggles("models", lineages.map(({ name }) => name),
      (name) => view.lineages.has(name),
      (name) => {
        const { models } = lineages.find((lineage) => lineage.name === name);
        const colour = sizes.length > 1 ? S.look("--soft") : S.colourOf(view, models[0]);
        return [colour, view.lineages.has(name) ? S.dashOf(view, models[0]) : "solid"];
      },
      (name, on) => {
        view.lineages[on ? "add" : "delete"](name);
        // In the order of the page, which dashes and symbols follow.
        view.lineages = new Set(lineages.map((each) => each.name)
          .filter((each) => view.lineages.has(each)));
        set({});
      });
  };
  const sizeToggles = () => {
    const { sizes, models, lineages } = view.results;
    // Not those of the published finals, which are many and stand alone in a chart.
    const own = lineages.filter(({ isReference }) => !isReference);
    const rows = (own.length ? own : lineages).filter(({ name }) => view.lineages.has(name));
    const used = sizes.filter((size) => models.some((model) => model.size === size
      && rows.some(({ name }) => name === model.lineage)));
    return toggles("sizes", used, (size) => !view.offSizes.has(size),
      (size) => [S.onScale(view.places.get(size)), null],
      (size, on) => {
        view.offSizes[on ? "delete" : "add"](size);
        set({});
      });
  };
  const stepsOf = () => {
    const { models, steps } = view.results;
    const all = new Set(steps.flat().filter((step) => step !== S.NO_STEP));
    return models.length ? [...all].sort((a, b) => a - b) : [];
  };
  const stepSlider = () => {
    const steps = stepsOf();
    const group = make("fieldset", { className: "smooth" }, make("legend", {}, "step"));
    const input = make("input", { type: "range", min: 0, max: steps.length, step: 1,
      ariaLabel: "step of the values" });
    const output = make("output");
    const value = () => (Number(input.value) === steps.length ? null : steps[input.value]);
    const say = () => {
      output.textContent = value() === null ? "each model’s last" : S.whole(value());
      input.setAttribute("aria-valuetext", output.textContent);
    };
    input.value = view.at === null ? steps.length : Math.max(0, steps.indexOf(view.at));
    input.oninput = say;
    input.onchange = () => set({ at: value() });
    say();
    group.append(make("label", {}, input, output));
    return group;
  };

  const showControls = () => {
    const focus = focused();
    const { results } = view;
    const some = (list) => list.length > 1;
    const metrics = results.metrics(view.tasks);
    const shots = results.shots(view.tasks);
    const settings = [...new Set(results.ways.map(S.setting))];
    parts.what.replaceChildren(...[
      some(metrics) && select("metric", "metric", metrics.map((each) => [each, each]),
        (metric) => set({ metric })),
      some(shots) && radios("shots", "shots", shots.map((each) => [each, each ?? "unknown"]),
        (each) => set({ shots: each })),
      some(settings) && select("setting", "evaluated with",
        [["all", "everything"], ...settings.map((each) => [each, each])],
        (setting) => set({ setting })),
    ].filter(Boolean));
    parts.choices.replaceChildren(...[
      radios("axis", "x axis", Object.entries(S.AXES), (axis) =>
        set({ axis, scale: axis === "percent" ? "linear" : view.scale })),
      radios("scale", "x scale", [["linear", "linear"], ["log", "log"]],
        (scale) => set({ scale })),
      radios("yvalues", "y scale", [["auto", "auto"], ["linear", "linear"], ["log", "log"]],
        (yvalues) => set({ yvalues })),
      results.hasSeeds && radios("seeds", "seeds", [["median", "median, quartiles"],
        ["each", "each"]], (seeds) => set({ seeds })),
      make("fieldset", { className: "switches" }, switches("bands", "± s.e."),
        ...(parts.hasReference ? [switches("references", "published as lines")] : [])),
    ].filter(Boolean));
    parts.toggles.replaceChildren(lineageToggles(),
      ...(results.sizes.length > 1 ? [sizeToggles()] : []));
    showScaleControls();
    showCompareControls();
    parts.tasks.show();
    focus();
  };
  // Controls are made anew at each choice: what had the focus has it again.
  const focused = () => {
    const active = document.activeElement;
    if (!active || !parts.root.contains(active)) return () => {};
    const { name, value, dataset } = active;
    return () => {
      if (document.activeElement !== document.body) return;
      const radio = name && `input[name="${CSS.escape(name)}"]:checked`;
      const key = dataset.key && `[data-key="${CSS.escape(dataset.key)}"]`;
      const toggle = dataset.name !== undefined && `[data-name="${CSS.escape(dataset.name)}"]`;
      const range = active.type === "range" && "input[type=range]";
      const selector = radio || key || toggle || range;
      if (selector) parts.root.querySelector(selector)?.focus();
      else if (value !== undefined && active.matches(".chip")) parts.tasks.focus();
    };
  };
  const showScaleControls = () => {
    parts.scaleControls.replaceChildren(
      radios("against", "against", [["parameters", "parameters"], ["flops", "training FLOPs"]],
        (against) => set({ against })), stepSlider());
    parts.tableControls.replaceChildren(
      radios("columns", "columns", [["all", "all tasks"], ["chosen", "the chosen tasks"]],
        (columns) => set({ columns })));
  };
  const showCompareControls = () => {
    const entries = S.entries(view.results);
    const [first, second] = firstPair(entries);
    const choose = (key, title, chosen) => {
      const box = select(key, title, [], (value) => set({ [key]: value }));
      const list = box.querySelector("select");
      for (const kind of new Set(entries.map((entry) => entry.kind))) {
        const group = make("optgroup", { label: kind });
        for (const entry of entries) {
          if (entry.kind === kind) group.append(new Option(entry.label, entry.key));
        }
        list.append(group);
      }
      list.value = chosen?.key ?? "";
      return box;
    };
    parts.compareControls.replaceChildren(choose("a", "A", first), choose("b", "B", second),
      radiosOf("pairs", "tasks", S.pairedTasks(view, first, second),
        [["all", "all"], ["chosen", "the chosen"]]),
      switches("anyway", "compare across conditions"));
    parts.compare.hidden = entries.length < 2;
  };
  // The two that were chosen, else the first two lineages, else the two largest models.
  const firstPair = (entries) => {
    const find = (key) => entries.find((entry) => entry.key === key);
    const isReference = ({ models }) => models.every(({ last }) => last === null);
    const rank = (entry) => (isReference(entry) ? 2 : Number(!view.lineages.has(entry.key)));
    const several = entries.filter(({ models }) => models.length > 1)
      .toSorted((x, y) => rank(x) - rank(y));
    const alone = entries.filter(({ models }) => models.length === 1)
      .toSorted((x, y) => y.models[0].order - x.models[0].order);
    const [one, other] = several.length > 1 ? several : alone;
    const a = find(view.a) ?? one;
    return [a, find(view.b) ?? [other, one].find((entry) => entry !== a)];
  };

  // --- drawing
  const panelOf = (name, kind) => {
    const task = view.results.task.get(name);
    const unit = make("span", { className: "unit" });
    return { name, kind, unit, note: make("p", { className: "fit" }),
      plot: make("div", { className: "plot", role: "img" }),
      title: make("h3", {}, name, unit),
      about: task.of ? `mean of ${task.of} tasks` : task.group ?? "" };
  };
  const boxOf = (panel, isWide) => make("figure",
    { className: `panel${isWide ? " spread" : ""}` },
    make("figcaption", {}, panel.title), panel.note, panel.plot);
  const layPanels = (grid, kind) => {
    const key = `${kind} ${view.tasks.join("|")}`;
    if (grid.dataset.key === key) return parts[kind];
    grid.dataset.key = key;
    const panels = view.tasks.map((name) => panelOf(name, kind));
    const isAlone = panels.length === 1;
    grid.replaceChildren(...panels.map((panel) => boxOf(panel, isAlone)));
    grid.classList.toggle("many", panels.length === 3 || panels.length > 4);
    parts[kind] = panels;
    return panels;
  };
  const heightOf = (count) => {
    if (window.innerWidth < 600) return 280;
    if (count === 1) return 400;
    return count > 4 ? 240 : 290;
  };
  const DRAW = {
    curves: async (isStale) => {
      const panels = layPanels(parts.curveGrid, "curves");
      for (const panel of panels) {
        const drawn = await S.drawCurves(view, panel.name, panel.plot, heightOf(panels.length));
        if (isStale()) return;
        panel.unit.textContent = ` ${drawn.metric}`;
      }
    },
    scales: async (isStale) => {
      const panels = layPanels(parts.scaleGrid, "scales");
      for (const panel of panels) {
        const drawn = await S.drawScale(view, panel.name, panel.plot, heightOf(panels.length));
        if (isStale()) return;
        panel.unit.textContent = ` ${drawn.metric}`;
        panel.note.replaceChildren(...drawn.fits.map((fit) => make("span", {}, fit)));
      }
    },
    values: () => S.drawTable(view, parts.values, (name, way) => set({ sort: [name, way] })),
    pairs: () => (parts.compare.hidden ? null
      : S.drawComparison(view, parts.comparison, ...firstPair(S.entries(view.results)))),
  };
  // A part is drawn when it comes near the screen: a table of all tasks unpacks all of them.
  const near = new Set();
  const watch = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      near[isIntersecting ? "add" : "delete"](target.dataset.part);
      if (isIntersecting && view) drawPart(target.dataset.part);
    }
  }, { rootMargin: "500px" });
  const done = {}; // part -> the redraw that it has seen
  const drawPart = async (part) => {
    if (done[part] === drawing) return;
    const turn = drawing;
    done[part] = turn;
    await DRAW[part](() => turn !== drawing);
    parts.root.dataset[part] = String(turn);
  };
  const redraw = async () => {
    drawing++;
    parts.root.dataset.turn = String(drawing);
    await drawPart("curves");
    await Promise.all([...near].map(drawPart));
  };

  const section = (part, title, about, ...children) => {
    const box = make("section", {}, make("h2", {}, title),
      make("p", { className: "about" }, about), ...children);
    box.dataset.part = part;
    return box;
  };
  // On a phone the axes and models are folded, else a screen of controls stands over the chart.
  const moreButton = (root) => {
    const button = make("button", { type: "button", className: "more" }, "axes, models and sizes");
    const show = (on) => {
      root.classList.toggle("folded", !on);
      button.setAttribute("aria-expanded", String(on));
    };
    button.onclick = () => show(root.classList.contains("folded"));
    show(false);
    return button;
  };
  const build = (root) => {
    parts = { root };
    parts.tasks = S.taskSearch(() => view, (tasks) => set({ tasks }));
    parts.what = make("div", { className: "score-choices" });
    parts.choices = make("div", { className: "score-choices" });
    parts.toggles = make("div", { className: "toggles" });
    parts.curveGrid = make("div", { className: "panels" });
    parts.scaleGrid = make("div", { className: "panels" });
    parts.scaleControls = make("div", { className: "score-choices" });
    parts.tableControls = make("div", { className: "score-choices" });
    parts.compareControls = make("div", { className: "score-choices" });
    parts.values = make("div");
    parts.comparison = make("div");
    parts.compare = section("pairs", "Two compared", "Differences of two models, or of two"
      + " suites size by size, at the chosen step.", parts.compareControls, parts.comparison);
    root.replaceChildren(
      make("h2", {}, "Evaluations"),
      make("p", { className: "about", id: "scores-about" }),
      make("div", { className: "controls" },
        make("div", { className: "asked" }, parts.tasks.element, parts.what, moreButton(root)),
        parts.choices),
      parts.toggles,
      parts.curveGrid,
      section("scales", "Score against size", "Lines are least squares of the score on the"
        + " logarithm of the size or compute; the band is ± one standard error of a new model.",
      parts.scaleControls, parts.scaleGrid),
      section("values", "Values", "At the chosen step. A name of a column sorts by it.",
        parts.tableControls, parts.values),
      parts.compare);
    root.querySelectorAll("[data-part]").forEach((each) => watch.observe(each));
    window.addEventListener("beforeprint", () => Object.keys(DRAW).forEach(drawPart));
  };
  const start = (results) => {
    view = readView(results);
    parts.hasReference = results.lineages.some(({ isReference }) => isReference);
    document.getElementById("scores-about").textContent = results.about;
    set({});
  };

  const part = {
    async init(data) {
      const root = document.getElementById("scores");
      if (!root || !data.scores) return;
      build(root);
      start(new S.Results(data.scores));
      const again = () => {
        showControls();
        redraw();
      };
      window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
      let width = window.innerWidth;
      window.addEventListener("resize", () => {
        // A phone resizes when its address bar goes; the charts depend on the width alone.
        if (window.innerWidth === width) return;
        width = window.innerWidth;
        redraw();
      });
    },
    // New results of the same stores: what the reader chose stays.
    refresh(data) {
      if (!data.scores) return;
      if (!view) {
        part.init(data);
        return;
      }
      // A run that trains changes the page every second, its results rarely.
      if (data.scores.version === view.results.version) return;
      start(new S.Results(data.scores));
    },
  };
  S.part = part;
  window.castalia.parts.push(part);
})();
