"use strict";
// Charts of evaluations: score against training, and against size or compute.
(() => {
  const S = window.castalia.scores;
  const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
  const SYMBOLS = ["circle", "diamond", "square", "triangle-up", "x", "star"];
  const isNarrow = () => window.innerWidth < 600;
  const isCoarse = window.matchMedia("(pointer: coarse)").matches;
  const LABELS = 16; // curves that are named at their ends

  // --- how a model is drawn
  const shown = (view) => view.results.models.filter(view.isOn);
  S.colourOf = (view, model) => {
    const { sizes, lineages } = view.results;
    // One size alone has no order to show: there the colour tells the lineages apart.
    if (sizes.length < 2) {
      return S.look(`--c${lineages.findIndex(({ name }) => name === model.lineage) % 8}`);
    }
    return S.onScale(view.places.get(model.size));
  };
  const placeOf = (view, model) => {
    const on = view.results.lineages.filter(({ name }) => view.lineages.has(name));
    return Math.max(0, on.findIndex(({ name }) => name === model.lineage));
  };
  S.dashOf = (view, model) => DASHES[placeOf(view, model) % DASHES.length];
  const symbolOf = (view, model) => SYMBOLS[placeOf(view, model) % SYMBOLS.length];
  // The size says enough where one lineage is looked at and has it in its names.
  const labelOf = (view, curve) => {
    const own = view.results.lineages.filter(({ name, isReference }) =>
      view.lineages.has(name) && !isReference);
    const isEach = !curve.low && curve.model.label.includes(" seed ");
    const { size, model } = curve.model;
    return size && own.length < 2 && !isEach && model.includes(size) ? size : S.nameOf(curve);
  };

  // The curves of a task that are chosen, those of several seeds as one where that is asked for.
  S.chosen = async (view, name) => {
    const metric = view.results.metricFor(name, view.metric);
    const on = new Set(shown(view));
    const curves = (await view.results.curves(name)).filter(({ model, way }) =>
      on.has(model) && S.metricOf(way) === metric && way.shots === view.shots
      && (view.setting === "all" || S.setting(way) === view.setting));
    if (view.seeds === "each") return { metric, curves };
    const groups = new Map();
    for (const curve of curves) {
      const key = `${curve.model.group} ${S.setting(curve.way)}`;
      if (!groups.has(key)) groups.set(key, []);
      groups.get(key).push(curve);
    }
    return { metric, curves: [...groups.values()].map((group) =>
      (group.length > 1 ? S.overSeeds(group) : group[0])) };
  };

  // --- score against training
  // The name of a curve: that of its model, without the seed where it is over several.
  S.nameOf = ({ model, low }) => (low ? model.base : model.label);
  const nameOf = (view, curve) =>
    S.plain(S.nameOf(curve) + (curve.low ? ` (median of ${Math.max(...curve.seeds)} seeds)` : ""));
  // The first step of any curve, for a curve with step 0 alone, and whether a step 0 is drawn at
  // another place: there each line of the hover box says its step, and the place says nothing.
  const zeroOf = (view, curves) => {
    const firsts = curves.map(({ steps }) => steps.find((step) => step > 0) ?? Infinity);
    const first = Math.min(...firsts);
    return { first: first === Infinity ? 1 : first, saysStep: view.axis !== "step"
      || (view.scale === "log" && curves.some(({ steps }) => steps.includes(0))) };
  };
  const pointsOf = (view, curve) => {
    const points = { x: [], y: [], low: [], high: [], step: [] };
    const first = curve.steps.find((step) => step > 0) ?? view.first;
    curve.steps.forEach((step, i) => {
      let x = S.place(curve.model, step, view.axis);
      // On a logarithmic axis step 0 stands at half of the first step.
      if (x === 0 && view.scale === "log") x = S.place(curve.model, first / 2, view.axis);
      const y = curve.values[i];
      if (x === null || x === undefined || Number.isNaN(x)) return;
      if (view.isLogY && y <= 0) return;
      points.x.push(x);
      points.y.push(y);
      points.step.push(step);
      const error = curve.errors?.[i] ?? 0;
      points.low.push(curve.low ? curve.low[i] : y - error);
      points.high.push(curve.high ? curve.high[i] : y + error);
    });
    return points;
  };
  const bandOf = (points, colour, floor) => ({
    x: [...points.x, ...points.x.toReversed()],
    y: [...points.high, ...points.low.map((y) => (floor ? Math.max(y, floor) : y)).toReversed()],
    mode: "lines",
    line: { width: 0 },
    fill: "toself",
    fillcolor: S.faded(colour, 0.16),
    hoverinfo: "skip",
  });
  const lineOf = (view, curve, points, metric) => {
    const colour = S.colourOf(view, curve.model);
    const isShort = points.x.length <= 60;
    const spread = points.y.map((y, i) => (points.high[i] - points.low[i]) / 2);
    return {
      x: points.x,
      y: points.y,
      customdata: points.step.map((step, i) => [S.whole(step),
        spread[i] ? ` ± ${spread[i].toPrecision(2)}` : ""]),
      mode: isShort ? "lines+markers" : "lines",
      line: { color: colour, width: 2, dash: S.dashOf(view, curve.model) },
      marker: { size: points.x.length === 1 ? 8 : 4.5, symbol: symbolOf(view, curve.model),
        color: colour },
      hovertemplate: `${nameOf(view, curve)} <b>%{y:${S.isShare(metric) ? ".4f" : ".5~g"}}</b>`
        + `%{customdata[1]}${view.saysStep ? " · step %{customdata[0]}" : ""}`
        + "<extra></extra>",
    };
  };
  const references = (view, curves, range) =>
    curves.map((curve) => ({
      x: range,
      y: [curve.values.at(-1), curve.values.at(-1)],
      mode: "lines",
      line: { color: S.colourOf(view, curve.model), width: 1, dash: S.dashOf(view, curve.model) },
      opacity: 0.8,
      hoverinfo: "skip",
    }));
  // A long name keeps its beginning and its end, which tell models apart.
  const FONT = "system-ui, sans-serif";
  const pen = document.createElement("canvas").getContext("2d");
  const widthOf = (text) => {
    pen.font = `11px ${FONT}`;
    return pen.measureText(text).width;
  };
  const shortened = (text, width) => {
    let shown = text;
    for (let kept = Math.min(text.length, 80) - 1; widthOf(shown) > width && kept > 1; kept--) {
      shown = `${text.slice(0, Math.ceil(kept / 2))}…${text.slice(-Math.floor(kept / 2))}`;
    }
    return shown;
  };
  // Names at the ends of the curves, moved apart where they would lie over each other.
  const endLabels = (view, drawn, { height, width, range, across }) => {
    if (drawn.length > LABELS || drawn.length < 2) return [];
    const span = range[1] - range[0] || 1;
    const pixels = (y) => (height * ((view.isLogY ? Math.log10(y) : y) - range[0])) / span;
    const ends = drawn.map(({ curve, points }) => ({ curve, x: points.x.at(-1), y: points.y.at(-1),
      at: pixels(points.y.at(-1)) })).sort((a, b) => a.at - b.at);
    const gap = 12;
    ends.forEach((end, i) => {
      end.to = i ? Math.max(end.at, ends[i - 1].to + gap) : end.at;
    });
    // What was pushed over the top goes back down, and what lies below it too.
    ends.at(-1).to = Math.min(ends.at(-1).to, height);
    for (let i = ends.length - 2; i >= 0; i--) {
      ends[i].to = Math.min(ends[i].to, ends[i + 1].to - gap);
    }
    // Where the curves end at different places, each has its name beside its own end.
    const own = (x) => (view.scale === "log" ? Math.log10(x) : x);
    const lasts = drawn.map(({ points }) => own(points.x.at(-1)));
    const isApart = Math.max(...lasts) - Math.min(...lasts) > 0.02 * (across[1] - across[0]);
    return ends.map(({ curve, x, y, at, to }) => ({
      x: isApart ? own(x) : 1, xref: isApart ? "x" : "paper", xshift: isApart ? 4 : 0,
      xanchor: "left", y: view.isLogY ? Math.log10(y) : y, yshift: to - at,
      name: shortened(labelOf(view, curve), width), showarrow: false,
      font: { size: 11, color: S.colourOf(view, curve.model) },
    })).map((label) => ({ ...label, text: S.plain(label.name) }));
  };
  const yRange = (view, ys, metric) => {
    const values = view.isLogY ? ys.filter((y) => y > 0).map(Math.log10) : ys;
    const low = Math.min(...values);
    const high = Math.max(...values);
    const margin = 0.05 * (high - low) || 0.05 * Math.abs(high) || 0.1;
    const floor = S.isShare(metric) && low >= 0 ? -0.015 : -Infinity;
    return [Math.max(low - margin, floor), high + margin];
  };
  const base = (view, height) => ({
    height,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: S.look("--soft"), size: 12, family: FONT },
    hoverlabel: { bgcolor: S.look("--card"), bordercolor: S.look("--edge"), align: "left",
      namelength: -1, font: { color: S.look("--ink"), size: 12 } },
    showlegend: false,
    modebar: { bgcolor: "rgba(0,0,0,0)", color: S.look("--soft"), activecolor: S.look("--ink") },
    dragmode: isCoarse ? false : "zoom",
  });
  const axisLook = () => ({ gridcolor: S.look("--grid"), linecolor: S.look("--edge"),
    zeroline: false });
  const CONFIG = () => ({ responsive: true, displaylogo: false,
    displayModeBar: isCoarse ? true : "hover",
    modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]],
    toImageButtonOptions: { scale: 2 } });
  // Where no config says how many FLOPs a token takes, 6 for each parameter.
  const flopsTitle = (models) =>
    `training FLOPs${models.every(({ counted }) => counted) ? "" : " (6·N·D)"}`;
  // Powers of ten; of a short range 2 and 5, too.
  const tickOf = (decades) => (decades < 1.5 ? "D2" : Math.max(1, Math.round(decades / 6)));
  const hoverTitle = (view) => {
    if (view.axis !== "step") return "%{x}";
    return view.saysStep ? " " : "step %{x:,}";
  };
  const xLayout = (view, xs, models) => {
    const last = Math.max(...xs);
    const first = Math.min(...xs.filter((x) => x > 0));
    const range = view.scale === "log" ? [Math.log10(first / 1.4), Math.log10(last * 1.15)]
      : [-0.015 * (last || 1), (last || 1) * 1.015];
    const decades = range[1] - range[0];
    return { ...axisLook(), type: view.scale, range, nticks: isNarrow() ? 5 : 8,
      title: { text: view.axis === "flops" ? flopsTitle(models) : S.AXES[view.axis], standoff: 6 },
      tickformat: { step: last >= 1e5 ? ".4~s" : ",", percent: ".3~g", tokens: ".3~s",
        flops: ".1~e" }[view.axis],
      ticksuffix: view.axis === "percent" ? "%" : "",
      dtick: view.scale === "log" ? tickOf(decades) : undefined,
      hoverformat: { step: ",.0f", percent: ".3~g", tokens: ".4~s", flops: ".3~e" }[view.axis],
      unifiedhovertitle: { text: hoverTitle(view) },
      showspikes: true, spikemode: "across", spikethickness: 1, spikedash: "solid",
      spikecolor: S.look("--soft") };
  };

  const empty = (plot, text) => {
    Plotly.purge(plot);
    plot.replaceChildren(text);
  };
  const react = (plot, traces, layout) => {
    if (!plot.classList.contains("js-plotly-plot")) plot.replaceChildren();
    return Plotly.react(plot, traces, layout, CONFIG());
  };
  const spoken = (plot, title, curves) => {
    const said = curves.slice(0, 12).map((curve) =>
      `${S.nameOf(curve)}: ${curve.values.at(-1)} at the end`);
    plot.setAttribute("aria-label", `${title}. ${said.join("; ")}`);
  };

  // Draws score against training into a box; returns how many curves there are.
  S.drawCurves = async (view, name, plot, height) => {
    const { metric, curves } = await S.chosen(view, name);
    const here = curves.filter((curve) => !(curve.steps.length === 1
      && curve.steps[0] === S.NO_STEP));
    const own = { ...view, ...zeroOf(view, here), isLogY: view.yscale === "log"
      || (view.yscale === "auto" && S.isLog(metric)) };
    const drawn = here.map((curve) => ({ curve, points: pointsOf(own, curve) }))
      .filter(({ points }) => points.x.length);
    if (!drawn.length) {
      empty(plot, curves.length ? `${S.AXES[view.axis]}: not recorded for these models.`
        : "None of the chosen models has this task with these settings.");
      return { metric, count: 0 };
    }
    // Small models first: what is drawn last lies on top.
    drawn.sort((a, b) => a.curve.model.order - b.curve.model.order);
    const traces = [];
    const xaxis = xLayout(own, drawn.flatMap(({ points }) => points.x),
      drawn.map(({ curve }) => curve.model));
    const lines = curves.filter((curve) => view.references && !here.includes(curve));
    const range = yRange(own, [...drawn.flatMap(({ points }) => points.y),
      ...lines.map((curve) => curve.values.at(-1))], metric);
    for (const { curve, points } of drawn) {
      const hasBand = curve.low || (view.bands && curve.errors);
      if (hasBand && points.x.length > 1) {
        traces.push(bandOf(points, S.colourOf(view, curve.model),
          own.isLogY ? 10 ** range[0] : 0));
      }
    }
    const ends = xaxis.range.map((x) => (view.scale === "log" ? 10 ** x : x));
    traces.push(...references(own, lines, ends));
    for (const { curve, points } of drawn) traces.push(lineOf(own, curve, points, metric));
    // Names take a third of the chart at the most.
    const labels = endLabels(own, drawn, { height: height - (isCoarse ? 72 : 50), range,
      across: xaxis.range, width: Math.min(190, (plot.clientWidth || window.innerWidth) / 3) });
    const widest = Math.max(0, ...labels.map((label) => widthOf(label.name)));
    await react(plot, traces, {
      ...base(own, height),
      margin: { l: 48, r: labels.length ? 14 + widest : 14,
        t: isCoarse ? 30 : 8, b: 42 },
      xaxis,
      yaxis: { ...axisLook(), type: own.isLogY ? "log" : "linear", range, nticks: 7,
        automargin: true, tickformat: own.isLogY ? ".3~s" : ".4~g",
        dtick: own.isLogY && range[1] - range[0] > 1.5
          ? Math.ceil((range[1] - range[0]) / 6) : undefined },
      annotations: labels,
      hovermode: drawn.length > 24 ? "closest" : "x unified",
      hoverdistance: 40,
    });
    spoken(plot, `${name}, ${metric}, by ${S.AXES[view.axis]}`, drawn.map(({ curve }) => curve));
    return { metric, count: drawn.length };
  };

  // --- score against size or compute
  const scalePoints = (view, curves) =>
    curves.map((curve) => {
      const found = S.at(curve, curve.steps.at(-1) === S.NO_STEP ? null : view.at);
      if (!found) return null;
      const x = view.against === "flops" ? S.place(curve.model, found.step, "flops")
        : curve.model.parameters || curve.model.order;
      if (!x) return null;
      const place = curve.steps.indexOf(found.step);
      const spread = curve.low ? [found.value - curve.low[place], curve.high[place] - found.value]
        : [found.error ?? 0, found.error ?? 0];
      return { ...found, x, curve, spread };
    }).filter(Boolean);
  // A line through the scores of a lineage against the logarithm of its size or compute.
  const fitOf = (points, isLogY) => {
    const xs = points.map(({ x }) => Math.log10(x));
    const ys = points.map(({ value }) => (isLogY ? Math.log10(value) : value));
    return S.line(xs, ys);
  };
  const fitTraces = (view, fit, points, isLogY) => {
    const logs = points.map(({ x }) => Math.log10(x));
    const [from, to] = [Math.min(...logs), Math.max(...logs)];
    const grid = Array.from({ length: 41 }, (_, i) => from + ((to - from) * i) / 40);
    const back = (y) => (isLogY ? 10 ** y : y);
    const xs = grid.map((x) => 10 ** x);
    const colour = S.look("--soft");
    const band = { x: xs, low: grid.map((x) => back(fit.at(x) - fit.error(x))),
      high: grid.map((x) => back(fit.at(x) + fit.error(x))) };
    return [{ ...bandOf(band, colour), fillcolor: S.faded(colour, 0.1) },
      { x: xs, y: grid.map((x) => back(fit.at(x))), mode: "lines", hoverinfo: "skip",
        line: { color: colour, width: 1.5, dash: S.dashOf(view, points[0].curve.model) } }];
  };
  // 1B where SI would say 1G.
  const sizeTicks = (points) => {
    const logs = points.map(({ x }) => Math.log10(x));
    const [low, high] = [Math.min(...logs), Math.max(...logs)];
    const marks = high - low > 2.5 ? [1, 3] : [1, 2, 5];
    const tickvals = [];
    for (let power = Math.floor(low) - 1; power <= high + 1; power++) {
      tickvals.push(...marks.map((mark) => mark * 10 ** power));
    }
    const text = (value) => {
      const [size, unit] = [[1e9, "B"], [1e6, "M"], [1e3, "k"], [1, ""]]
        .find(([each]) => value >= each) ?? [1, ""];
      return `${+(value / size).toPrecision(3)}${unit}`;
    };
    return { tickvals, ticktext: tickvals.map(text) };
  };
  const saidFit = (view, lineage, fit, metric, isLogY) => {
    const axis = view.against === "flops" ? "C" : "N";
    const number = (value) => String(Number(value.toPrecision(3))).replace("-", "−");
    const what = isLogY ? `log₁₀ ${metric}` : metric;
    return `${lineage}: ${what} = ${number(fit.start)} ${fit.slope < 0 ? "−" : "+"} `
      + `${number(Math.abs(fit.slope))} log₁₀ ${axis}, residual s.d. ${number(fit.sd)},`
      + ` ${fit.n} models`;
  };

  // Draws score against size into a box; returns the fits in words.
  S.drawScale = async (view, name, plot, height) => {
    const { metric, curves } = await S.chosen(view, name);
    const isLogY = view.yscale === "log" || (view.yscale === "auto" && S.isLog(metric));
    const points = scalePoints(view, curves).filter(({ value }) => !isLogY || value > 0);
    if (!points.length) {
      empty(plot, "None of the chosen models has a size and a score at this step.");
      return { metric, fits: [] };
    }
    const traces = [];
    const fits = [];
    for (const { name: lineage } of view.results.lineages) {
      const own = points.filter(({ curve }) => curve.model.lineage === lineage);
      const fit = own.length ? fitOf(own, isLogY) : null;
      if (!fit) continue;
      traces.push(...fitTraces(view, fit, own, isLogY));
      fits.push(saidFit(view, lineage, fit, metric, isLogY));
    }
    traces.push({
      x: points.map(({ x }) => x),
      y: points.map(({ value }) => value),
      error_y: { type: "data", symmetric: false, array: points.map(({ spread }) => spread[1]),
        arrayminus: points.map(({ spread }) => spread[0]), width: 0, thickness: 1,
        color: S.look("--soft"), visible: view.bands },
      customdata: points.map(({ curve, step }) => [nameOf(view, curve),
        step === S.NO_STEP ? "final, published" : `step ${S.whole(step)}`]),
      mode: "markers",
      marker: { size: 9, symbol: points.map(({ curve }) => symbolOf(view, curve.model)),
        color: points.map(({ curve }) => S.colourOf(view, curve.model)),
        line: { width: 1, color: S.look("--card") } },
      hovertemplate: "%{customdata[0]} <b>%{y:.4~g}</b><br>%{customdata[1]} · "
        + `${view.against === "flops" ? "%{x:.2~e} FLOPs" : "%{x:.3~s} parameters"}`
        + "<extra></extra>",
    });
    await react(plot, traces, {
      ...base(view, height),
      margin: { l: 48, r: 14, t: isCoarse ? 30 : 8, b: 42 },
      xaxis: { ...axisLook(), type: "log", nticks: 6,
        title: { standoff: 6, text: view.against === "flops"
          ? flopsTitle(points.map(({ curve }) => curve.model)) : "parameters" },
        ...(view.against === "flops" ? { tickformat: ".1~e" } : sizeTicks(points)) },
      yaxis: { ...axisLook(), type: isLogY ? "log" : "linear", nticks: 7, automargin: true,
        tickformat: isLogY ? ".3~s" : ".4~g" },
      hovermode: "closest",
    });
    spoken(plot, `${name}, ${metric}, by ${view.against}`, points.map(({ curve }) => curve));
    return { metric, fits };
  };
})();
