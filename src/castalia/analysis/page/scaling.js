"use strict";
// The chart of a scaling law: the runs, and the law with its interval, a curve for each size.
(() => {
  const { look, faded, plain, plotly, parts } = window.castalia;
  const COLOURS = 8;
  const TITLES = { tokens: "tokens", parameters: "parameters" };
  let data = null;

  // Sizes within 1% are one, as in the fit.
  const isNear = (one, other) => Math.abs(Math.log(one / other)) < 0.01;
  const axisOf = (fit) => (fit.variables.includes("tokens") ? "tokens" : "parameters");
  const colourOf = (fit, place) => look(`--c${place % COLOURS}`);
  const placeOf = (fit, point) => {
    if (fit.variables.length < 2) return 0;
    const place = fit.curves.findIndex((curve) => isNear(curve.parameters[0], point.parameters));
    return Math.max(place, 0);
  };

  const band = (curve, x, colour) => ({
    x: [...x, ...x.toReversed()],
    y: [...curve.high, ...curve.low.toReversed()],
    mode: "lines",
    line: { width: 0 },
    fill: "toself",
    fillcolor: faded(colour, 0.15),
    hoverinfo: "skip",
    showlegend: false,
  });
  const line = (curve, x, colour) => ({
    x,
    y: curve.loss,
    mode: "lines",
    name: plain(curve.name),
    line: { color: colour, width: 2 },
    hovertemplate: `${plain(curve.name)}: <b>%{y:.4f}</b><extra></extra>`,
  });
  const marks = (fit, points, symbol) => ({
    x: points.map((point) => point[axisOf(fit)]),
    y: points.map((point) => point.loss),
    customdata: points.map((point) => [plain(point.run), (100 * point.residual).toFixed(2)]),
    mode: "markers",
    marker: { size: 9, symbol, color: points.map((point) => colourOf(fit, placeOf(fit, point))),
      line: { color: look("--card"), width: 1 } },
    hovertemplate: "%{customdata[0]} <b>%{y:.4f}</b>, %{customdata[1]}% from the law<extra></extra>",
    showlegend: false,
  });
  const axis = (title) => ({ type: "log", title: { text: title }, gridcolor: look("--grid"),
    zeroline: false, automargin: true, exponentformat: "power" });

  const draw = async () => {
    const box = document.getElementById("scaling");
    const fit = data?.scaling;
    if (!box || !fit) return;
    const Plotly = await plotly();
    const traces = [];
    fit.curves.forEach((curve, place) => {
      const x = curve[axisOf(fit)];
      const colour = colourOf(fit, place);
      if (curve.low) traces.push(band(curve, x, colour));
      traces.push(line(curve, x, colour));
    });
    traces.push(marks(fit, fit.points, "circle"));
    box.setAttribute("aria-label", `${fit.formula} and ${fit.points.length} runs`);
    await Plotly.react(box, traces, {
      height: 420,
      margin: { l: 56, r: 16, t: 12, b: 48 },
      paper_bgcolor: "transparent",
      plot_bgcolor: "transparent",
      font: { color: look("--ink"), family: "inherit" },
      hoverlabel: { bgcolor: look("--card"), font: { color: look("--ink") } },
      showlegend: fit.curves.length > 1,
      legend: { orientation: "h", y: 1.02, yanchor: "bottom" },
      xaxis: axis(TITLES[axisOf(fit)]),
      yaxis: axis("loss"),
    }, { displayModeBar: false, responsive: true });
  };
  const take = (fresh) => {
    data = fresh;
    return draw();
  };
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  // A page that is served live replaces the section after it has called `refresh`.
  const refresh = (fresh) => {
    data = fresh;
    setTimeout(draw);
  };
  parts.push({ init: take, refresh });
})();
