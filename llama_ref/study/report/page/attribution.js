// Attribution of the target's logit: bars by layer with their running sum, and the strongest parts by name.

const STRONGEST = 14; // parts in the list
const LISTED_OF_A_LAYER = 4; // heads in a card
const BARS_HEIGHT = 210;
const SUM_HEIGHT = 110;

/**
 * Embedding and layers in the order in which they write: {name, attention, ffn, cross, soFar, strongest}. `cross` is what the
 * cross-attention layer before a layer wrote, where there is one.
 */
function writers({ embedding, heads, ffns, cross }) {
  const found = [{ name: "embedding", attention: 0, ffn: 0, cross: 0, soFar: embedding, strongest: [] }];
  const ofCross = new Map(cross);
  for (const [layer, shares] of heads.entries()) {
    const attention = shares.reduce((a, b) => a + b, 0);
    const image = ofCross.get(layer) ?? 0;
    const soFar = found[layer].soFar + image + attention + ffns[layer];
    const ordered = strongestFirst(shares.map((share, head) => ({ name: `head ${head}`, share })));
    const strongest = ordered.slice(0, LISTED_OF_A_LAYER);
    found.push({ name: `layer ${layer}`, attention, ffn: ffns[layer], cross: image, soFar, strongest });
  }
  return found;
}

const strongestFirst = (parts) => parts.sort((a, b) => Math.abs(b.share) - Math.abs(a.share));

function partsByName({ embedding, heads, ffns, cross }) {
  return strongestFirst([
    { name: "embedding", share: embedding, kind: "embedding" },
    ...heads.flatMap((shares, layer) =>
      shares.map((share, head) => ({ name: `layer ${layer} head ${head}`, share, kind: "", layer, head })),
    ),
    ...cross.map(([, share], i) => ({ name: `cross layer ${i}`, share, kind: "cross" })),
    ...ffns.map((share, layer) => ({ name: `layer ${layer} feed-forward`, share, kind: "ffn" })),
  ]);
}

function startAttribution() {
  const found = data.attribution;
  byId("attribution-title").replaceChildren("What wrote the logit of ", tokenElement(data.target));
  byId("attribution-pictures").hidden = !found;
  if (!found) {
    byId("sum").textContent = `No attribution: ${data.not_attributed}`;
    return;
  }
  const parts = writers(found);
  const attention = parts.reduce((sum, part) => sum + part.attention, 0);
  const ffn = parts.reduce((sum, part) => sum + part.ffn, 0);
  const cross = parts.reduce((sum, part) => sum + part.cross, 0);
  const image = found.cross.length ? `, the image ${signed(cross)}` : "";
  byId("sum").textContent =
    `Embedding ${signed(found.embedding)}${image}, attention ${signed(attention)} and feed-forward ${signed(ffn)} add up to ` +
    `${signed(found.total)}. The model’s own logit is ${signed(found.logit)}: ` +
    `the difference, ${scientific(found.rounding)}, is rounding.`;
  drawKeys(byId("attribution-keys"), [
    { kind: "attention", name: "attention, all heads", square: true },
    { kind: "ffn", name: "feed-forward", square: true },
    ...(found.cross.length ? [{ kind: "cross", name: "the image, before a layer", square: true }] : []),
    { kind: "sum-line", name: "sum so far" },
  ]);
  const reader = new Reader(byId("by-layer"), "Shares of the logit by layer");
  drawnToWidth(byId("by-layer"), (width) => drawByLayer(reader, parts, width));
  byId("strongest").replaceChildren(barList(partsByName(found).slice(0, STRONGEST).map(strongestRow)));
}

/** A part's name; a head's is a button that opens it in the explorer. */
function strongestRow({ name, share, kind, layer, head }) {
  let label = make("span", {}, name);
  if (head !== undefined) {
    label = make("button", { type: "button", title: "Show where it looks" }, name);
    label.addEventListener("click", () => {
      select({ layer, head, position: nTokens - 1 });
      byId("attention").scrollIntoView();
    });
  }
  return { label, share, text: signed(share), kind };
}

