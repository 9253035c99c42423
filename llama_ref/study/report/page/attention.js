// Where heads look: one head's shares over the text, all heads' habits, and the head's whole pattern.

const LISTED = 8; // shares in the list
const HELD = 12; // decoded heads
const LEAST = 16; // as float16's bits: what is less, about 10⁻⁶, has not even one digit that is sure
const HABITS = {
  sink: ["the first token", "Mean share that later tokens give to the first. A head that finds nothing looks there."],
  previous: ["the token before", "Mean share given to the token just before."],
  induction: ["induction", "On random tokens that come twice: the share given to what followed the first time."],
  entropy: ["entropy", "Of where tokens look, in nats: little where few tokens get all."],
};

// ---- packed patterns, see study/report/packing.py

const decoded = new Map();

/** A head's pattern; a promise, for the browser inflates beside. */
function patternOf(layer, head) {
  const key = `${layer}.${head}`;
  const found = decoded.get(key) ?? decode(layer, head);
  decoded.delete(key);
  decoded.set(key, found); // the last one used is the last one to go
  if (decoded.size > HELD) decoded.delete(decoded.keys().next().value);
  return found;
}

async function decode(layer, head) {
  const packed = atob(byId(`layer-${layer}`).textContent.split(" ")[head]);
  const stream = new Blob([Uint8Array.from(packed, (char) => char.charCodeAt(0))]).stream();
  const bytes = await new Response(stream.pipeThrough(new DecompressionStream("deflate"))).arrayBuffer();
  return new Pattern(new Uint8Array(bytes));
}

/** Of two bytes, none of them a share below 0; NaN for whatever is no number. */
function float16(bits) {
  const [exponent, fraction] = [bits >> 10, bits & 1023];
  if (exponent >= 31) return NaN;
  return exponent ? (1024 + fraction) * 2 ** (exponent - 25) : fraction * 2 ** -24;
}

/** The shares of all tokens; those that were not kept are drawn as equal parts of what is left over. */
class Pattern {
  /** `packed`: of the keys' distances and then of the shares, all low bytes and then all high ones. */
  constructor(packed) {
    const n = nTokens * data.kept;
    const at = (matrix, i) => packed[2 * n * matrix + i] + 256 * packed[2 * n * matrix + n + i];
    this.bits = new Uint16Array(nTokens * nTokens); // shares as they come, half the size of what they are
    this.restEach = new Float32Array(nTokens);
    this.least = new Float32Array(nTokens); // of what was kept: no other share is larger
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
    const whole = this.isWhole(t); // then what is left over is what was rounded
    this.restEach[t] = whole ? 0 : Math.max(0, rest) / (t + 1 - shares.length);
    this.least[t] = whole ? float16(LEAST) : Math.min(...shares);
  }

  /** What token t gives to token s: null if that is not a number, undefined if s comes later. */
  share(t, s) {
    if (s > t) return undefined;
    const share = this.kept(t, s) ? float16(this.bits[t * nTokens + s]) : this.restEach[t];
    return Number.isNaN(share) ? null : share;
  }

  /** Whether every share of a token's was kept, but for those that are next to nothing. */
  isWhole(t) {
    return t < data.kept;
  }

  /** Whether a share was kept on its own. */
  kept(t, s) {
    return this.bits[t * nTokens + s] >= LEAST;
  }
}

// ---- the explorer

function startAttention() {
  const explorer = { pattern: null, hovered: null, direction: "from" };
  const at = () => explorer.hovered ?? selection.position;
  /** What is between the token looked from (or at) and another one. */
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

  /** `stale`: the pattern is another one, or its colours are. */
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
    if (layer !== selection.layer || head !== selection.head) return; // another was chosen meanwhile
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
  byId("shares").style.minHeight = `${1.75 * (Math.min(nTokens, LISTED + 1) + 1)}rem`; // what is below stays where it is
  strip.mark();
  onTheme(() => {
    drawLegend(byId("looks-legend"), "share, square-root scale", scales.share);
    showLooks(true);
  });
  showHead();
}

/** The largest shares with their tokens, and what all others have together. */
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
    if (event.metaKey) return; // Ctrl and Alt are how many keyboards write a bracket
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
    known || pattern.isWhole(row) ? null : quiet("not kept; drawn at the mean of what was not"),
  ];
}
