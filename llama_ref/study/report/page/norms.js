// Length and direction of the residual stream, at the selected token and as the median of all tokens but the first.

function startNorms() {
  const { norm, drift, to_last: toLast, medians } = data.residual;
  const within = (layer) => [`layer ${layer}, after attention`, `after layer ${layer}`];
  const names = ["embedding", ...range(nLayers).flatMap(within)];
  const here = (values) => values.map((row) => row[selection.position]);
  const shared = { places: names, perLayer: 2 };
  const redraw = [
    lineChart(byId("norms"), {
      ...shared,
      label: "Length of the residual stream through the layers",
      series: () => [
        { name: "median of all but the first", kind: "one", dashed: true, values: medians.norm },
        { name: "selected token", kind: "one", values: here(norm) },
      ],
      logarithmic: true,
      format: (value) => (value === null ? "–" : `${Number(value.toPrecision(3))}`),
    }),
    lineChart(byId("cosines"), {
      ...shared,
      label: "Cosines of the residual stream through the layers",
      series: () => [
        { name: "with the last layer, median", kind: "three", dashed: true, values: medians.to_last },
        { name: "with the last layer", kind: "three", values: here(toLast) },
        { name: "with the point before, median", kind: "one", dashed: true, values: medians.drift },
        { name: "with the point before", kind: "one", values: here(drift) },
      ],
      format: number,
    }),
  ];
  drawKeys(byId("norm-keys"), [
    { kind: "one", name: "selected token" },
    { kind: "one", name: "median of all but the first", dashed: true },
  ]);
  drawKeys(byId("cosine-keys"), [
    { kind: "one", name: "with the point before" },
    { kind: "three", name: "with the last layer" },
    { kinds: ["one", "three"], name: "medians of all but the first", dashed: true },
  ]);
  const show = () => {
    byId("stream-lead").replaceChildren(
      "Every layer adds to the residual stream, once after attention and once after the feed-forward layer. ",
      "Here is how long it is and how far it turns at ",
      ...tokenAt(selection.position),
      ".",
    );
    for (const draw of redraw) draw();
  };
  onSelect(({ position }) => position !== undefined && show());
  show();
}
