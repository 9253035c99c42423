// Activation patching: how much of the clean answer each cell restores, exact and estimated by a gradient.

const MADE = { exact: "Exact: every cell was run", estimate: "Estimated by a gradient" };

function startPatching() {
  const found = data.patched;
  if (!hasSection("patching", found)) return;
  const measured = found.other === null ? `${found.measure} of ${found.target}` : `logit of ${found.target} above ${found.other}`;
  const place = found.axes.join(", ").replace(/, (?=\w+$)/, " and ");
  const noisy = found.noise?.map((position) => `${found.text[position]} @${position}`).join(", ");
  const corrupts = noisy ? [`Noise on ${noisy} corrupts the text. `] : ["The corrupted text is ", ...joined(found.text), ". "];
  byId("patching-lead").replaceChildren(
    ...corrupts,
    `A cell takes ${found.activation} of one ${place} from this text’s run, and shows how much of the difference ` +
      "that restores; below 0, it makes the difference larger." +
      (found.axes.length === 3 ? " One map has the strongest head at each position, another all heads at one token." : ""),
  );
  const close = found.correlation === null ? "" : ` Estimate and exact have a correlation of ${number(found.correlation)}.`;
  byId("patching-sum").textContent =
    `The ${measured} is ${number(found.clean, 3)} here and ${number(found.corrupted, 3)} in the corrupted run.${close}`;
  startPatchingToken(found);
  const views = found.axes.slice(1).map((axis) => (axis === "position" ? positionsView(found) : headsView(found)));
  const grids = Object.keys(MADE).flatMap((name) => (found[name] ? views.map((view) => patchedGrid(name, found, view)) : []));
  onTheme(() => {
    for (const grid of grids) grid.paint();
    drawLegend(byId("patching-legend"), "restored", scales.signed);
  });
}

/** The tokens of a text with │ between them; a line breaks between tokens where it can. */
const joined = (text) => text.flatMap((token, i) => (i ? ["│", make("wbr"), token] : [token]));

/** The choice of the token whose heads are shown, if the grid has positions and heads. */
function startPatchingToken({ axes, text }) {
  byId("patching-controls").hidden = axes.length < 3;
  const chosen = byId("patching-token");
  fillOptions(chosen, text.map((token, position) => `${token} @${position}`), selection.position);
  chosen.addEventListener("change", () => select({ position: Number(chosen.value) }));
  onSelect(({ position }) => {
    if (position !== undefined) chosen.value = position;
  });
}

// A view has a column for each position or head. `share(values, layer, column)` is what a cell of one of the two grids
// restores; `whose` says which head that is, if the cell stands for several.

function positionsView({ axes, text }) {
  const hasHeads = axes.length === 3;
  const strongest = (shares) => shares.reduce((best, share, head) => (Math.abs(share) > Math.abs(shares[best]) ? head : best), 0);
  const headOf = (values, layer, position) => strongest(values[layer][position]);
  return {
    id: "grid",
    caption: hasHeads ? "; strongest head" : "",
    columns: text.length,
    columnName: (position) => text[position],
    cellName: (position) => `${text[position]} @${position}`,
    share: (values, layer, position) =>
      hasHeads ? values[layer][position][headOf(values, layer, position)] : values[layer][position],
    whose: (values, layer, position) => (hasHeads ? ` by head ${headOf(values, layer, position)}` : ""),
    pick: (values, layer, position) => select(hasHeads ? { layer, position, head: headOf(values, layer, position) } : { position }),
    marked: () => ({ column: selection.position }),
  };
}

function headsView({ axes, exact, estimate }) {
  const hasPositions = axes.length === 3;
  const headsOf = (values, layer) => (hasPositions ? values[layer][selection.position] : values[layer]);
  return {
    id: hasPositions ? "heads" : "grid",
    caption: hasPositions ? "; heads at the token" : "",
    columns: headsOf(exact ?? estimate, 0).length,
    columnName: (head) => `head ${head}`,
    cellName: (head) => `head ${head}`,
    share: (values, layer, head) => headsOf(values, layer)[head],
    whose: () => "",
    pick: (values, layer, head) => select({ layer, head }),
    marked: () => ({ row: selection.layer, column: selection.head }),
  };
}

/** 0.183 -> 18, -0.183 -> −18. */
const percents = (share) => `${Math.round(100 * share)}`.replace("-", "−");

function patchedGrid(name, found, { id, caption, columns, columnName, cellName, share, whose, pick, marked }) {
  const values = found[name];
  const element = make("div", { class: "grid", id: `${name}-${id}` });
  byId("patching-grids").append(make("figure", {}, make("figcaption", {}, MADE[name] + caption), element));
  const restored = (row, column) => share(values, row, column);
  const restores = (other, row, column) =>
    make("p", {}, `${other} ${signed(share(found[other], row, column))} of the difference${whose(found[other], row, column)}`);
  const grid = new Grid(element, {
    label: `Patching, ${MADE[name]}${caption}`,
    rows: values.length,
    columns,
    rowName: (row) => `${row}`,
    columnName,
    strength: (row, column) => (restored(row, column) === null ? null : scales.signed.strength(restored(row, column))),
    text: (row, column) => (restored(row, column) === null ? "–" : percents(restored(row, column))),
    describe: (row, column) => [
      title(`layer ${row}, ${cellName(column)}`),
      ...Object.keys(MADE).filter((other) => found[other]).map((other) => restores(other, row, column)),
    ],
    pick: (row, column) => pick(values, row, column),
    marked,
    size: (space) => [clamp(Math.floor(space / columns), 36, 64), 20],
  });
  onSelect(() => grid.paint());
  return grid;
}
