// The features of a sparse dictionary that fire at a token, and all tokens at which one of them fires.

/** A feature's value at every token: 0 where it does not fire. */
function valuesOf(feature) {
  const values = new Float32Array(nTokens);
  for (const [position, value] of data.features.values[feature] ?? []) values[position] = value;
  return values;
}

const figure = (value) => String(Number(value.toPrecision(3)));

function featuresLead() {
  const { name, form, where, legend, n_features: all, counts } = data.features;
  const mean = counts.reduce((sum, count) => sum + count, 0) / nTokens;
  return `${name} (${form}): ${whole(all)} features of ${where}. ${number(mean, 1)} fire at a token. ${legend}`;
}

function startFeatures() {
  if (!hasSection("features", data.features)) return;
  byId("features-lead").textContent = featuresLead();
  const { strongest, counts } = data.features;
  const view = { feature: null, hovered: null };
  const at = () => view.hovered ?? selection.position;
  const strip = new Strip(byId("features-strip"), {
    label: "Tokens of the text, shaded by a feature",
    hover: (position) => {
      view.hovered = position;
      show();
      if (position !== null) say(byId("features-list").innerText);
    },
  });

  /** Without a chosen feature, the strongest of the selected token is shaded. */
  const shaded = () => view.feature ?? strongest[selection.position][0] ?? null;

  function row(feature) {
    const value = valuesOf(feature)[at()];
    const label = make("button", { type: "button", title: "Shade the text by it", "data-feature": feature }, `${feature}`);
    label.addEventListener("click", () => {
      view.feature = feature;
      show();
      say(`Feature ${feature} shades the text`);
    });
    return { label, share: value, text: figure(value), marked: feature === shaded() };
  }

  function show() {
    const feature = shaded();
    const values = feature === null ? null : valuesOf(feature);
    const high = values ? extent([...values].map(Math.abs))[1] : 0;
    strip.shade((position) => (values && values[position] !== 0 ? Math.abs(values[position]) / (high || 1) : null));
    for (const [position, chip] of strip.chips.entries()) chip.classList.toggle("source", position === at());
    byId("features-legend").hidden = feature === null;
    if (feature !== null) drawLegend(byId("features-legend"), `feature ${feature}`, scales.linear(high, figure(high)));
    const listed = strongest[at()];
    const head = make("h3", {}, "Features at ", ...tokenAt(at()));
    const left = counts[at()] - listed.length;
    byId("features-list").replaceChildren(
      head,
      ...(listed.length ? [barList(listed.map(row))] : [quiet("No feature fires here.")]),
      ...(left > 0 ? [quiet(`… and ${whole(left)} more`)] : []),
    );
  }

  onSelect(({ position }) => {
    if (position === undefined) return;
    view.feature = null;
    show();
  });
  strip.mark();
  onTheme(show);
}
