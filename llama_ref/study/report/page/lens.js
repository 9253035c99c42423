// The logit lens: a heat map of layers by tokens, and the target's probability and rank by layer at the selected token.

const CELL_SIZES = {
  wide: (space) => [clamp(Math.floor(space / nTokens), 86, 140), nLayers > 24 ? 20 : 24],
  narrow: () => [60, 20],
  "all in view": (space) => [fitTo(space, nTokens, 140), 20],
};

/** The width of each of n cells in some space: whole pixels if there is at least one for each. */
function fitTo(space, n, most) {
  const width = space / n;
  return Math.min(most, width >= 1 ? Math.floor(width) : width);
}

function lensColours() {
  const { top_probabilities: top, target_probability: target, entropy, kl } = data.lens;
  const highest = (values) => extent(values.flat())?.[1] ?? 1;
  const nats = (values) => scales.linear(highest(values), `${number(highest(values), 1)} nats`);
  return [
    { name: "probability of the likeliest", value: (p, t) => top[p][t][0], scale: scales.linear(1, "100%") },
    { name: `probability of ${labelOf(data.target)}`, value: (p, t) => target[p][t], scale: scales.logarithmic(1e-6) },
    { name: "entropy", value: (p, t) => entropy[p][t], scale: nats(entropy) },
    { name: "KL to the last layer", value: (p, t) => kl[p][t], scale: nats(kl) },
  ];
}

function describeReading(p, t) {
  const read = (name) => data.lens[name][p][t];
  return [
    title(`${pointNames[p]}, after `, ...tokenAt(t)),
    ...alternatives(read("top_ids"), read("top_probabilities"), data.target),
    quiet(tokenElement(data.target), ` ${percent(read("target_probability"))}, rank ${whole(read("target_rank"))}`),
    quiet(`entropy ${number(read("entropy"))} · KL to the last layer ${number(read("kl"))} nats`),
  ];
}

/** The likeliest token, if its probability is a number. */
function likeliestAt(p, t) {
  return data.lens.top_probabilities[p][t][0] === null ? "–" : labelOf(data.lens.top_ids[p][t][0]);
}

function startLens() {
  const colours = lensColours();
  let { value, scale } = colours[0];
  if (data.lens.tuned) {
    byId("lens-how").textContent =
      "translated by a matrix that was fitted to the layer, then read through the final norm and the output matrix: a tuned lens";
  }
  let size = nTokens <= 12 || innerWidth < 600 ? "wide" : "narrow";
  const grid = new Grid(byId("lens-grid"), {
    label: `${data.lens.tuned ? "Tuned" : "Logit"} lens: layers by tokens`,
    rows: nLayers + 1,
    columns: nTokens,
    rowName: (row) => (row ? `${row - 1}` : "embedding"),
    columnName: (column) => labelOf(data.tokens[column]),
    strength: (row, column) => (value(row, column) === null ? null : scale.strength(value(row, column))),
    text: likeliestAt,
    describe: describeReading,
    pick: (row, column) => select({ position: column }),
    marked: () => ({ column: selection.position }),
    size: (space) => CELL_SIZES[size](space),
  });
  const paint = () => {
    grid.paint();
    const shown = nTokens - grid.cut;
    byId("lens-cut").hidden = !paper.on || shown === nTokens;
    byId("lens-cut").textContent =
      `Only the last ${shown} of ${nTokens} tokens fit here; set cells to “all in view” to print all.`;
    drawLegend(byId("lens-legend"), "", scale);
  };
  fillOptions(byId("lens-colour"), colours.map(({ name }) => name));
  byId("lens-colour").addEventListener("change", (event) => {
    ({ value, scale } = colours[event.target.value]);
    paint();
  });
  fillOptions(byId("lens-size"), Object.keys(CELL_SIZES), Object.keys(CELL_SIZES).indexOf(size));
  byId("lens-size").addEventListener("change", (event) => {
    size = Object.keys(CELL_SIZES)[event.target.value];
    grid.layOut();
    grid.reveal({ row: nLayers, column: selection.position });
  });
  onTheme(paint);
  onSelect(({ position }) => {
    if (position === undefined) return;
    grid.reveal({ column: position });
    grid.paint();
  });
  requestAnimationFrame(() => grid.reveal({ row: nLayers, column: selection.position }));
  startRise();
}

// ---- how the target rises at the selected token

function startRise() {
  const { target_probability: probability, target_rank: rank, top_probabilities: top } = data.lens;
  const through = (values) => values.map((row) => row[selection.position]);
  const shared = {
    places: pointNames,
    describe: (i) => describeReading(i, selection.position),
  };
  const redraw = [
    lineChart(byId("rise-probability"), {
      ...shared,
      label: `Probability of ${labelOf(data.target)} through the layers`,
      series: () => [
        { name: "likeliest token", kind: "two", dashed: true, values: through(top).map((row) => row[0]) },
        { name: labelOf(data.target), kind: "one", values: through(probability) },
      ],
      logarithmic: true,
      format: percent,
      formatTick: (value) => (value >= 0.01 ? percent(value) : power(Math.round(Math.log10(value)))),
    }),
    lineChart(byId("rise-rank"), {
      ...shared,
      label: `Rank of ${labelOf(data.target)} through the layers`,
      series: () => [{ name: labelOf(data.target), kind: "one", values: through(rank) }],
      logarithmic: true,
      upsideDown: true,
      format: whole,
    }),
  ];
  const show = () => {
    const where = [" through the layers, after ", ...tokenAt(selection.position)];
    byId("rise-title").replaceChildren(tokenElement(data.target), ...where);
    for (const draw of redraw) draw();
  };
  onSelect(({ position }) => position !== undefined && show());
  show();
}
