"use strict";
// The results of evaluations as the page has them: models, tasks, and curves that are unpacked when
// a task is chosen. Shared by score_charts.js, score_tables.js and scores.js.
(() => {
  const castalia = (window.castalia ??= {});
  const S = (castalia.scores ??= {});
  const NO_STEP = -1; // of a number whose checkpoint is not said: a published final score

  const unpacked = async (text) => {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).json();
  };
  const cumulated = (differences) => {
    let sum = 0;
    return differences.map((each) => (sum += each));
  };
  const withoutSeed = (name) => name.replace(/[-_.]?seed[-_]?\d+/i, "");
  const unique = (values) => [...new Set(values)];

  class Results {
    constructor(data) {
      this.about = data.about;
      this.version = data.version;
      this.better = data.better;
      this.blocks = data.blocks;
      this.steps = data.steps.map(cumulated);
      this.tasks = data.tasks;
      this.task = new Map(data.tasks.map((task) => [task.name, task]));
      // A way is how a number was made: metric, filter, shots, and what makes numbers comparable.
      this.ways = data.ways.map((values) =>
        Object.fromEntries(data.settings.map((name, i) => [name, values[i]])));
      const groupOf = (model) => `${model.suite}/${model.family}/${model.variant}/${model.size}`;
      const groups = data.models.map(groupOf);
      const isSeeded = (group) => groups.indexOf(group) !== groups.lastIndexOf(group);
      this.hasSeeds = groups.some(isSeeded);
      this.models = data.models.map((model, place) => ({
        ...model,
        place,
        lineage: unique([model.suite, model.family, model.variant]).filter(Boolean).join(" · "),
        // The seed is worth a word only where there are several.
        base: [withoutSeed(model.model), model.variant].filter(Boolean).join(" "),
        label: [withoutSeed(model.model), model.variant,
          model.seed !== null && isSeeded(groups[place]) ? `seed ${model.seed}` : ""]
          .filter(Boolean).join(" "),
        group: groups[place],
      }));
      const order = new Map(this.models.map((model) => [model.size, model.order]));
      this.sizes = [...order].sort((a, b) => a[1] - b[1]).map(([size]) => size);
      this.cache = new Map();
      this.lineages = this.lineagesOf();
    }

    // Models that differ in size and seed alone: the runs of the page first, then those with the
    // most numbers.
    lineagesOf() {
      const found = new Map();
      for (const model of this.models) {
        if (!found.has(model.lineage)) {
          found.set(model.lineage, { name: model.lineage, suite: model.suite, models: [] });
        }
        found.get(model.lineage).models.push(model);
      }
      const lineages = [...found.values()];
      for (const lineage of lineages) {
        // Published final scores without a checkpoint: they are something to compare with.
        lineage.isReference = lineage.models.every((model) => model.last === null);
      }
      const rows = ({ models }) => models.reduce((sum, model) => sum + model.rows, 0);
      const isOwn = ({ models }) => models.some(({ own }) => own);
      return lineages.sort((a, b) => isOwn(b) - isOwn(a) || a.isReference - b.isReference
        || rows(b) - rows(a));
    }

    has(name) {
      return this.task.has(name);
    }

    // The curves of a task: {model, way, steps, values, errors}.
    async curves(name) {
      if (!this.cache.has(name)) {
        const rows = await unpacked(this.blocks[name]);
        this.cache.set(name, rows.map(([model, way, grid, values, errors]) => ({
          model: this.models[model],
          way: this.ways[way],
          steps: this.steps[grid],
          values,
          errors: errors.length ? errors : null,
        })));
      }
      return this.cache.get(name);
    }

    // Names of the metrics of some tasks, the usual ones first.
    metrics(names) {
      const ways = unique(names.flatMap((name) => this.task.get(name).ways));
      const metrics = unique(ways.map((way) => S.metricOf(this.ways[way])));
      return metrics.sort((a, b) => rank(a) - rank(b) || a.localeCompare(b));
    }

    shots(names) {
      const ways = unique(names.flatMap((name) => this.task.get(name).ways));
      return unique(ways.map((way) => this.ways[way].shots)).sort((a, b) => a - b);
    }

    // The chosen metric, where the task has it, else the usual one of the task.
    metricFor(name, chosen) {
      const own = this.metrics([name]);
      return own.includes(chosen) ? chosen : own[0];
    }
  }

  const USUAL = ["acc", "bits_per_byte", "exact_match", "em", "pct_stereotype", "acc_norm",
    "perplexity", "ppl", "word_perplexity"];
  const rank = (metric) => {
    const place = USUAL.indexOf(metric);
    return place < 0 ? USUAL.length : place;
  };

  // The name of a metric, with the harness's filter where it has one.
  S.metricOf = (way) => (way.filter === "none" ? way.metric : `${way.metric}, ${way.filter}`);
  // Errors and perplexities fall over decades.
  S.isLog = (metric) => /ppl|perplexity/.test(metric);
  S.isShare = (metric) => /^(acc|acc_norm|exact_match|em|pct_stereotype|f1)\b/.test(metric);
  // What keeps two numbers from being compared, in words; "" where nothing does. Unknown and known
  // differ.
  S.differences = (one, other) =>
    Object.keys(one).filter((name) => name !== "metric" && name !== "filter"
      && one[name] !== other[name]).map((name) =>
      `${name.replace("_", " ")} ${one[name] ?? "unknown"} and ${other[name] ?? "unknown"}`)
      .join("; ");
  // The setting beside task, metric and shots, in words.
  S.setting = (way) => [way.harness, way.dtype, way.engine].filter(Boolean).join(", ")
    || "not recorded";

  // --- axes
  S.AXES = { step: "step", percent: "% of training", tokens: "tokens", flops: "training FLOPs" };
  const tokensAt = (model, step) => {
    if (step === NO_STEP) return model.tokens;
    return model.tokens_per_step === null ? null : step * model.tokens_per_step;
  };
  // The place of a step on an axis; null where the results do not say.
  S.place = (model, step, axis) => {
    if (axis === "tokens") return tokensAt(model, step);
    if (axis === "flops") {
      const tokens = tokensAt(model, step);
      return tokens === null || !model.flops_per_token ? null : tokens * model.flops_per_token;
    }
    if (step === NO_STEP) return null;
    if (axis === "percent") return model.last ? (100 * step) / model.last : null;
    return step;
  };
  S.NO_STEP = NO_STEP;

  // --- the number of a curve at a step: null asks for the last
  S.at = (curve, step) => {
    const place = step === null ? curve.steps.length - 1 : curve.steps.indexOf(step);
    if (place < 0) return null;
    return { step: curve.steps[place], value: curve.values[place],
      error: curve.errors ? curve.errors[place] : null };
  };

  // --- statistics
  S.quantile = (sorted, share) => {
    const place = share * (sorted.length - 1);
    const low = Math.floor(place);
    const high = Math.ceil(place);
    return sorted[low] + (place - low) * (sorted[high] - sorted[low]);
  };
  // Curves of the seeds of one model as their median and quartiles at each step.
  S.overSeeds = (curves) => {
    const at = new Map();
    for (const curve of curves) {
      curve.steps.forEach((step, i) => {
        if (!at.has(step)) at.set(step, []);
        at.get(step).push(curve.values[i]);
      });
    }
    const steps = [...at.keys()].sort((a, b) => a - b);
    const all = steps.map((step) => at.get(step).sort((a, b) => a - b));
    return {
      ...curves[0],
      steps,
      seeds: all.map((values) => values.length),
      values: all.map((values) => S.quantile(values, 0.5)),
      low: all.map((values) => S.quantile(values, 0.25)),
      high: all.map((values) => S.quantile(values, 0.75)),
      errors: null,
    };
  };
  // Least squares of y on x. sd is the standard deviation of the residuals, with n - 2 degrees of
  // freedom; `error` is that of a new point at x: sd² (1 + 1/n + (x - mean)² / sum of squares).
  S.line = (xs, ys) => {
    const n = xs.length;
    if (n < 3 || new Set(xs).size < 2) return null;
    const mean = (values) => values.reduce((sum, each) => sum + each, 0) / n;
    const [mx, my] = [mean(xs), mean(ys)];
    const square = xs.reduce((sum, x) => sum + (x - mx) ** 2, 0);
    const slope = xs.reduce((sum, x, i) => sum + (x - mx) * (ys[i] - my), 0) / square;
    const at = (x) => my + slope * (x - mx);
    const sd = Math.sqrt(xs.reduce((sum, x, i) => sum + (ys[i] - at(x)) ** 2, 0) / (n - 2));
    const error = (x) => sd * Math.sqrt(1 + 1 / n + (x - mx) ** 2 / square);
    return { n, slope, start: at(0), at, sd, error };
  };

  // --- looks
  const look = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  S.look = look;
  const parts = (colour) => [1, 3, 5].map((i) => Number.parseInt(colour.slice(i, i + 2), 16));
  S.faded = (colour, share) => `rgba(${parts(colour).join(",")},${share})`;
  // Places of the sizes on the colour scale, 0 to 1: those of the models that are looked at are
  // evenly spaced, and any other lies between its neighbours by its number of parameters.
  S.placesOfSizes = (results, lineages) => {
    const order = new Map(results.models.map((model) => [model.size, Math.log(model.order || 1)]));
    const isUsed = (wanted) => (size) => results.models.some((model) => model.size === size
      && wanted.some(({ name }) => name === model.lineage));
    const on = results.lineages.filter(({ name }) => lineages.has(name));
    const own = on.filter(({ isReference }) => !isReference);
    const used = results.sizes.filter(isUsed(own.length ? own : on));
    const share = (i) => (used.length > 1 ? i / (used.length - 1) : 0.5);
    const between = (size) => {
      const at = order.get(size);
      const above = used.findIndex((each) => order.get(each) > at);
      if (above < 0) return 1;
      if (above === 0) return 0;
      const [low, high] = [order.get(used[above - 1]), order.get(used[above])];
      return share(above - 1) + ((at - low) / (high - low)) * (share(above) - share(above - 1));
    };
    return new Map(results.sizes.map((size) => {
      const place = used.indexOf(size);
      return [size, place < 0 ? between(size) : share(place)];
    }));
  };
  // Sizes are ordered, and so are their colours: a place on the scale --s0 … --s4.
  S.onScale = (share) => {
    const stops = [0, 1, 2, 3, 4].map((i) => parts(look(`--s${i}`)));
    const place = Math.min(share * 4, 3.9999);
    const low = Math.floor(place);
    const mixed = stops[low].map((each, i) =>
      Math.round(each + (place - low) * (stops[low + 1][i] - each)));
    return `#${mixed.map((each) => each.toString(16).padStart(2, "0")).join("")}`;
  };
  S.plain = (text) =>
    String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  S.number = (value, metric) => {
    if (value === null || value === undefined) return "–";
    if (S.isShare(metric)) return value.toFixed(4);
    return Math.abs(value) >= 1e5 ? value.toExponential(2) : String(+value.toPrecision(4));
  };
  S.whole = (value) => value.toLocaleString("en");
  S.make = (tag, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };
  S.Results = Results;
})();
