"use strict";
// Draws the charts of a study of memorization; what there is to draw stands in the data.
(async () => {
  const { look, faded, plotly, address } = window.castalia;
  const isNarrow = () => window.innerWidth < 600;
  const boxes = [...document.querySelectorAll("[data-chart]")];
  if (window.castalia.isOld) {
    boxes[0]?.append("The charts need a browser of 2023 or newer.");
    return;
  }
  const { charts } = await window.castalia.data();
  const Plotly = await plotly();

  // "--c0" is a colour of the page, "--c0/0.2" the same with an opacity.
  const coloured = (value) => {
    if (typeof value === "string" && value.startsWith("--")) {
      const [name, share] = value.split("/");
      return share ? faded(look(name), share) : look(name);
    }
    if (Array.isArray(value)) return value.map(coloured);
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, each]) => [key, coloured(each)]));
  };

  // Names at both ends need room beside the marks.
  const roomy = (values, log) => {
    const places = values.map((value) => (log ? Math.log10(value) : value));
    const low = Math.min(...places);
    const high = Math.max(...places);
    const room = 0.2 * (high - low) || 1;
    return [low - room, high + room];
  };
  const axis = ({ title, log, suffix, zero, values, names }) => ({
    title: { text: title, standoff: 8, font: { size: 12 } },
    type: log ? "log" : "linear",
    ticksuffix: suffix,
    gridcolor: look("--grid"),
    linecolor: look("--edge"),
    zeroline: false,
    automargin: true,
    exponentformat: "SI",
    ...(zero && !log ? { rangemode: "tozero" } : {}),
    ...(values.length ? { tickmode: "array", tickvals: values,
      ticktext: names.length ? names : values.map((value) => value.toLocaleString("en")) } : {}),
    ...(names.length ? { range: roomy(values, log) } : {}),
    // Digits 2 and 5 between powers of ten only crowd a phone.
    ...(log && !values.length ? { dtick: 1 } : {}),
  });
  const layout = (view) => {
    const shared = {
      paper_bgcolor: "transparent",
      plot_bgcolor: "transparent",
      font: { color: look("--ink"), family: "inherit", size: 12 },
      hoverlabel: { bgcolor: look("--card"), bordercolor: look("--edge"),
        font: { color: look("--ink") }, align: "left" },
      margin: { l: 52, r: 14, t: 10, b: 46 },
      hovermode: "closest",
    };
    if (view.kind === "heat") {
      const category = { type: "category", automargin: true, showgrid: false, fixedrange: true };
      return { ...shared, height: isNarrow() ? 330 : 420,
        xaxis: { ...category, title: { text: view.x.title, standoff: 8, font: { size: 12 } }, tickangle: "auto" },
        yaxis: { ...category, title: { text: view.y.title }, autorange: "reversed" } };
    }
    const shown = view.traces.filter((trace) => trace.showlegend !== false).length;
    return { ...shared, height: isNarrow() ? 300 : 340, bargap: 0.15,
      showlegend: shown > 1,
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 12 } },
      xaxis: axis(view.x), yaxis: axis(view.y) };
  };

  const chosen = new Map(); // chart -> the option of each menu
  const draw = (box) => {
    const chart = charts[Number(box.dataset.chart)];
    const plot = box.querySelector(".plot");
    const view = chart.views[chosen.get(chart).join(",")];
    const isEmpty = !view || view.empty;
    box.classList.toggle("empty", Boolean(isEmpty));
    if (isEmpty) {
      Plotly.purge(plot);
      plot.textContent = view ? view.empty : "Nothing to show for this choice.";
      return;
    }
    if (!plot.classList.contains("js-plotly-plot")) plot.textContent = "";
    Plotly.react(plot, coloured(view.traces), layout(view),
      { displayModeBar: false, responsive: true });
  };

  // --- menus; the address keeps what the reader chose
  const menu = (box, chart, place) => {
    const { title, options } = chart.choices[place];
    const key = `${box.dataset.chart}.${place}`;
    const label = document.createElement("label");
    const select = document.createElement("select");
    label.append(`${title} `, select);
    for (const [number, option] of options.entries()) select.add(new Option(option, number));
    const wanted = options.indexOf(address.get(key));
    if (wanted >= 0) chosen.get(chart)[place] = wanted;
    select.value = chosen.get(chart)[place];
    select.addEventListener("change", () => {
      chosen.get(chart)[place] = Number(select.value);
      address.set(key, options[Number(select.value)]);
      draw(box);
    });
    return label;
  };
  for (const box of boxes) {
    const chart = charts[Number(box.dataset.chart)];
    chosen.set(chart, chart.choices.map((choice) => choice.chosen));
    const menus = chart.choices.map((_, place) => menu(box, chart, place));
    box.querySelector(".choices").append(...menus);
    draw(box);
  }
  document.documentElement.dataset.ready = "yes";
  const redraw = () => boxes.forEach(draw);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
})();
