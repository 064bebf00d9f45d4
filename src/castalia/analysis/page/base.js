"use strict";
// What the scripts of a page share: its data, Plotly, its colours, the address, and `refresh`.
window.castalia = (() => {
  // In the first run of the script: later, document.currentScript is null.
  const nonce = document.currentScript.nonce;
  const isOld = typeof DecompressionStream === "undefined";
  const unpack = async (id) => {
    const text = document.getElementById(id).textContent;
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  };
  const once = (make) => {
    let made = null;
    return () => (made ||= make());
  };
  const data = once(async () => JSON.parse(await unpack("data")));
  const plotly = once(async () => {
    const script = document.createElement("script");
    script.nonce = nonce;
    script.textContent = await unpack("plotly");
    document.head.append(script);
    return window.Plotly;
  });

  // --- looks
  const look = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const faded = (colour, share) => {
    const value = Number.parseInt(colour.slice(1), 16);
    return `rgba(${value >> 16},${(value >> 8) & 255},${value & 255},${share})`;
  };
  // Plotly takes texts for markup.
  const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

  // --- the address keeps what the reader chose, so that a view can be passed on
  const words = () => new URLSearchParams(location.hash.slice(1));
  const address = {
    get: (key) => words().get(key),
    all: (key) => words().getAll(key),
    // A value, a list of values, or null to forget the key.
    set: (key, value) => {
      const kept = words();
      kept.delete(key);
      for (const each of [value ?? []].flat()) kept.append(key, each);
      const text = kept.toString();
      history.replaceState(null, "", text ? `#${text}` : location.pathname + location.search);
    },
  };

  // Another address of this page, pasted or from the reader's history, is another view.
  window.addEventListener("hashchange", () => location.reload());

  // --- parts of the page, {init(data), refresh(data)}; a page that is served live gets new data
  const parts = [];
  const refresh = (fresh) => parts.forEach((part) => part.refresh(fresh));

  return { isOld, data, plotly, look, faded, plain, address, parts, refresh };
})();
