// Which runs are shown: a box to tick for each, with a search where they are many. The address keeps it.
window.castalia.runChoice = (colours, redraw) => {
  const { address } = window.castalia;
  const MANY = 8;
  // By name: those that are off, or of many the few that are on.
  let off = new Set(address.all("hide"));
  let only = address.all("run").length ? new Set(address.all("run")) : null;
  let wanted = "";
  const isShown = (name) => (only ? only.has(name) : !off.has(name));

  const build = (runs) => {
    const group = document.createElement("fieldset");
    group.className = "runs";
    group.innerHTML = "<legend>runs</legend>";
    const list = document.createElement("div");
    list.className = "ticks";
    const ticks = runs.map((run, place) => {
      const label = document.createElement("label");
      label.className = "key tick";
      label.innerHTML = '<input type="checkbox" name="run"><span></span>';
      const [input, text] = label.children;
      text.textContent = run.name;
      label.style.setProperty("--key", `var(--c${place % colours})`);
      input.value = run.name;
      input.checked = isShown(run.name);
      input.onchange = () => choose(ticks);
      list.append(label);
      return label;
    });
    if (runs.length > MANY) group.append(searchOf(ticks));
    group.append(list);
    return group;
  };

  const searchOf = (ticks) => {
    const line = document.createElement("div");
    line.className = "search";
    line.innerHTML = '<input type="search" placeholder="search runs" aria-label="search runs">'
      + '<button type="button" value="all">all</button>'
      + '<button type="button" value="none">none</button>';
    const [search, ...buttons] = line.children;
    search.value = wanted;
    const filter = () => {
      wanted = search.value;
      const words = wanted.toLowerCase();
      for (const tick of ticks) tick.hidden = !tick.textContent.toLowerCase().includes(words);
    };
    search.oninput = filter;
    filter();
    for (const button of buttons) {
      button.title = "of the runs that the search leaves";
      button.onclick = () => {
        for (const tick of ticks) if (!tick.hidden) tick.firstChild.checked = button.value === "all";
        choose(ticks);
      };
    }
    return line;
  };

  const choose = (ticks) => {
    const names = (on) => ticks.map((tick) => tick.firstChild)
      .filter((input) => input.checked === on).map((input) => input.value);
    const shown = names(true);
    // The shorter list stands in the address. A run that appears later is shown, unless a few were
    // chosen.
    const isFew = shown.length > 0 && 2 * shown.length < ticks.length;
    only = isFew ? new Set(shown) : null;
    off = new Set(isFew ? [] : names(false));
    address.set("run", isFew ? shown : null);
    address.set("hide", isFew ? null : names(false));
    redraw();
  };

  return { isShown, build };
};
