"use strict";
// Tables of evaluations: the values of every model, and two of them compared.
(() => {
  const S = window.castalia.scores;
  const { make } = S;
  const CRITICAL = 1.96; // a two-sided test at 5% of a normal variable

  // The tasks of the tables: the chosen ones, or all, where a mean stands for its group.
  S.tableTasks = (view, columns) => {
    if (columns === "chosen") return view.tasks;
    const rest = view.results.tasks.filter(({ name, group }) =>
      !group && !view.tasks.includes(name)).toSorted((a, b) => (a.of > 0) - (b.of > 0));
    return [...view.tasks, ...rest.map(({ name }) => name)];
  };
  // The seeds of a model are one row, also where a task was measured on some of them.
  const keyOf = (view, { model, way }) =>
    `${view.seeds === "each" ? `${model.lineage} ${model.label}` : model.group} ${S.setting(way)}`;

  // --- values
  const valueRows = async (view) => {
    const rows = new Map();
    const columns = [];
    for (const name of S.tableTasks(view, view.columns)) {
      const { metric, curves } = await S.chosen(view, name);
      if (!curves.length) continue;
      columns.push({ name, metric });
      for (const curve of curves) {
        const found = S.at(curve, curve.steps.at(-1) === S.NO_STEP ? null : view.at);
        if (!found) continue;
        const key = keyOf(view, curve);
        if (!rows.has(key)) rows.set(key, { curve, cells: new Map(), steps: new Set() });
        if (curve.low) rows.get(key).curve = curve;
        rows.get(key).cells.set(name, { ...found, metric,
          seeds: curve.seeds?.[curve.steps.indexOf(found.step)] });
        rows.get(key).steps.add(found.step);
      }
    }
    return { columns, rows: [...rows.values()] };
  };
  const sorted = (view, rows) => {
    const [name, way] = view.sort;
    const sign = way === "down" ? -1 : 1;
    const value = (row) => (name === "model" ? null : row.cells.get(name)?.value ?? null);
    const lineages = view.results.lineages.map((lineage) => lineage.name);
    const place = ({ curve }) => lineages.indexOf(curve.model.lineage);
    return rows.toSorted((a, b) => {
      if (name === "model") {
        return sign * (place(a) - place(b) || a.curve.model.order - b.curve.model.order
          || a.curve.model.label.localeCompare(b.curve.model.label));
      }
      const [one, other] = [value(a), value(b)];
      // A model without the number is last in both directions.
      if (one === null || other === null) return (one === null) - (other === null);
      return sign * (one - other);
    });
  };
  // Long names break after their parts.
  const breakable = (text) =>
    text.split(/(?<=[_/-])/).flatMap((part) => [part, document.createElement("wbr")]);
  const headCell = (view, name, text, small, act) => {
    const [by, way] = view.sort;
    const cell = make("th", { scope: "col" });
    const button = make("button", { type: "button", className: "sort" }, ...breakable(text));
    if (small) button.append(make("small", {}, ...breakable(small)));
    button.dataset.sort = name;
    cell.ariaSort = by === name ? { up: "ascending", down: "descending" }[way] : "none";
    button.onclick = () => act(name, by === name && way === "down" ? "up" : "down");
    cell.append(button);
    return cell;
  };
  const swatch = (view, model) => {
    const mark = make("i", { className: "swatch" });
    mark.style.setProperty("--key", S.colourOf(view, model));
    mark.dataset.dash = S.dashOf(view, model);
    return mark;
  };
  S.drawTable = async (view, box, sortBy) => {
    const { columns, rows } = await valueRows(view);
    if (!rows.length) {
      box.replaceChildren(make("p", { className: "about" },
        "None of the chosen models has these tasks with these settings."));
      return;
    }
    const several = new Set(rows.map(({ curve }) => S.setting(curve.way))).size > 1;
    const labels = rows.map(({ curve }) => S.nameOf(curve));
    const isTwice = (label) => labels.indexOf(label) !== labels.lastIndexOf(label);
    const head = make("tr", {}, headCell(view, "model", "model", "", sortBy),
      ...columns.map(({ name, metric }) => headCell(view, name, name, metric, sortBy)));
    const body = sorted(view, rows).map(({ curve, cells, steps }) => {
      const first = make("th", { scope: "row" }, swatch(view, curve.model),
        make("span", { className: "named" }, S.nameOf(curve)));
      const notes = [isTwice(S.nameOf(curve)) && curve.model.suite, several && S.setting(curve.way),
        steps.size > 1 && "steps differ"].filter(Boolean);
      if (notes.length) first.append(" ", make("small", {}, notes.join(" · ")));
      const line = make("tr", {}, first);
      for (const { name } of columns) {
        const cell = cells.get(name);
        const text = cell ? S.number(cell.value, cell.metric) : "–";
        const td = make("td", {}, text);
        if (cell) {
          const at = cell.step === S.NO_STEP ? "final" : `step ${S.whole(cell.step)}`;
          const seeds = cell.seeds > 1 ? `, median of ${cell.seeds} seeds` : "";
          td.title = `${at}${cell.error === null ? "" : `, ± ${cell.error}`}${seeds}`;
        }
        line.append(td);
      }
      return line;
    });
    const table = make("table", { className: "numbers scores-table" },
      make("thead", {}, head), make("tbody", {}, ...body));
    const focused = document.activeElement?.dataset?.sort;
    box.replaceChildren(make("div", { className: "wide", tabIndex: 0, role: "region",
      ariaLabel: "values" }, table));
    // The button that was pressed is a new one now.
    if (focused && box.contains(document.activeElement) === false) {
      box.querySelector(`[data-sort="${CSS.escape(focused)}"]`)?.focus();
    }
  };

  // --- comparison
  // What can be compared: a lineage with all its sizes, or one model.
  S.entries = (results) => [
    ...results.lineages.filter(({ models }) => models.length > 1).map(({ name, models }) =>
      ({ key: name, label: `${name}: all sizes`, kind: "several sizes", models })),
    ...results.models.map((model) => ({ key: `${model.lineage}/${model.label}`,
      label: `${model.suite} · ${model.label}`, kind: model.suite, models: [model] })),
  ];
  const groupsOf = (entry, curves, metric, shots, setting) => {
    const groups = new Map();
    for (const curve of curves) {
      if (!entry.models.includes(curve.model) || S.metricOf(curve.way) !== metric) continue;
      if (curve.way.shots !== shots) continue;
      if (setting !== "all" && S.setting(curve.way) !== setting) continue;
      const key = `${curve.model.size} ${S.setting(curve.way)}`;
      if (!groups.has(key)) groups.set(key, { size: curve.model.size, curves: [] });
      groups.get(key).curves.push(curve);
    }
    return [...groups.values()];
  };
  // One number of a size: of one model, or the mean over its seeds with the error of that mean.
  const numberOf = (group, at) => {
    const found = group.curves.map((curve) =>
      S.at(curve, curve.steps.at(-1) === S.NO_STEP ? null : at)).filter(Boolean);
    if (!found.length) return null;
    const { way } = group.curves[0];
    if (found.length === 1) return { ...found[0], way, seeds: 1 };
    const n = found.length;
    const value = found.reduce((sum, each) => sum + each.value, 0) / n;
    const square = found.reduce((sum, each) => sum + (each.value - value) ** 2, 0);
    return { value, error: Math.sqrt(square / (n - 1) / n), step: found[0].step, way, seeds: n };
  };
  // Equal sizes are compared with each other; a model alone with everything.
  const pairs = (ones, others) => {
    const same = ones.flatMap((one) => others.filter((other) => other.size === one.size)
      .map((other) => [one, other]));
    const isAlone = (groups) => new Set(groups.map(({ size }) => size)).size === 1;
    if (same.length || !(isAlone(ones) || isAlone(others))) return same;
    return ones.flatMap((one) => others.map((other) => [one, other]));
  };
  const compared = (one, other) => {
    const difference = one.value - other.value;
    const known = one.error !== null && other.error !== null;
    const error = known ? Math.hypot(one.error, other.error) : null;
    return { one, other, difference, error, z: error ? difference / error : null,
      why: S.differences(one.way, other.way) };
  };
  // All tasks of two models fit on a page; of two suites, the chosen ones at every size.
  S.pairedTasks = (view, ...entries) =>
    view.pairs ?? (entries.some((entry) => entry?.models.length > 1) ? "chosen" : "all");
  S.compare = async (view, first, second) => {
    const rows = [];
    for (const name of S.tableTasks(view, S.pairedTasks(view, first, second))) {
      const metric = view.results.metricFor(name, view.metric);
      const curves = await view.results.curves(name);
      const groups = [first, second].map((entry) =>
        groupsOf(entry, curves, metric, view.shots, view.setting)
          .sort((x, y) => x.curves[0].model.order - y.curves[0].model.order));
      for (const [one, other] of pairs(...groups)) {
        const numbers = [one, other].map((group) => numberOf(group, view.at));
        if (numbers.every(Boolean)) {
          rows.push({ name, metric, size: one.size === other.size ? one.size
            : `${one.size || "unknown"} and ${other.size || "unknown"}`, ...compared(...numbers) });
        }
      }
    }
    return rows;
  };
  const verdict = (view, row) => {
    if (row.z === null) return "no standard error";
    if (Math.abs(row.z) < CRITICAL) return "within the error";
    const better = view.results.better[row.metric.split(", ")[0]];
    if (better === null || better === undefined) return row.z > 0 ? "A higher" : "A lower";
    return (row.z > 0) === better ? "A better" : "A worse";
  };
  const bar = (row, largest) => {
    // The interval of 95% on a common scale, with 0 in the middle.
    const mark = make("span", { className: "interval" });
    const place = (value) => 50 + (50 * value) / (largest || 1);
    const half = CRITICAL * row.error;
    mark.style.setProperty("--from", `${place(row.difference - half)}%`);
    mark.style.setProperty("--to", `${place(row.difference + half)}%`);
    mark.style.setProperty("--at", `${place(row.difference)}%`);
    mark.dataset.clear = String(Math.abs(row.z) >= CRITICAL);
    return mark;
  };
  const signed = (value, metric) =>
    `${value < 0 ? "−" : "+"}${S.number(Math.abs(value), metric)}`;
  const rowOf = (view, row, widest) => {
    const line = make("tr", {}, make("th", { scope: "row" },
      make("span", { className: "named" }, row.name), " ",
      make("small", {}, [row.metric, row.size].filter(Boolean).join(" · "))));
    for (const side of [row.one, row.other]) {
      const error = side.error === null ? "" : ` ± ${side.error.toPrecision(2)}`;
      line.append(make("td", {}, S.number(side.value, row.metric), make("small", {}, error)));
    }
    if (row.why && !view.anyway) {
      line.append(make("td", { className: "refused", colSpan: 4 }, `not compared: ${row.why}`));
      return line;
    }
    const clear = row.z !== null && Math.abs(row.z) >= CRITICAL;
    const said = make("td", { className: clear ? "clear" : "" }, verdict(view, row));
    if (row.why) said.append(make("small", { className: "refused" }, row.why));
    const steps = [row.one.step, row.other.step];
    if (steps[0] !== steps[1] && !steps.includes(S.NO_STEP)) {
      said.append(make("small", {}, `steps ${steps.map(S.whole).join(" and ")}`));
    }
    line.append(make("td", {}, signed(row.difference, row.metric)),
      make("td", {}, row.error === null ? "–" : bar(row, widest(row.metric))),
      make("td", {}, row.z === null ? "–" : row.z.toFixed(1).replace("-", "−")), said);
    return line;
  };
  const summaryOf = (view, rows) => {
    const open = rows.filter((row) => view.anyway || !row.why);
    const tested = open.filter(({ z }) => z !== null);
    const clear = tested.filter(({ z }) => Math.abs(z) >= CRITICAL).length;
    const refused = rows.length - open.length;
    const parts = [];
    if (tested.length) {
      parts.push(`${clear} of ${tested.length} differences are outside their 95% interval;`
        + ` about ${(0.05 * tested.length).toFixed(1)} would be by chance. The interval is of`
        + " independent documents: both models answer the same ones, so it is wide.");
    }
    if (refused) {
      parts.push(`${refused} ${refused === 1 ? "row is" : "rows are"} not compared: the numbers`
        + " were made under other conditions.");
    }
    return parts.join(" ");
  };
  S.drawComparison = async (view, box, first, second) => {
    const rows = first && second ? await S.compare(view, first, second) : [];
    if (!rows.length) {
      box.replaceChildren(make("p", { className: "about" },
        "The two have no size and task in common with these settings."));
      return;
    }
    const widths = new Map();
    for (const row of rows) {
      const reach = Math.abs(row.difference) + CRITICAL * (row.error ?? 0);
      if (row.why && !view.anyway) continue;
      widths.set(row.metric, Math.max(widths.get(row.metric) ?? 0, reach));
    }
    const head = ["task", "A", "B", "A − B", "95% interval", "z", ""].map((text) =>
      make("th", { scope: "col" }, text));
    const table = make("table", { className: "numbers scores-table" },
      make("thead", {}, make("tr", {}, ...head)),
      make("tbody", {}, ...rows.map((row) => rowOf(view, row, (m) => widths.get(m)))));
    box.replaceChildren(make("p", { className: "about" }, summaryOf(view, rows)),
      make("div", { className: "wide", tabIndex: 0, role: "region", ariaLabel: "comparison" },
        table));
  };
})();
