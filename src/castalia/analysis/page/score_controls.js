"use strict";
// The controls of the part about evaluations. `view` gives what the reader chose, `set` changes it.
(() => {
  const S = window.castalia.scores;
  const { make } = S;
  const FOUND = 40; // tasks that the search lists
  S.MOST = 24; // tasks that are drawn at a time

  S.controls = (view, set) => {
    const radiosOf = (key, title, chosen, options, act = (value) => set({ [key]: value })) => {
      const group = make("fieldset", { className: "choice" }, make("legend", {}, title));
      for (const [value, text] of options) {
        const input = make("input", { type: "radio", name: `scores-${key}`, value,
          checked: String(chosen) === String(value) });
        input.onchange = () => act(value);
        group.append(make("label", {}, input, make("span", {}, text)));
      }
      return group;
    };
    const radios = (key, title, options, act) =>
      radiosOf(key, title, view()[key], options, act);
    const switches = (key, text) => {
      const input = make("input", { type: "checkbox", checked: view()[key] });
      input.onchange = () => set({ [key]: input.checked });
      input.dataset.key = key;
      return make("label", { className: "switch" }, input, text);
    };
    const select = (key, title, options, act) => {
      const box = make("select", { ariaLabel: title });
      box.dataset.key = key;
      for (const [value, text] of options) box.append(new Option(text, value));
      box.value = String(view()[key] ?? "");
      box.onchange = () => act(box.value);
      return make("label", { className: "select" }, make("span", {}, title), box);
    };
    const keyButton = (text, on, colour, dash, act) => {
      const button = make("button", { type: "button", className: "key", textContent: text });
      button.setAttribute("aria-pressed", String(on));
      if (colour) button.style.setProperty("--key", colour);
      if (dash) button.dataset.dash = dash;
      button.onclick = () => act(button.getAttribute("aria-pressed") !== "true");
      return button;
    };
    const toggles = (title, names, isOn, looks, flip) => {
      const group = make("fieldset", { className: "runs" }, make("legend", {}, title));
      for (const name of names) {
        const [colour, dash] = looks(name);
        const button = keyButton(name || "unknown", isOn(name), colour, dash, (on) => flip(name, on));
        button.dataset.name = name;
        group.append(button);
      }
      return group;
    };
    return { radios, radiosOf, switches, select, toggles };
  };

  // The chosen tasks as chips, and a search over all of them.
  S.taskSearch = (view, choose) => {
    const input = make("input", { type: "text", role: "combobox", placeholder: "add a task",
      autocomplete: "off", ariaLabel: "search for a task to add" });
    input.setAttribute("aria-controls", "scores-list");
    input.setAttribute("aria-expanded", "false");
    input.setAttribute("aria-autocomplete", "list");
    const list = make("ul", { id: "scores-list", role: "listbox", hidden: true });
    const chips = make("span", { className: "chips" });
    const show = () => {
      chips.replaceChildren(...view().tasks.map((name) => {
        const chip = make("button", { type: "button", className: "chip", value: name,
          title: `remove ${name}`, ariaLabel: `remove the task ${name}` }, name,
        make("span", { ariaHidden: "true" }, " ×"));
        chip.disabled = view().tasks.length === 1;
        chip.onclick = () => choose(view().tasks.filter((task) => task !== name));
        return chip;
      }));
    };
    // Tasks whose name has every word; group means first, and for each group all of its tasks.
    const matches = (text) => {
      const words = text.toLowerCase().split(/\s+/).filter(Boolean);
      const found = view().results.tasks.filter(({ name, group }) => {
        const all = `${name} ${group ?? ""}`.toLowerCase();
        return words.every((word) => all.includes(word));
      });
      const offers = found.filter(({ name }) => !view().tasks.includes(name))
        .map(({ name, of }) => ({ text: name, note: of ? `mean of ${of}` : "", tasks: [name] }));
      const groups = found.filter(({ of }) => of).map(({ name, of }) => ({
        text: name, note: of > S.MOST ? `the first ${S.MOST} of ${of} tasks` : `all ${of} tasks`,
        tasks: view().results.tasks.filter(({ group }) => group === name).map((task) => task.name),
      }));
      return [...offers.slice(0, FOUND), ...groups];
    };
    const add = (offer) => {
      closeList();
      input.value = "";
      const tasks = [...new Set([...view().tasks, ...offer.tasks])].slice(0, S.MOST);
      choose(tasks);
    };
    let active = -1;
    let offers = [];
    const openList = () => {
      offers = matches(input.value);
      active = -1;
      list.replaceChildren(...offers.map((offer, i) => {
        const option = make("li", { id: `scores-option-${i}`, role: "option" }, offer.text,
          make("small", {}, offer.note));
        option.setAttribute("aria-selected", "false");
        // Before the search loses the focus, which closes the list.
        option.onmousedown = (event) => {
          event.preventDefault();
          add(offer);
        };
        return option;
      }));
      if (!offers.length) list.append(make("li", { className: "none" }, "no such task"));
      list.hidden = false;
      input.setAttribute("aria-expanded", "true");
    };
    const closeList = () => {
      list.hidden = true;
      input.setAttribute("aria-expanded", "false");
      input.removeAttribute("aria-activedescendant");
    };
    const move = (by) => {
      if (list.hidden) openList();
      if (!offers.length) return;
      active = (active + by + offers.length) % offers.length;
      [...list.children].forEach((option, i) =>
        option.setAttribute("aria-selected", String(i === active)));
      input.setAttribute("aria-activedescendant", `scores-option-${active}`);
      list.children[active].scrollIntoView({ block: "nearest" });
    };
    const onKey = (event) => {
      if (event.key === "ArrowDown") move(1);
      else if (event.key === "ArrowUp") move(-1);
      else if (event.key === "Enter") {
        const offer = list.hidden ? null : offers[Math.max(active, 0)];
        if (offer) add(offer);
      } else if (event.key === "Escape") closeList();
      else if (event.key === "Backspace" && !input.value && view().tasks.length > 1) {
        choose(view().tasks.slice(0, -1));
      } else return;
      event.preventDefault();
    };
    input.onfocus = openList;
    input.oninput = openList;
    input.onblur = closeList;
    input.onkeydown = onKey;
    const element = make("div", { className: "tasks" },
      make("span", { className: "legend" }, "tasks"), chips,
      make("span", { className: "search" }, input, list));
    return { element, show, focus: () => input.focus() };
  };
})();
