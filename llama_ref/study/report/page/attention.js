// Where heads look: one head's shares over the text, all heads' habits, and the head's whole pattern.

const LISTED = 8; // shares in the list
const HELD = 12; // decoded heads
const LEAST = 16; // float16 bits, about 10⁻⁶: smaller shares do not have even one correct digit
const HABITS = {
  sink: ["the first token", "Mean share that later tokens give to the first. A head that finds nothing looks there."],
  previous: ["the token before", "Mean share given to the token just before."],
  induction: ["induction", "On repeated random tokens: mean share given to the token that followed the first time."],
  entropy: ["entropy", "Mean entropy of the shares in nats: low where few tokens get most of the attention."],
};

// ---- packed patterns, see study/report/packing.py

const decoded = new Map();

/** A promise of a head's pattern: the browser inflates asynchronously. */
function patternOf(layer, head) {
  const key = `${layer}.${head}`;
  const found = decoded.get(key) ?? decode(layer, head);
  decoded.delete(key);
  decoded.set(key, found); // moved to the end: the least recently used pattern is dropped first
  if (decoded.size > HELD) decoded.delete(decoded.keys().next().value);
  return found;
}

async function decode(layer, head) {
  const packed = atob(byId(`layer-${layer}`).textContent.split(" ")[head]);
  const stream = new Blob([Uint8Array.from(packed, (char) => char.charCodeAt(0))]).stream();
  const bytes = await new Response(stream.pipeThrough(new DecompressionStream("deflate"))).arrayBuffer();
  return new Pattern(new Uint8Array(bytes));
}

/** Decode a float16 that is not negative; NaN if it is not finite. */
function float16(bits) {
  const [exponent, fraction] = [bits >> 10, bits & 1023];
  if (exponent >= 31) return NaN;
  return exponent ? (1024 + fraction) * 2 ** (exponent - 25) : fraction * 2 ** -24;
}

/** The shares of all tokens; shares that were not kept are drawn as equal parts of the remainder. */
class Pattern {
  /** `packed`: the keys' distances, then the shares; of each, all low bytes and then all high bytes. */
  constructor(packed) {
    const n = nTokens * data.kept;
    const at = (matrix, i) => packed[2 * n * matrix + i] + 256 * packed[2 * n * matrix + n + i];
    this.bits = new Uint16Array(nTokens * nTokens); // shares as float16 bits, half the size of float32
    this.restEach = new Float32Array(nTokens);
    this.least = new Float32Array(nTokens); // the smallest kept share: no other share is larger
    for (let t = 0; t < nTokens; t++) this.unpackRow(t, at);
  }

  unpackRow(t, at) {
    let key = 0;
    const shares = [];
    for (let i = t * data.kept; i < (t + 1) * data.kept; i++) {
      key += at(0, i);
      this.bits[t * nTokens + key] = at(1, i);
      if (key <= t && this.kept(t, key)) shares.push(float16(at(1, i)));
    }
    const rest = 1 - shares.reduce((sum, share) => sum + share, 0);
    const whole = this.isWhole(t); // then the remainder is only rounding
    this.restEach[t] = whole ? 0 : Math.max(0, rest) / (t + 1 - shares.length);
    this.least[t] = whole ? float16(LEAST) : Math.min(...shares);
  }

  /** The share that token t gives to token s: null if it is not a number, undefined if s comes later. */
  share(t, s) {
    if (s > t) return undefined;
    const share = this.kept(t, s) ? float16(this.bits[t * nTokens + s]) : this.restEach[t];
    return Number.isNaN(share) ? null : share;
  }

  /** Whether every share of a token was kept, except negligible ones. */
  isWhole(t) {
    return t < data.kept;
  }

  /** Whether a share was kept. */
  kept(t, s) {
    return this.bits[t * nTokens + s] >= LEAST;
  }
}

// ---- the explorer

function startAttention() {
  const explorer = { pattern: null, hovered: null, direction: "from" };
  const at = () => explorer.hovered ?? selection.position;
  /** The share between the explored token and another, in the chosen direction. */
  const share = (other) => {
    const [looking, seen] = explorer.direction === "from" ? [at(), other] : [other, at()];
    return explorer.pattern.share(looking, seen);
  };

  const strip = new Strip(byId("looks"), {
    label: "Tokens of the text, shaded by attention",
    hover: (position) => {
      if (explorer.hovered === position) return;
      explorer.hovered = position;
      showLooks();
      if (position !== null) say(byId("shares").innerText);
    },
  });
  const map = headsMap();
  const grid = patternGrid(explorer);

  /** `stale`: the pattern or its colours have changed. */
  function showLooks(stale = false) {
    if (!explorer.pattern) return;
    strip.shade((position) => {
      const found = share(position);
      return found === undefined ? null : scales.share.strength(found ?? 0);
    });
    for (const [position, chip] of strip.chips.entries()) chip.classList.toggle("source", position === at());
    showShares(explorer, at(), share);
    grid.paint(stale);
  }

  async function showHead() {
    const { layer, head } = selection;
    byId("layer").value = layer;
    byId("head").value = head;
    byId("habits").textContent = headHabits(layer, head);
    map.paint();
    const pattern = await patternOf(layer, head);
    if (layer !== selection.layer || head !== selection.head) return; // another head was chosen while this one was decoded
    explorer.pattern = pattern;
    byId("pattern-title").textContent = `Layer ${layer}, head ${head}: the whole pattern`;
    showLooks(true);
  }

  onSelect(({ layer, head }) => {
    if (layer === undefined && head === undefined) return showLooks();
    say(`Layer ${selection.layer}, head ${selection.head}. ${headHabits(selection.layer, selection.head)}`);
    return showHead();
  });
  byId("direction").addEventListener("change", (event) => {
    explorer.direction = event.target.value;
    showLooks();
  });
  startHeadControls();
  byId("shares").style.minHeight = `${1.75 * (Math.min(nTokens, LISTED + 1) + 1)}rem`; // keeps the content below in place
  strip.mark();
  onTheme(() => {
    drawLegend(byId("looks-legend"), "share, square-root scale", scales.share);
    showLooks(true);
  });
  showHead();
}