function drawByLayer(reader, parts, width) {
  const height = SUM_HEIGHT + BARS_HEIGHT;
  const step = (width - MARGIN.left - MARGIN.right) / parts.length;
  const x = (i) => MARGIN.left + (i + 0.5) * step;
  const chart = newChart(width, height);
  const sums = bounded([0, ...parts.map((part) => part.soFar)], MARGIN.top, SUM_HEIGHT - 14);
  drawAxis(chart, sums, 3, width);
  drawCurve(chart, { values: parts.map((part) => part.soFar), kind: "sum-line" }, x, sums.y);
  for (const [i, { soFar }] of parts.entries()) {
    chart.append(svg("circle", { class: "dot sum-line", cx: x(i), cy: sums.y(soFar), r: 2.2 }));
  }
  const ends = parts.flatMap(({ attention, ffn, cross }) => [
    cross,
    ...[Math.max, Math.min].map((further) => further(attention, 0) + further(ffn, 0)),
  ]);
  const bars = bounded([0, ...ends], SUM_HEIGHT + 6, height - MARGIN.bottom);
  drawAxis(chart, bars, 5, width);
  for (const [i, part] of parts.entries()) {
    drawStack(chart, part, x(i), Math.max(1, Math.min(26, 0.72 * step)), bars.y);
    if (part.cross) drawBar(chart, { from: 0, to: part.cross, kind: "cross" }, x(i - 0.5), Math.max(1, Math.min(8, 0.2 * step)), bars.y);
  }
  drawLayers(chart, (layer) => x(layer + 1), width, "layer", height - MARGIN.bottom);
  reader.element.replaceChildren(chart);
  reader.read(chart, { n: parts.length, x, describe: (i) => describeWriter(parts[i]) });
}

function bounded(values, top, bottom) {
  let [low, high] = extent(values);
  if (low === high) high = low + 1;
  return { low, high, y: (value) => bottom - ((value - low) / (high - low)) * (bottom - top) };
}

function drawAxis(chart, { low, high, y }, count, width) {
  for (const tick of ticks([low, high], count)) {
    const at = y(tick);
    chart.append(svg("line", { class: tick ? "rule" : "zero", x1: MARGIN.left, x2: width - MARGIN.right, y1: at, y2: at }));
    chart.append(svg("text", { x: MARGIN.left - 8, y: at + 4, "text-anchor": "end" }, `${Number(tick.toPrecision(4))}`));
  }
}

/** A layer's bars: attention next to the zero line, the feed-forward layer beyond it, or opposite if the signs differ. */
function drawStack(chart, { attention, ffn }, x, width, y) {
  const beside = attention * ffn > 0 ? attention : 0;
  drawBar(chart, { from: 0, to: attention, kind: "attention" }, x, width, y);
  drawBar(chart, { from: beside, to: beside + ffn, kind: "ffn" }, x, width, y);
}

function drawBar(chart, { from, to, kind }, x, width, y) {
  const [top, bottom] = [y(Math.max(from, to)), y(Math.min(from, to))];
  chart.append(svg("rect", { class: kind, x: x - width / 2, y: top, width, height: bottom - top }));
}

function describeWriter({ name, attention, ffn, cross, soFar, strongest }) {
  if (!strongest.length) return [title(name), make("p", {}, signed(soFar))];
  return [
    title(name),
    make("p", {}, `attention ${signed(attention)} · feed-forward ${signed(ffn)}`),
    cross ? make("p", {}, `before it, the image ${signed(cross)}`) : null,
    make("p", {}, `sum so far ${signed(soFar)}`),
    barList(strongest.map(({ name: head, share }) => ({ label: make("span", {}, head), share, text: signed(share) }))),
  ];
}
