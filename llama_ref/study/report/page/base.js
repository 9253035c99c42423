// Shared by all sections: the data, the selection, elements, numbers as text, colours, and the card at the pointer.

const data = JSON.parse(document.getElementById("data").textContent);
const nTokens = data.tokens.length;
const nLayers = data.attention.sink.length;
const nHeads = data.attention.sink[0].length;
const pointNames = ["embedding", ...Array.from({ length: nLayers }, (_, layer) => `layer ${layer}`)];

const byId = (id) => document.getElementById(id);
const range = (n) => Array.from({ length: n }, (_, i) => i);
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

// Show an optional section and its link, or remove both. Returns whether the page has it.
function hasSection(name, found) {
  for (const own of [byId(name), byId(`${name}-link`)]) {
    if (found) own.hidden = false;
    else own.remove();
  }
  return Boolean(found);
}

// ---- what is selected; every section listens

const selection = { position: nTokens - 1, layer: 0, head: 0 };
const listeners = [];

function onSelect(listener) {
  listeners.push(listener);
}

function select(change) {
  Object.assign(selection, change);
  for (const listener of listeners) listener(change);
}

// ---- keys

const FAR = 20; // positions that Page Up and Page Down move

/** The position to which a key moves among n: one or FAR positions on, or an end; null for any other key. */
function keyedTo(key, at, n) {
  const to = { ArrowLeft: at - 1, ArrowRight: at + 1, PageUp: at - FAR, PageDown: at + FAR, Home: 0, End: n - 1 }[key];
  return to === undefined ? null : clamp(to, 0, n - 1);
}

// ---- elements; text from the model or prompt is only inserted as text

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null));
  return element;
}

function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Announce a change to screen readers: the page's only live region, so that it is announced once. */
function say(text) {
  byId("spoken").textContent = text;
}

function fillOptions(element, names, chosen = 0) {
  element.append(...names.map((name, i) => new Option(name, i, i === chosen, i === chosen)));
}

// ---- tokens

const labelOf = (id) => data.vocabulary[id][0];
const bytesOf = (id) => data.vocabulary[id][1];

/** A token's text; the mark of a space is pale, so that the word is easier to read. */
function tokenParts(id) {
  return labelOf(id)
    .split(/(␣+)/)
    .filter((part) => part)
    .map((part) => (part[0] === "␣" ? make("span", { class: "space" }, part) : part));
}

const tokenElement = (id) => make("span", { class: "token" }, ...tokenParts(id));

/** A token of the text and its position, as parts of a sentence. */
const tokenAt = (position) => [tokenElement(data.tokens[position]), ` @${position}`];

function shortened(text, length) {
  const letters = [...text];
  return letters.length > length ? `${letters.slice(0, length - 1).join("")}…` : text;
}

// ---- numbers

/** 0.62 -> 62%, 0.00062 -> 0.06%; smaller values in scientific notation: 3·10⁻⁶. */
function percent(share) {
  if (share === null) return "–";
  if (share !== 0 && share < 0.000095) return scientific(share);
  return `${(100 * share).toFixed(share >= 0.0995 || share === 0 ? 0 : share >= 0.00995 ? 1 : 2)}%`;
}

function scientific(value) {
  if (value === 0) return "0";
  const [digit, exponent] = value.toExponential(0).split("e");
  return `${digit.replace("-", "−")}·${power(Number(exponent))}`;
}

const power = (exponent) => `10${String(exponent).replace(/./g, (char) => (char === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[char]))}`;

const number = (value, digits = 2) => (value === null ? "–" : value.toFixed(digits));
const signed = (value) => (value === null ? "–" : `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(2)}`);
const whole = (value) => (value === null ? "–" : value.toLocaleString("en"));

/** Minimum and maximum of the values that are numbers; null if there are none. */
function extent(values) {
  const known = values.filter((value) => value !== null && Number.isFinite(value));
  return known.length ? [known.reduce((a, b) => Math.min(a, b)), known.reduce((a, b) => Math.max(a, b))] : null;
}

// ---- colours, read from the style sheet so that they follow the theme

const themed = [];
const probe = document.body.appendChild(make("span", { hidden: "" }));
let ramp = []; // [red, green, blue] of 511 strengths from -1 to 1
let pixels = []; // the same colours as ImageData's 32-bit numbers

function colour(name) {
  probe.style.color = `var(--${name})`;
  return getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map(Number);
}

const css = ([red, green, blue]) => `rgb(${red} ${green} ${blue})`;

/** 255 steps each way from the palest colour, 0, to the strongest: those below 0 have another hue. */
function makeRamp() {
  const stops = range(11).map((i) => colour(i < 5 ? `below-${5 - i}` : `scale-${i - 5}`));
  ramp = range(511).map((i) => {
    const at = (i / 510) * (stops.length - 1);
    const from = Math.min(Math.floor(at), stops.length - 2);
    return stops[from].map((value, c) => Math.round(value + (stops[from + 1][c] - value) * (at - from)));
  });
  pixels = ramp.map(asPixel);
}

