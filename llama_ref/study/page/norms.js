// How the residual stream grows and turns, at the selected token and at the median of all.

function startNorms() {
  const { norm, drift, to_last: toLast } = data.residual;
  const within = (layer) => [`layer ${layer}, after attention`, `after layer ${layer}`];
  const names = ["embedding", ...range(nLayers).flatMap(within)];
  const here = (values) => values.map((row) => row[selection.position]);
  const medians = { norm: norm.map(median), drift: drift.map(median), toLast: toLast.map(median) };
  const shared = { labels: names, perLayer: 2 };
  const redraw = [
    lineChart(byId("norms"), {
      ...shared,
      series: () => [
        { name: "median of all tokens", kind: "one", dashed: true, values: medians.norm },
        { name: "selected token", kind: "one", values: here(norm) },
      ],
      logarithmic: true,
      format: (value) => (value === null ? "–" : `${Number(value.toPrecision(3))}`),
    }),
    lineChart(byId("cosines"), {
      ...shared,
      series: () => [
        { name: "with the last layer, median", kind: "three", dashed: true, values: medians.toLast },
        { name: "with the last layer", kind: "three", values: here(toLast) },
        { name: "with the point before, median", kind: "one", dashed: true, values: medians.drift },
        { name: "with the point before", kind: "one", values: here(drift) },
      ],
      format: number,
    }),
  ];
  drawKeys(byId("norm-keys"), [
    { kind: "one", name: "selected token" },
    { kind: "one", name: "median of all", dashed: true },
  ]);
  drawKeys(byId("cosine-keys"), [
    { kind: "one", name: "with the point before" },
    { kind: "three", name: "with the last layer" },
    { kind: "two", name: "medians", dashed: true },
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
