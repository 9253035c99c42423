// Line charts in SVG, redrawn when their width changes.

const CHART_HEIGHT = 190;
const MARGIN = { left: 46, right: 12, top: 10, bottom: 34 };

const drawn = []; // functions that redraw each picture

/** Call `draw` with the element's width, now and when it changes; returns a function that redraws. */
function drawnToWidth(element, draw) {
  const again = () => element.clientWidth && draw(element.clientWidth);
  drawn.push(again);
  let width = 0;
  new ResizeObserver(() => {
    if (element.clientWidth !== width) {
      width = element.clientWidth;
      again();
    }
  }).observe(element);
  return again;
}

/** About `count` round numbers within the shown range. */
function ticks([low, high], count = 5) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
  const first = Math.ceil(low / step - 1e-9);
  return range(Math.max(1, Math.floor(high / step + 1e-9) - first + 1)).map((i) => (first + i) * step);
}

/** Powers of ten, few enough to be readable; 1 is one of them if it is in the range. */
function decades([low, high]) {
  const first = Math.ceil(Math.log10(low) - 1e-9);
  const last = Math.floor(Math.log10(high) + 1e-9);
  const step = Math.ceil((last - first + 1) / 6) || 1;
  const exponents = range(last - first + 1).map((i) => first + i);
  return exponents.filter((exponent) => exponent % step === 0).map((exponent) => 10 ** exponent);
}

/** A value's height in the chart; null if it has none. */
function heightScale(values, { logarithmic = false, upsideDown = false }) {
  const usable = values.filter((value) => value !== null && (!logarithmic || value > 0));
  let [low, high] = extent(usable) ?? (logarithmic ? [0.1, 1] : [0, 1]);
  if (logarithmic) [low, high] = [10 ** Math.floor(Math.log10(low)), 10 ** Math.ceil(Math.log10(high))];
  if (low === high) [low, high] = logarithmic ? [low / 10, high] : [low - 1, high + 1];
  const scaled = logarithmic ? Math.log10 : (value) => value;
  const [bottom, top] = [CHART_HEIGHT - MARGIN.bottom, MARGIN.top];
  const y = (value) => {
    if (value === null || (logarithmic && value <= 0)) return null;
    const share = (scaled(value) - scaled(low)) / (scaled(high) - scaled(low));
    return upsideDown ? top + share * (bottom - top) : bottom - share * (bottom - top);
  };
  return { y, ticks: logarithmic ? decades([low, high]) : ticks([low, high]) };
}

/**
 * Lines over the layers. `series`: [{name, values, kind, dashed}]; `places`: the name of each value's point; each layer has
 * `perLayer` points, after one for the embedding. A value that is null leaves a gap.
 */
function lineChart(element, { label, series, places, perLayer = 1, format, formatTick = format, describe = null, ...scaling }) {
  const reader = new Reader(element, label);
  return drawnToWidth(element, (width) => {
    const lines = series();
    const scale = heightScale(lines.flatMap((line) => line.values), scaling);
    const x = (i) => MARGIN.left + (i / Math.max(1, places.length - 1)) * (width - MARGIN.left - MARGIN.right);
    const chart = newChart(width, CHART_HEIGHT);
    drawHeights(chart, scale, formatTick, width);
    drawLayers(chart, (layer) => x((layer + 1) * perLayer), width, "after layer");
    for (const line of lines) drawCurve(chart, line, x, scale.y);
    element.replaceChildren(chart);
    const listed = (i) => lines.map((line) => make("p", {}, `${line.name}: ${format(line.values[i])}`));
    reader.read(chart, { n: places.length, x, describe: describe ?? ((i) => [title(places[i]), ...listed(i)]) });
  });
}

/** An empty picture; its parent element has the label. */
const newChart = (width, height) => svg("svg", { viewBox: `0 0 ${width} ${height}`, height, "aria-hidden": "true" });

function drawHeights(chart, scale, format, width) {
  for (const tick of scale.ticks) {
    const y = scale.y(tick);
    chart.append(svg("line", { class: "rule", x1: MARGIN.left, x2: width - MARGIN.right, y1: y, y2: y }));
    chart.append(svg("text", { x: MARGIN.left - 8, y: y + 4, "text-anchor": "end" }, format(tick)));
  }
}

