// Strips of tokens, and the strip that shows how likely the model found each.

class Strip {
  /** `describe(position)` gives the card's content, `hover` is told the position under the pointer, or null. */
  constructor(element, { label, describe = null, hover = () => {} }) {
    Object.assign(this, { element, describe, hover });
    this.chips = data.tokens.map((id, position) => this.chip(id, position));
    element.setAttribute("role", "toolbar");
    element.setAttribute("aria-label", label);
    for (const [position, chip] of this.chips.entries()) {
      element.append(chip);
      if (bytesOf(data.tokens[position])?.endsWith("0a")) element.append(make("br"));
    }
    element.addEventListener("pointerover", (event) => this.enter(event.target.closest(".chip")));
    element.addEventListener("pointerleave", () => this.enter(null));
    element.addEventListener("focusin", (event) => {
      if (event.target.matches(":focus-visible")) this.enter(event.target.closest(".chip"));
    });
    element.addEventListener("focusout", () => this.enter(null));
    element.addEventListener("click", (event) => this.pick(event.target.closest(".chip")));
    element.addEventListener("keydown", (event) => this.key(event));
    onSelect(({ position }) => position !== undefined && this.mark());
  }

  chip(id, position) {
    return make("button", { type: "button", class: "chip", "data-position": position }, ...tokenParts(id));
  }

  position(chip) {
    return chip?.dataset.position === undefined ? null : Number(chip.dataset.position);
  }

  enter(chip) {
    const position = this.position(chip);
    this.hover(position);
    if (chip && this.describe) card.show(chip, () => this.describe(position), chip.getBoundingClientRect());
    else card.hide();
  }

  pick(chip) {
    const position = this.position(chip);
    if (position !== null) select({ position });
  }

  /** Tab reaches only the selected token, and keys move from there: 500 tokens should not need 500 Tab stops. */
  key(event) {
    const position = this.position(event.target.closest(".chip"));
    const to = position === null ? null : keyedTo(event.key, position, nTokens);
    if (to === null) return;
    event.preventDefault();
    this.chips[to].focus();
  }

  mark() {
    for (const [position, chip] of this.chips.entries()) {
      const selected = position === selection.position;
      chip.setAttribute("aria-pressed", selected);
      chip.tabIndex = selected ? 0 : -1;
    }
    this.reveal(this.chips[selection.position]);
  }

  /** Scroll the strip, and not the page, until a chip is visible. */
  reveal(chip) {
    const strip = this.element;
    const top = chip.offsetTop - strip.offsetTop;
    const bottom = top + chip.offsetHeight;
    if (top < strip.scrollTop) strip.scrollTop = top - 12;
    if (bottom > strip.scrollTop + strip.clientHeight) strip.scrollTop = bottom + 12 - strip.clientHeight;
  }

  /** Shade every chip by strength(position) from 0 to 1; null leaves it unshaded. */
  shade(strength) {
    for (const [position, chip] of this.chips.entries()) {
      const strong = strength(position);
      const rgb = strong === null ? null : shade(strong);
      chip.style.backgroundColor = rgb ? css(rgb) : "";
      chip.style.color = rgb ? inkOn(rgb) : "";
    }
  }
}

/** A token's description: its text, position, id and bytes. */
function identity(id, position) {
  const bytes = bytesOf(id);
  return [
    title(tokenElement(id)),
    quiet(`position ${position} · id ${id}`, ...(bytes ? [" · bytes ", make("code", {}, bytes)] : [" · no text"])),
    data.parts[position] ? quiet("a part of ", make("span", { class: "token" }, data.parts[position])) : null,
  ];
}

function startTokens() {
  const { probability, rank, top_ids: ids, top_probabilities: probabilities } = data.predictions;
  const scale = scales.logarithmic(1e-4);

  function expected(position) {
    if (probability[position] === null && labelOf(data.tokens[position]) === "<|image|>") {
      return [quiet("The place of an image, which the model does not predict.")];
    }
    if (position === 0) return [quiet("The first token: there is nothing before it to predict it from.")];
    return [
      make("p", {}, `had probability ${percent(probability[position])}, rank ${whole(rank[position])}`),
      ...alternatives(ids[position - 1], probabilities[position - 1], data.tokens[position]),
    ];
  }

  const met = (position) => [...identity(data.tokens[position], position), ...expected(position)];
  const coming = () => [quiet("What the model would say next"), ...alternatives(ids[nTokens - 1], probabilities[nTokens - 1])];
  const strip = new Strip(byId("strip"), {
    label: "Tokens of the text",
    describe: (position) => (position === null ? coming() : met(position)),
  });
  strip.mark();
  strip.element.scrollTop = 0; // start at the beginning of the text
  strip.chips[0].classList.add("unknown");
  if (probabilities[nTokens - 1][0] !== null) {
    strip.element.append(make("span", { class: "chip coming" }, "→ ", ...tokenParts(ids[nTokens - 1][0])));
  }
  onTheme(() => {
    strip.shade((position) => (probability[position] === null ? null : scale.strength(probability[position])));
    drawLegend(byId("strip-legend"), "probability, log scale", scale);
  });
}

// ---- the bar on top

function startBar() {
  const step = (by) => select({ position: clamp(selection.position + by, 0, nTokens - 1) });
  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  const show = () => {
    byId("previous").disabled = selection.position === 0;
    byId("next").disabled = selection.position === nTokens - 1;
    byId("selected").replaceChildren(...tokenAt(selection.position));
  };
  onSelect(({ position }) => {
    if (position === undefined) return;
    show();
    say(`${byId("selected").textContent} is selected`);
  });
  show();
}
