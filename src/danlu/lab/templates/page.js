// Draws the charts. Colors are CSS variables, so a change of theme or the printer needs no redrawing.
(() => {
  const specs = JSON.parse(document.getElementById("specs").textContent);
  // Views by chart, for the browser's console and the tests.
  window.danluCharts = {};
  for (const [id, spec] of Object.entries(specs)) {
    const box = document.getElementById(id);
    vegaEmbed(box, spec, { mode: "vega-lite", renderer: "svg", actions: false, ast: true, defaultStyle: false, tooltip: { disableDefaultStyle: true } })
      .then((result) => { window.danluCharts[id] = result.view; })
      .catch((error) => {
        box.textContent = "This chart could not be drawn; the tables hold its numbers.";
        console.error(id, error);
      });
  }
  // Closed details would be missing on paper.
  let closed = [];
  window.addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    for (const one of closed) one.open = true;
  });
  window.addEventListener("afterprint", () => { for (const one of closed) one.open = false; });
})();
