// Where in the image tokens look: shares of patches over the grey image, for one token and one layer, or the mean over layers.

const STRONGEST_PATCHES = 6; // in the list
const SEEN_THROUGH = 0.8; // opacity of the strongest colour

/** A promise of a block's bytes: the browser inflates asynchronously. */
async function inflated(id) {
  const packed = Uint8Array.from(atob(byId(id).textContent), (char) => char.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** Shares of patches by token and cross-attention layer. */
class PatchShares {
  /** `layers`: the bytes of each layer, see study/report/image_packing.py. */
  constructor(layers) {
    this.layers = layers;
    this.nPatches = data.image.rows * data.image.columns;
  }

  /** A token's shares of all patches (rows × columns) in a layer, or the mean over all layers if `layer` is null; null if
   * the page does not have them. */
  of(position, layer) {
    const t = data.image.positions.indexOf(position);
    if (t < 0) return null;
    const chosen = layer === null ? range(this.layers.length) : [layer];
    return range(this.nPatches).map(
      (i) =>
        chosen.reduce((sum, own) => {
          const part = this.layers[own][t * this.nPatches + i] / 255;
          return sum + part * part * data.image.largest[own][t];
        }, 0) / chosen.length,
    );
  }
}

/** The share of class tokens or of patches beside the image, in one layer or as the mean over all. */
function besidePatches(name, position, layer) {
  const found = data.image[name].map((shares) => shares[position]);
  return layer === null ? found.reduce((sum, share) => sum + share, 0) / found.length : found[layer];
}

/** The center of a patch in the image's pixels; the last patches may reach beyond the image. */
function patchMiddle(patch) {
  const { columns, width, height, patch_width: wide, patch_height: high } = data.image;
  const [left, top] = [(patch % columns) * wide, Math.floor(patch / columns) * high];
  return [(left + Math.min(left + wide, width)) / 2, (top + Math.min(top + high, height)) / 2].map(Math.round);
}

async function startImage() {
  if (!hasSection("image", data.image)) return;
  const { before } = data.image;
  const layers = ["mean over layers", ...before.map((layer, i) => `cross layer ${i} (before layer ${layer})`)];
  fillOptions(byId("image-layer"), layers);
  const view = { layer: null, hovered: null };
  const at = () => view.hovered ?? selection.position;
  const strip = new Strip(byId("image-looks"), {
    label: "Tokens of the text, to see where in the image each looks",
    hover: (position) => {
      view.hovered = position;
      show();
      if (position !== null) say(byId("image-shares").innerText);
    },
  });
  for (const [position, chip] of strip.chips.entries()) {
    chip.classList.toggle("unknown", !data.image.positions.includes(position));
  }
  const [pixels, ...packed] = await Promise.all(
    ["image-pixels", ...before.map((_, i) => `image-layer-${i}`)].map(inflated),
  );
  const shares = new PatchShares(packed);
  const picture = greyPicture(pixels);

  function show() {
    const found = shares.of(at(), view.layer);
    const scale = { ...scales.linear(1), strength: (share) => Math.sqrt(share / (extent(found)[1] || 1)) };
    drawImage(picture, found, scale);
    showPatches(at(), view.layer, found);
    for (const [position, chip] of strip.chips.entries()) chip.classList.toggle("source", position === at());
    byId("image-legend").hidden = !found;
    if (found) drawLegend(byId("image-legend"), "share of a patch, square-root scale", { ...scale, high: percent(extent(found)[1]) });
  }

  byId("image-layer").addEventListener("change", (event) => {
    const chosen = Number(event.target.value);
    view.layer = chosen === 0 ? null : chosen - 1;
    show();
  });
  onSelect(({ position }) => position !== undefined && show());
  strip.mark();
  drawnToWidth(byId("image-picture"), show);
  onTheme(show);
}

/** The image on a separate canvas, pale, so that colours are visible over it. */
function greyPicture(pixels) {
  const [width, height] = data.image.size;
  const canvas = make("canvas", { width, height });
  const image = new ImageData(width, height);
  for (const [i, grey] of pixels.entries()) image.data.set([grey, grey, grey, 255], 4 * i);
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

/** Draw the picture over the page's background, and a colour over each patch, stronger for larger shares. */
function drawImage(picture, shares, scale) {
  const { width, height, rows, columns, patch_width: wide, patch_height: high } = data.image;
  const box = byId("image-picture");
  const canvas = box.firstElementChild;
  const zoom = Math.min(box.clientWidth / width, 520 / height);
  const density = paper.on ? paper.density : devicePixelRatio || 1;
  canvas.width = Math.max(1, Math.round(width * zoom * density));
  canvas.height = Math.max(1, Math.round(height * zoom * density));
  canvas.style.width = `${width * zoom}px`;
  canvas.style.height = `${height * zoom}px`;
  const context = canvas.getContext("2d");
  context.fillStyle = css(colour("panel"));
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.globalAlpha = 0.5;
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  if (!shares) return;
  for (let i = 0; i < rows * columns; i++) {
    const strength = scale.strength(shares[i]);
    const edges = [(i % columns) * wide, Math.floor(i / columns) * high].map((edge) => edge * zoom * density);
    const ends = [((i % columns) + 1) * wide, (Math.floor(i / columns) + 1) * high].map((edge) => edge * zoom * density);
    const [left, top, right, bottom] = [...edges, ...ends].map(Math.round);
    context.globalAlpha = SEEN_THROUGH * strength;
    context.fillStyle = css(shade(strength));
    context.fillRect(left, top, right - left, bottom - top);
  }
}

/** List the largest shares by position, and the shares without a position. */
function showPatches(position, layer, shares) {
  const head = make("h3", {}, ...tokenAt(position), " looks at");
  if (!shares) {
    const sees = data.image.seen_by.includes(position);
    byId("image-shares").replaceChildren(head, quiet(sees ? "Not kept: only the last tokens are." : "It does not see the image."));
    return;
  }
  const row = (text, share, kind = "") => ({ label: make("span", {}, text), share, text: percent(share), kind });
  const strongest = range(shares.length).sort((a, b) => shares[b] - shares[a]).slice(0, STRONGEST_PATCHES);
  const listed = strongest.reduce((sum, patch) => sum + shares[patch], 0);
  const rest = shares.reduce((sum, share) => sum + share, 0) - listed;
  const rows = [
    ...strongest.map((patch) => row(`at (${patchMiddle(patch).join(", ")})`, shares[patch])),
    row("other patches", rest, "rest"),
    row("class tokens", besidePatches("class_tokens", position, layer), "rest"),
    row("beside the image", besidePatches("beside", position, layer), "rest"),
  ];
  byId("image-shares").replaceChildren(head, barList(rows));
}
