// The reader of memorized rows: a checkpoint continues the rows of a step, one job at a time.
(() => {
  const { make, ask, address, readers, field, options, counter, problem } = window.castalia;
  const EVERY = 500; // ms between two questions for the results
  const run = make("select");
  const checkpoint = make("select");
  const kept = (key, value) => Number(address.get(key) ?? value);
  const step = counter(kept("of", 0), 0);
  const rows = counter(kept("rows", 64), 1);
  const prompt = counter(kept("prompt", 32), 1);
  const continuation = counter(kept("continuation", 32), 1);
  const start = make("button", { type: "submit" }, "start");
  const cancel = make("button", { type: "button", hidden: true }, "cancel");
  const bar = make("progress", { hidden: true, ariaLabel: "rows done" });
  const info = make("p", { className: "about", role: "status" });
  const few = make("input", { type: "checkbox" });
  const list = make("div", { className: "rows" });
  let live = { runs: [] };
  let job = { job: 0, state: "none" };
  let results = [];
  let timer = 0;

  const steps = () => live.runs.find((each) => each.name === run.value)?.checkpoints ?? [];
  const drawSteps = () => {
    const isNew = !checkpoint.options.length;
    options(checkpoint, steps().map((each) => [each, `step ${each.toLocaleString("en")}`]));
    if (isNew) checkpoint.value = steps().at(-1);
    if (isNew && address.get("checkpoint")) checkpoint.value = address.get("checkpoint");
    if (!checkpoint.value) checkpoint.value = steps().at(-1);
  };

  const begin = async () => {
    const body = { run: run.value, checkpoint: Number(checkpoint.value), step: Number(step.value),
      rows: Number(rows.value), prompt: Number(prompt.value),
      continuation: Number(continuation.value) };
    const names = { reader: "run", checkpoint: "checkpoint", of: "step", rows: "rows",
      prompt: "prompt", continuation: "continuation" };
    for (const [key, name] of Object.entries(names)) address.set(key, String(body[name]));
    try {
      take(await ask("/memorized", { body }));
    } catch (error) {
      problem(list, error);
      if (error.status === 409) follow(); // show the job that is in the way
    }
  };
  const follow = async () => {
    clearTimeout(timer);
    try {
      take(await ask("/job", { query: { first: results.length } }));
    } catch (error) {
      info.textContent = "not connected; trying again";
      timer = setTimeout(follow, 4 * EVERY);
    }
  };
  const take = (answer) => {
    if (answer.job !== job.job) {
      results = [];
      list.replaceChildren();
      // The results of another job than the one asked for: from its first one on.
      if (answer.first) {
        job = { job: answer.job, state: answer.state };
        return follow();
      }
    }
    job = answer;
    if (!job.job) return;
    const fresh = answer.results.slice(results.length - answer.first);
    results.push(...fresh);
    list.append(...fresh.map(drawRow));
    const runs = job.state === "preparing" || job.state === "running";
    start.hidden = runs;
    cancel.hidden = bar.hidden = !runs;
    if (job.total) Object.assign(bar, { max: job.total, value: results.length });
    else bar.removeAttribute("value");
    say();
    sift();
    if (runs) timer = setTimeout(follow, EVERY);
  };
  const say = () => {
    const about = job.about;
    const what = `${about.run}, checkpoint ${about.checkpoint}, rows of step ${about.step}`;
    const whole = results.filter((each) => each.score === 1).length;
    const mean = results.reduce((sum, each) => sum + each.score, 0) / (results.length || 1);
    const words = { preparing: "loading the model …", running: `${results.length} of ${job.total} rows`,
      done: `${job.total} rows`, cancelled: `cancelled after ${results.length} of ${job.total} rows`,
      failed: `failed: ${job.error}` };
    const found = results.length
      ? ` · ${whole} memorized · mean score ${mean.toFixed(3)}` : "";
    info.textContent = `${what} · ${words[job.state]}${found}`;
    info.classList.toggle("wrong", job.state === "failed");
  };
  const sift = () => {
    for (const box of list.children) box.hidden = few.checked && box.dataset.whole === "no";
  };
  const drawRow = (row) => {
    const length = job.about.continuation;
    const equal = Math.round(row.score * length);
    const whole = row.score === 1;
    const parts = row.parts.map((part) => (part.same
      ? make("ins", { title: "the model writes the same" }, part.true)
      : make("span", { className: "differs" },
        make("span", { className: "true", title: "in the data" }, part.true),
        make("del", { title: "the model writes" }, part.made))));
    const box = make("article", { className: "row" },
      make("h3", {}, `row ${row.row} `, make("span", { className: "source" }, row.source),
        make("span", { className: whole ? "score whole" : "score" },
          ` ${equal} of ${length} tokens${whole ? " · memorized" : ""}`)),
      make("pre", { tabIndex: 0, ariaLabel: `row ${row.row}` }, make("i", {}, row.prompt), ...parts));
    box.dataset.whole = whole ? "yes" : "no";
    return box;
  };

  const init = (box, first) => {
    refresh(first);
    run.value = address.get("reader") ?? run.value;
    if (!run.value) run.selectedIndex = 0;
    drawSteps();
    run.onchange = () => {
      checkpoint.replaceChildren();
      delete checkpoint.dataset.texts;
      drawSteps();
    };
    const form = make("form", { className: "fields" }, field("run", run),
      field("checkpoint", checkpoint), field("rows of step", step), field("rows", rows),
      field("prompt tokens", prompt), field("continuation tokens", continuation), start, cancel);
    form.onsubmit = (event) => {
      event.preventDefault();
      begin();
    };
    cancel.onclick = () => ask("/cancel", { body: {} }).then(take, (error) => problem(list, error));
    few.onchange = sift;
    box.append(
      make("p", { className: "about" }, "The model is given the first tokens of a row and goes on"
        + " greedily. The score of a row is the share of tokens that equal the row's own; at 1 the"
        + " row is memorized. It runs on one core, at a low priority."),
      form, bar, info, make("p", { className: "legend" },
        make("i", {}, "prompt"), make("ins", {}, "the same in data and model"),
        make("span", { className: "differs" }, make("span", { className: "true" }, "data"),
          make("del", {}, "model")),
        make("label", {}, few, " memorized rows only")), list);
  };
  const refresh = (fresh) => {
    live = fresh;
    const known = live.runs.filter((each) => each.rows && each.checkpoints.length);
    options(run, known.map(({ name }) => [name, name]));
    drawSteps();
  };
  readers.push({ id: "memorized", title: "Memorized", init, refresh, open: follow });
})();