/** Write the layers' numbers under the axis, as many as fit; -1 is the embedding. */
function drawLayers(chart, x, width, name, bottom = CHART_HEIGHT - MARGIN.bottom) {
  const write = (middle, y, text) => chart.append(svg("text", { x: middle, y, "text-anchor": "middle" }, text));
  const every = [1, 2, 5, 10, 20, 50].find((n) => n * (x(1) - x(0)) >= 22) ?? 100;
  write(x(-1), bottom + 17, "emb.");
  for (const layer of range(nLayers)) {
    if (layer % every === 0 && x(layer) - x(-1) >= 28) write(x(layer), bottom + 17, layer);
  }
  write((MARGIN.left + width - MARGIN.right) / 2, bottom + 32, name);
}

function drawCurve(chart, { values, kind, dashed = false }, x, y) {
  let path = "";
  let pen = "M";
  for (const [i, value] of values.entries()) {
    const height = y(value);
    if (height === null) {
      pen = "M";
      continue;
    }
    path += `${pen}${x(i).toFixed(1)},${height.toFixed(1)}`;
    pen = "L";
    const alone = [values[i - 1], values[i + 1]].every((other) => other === undefined || y(other) === null);
    if (alone) chart.append(svg("circle", { class: `dot ${kind}`, cx: x(i), cy: height, r: 3 }));
  }
  chart.append(svg("path", { class: `curve ${kind}${dashed ? " dashed" : ""}`, d: path }));
}

/** Shows a chart's numbers at one point: a rule and a card at the point nearest to the pointer, or chosen by keys. */
class Reader {
  constructor(element, label) {
    Object.assign(this, { element, places: [], at: null });
    element.tabIndex = 0;
    element.setAttribute("role", "application");
    element.setAttribute("aria-label", `${label}; arrow keys, Home, End, Page Up and Page Down move`);
    element.addEventListener("pointermove", (event) => this.point(event));
    element.addEventListener("pointerleave", () => this.leave());
    element.addEventListener("blur", () => this.leave());
    element.addEventListener("keydown", (event) => this.key(event));
  }

  /** Called after a chart was drawn: it has n points, the i-th at x(i) from the left; `describe(i)` is a card's content. */
  read(chart, { n, x, describe }) {
    if (this.at !== null) card.hide();
    this.at = null;
    this.places = range(n).map((i) => ({ x: x(i), describe: () => describe(i) }));
    this.rule = svg("line", { class: "here", y1: MARGIN.top, y2: chart.getAttribute("height") - MARGIN.bottom });
    this.rule.setAttribute("visibility", "hidden");
    chart.append(this.rule);
  }

  point({ clientX, clientY }) {
    const at = clientX - this.element.getBoundingClientRect().left;
    const distance = (i) => Math.abs(this.places[i].x - at);
    this.show(range(this.places.length).reduce((best, i) => (distance(i) < distance(best) ? i : best)), clientY, clientY);
  }

  key(event) {
    const n = this.places.length;
    const to = keyedTo(event.key, this.at ?? (event.key === "ArrowLeft" || event.key === "PageUp" ? n : -1), n);
    if (to === null) return;
    event.preventDefault();
    const { top, bottom } = this.element.getBoundingClientRect();
    this.show(to, top, bottom);
  }

  show(i, top, bottom) {
    const { x, describe } = this.places[i];
    this.at = i;
    this.rule.setAttribute("x1", x);
    this.rule.setAttribute("x2", x);
    this.rule.setAttribute("visibility", "visible");
    card.show(this.places[i], describe, { left: this.element.getBoundingClientRect().left + x + 12, top, bottom });
  }

  leave() {
    if (this.at === null) return;
    this.at = null;
    this.rule.setAttribute("visibility", "hidden");
    card.hide();
  }
}

/** A legend of lines [{kind, name, dashed}], {kinds, name} for several with one meaning, or {kind, name, square} for bars. */
function drawKeys(element, keys) {
  element.replaceChildren(
    ...keys.map(({ kind, kinds = [kind], name, dashed = false, square = false }) => {
      const sample = svg("svg", { viewBox: "0 0 24 10", "aria-hidden": "true" });
      if (square) sample.append(svg("rect", { class: kind, x: 7, y: 0, width: 10, height: 10, rx: 2 }));
      else sample.append(...kinds.map((of, i) => sampleLine(of, dashed, (10 * (i + 1)) / (kinds.length + 1))));
      return make("li", {}, sample, name);
    }),
  );
}

const sampleLine = (kind, dashed, y) =>
  svg("line", { class: `curve ${kind}${dashed ? " dashed" : ""}`, x1: 0, x2: 24, y1: y, y2: y });