/** The largest shares with their tokens, and the sum of all others. */
function showShares({ pattern, direction }, at, share) {
  const from = direction === "from";
  const found = range(nTokens)
    .filter((other) => (from ? other <= at && pattern.kept(at, other) : other >= at && pattern.kept(other, at)))
    .sort((a, b) => share(b) - share(a));
  const place = (other) => make("span", { class: "at" }, ` @${other}`);
  const rows = found.slice(0, LISTED).map((other) => ({
    label: make("span", { "data-position": other }, tokenElement(data.tokens[other]), place(other)),
    share: share(other),
    text: percent(share(other)),
  }));
  if (from && pattern.share(at, 0) !== null) {
    const listed = new Set(found.slice(0, LISTED));
    const left = range(at + 1).reduce((sum, other) => sum + (listed.has(other) ? 0 : share(other)), 0);
    if (left > 0.00995) rows.push({ label: make("span", {}, "elsewhere"), share: left, text: percent(left), kind: "rest" });
  }
  const head = make("h3", {}, ...tokenAt(at), from ? " looks at" : " is looked at by");
  byId("shares").replaceChildren(head, rows.length ? barList(rows) : quiet("No share large enough to be kept."));
}

function startHeadControls() {
  fillOptions(byId("layer"), range(nLayers));
  fillOptions(byId("head"), range(nHeads));
  byId("layer").addEventListener("change", (event) => select({ layer: Number(event.target.value) }));
  byId("head").addEventListener("change", (event) => select({ head: Number(event.target.value) }));
  const step = (by) => {
    const to = clamp(selection.layer * nHeads + selection.head + by, 0, nLayers * nHeads - 1);
    select({ layer: Math.floor(to / nHeads), head: to % nHeads });
  };
  byId("head-before").addEventListener("click", () => step(-1));
  byId("head-after").addEventListener("click", () => step(1));
  addEventListener("keydown", (event) => {
    if (event.metaKey) return; // not Ctrl and Alt: on many keyboards a bracket needs them
    if (event.key === "[") step(-1);
    if (event.key === "]") step(1);
  });
}

function headHabits(layer, head) {
  const { sink, previous, induction, entropy } = data.attention;
  return (
    `Gives ${percent(sink[layer][head])} to the first token and ${percent(previous[layer][head])} to the one before; ` +
    `induction ${percent(induction[layer][head])}, entropy ${number(entropy[layer][head])} nats.`
  );
}

// ---- all heads

function headsMap() {
  let habit = "sink";
  let scale;
  const values = () => data.attention[habit];
  const grid = new Grid(byId("heads-grid"), {
    label: "All heads: layers by heads",
    rows: nLayers,
    columns: nHeads,
    rowName: (row) => `layer ${row}`,
    columnName: String,
    strength: (row, column) => (values()[row][column] === null ? null : scale.strength(values()[row][column])),
    describe: (row, column) => [title(`layer ${row}, head ${column}`), make("p", {}, headHabits(row, column))],
    pick: (layer, head) => select({ layer, head }),
    marked: () => ({ row: selection.layer, column: selection.head }),
    size: (space) => [fitTo(space, nHeads, 44), nLayers > 20 ? 14 : 18],
  });
  const show = () => {
    const high = extent(values().flat())?.[1] ?? 1;
    scale = habit === "entropy" ? scales.linear(high, `${number(high, 1)} nats`) : scales.linear(1, "100%");
    byId("habit-note").textContent = HABITS[habit][1];
    drawLegend(byId("heads-legend"), "", scale);
    grid.paint();
  };
  byId("habit").append(...Object.entries(HABITS).map(([name, [text]]) => new Option(text, name)));
  byId("habit").addEventListener("change", (event) => {
    habit = event.target.value;
    show();
  });
  onTheme(show);
  return grid;
}

// ---- the whole pattern

function patternGrid(explorer) {
  const marked = () => ({ [explorer.direction === "from" ? "row" : "column"]: explorer.hovered ?? selection.position });
  byId("pattern-note").textContent =
    "Rows look, columns are looked at." +
    (data.kept < nTokens ? ` Each row keeps its ${data.kept} largest shares; the others are drawn at their mean.` : "");
  const grid = new Grid(byId("pattern-grid"), {
    label: "Attention pattern: tokens by tokens",
    rows: nTokens,
    columns: nTokens,
    rowName: (row) => (nTokens <= 30 ? shortened(labelOf(data.tokens[row]), 12) : String(row)),
    columnName: (column) => labelOf(data.tokens[column]),
    strength: (row, column) => {
      const share = explorer.pattern?.share(row, column);
      return share ? scales.share.strength(share) : share;
    },
    describe: (row, column) => describeShare(explorer.pattern, row, column),
    pick: (row, column) => select({ position: explorer.direction === "from" ? row : column }),
    marked,
    size: (space) => range(2).fill(fitTo(Math.min(space, 560), nTokens, 56)),
  });
  return grid;
}

function describeShare(pattern, row, column) {
  const share = pattern.share(row, column);
  const known = share === null || pattern.kept(row, column);
  return [
    make("p", {}, ...tokenAt(row), " looks at ", ...tokenAt(column)),
    title(known ? percent(share) : `at most ${percent(pattern.least[row])}`),
    known || pattern.isWhole(row) ? null : quiet("not kept; drawn at the mean of the shares not kept"),
  ];
}