const asPixel = ([red, green, blue]) => new Uint32Array(new Uint8Array([red, green, blue, 255]).buffer)[0];
const shadeIndex = (strength) => 255 + Math.round(255 * clamp(strength, -1, 1)); // of the ramp
const shade = (strength) => ramp[shadeIndex(strength)];

/** Black or white, whichever is easier to read on a colour: the contrast is at least 4.5 on any, which needs pure black. */
function inkOn(rgb) {
  const [r, g, b] = rgb.map((value) => ((value / 255 + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000000" : "#ffffff";
}

/** How strongly to shade a value, from 0 (or `least`) to 1, and the labels at both ends of the legend. */
const scales = {
  share: { strength: Math.sqrt, low: "0", high: "100%" },
  signed: { strength: (value) => value, least: -1, low: "−100%", high: "100%" },
  linear: (high, text) => ({ strength: (value) => value / (high || 1), low: "0", high: text }),
  logarithmic: (low) => ({
    strength: (value) => 1 - Math.log10(Math.max(value, low)) / Math.log10(low),
    low: percent(low),
    high: "100%",
  }),
};

function drawLegend(element, text, scale) {
  const bar = make("span", { class: "ramp" });
  const least = scale.least ?? 0;
  const shades = range(11).map((i) => css(shade(least + (i / 10) * (1 - least))));
  bar.style.background = `linear-gradient(to right, ${shades.join(", ")})`;
  element.replaceChildren(text, make("span", {}, scale.low), bar, make("span", {}, scale.high));
}

/** Call now and whenever the colours change. */
function onTheme(paint) {
  themed.push(paint);
  paint();
}

function recolour() {
  makeRamp();
  for (const paint of themed) paint();
}

function startTheme() {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const repaint = () => {
    byId("theme").textContent = isDark() ? "☀ Light" : "☾ Dark";
    recolour();
  };
  byId("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    repaint();
  });
  system.addEventListener("change", repaint);
  repaint();
}

// ---- the card

const MOST_IN_CARD = 10; // alternatives

const card = {
  element: byId("card"),
  of: null,

  /**
   * Beside what is between {left, top, bottom} in the window, below it where there is room. `of` is what the card is of: it
   * has the content that `describe` makes until it is of something else.
   */
  show(of, describe, rectangle) {
    if (of !== this.of) this.fill(describe());
    this.of = of;
    const { width, height } = this.element.getBoundingClientRect();
    const below = rectangle.bottom + 10 + height <= innerHeight;
    const top = below ? rectangle.bottom + 10 : Math.max(4, rectangle.top - height - 10);
    const left = clamp(rectangle.left, 8, Math.max(8, innerWidth - width - 8));
    this.element.style.transform = `translate(${Math.round(left)}px, ${Math.round(top)}px)`;
  },

  fill(content) {
    this.element.replaceChildren(...content.filter((part) => part !== null));
    this.element.hidden = false;
    say(this.element.innerText);
  },

  hide() {
    this.element.hidden = true;
    this.of = null;
  },
};
addEventListener("scroll", () => card.hide(), { passive: true });
addEventListener("keydown", (event) => event.key === "Escape" && card.hide());

const quiet = (...parts) => make("p", { class: "quiet" }, ...parts);
const title = (...parts) => make("p", { class: "head" }, ...parts);

/** Likeliest tokens with bars, as many as a card has room for; `actual` is marked if it is among them. */
function alternatives(ids, probabilities, actual = null) {
  const row = (id, share) => ({ label: tokenElement(id), share, text: percent(share), marked: id === actual });
  const list = barList(ids.slice(0, MOST_IN_CARD).map((id, i) => row(id, probabilities[i])));
  return ids.length > MOST_IN_CARD ? [list, quiet(`… and ${ids.length - MOST_IN_CARD} more`)] : [list];
}

/** Rows {label, share, text, kind, marked}: bars from the left, or, where some shares are below 0, from a line in between. */
function barList(rows) {
  const [low, high] = extent([0, ...rows.map((row) => row.share)]);
  const width = Math.max(high, low < 0 ? 0 : 1e-12) - low || 1;
  const list = make("div", { class: "bars" });
  for (const { label, share, text, kind = "", marked = false } of rows) {
    const fill = make("span", { class: `fill ${kind}` });
    fill.style.left = `${(100 * (Math.min(share ?? 0, 0) - low)) / width}%`;
    fill.style.width = `${(100 * Math.abs(share ?? 0)) / width}%`;
    label.classList.toggle("actual", marked);
    list.append(label, make("span", { class: "track" }, fill), make("span", { class: "share" }, text));
  }
  return list;
}
