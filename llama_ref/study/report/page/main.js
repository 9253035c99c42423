// The header, and the sections one after another.

function startHeader() {
  document.title = `${data.model} · llama-ref lens`;
  byId("model").textContent = data.model;
  const tokens = nTokens === 1 ? "one token" : `${nTokens.toLocaleString("en")} tokens`;
  byId("lead").replaceChildren(
    `What the model makes of a text of ${tokens}: how likely it found each, what each layer would say next, `,
    "where its heads look, and which parts wrote ",
    tokenElement(data.target),
    ".",
  );
  const probability = data.lens.target_probability[nLayers][nTokens - 1];
  const rank = data.lens.target_rank[nLayers][nTokens - 1];
  byId("warning").hidden = probability !== null;
  const facts = {
    Tokens: nTokens.toLocaleString("en"),
    Layers: `${nLayers} × ${nHeads} heads`,
    Numbers: data.dtype,
    Target: make("span", {}, tokenElement(data.target), ` id ${data.target}`),
    "Probability after the text": `${percent(probability)}, rank ${whole(rank)}`,
  };
  for (const [name, value] of Object.entries(facts)) {
    byId("facts").append(make("div", {}, make("dt", {}, name), make("dd", {}, value)));
  }
}

/** Start with the head that wrote most of the target's logit. */
function firstHead() {
  const best = data.attribution && partsByName(data.attribution).find((part) => part.head !== undefined && part.share > 0);
  if (best) Object.assign(selection, { layer: best.layer, head: best.head });
}

startTheme();
startHeader();
startBar();
firstHead();
startTokens();
startLens();
startAttention();
startImage();
startAttribution();
startFeatures();
startSaliency();
startPatching();
startNorms();
startPaper();
