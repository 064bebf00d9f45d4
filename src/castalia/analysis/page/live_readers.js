// Readers of the live page: the rows of any step, and samples checkpoint by checkpoint.
(() => {
  const { make, ask, address, readers } = window.castalia;
  const ROWS = 16; // in one answer
  let number = 0; // of the fields, for their labels

  // --- fields, which the address keeps
  const field = (text, input, className = "") => {
    number += 1;
    input.id = `field-${number}`;
    return make("div", { className: `field ${className}` },
      make("label", { htmlFor: input.id }, text), input);
  };
  const options = (select, values) => {
    const chosen = select.value;
    const texts = values.map(([value, text]) => `${value}\n${text}`).join("\n");
    if (select.dataset.texts === texts) return;
    select.dataset.texts = texts;
    select.replaceChildren(...values.map(([value, text]) => make("option", { value }, text)));
    if (values.some(([value]) => String(value) === chosen)) select.value = chosen;
  };
  const counter = (value, min, max) =>
    make("input", { type: "number", value, min, max, step: 1, inputMode: "numeric" });
  const problem = (box, error) => {
    const text = error.name === "TypeError" ? "not connected" : error.message;
    box.replaceChildren(make("p", { className: "wrong", role: "alert" }, text));
  };
  // Only the newest question of a reader is shown, whatever order the answers come in.
  const latest = () => {
    let asked = 0;
    return async (box, question) => {
      const mine = (asked += 1);
      box.setAttribute("aria-busy", "true");
      try {
        const draw = await question();
        if (mine === asked) draw();
      } catch (error) {
        if (mine === asked) problem(box, error);
      }
      if (mine === asked) box.removeAttribute("aria-busy");
    };
  };
  const marked = (text, words) => {
    if (!words) return [text];
    const parts = [];
    const lower = text.toLowerCase();
    let at = 0;
    for (;;) {
      const found = lower.indexOf(words.toLowerCase(), at);
      if (found < 0 || lower.length !== text.length) break;
      parts.push(text.slice(at, found), make("mark", {}, text.slice(found, found + words.length)));
      at = found + words.length;
    }
    return [...parts, text.slice(at)];
  };
  Object.assign(window.castalia, { field, options, counter, problem });

  // --- batches
  const batches = (() => {
    const run = make("select");
    const step = counter(address.get("step") ?? 0, 0);
    const search = make("input", { type: "search", placeholder: "text or source",
      value: address.get("find") ?? "" });
    const info = make("p", { className: "about", role: "status" });
    const rows = make("div", { className: "rows" });
    const pages = make("div", { className: "pages" });
    const only = latest();
    let first = 0;
    let opened = false;
    let asked = "";
    const button = (text, title, act) =>
      make("button", { type: "button", textContent: text, title, ariaLabel: title, onclick: act });
    const go = (to = first) => {
      if (!run.value) return info.replaceChildren("No run here has a config whose rows could be read.");
      first = to;
      const query = { run: run.value, step: step.value || "0", first, count: ROWS,
        search: search.value.trim() };
      // A click on "read" after the step was changed asks for the same twice.
      const asks = JSON.stringify(query);
      if (asks === asked && rows.hasAttribute("aria-busy")) return null;
      asked = asks;
      address.set("reader", run.value);
      address.set("step", query.step);
      address.set("find", query.search || null);
      return only(rows, async () => {
        const batch = await ask("/batch", { query });
        return () => draw(batch, query.search);
      });
    };
    const move = (by) => {
      step.value = Math.max(0, Number(step.value) + by);
      go(0);
    };
    const draw = (batch, words) => {
      step.max = batch.steps - 1;
      const last = Math.min(batch.first + ROWS, batch.matching);
      const which = words ? `${batch.matching} of ${batch.batch_size} rows hold “${words}”`
        : `${batch.batch_size.toLocaleString("en")} rows`;
      const shown = batch.matching > ROWS ? ` · ${batch.first + 1} to ${last} are shown` : "";
      const text = batch.text ? "" : " · ids, since the config names no tokenizer";
      info.textContent = `Step ${batch.step} of 0 to ${batch.steps - 1}, the update from checkpoint`
        + ` ${batch.step} to ${batch.step + 1} · ${which}${shown}${text}`;
      rows.replaceChildren(...batch.rows.map((row) => drawRow(row, words)));
      pages.replaceChildren();
      if (batch.first > 0) pages.append(button("← rows", "rows before", () => turn(-1)));
      if (last < batch.matching) pages.append(button("rows →", "more rows", () => turn(1)));
    };
    const turn = (by) => {
      go(Math.max(0, first + by * ROWS));
      info.scrollIntoView({ block: "nearest" });
    };
    const drawRow = (row, words) => {
      const pieces = row.documents.some((piece) => piece.text === undefined)
        ? [make("span", {}, ...marked(row.text, words))]
        : row.documents.map((piece) => make("span", { className: "piece",
          title: originOf(piece) }, ...marked(piece.text, words)));
      const names = row.documents.map((piece) => originOf(piece));
      return make("article", { className: "row" },
        make("h3", {}, `row ${row.row} `, make("span", { className: "source" }, row.source)),
        make("pre", { tabIndex: 0, ariaLabel: `text of row ${row.row}` }, ...pieces),
        make("details", {}, make("summary", {}, documentsOf(row)),
          make("ul", {}, ...names.map((name) => make("li", {}, name)))));
    };
    const documentsOf = (row) =>
      `${row.documents.length} ${row.documents.length === 1 ? "document" : "documents"} of ${row.prefix}`;
    const originOf = ({ document, start, length, from, text, ...rest }) => {
      const more = { ...rest, ...(from ?? {}) };
      const words = Object.entries(more).map(([key, value]) =>
        `${key} ${typeof value === "object" ? JSON.stringify(value) : value}`);
      return [`document ${document}`, `tokens ${start} to ${start + length - 1}`, ...words].join(" · ");
    };
    const init = (box, live) => {
      refresh(live);
      run.value = address.get("reader") ?? run.value;
      if (!run.value) run.selectedIndex = 0;
      const form = make("form", { className: "fields" },
        field("run", run), field("step", step, "steps"),
        make("div", { className: "buttons" }, button("←", "previous step", () => move(-1)),
          button("→", "next step", () => move(1))),
        field("search in the batch", search, "words"),
        make("button", { type: "submit" }, "read"));
      form.onsubmit = (event) => {
        event.preventDefault();
        go(0);
      };
      run.onchange = step.onchange = () => go(0);
      search.onsearch = () => go(0); // also its button that clears it
      box.append(make("p", { className: "about" }, "The rows that a step trains on, in the order of"
        + " the batch. Where two documents meet there is a line."), form, info, rows, pages);
    };
    const refresh = (live) =>
      options(run, live.runs.filter((each) => each.rows).map(({ name }) => [name, name]));
    const open = () => {
      if (!opened) go(0);
      opened = true;
    };
    return { id: "batches", title: "Batches", init, refresh, open };
  })();

  // --- samples: two checkpoints side by side, of one run or of two
  const samples = (() => {
    const sides = ["left", "right"].map((side) => ({ side, run: make("select"),
      step: make("select"), samples: [] }));
    const texts = make("div", { className: "rows" });
    const only = latest();
    let known = "";
    const load = () => only(texts, async () => {
      for (const side of sides) {
        side.samples = [];
        if (side.run.value) {
          const answer = await ask("/samples", { query: { run: side.run.value } });
          side.samples = answer.samples;
        }
      }
      return () => {
        for (const side of sides) {
          const steps = [...new Set(side.samples.map((each) => each.step))].sort((a, b) => a - b);
          const isNew = !side.step.options.length;
          options(side.step, steps.map((step) => [step, `step ${step.toLocaleString("en")}`]));
          const wanted = address.get(`${side.side}-step`);
          if (isNew) side.step.value = wanted ?? steps.at(side.side === "left" ? 0 : -1);
          if (!side.step.value && steps.length) side.step.value = steps.at(-1);
        }
        draw();
      };
    });
    const draw = () => {
      for (const { side, run, step } of sides) {
        address.set(side, run.value || null);
        address.set(`${side}-step`, step.value || null);
      }
      const prompts = [...new Set(sides.flatMap((side) => side.samples.map(({ prompt }) => prompt)))];
      texts.replaceChildren(...prompts.map((prompt) => make("article", { className: "row" },
        make("h3", {}, "after ", make("q", {}, prompt.trim())),
        make("div", { className: "pair" }, ...sides.map((side) => {
          const found = side.samples.find((each) => each.prompt === prompt
            && String(each.step) === side.step.value);
          const name = `${side.run.value}, step ${side.step.value}`;
          return make("div", {}, make("p", { className: "about" }, name),
            make("pre", { tabIndex: 0, ariaLabel: `sample of ${name}` },
              make("b", {}, prompt), found ? found.text : " (no sample)"));
        })))));
      if (!prompts.length) {
        texts.replaceChildren(make("p", { className: "about" },
          "No run here has samples: RUN/samples/samples.json is written by a run that evaluates."));
      }
    };
    const init = (box, live) => {
      refresh(live);
      const form = make("form", { className: "fields" });
      for (const side of sides) {
        side.run.value = address.get(side.side) ?? side.run.value;
        if (!side.run.value) side.run.selectedIndex = 0;
        side.run.onchange = load;
        side.step.onchange = draw;
        form.append(field(`${side.side} run`, side.run), field(`${side.side} checkpoint`, side.step));
      }
      form.onsubmit = (event) => event.preventDefault();
      box.append(make("p", { className: "about" },
        "What two checkpoints write after the same prompts, with the same seed."), form, texts);
    };
    const refresh = (live) => {
      const names = live.runs.filter((each) => each.samples).map(({ name }) => [name, name]);
      for (const { run } of sides) options(run, names);
      const stamp = JSON.stringify(live.runs.map((each) => [each.name, each.sampled]));
      if (known && stamp !== known) load();
      if (known) known = stamp;
      fresh = stamp;
    };
    let fresh = "";
    const open = () => {
      if (!known) load();
      known = known || fresh;
    };
    return { id: "samples", title: "Samples", init, refresh, open };
  })();

  readers.push(batches, samples);
})();
