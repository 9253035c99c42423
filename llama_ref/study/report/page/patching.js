// Activation patching: how much of the clean answer each cell restores, exact and estimated by a gradient.

function startPatching() {
  const found = data.patched;
  if (!hasSection("patching", found)) return;
  const measured = found.other === null ? `${found.measure} of ${found.target}` : `logit of ${found.target} above ${found.other}`;
  const place = found.axes[1];
  const noisy = found.noise?.map((position) => `${found.text[position]} @${position}`).join(", ");
  byId("patching-lead").textContent =
    (noisy ? `Noise on ${noisy} corrupts the text. ` : `The corrupted text is ${found.text.join("│")}. `) +
    `A cell takes ${found.activation} of one layer and ${place} from this text’s run, and shows how much of the difference ` +
    "that restores.";
  const close = found.correlation === null ? "" : ` Estimate and exact have a correlation of ${number(found.correlation)}.`;
  byId("patching-sum").textContent =
    `The ${measured} is ${number(found.clean, 3)} here and ${number(found.corrupted, 3)} in the corrupted run.${close}`;
  const grids = ["exact", "estimate"].filter((name) => found[name]);
  const paints = grids.map((name) => patchedGrid(name, found, place === "position").paint);
  for (const name of ["exact", "estimate"]) byId(`patching-${name}`).hidden = !found[name];
  onTheme(() => {
    for (const paint of paints) paint();
    drawLegend(byId("patching-legend"), "restored", scales.linear(1, "100%"));
  });
}

function patchedGrid(name, found, hasTokens) {
  const values = found[name];
  const columnName = (column) => (hasTokens ? found.text[column] : `head ${column}`);
  const grid = new Grid(byId(`${name}-grid`), {
    label: `Patching, ${name}: layers by ${found.axes[1]}s`,
    rows: values.length,
    columns: values[0].length,
    rowName: (row) => `${row}`,
    columnName,
    strength: (row, column) => (values[row][column] === null ? null : clamp(values[row][column], 0, 1)),
    text: (row, column) => (values[row][column] === null ? "–" : `${Math.round(100 * values[row][column])}`),
    describe: (row, column) => [
      title(`layer ${row}, ${columnName(column)}${hasTokens ? ` @${column}` : ""}`),
      ...["exact", "estimate"]
        .filter((other) => found[other])
        .map((other) => make("p", {}, `${other} ${signed(found[other][row][column])} of the difference`)),
    ],
    pick: (row, column) => (hasTokens ? select({ position: column }) : select({ layer: row, head: column })),
    marked: () => (hasTokens ? { column: selection.position } : { row: selection.layer, column: selection.head }),
    size: (space) => [clamp(Math.floor(space / values[0].length), 36, 64), 20],
  });
  onSelect(() => grid.paint());
  return { paint: () => grid.paint() };
}
