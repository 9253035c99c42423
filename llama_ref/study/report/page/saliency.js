// Which tokens made the prediction: shares by gradients, shaded on the text, and the strongest by name.

const MOST_SALIENT = 14; // tokens in the list

const SALIENCY_LEADS = {
  integrated:
    "Integrated gradients: the tokens’ embeddings move from a baseline to their actual values, and the change of the " +
    "prediction is divided among them.",
  "gradient×input": "Each token’s embedding times the gradient of the prediction by it.",
  gradient: "The length of the prediction’s gradient by each token’s embedding: the effect of a small change there.",
};

function startSaliency() {
  const found = data.saliency;
  if (!hasSection("saliency", found)) return;
  const what = found.of === "logit" ? "logit" : "log-probability";
  const of = make("span", { class: "token" }, found.answer);
  const against = found.other === null ? [] : [" over ", make("span", { class: "token" }, found.other)];
  byId("saliency-title").replaceChildren(`Which tokens made the ${what} of `, of, ...against);
  const kept = found.positions.length < nTokens ? " Tokens without a share did not move." : "";
  byId("saliency-lead").textContent = SALIENCY_LEADS[found.method] + " Underlined: a share below 0." + kept;
  byId("saliency-sum").textContent = saliencySum(found);

  const largest = found.shares.reduce((most, share) => Math.max(most, Math.abs(share ?? 0)), 0);
  const scale = scales.linear(largest, largest.toFixed(2));
  const shared = new Set(found.positions);
  const strip = new Strip(byId("saliency-strip"), {
    label: "Tokens, shaded by their shares",
    describe: (position) =>
      position === null
        ? []
        : [
            ...identity(data.tokens[position], position),
            make("p", {}, shared.has(position) ? `share ${signed(found.shares[position])}` : "no share: it did not move"),
          ],
  });
  strip.mark();
  for (const [position, chip] of strip.chips.entries()) {
    chip.classList.toggle("unknown", !shared.has(position));
    chip.classList.toggle("against", (found.shares[position] ?? 0) < 0);
  }
  onTheme(() => {
    strip.shade((position) => {
      const share = found.shares[position];
      return share === null || !shared.has(position) ? null : scale.strength(Math.abs(share));
    });
    drawLegend(byId("saliency-legend"), "size of the share", scale);
  });
  const rows = found.positions.map((position) => ({ position, share: found.shares[position] }));
  rows.sort((a, b) => Math.abs(b.share) - Math.abs(a.share));
  byId("saliency-strongest").replaceChildren(
    barList(
      rows.slice(0, MOST_SALIENT).map(({ position, share }) => ({
        label: make("span", {}, ...tokenAt(position)),
        share,
        text: signed(share),
      })),
    ),
  );
}

/** The change that is divided among the tokens, and the part that the shares miss. */
function saliencySum({ method, total, value, baseline_value: baseline, missing }) {
  if (method === "gradient") return `The prediction is ${signed(value)}.`;
  if (baseline === null) return `The shares add up to ${signed(total)}. The prediction is ${signed(value)}.`;
  return (
    `From the baseline’s ${signed(baseline)} to the text’s ${signed(value)}: the shares add up to ${signed(total)}; ` +
    `the remaining ${signed(missing)} is the error of the steps.`
  );
}
