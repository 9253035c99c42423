"""Compare `llama_ref.study` with the packages whose formats it reads or whose methods it has.

    python -m venv /tmp/oracles
    /tmp/oracles/bin/pip install -r scripts/study_peers/oracles.txt
    /tmp/oracles/bin/pip install --no-deps -r scripts/study_peers/oracles-no-deps.txt
    python scripts/compare_study.py --peers /tmp/oracles/bin/python

Dictionaries of features have small random weights, written in each package's format and read by both;
saliency, the tuned lens and steering use the demo model (`--folder`), which the peers get in Hugging
Face's format. All compute in float32. The difference is the largest, relative to the largest value.
`--only captum,repeng` chooses peers. Exits with 1 if something differs or fails; a peer that is not
installed is skipped. `--threads` (1) is for both. Our own Python needs the extra `quick`.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fire
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama_ref import Llama, study
from llama_ref.checkpoint.folder import open_folder
from llama_ref.checkpoint.writing.convert import to_hugging_face
from llama_ref.errors import LlamaRefError, RequestError
from llama_ref.study.tuned.unembed_hash import unembed_hash

REPOSITORY = Path(__file__).resolve().parents[1]
DEMO = REPOSITORY / "checkpoints" / "SmolLM2-135M-Instruct"
WORKER = REPOSITORY / "scripts" / "study_peers" / "oracles.py"
DICTIONARIES = ("eai-sparsify", "dictionary-learning", "sae-lens", "llamascopium", "circuit-tracer")
MODELS = ("captum", "tuned-lens", "repeng")
DIM, N_FEATURES, N_LAYERS, N_TOKENS = 16, 64, 3, 40  # of the random dictionaries
TEXT, TARGET = "The capital of France is", " Paris"
STEPS, SCALE = 32, 4.0
TOLERANCE = 1e-4  # relative


@dataclass(frozen=True)
class Row:
    """One comparison. If the peer has no answer, `difference` is None and `verdict` says why."""

    what: str
    peer: str
    difference: float | None
    verdict: str

    @property
    def is_fault(self) -> bool:
        return self.verdict != "OK" and not self.verdict.startswith("not installed")

    def __str__(self) -> str:
        shown = "" if self.difference is None else f"{self.difference:.1e}"
        return f"{self.what:46}  {self.peer:26}  {shown:>10}  {self.verdict}"


def main(
    folder: str | Path = DEMO,
    peers: str | Path = sys.executable,
    only: str | tuple[str, ...] = DICTIONARIES + MODELS,
    threads: int = 1,
) -> list[Row]:
    """Print a table of all comparisons, and return it."""
    chosen = only.split(",") if isinstance(only, str) else only
    if unknown := [peer for peer in chosen if peer not in DICTIONARIES + MODELS]:
        raise RequestError(f"only has {unknown[0]!r}, expected some of {', '.join(DICTIONARIES + MODELS)}")
    if not Path(peers).is_file():
        raise RequestError(f"{peers} is not a file, expected the Python of the peers' environment")
    torch.set_num_threads(threads)
    rows = []
    print(f"{'what':46}  {'peer':26}  {'difference':>10}")
    with TemporaryDirectory() as scratch:
        inputs, arrays, ours = with_dictionaries(Path(scratch))
        if set(chosen) & set(MODELS):
            more_inputs, more_arrays, more_of_ours = with_model(folder, Path(scratch))
            inputs, arrays, ours = inputs | more_inputs, arrays | more_arrays, ours | more_of_ours
        (Path(scratch) / "inputs.json").write_text(json.dumps(inputs | {"threads": threads}), encoding="utf-8")
        save_file(arrays, Path(scratch) / "arrays.safetensors")
        for peer in chosen:
            for row in compare(peer, ours[peer], *ask(peers, peer, Path(scratch))):
                print(row, flush=True)
                rows.append(row)
    return rows


# ---- our answers: (inputs of the peers, their arrays, {peer: {what: our value}})

Ours = tuple[dict[str, Any], dict[str, Tensor], dict[str, dict[str, Tensor]]]


def with_dictionaries(scratch: Path) -> Ours:
    """Write dictionaries, encode random activations, and decode them."""
    sys.path.insert(0, str(REPOSITORY / "tests"))
    from study import feature_folders as made

    shape = (DIM, N_FEATURES)
    transcodes = {"name": "layers.1.mlp", "skip": True, "transcode": True, "skip_connection": True}
    goodfire = {"name": "Llama-3.1-8B-Instruct-SAE-l19.pth"}
    paths = {
        "eai-sparsify": {
            "sparsify, autoencoder": made.sparsify(scratch / "sparsify", *shape).path,
            "sparsify, transcoder with skip": made.sparsify(scratch / "sparsify", *shape, **transcodes).path,
        },
        "dictionary-learning": {
            "dictionary_learning, BatchTopK": made.dictionary_learning(scratch / "batch", *shape).path,
            "dictionary_learning, TopK": made.dictionary_learning(scratch / "top", *shape, k=5).path,
        },
        "sae-lens": {
            "Llama Scope, unit decoder rows": made.llama_scope(scratch / "scope", *shape, unit_norm=True).path,
            "Goodfire": made.goodfire(scratch / "goodfire", *shape, **goodfire).path,
        },
        "llamascopium": {
            "Llama Scope, autoencoder": made.llama_scope(scratch / "authors", *shape).path,
            "Llama Scope, transcoder": made.llama_scope(scratch / "authors", *shape, kind="TC").path,
        },
        "circuit-tracer": {
            "transcoder, ReLU": made.transcoders(scratch / "relu", *shape).path,
            "transcoder, thresholds and skip": made.transcoders(scratch / "jump", *shape, thresholds=True, skip=True).path,
            "cross-layer transcoder, ReLU": made.cross_layer(scratch / "cross", *shape, N_LAYERS).path,
            "cross-layer transcoder, thresholds": made.cross_layer(
                scratch / "jump_cross", *shape, N_LAYERS, thresholds=True
            ).path,
        },
    }
    generator = torch.Generator().manual_seed(0)
    arrays: dict[str, Tensor] = {}
    ours: dict[str, dict[str, Tensor]] = {peer: {} for peer in paths}
    for peer, own in paths.items():
        for title, path in own.items():
            layers = (N_LAYERS,) if title.startswith("cross-layer") else ()
            x = arrays[title] = torch.randn(*layers, N_TOKENS, DIM, generator=generator)
            if layers:
                every = study.open_cross_layer(path)
                values = every.encode(x)
                features, output = torch.stack(values), every.decode(values)
            else:
                one = study.open_features(path)
                features = one.encode(x)
                output = one.decode(features, x)
            ours[peer] |= {f"{title}: features": features, f"{title}: output": output}
    written = {peer: {title: str(path) for title, path in own.items()} for peer, own in paths.items()}
    return {"dictionaries": written}, arrays, ours


def with_model(folder: str | Path, scratch: Path) -> Ours:
    """Saliency, a random tuned lens and a random control vector."""
    converted = folder if open_folder(folder).is_hugging_face else to_hugging_face(folder, scratch / "hf")
    llama = Llama.build(folder, device="cpu", dtype="float32")
    model, dim, n_layers = llama.model, llama.model.args.dim, llama.model.args.n_layers
    ids, target = llama.encode(TEXT), llama.encode(TARGET)[1]
    moved = list(range(1, len(ids)))  # begin-of-text keeps its embedding
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(dim, dim, generator=generator) * 0.3 / dim**0.5 for _ in range(n_layers)]
    biases = [torch.randn(dim, generator=generator) * 0.3 for _ in range(n_layers)]
    study.TunedLens(weights, biases, "demo", unembed_hash(model)).save(scratch / "lens")
    lens = study.TunedLens.load(scratch / "lens")
    residuals = torch.randn(n_layers, N_TOKENS, dim, generator=generator)
    translated = [lens.translate(*each) for each in zip(lens.points[:-1], residuals, strict=True)]
    directions = {layer: torch.randn(dim, generator=generator) for layer in range(1, n_layers)}
    study.write_control_vector(scratch / "vector.gguf", directions)
    with study.steer(model, directions, SCALE):
        steered = model(torch.tensor([ids]))[0]
    inputs = {"converted": str(converted), "ids": ids, "target": target, "steps": STEPS, "scale": SCALE}
    inputs |= {"lens": str(scratch / "lens"), "control_vector": str(scratch / "vector.gguf")}
    return (
        inputs,
        {"residuals": residuals},
        {
            "captum": {
                "integrated gradients": study.saliency(model, ids, target, steps=STEPS, positions=moved).shares,
                "input × gradient": study.saliency(model, ids, target, method="gradient×input").shares,
                "length of the gradient": study.saliency(model, ids, target, method="gradient").shares,
            },
            "tuned-lens": {
                "translated residuals": torch.stack(translated),
                "entropy at every layer": study.logit_lens(model, ids, points=lens.points[:-1], lens=lens).entropy,
                "hash of the output matrix": torch.tensor(list(bytes.fromhex(str(unembed_hash(model))))),
            },
            "repeng": {
                "control vector from GGUF": torch.stack(list(directions.values())),
                "logits steered by it": steered.detach(),
            },
        },
    )


# ---- the peers' answers


def ask(python: str | Path, peer: str, scratch: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """What a peer says about itself (its version, or what is missing), and its answers."""
    files = [scratch / name for name in ("inputs.json", "arrays.safetensors", "answers.safetensors")]
    done = subprocess.run([python, WORKER, peer, *files], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
        return {"missing": f"failed: {last:.200}"}, {}
    said = json.loads(done.stdout)
    return said, {} if "missing" in said else load_file(files[-1])


def compare(peer: str, ours: dict[str, Tensor], said: dict[str, str], found: dict[str, Tensor]) -> list[Row]:
    """One row for each of our values; one for all if the peer has no answers."""
    if "missing" in said:
        return [Row("", peer, None, said["missing"])]
    rows = []
    for what, value in ours.items():
        own, other = value.double(), found[what].double()
        difference = float((own - other).abs().max() / other.abs().max()) if own.shape == other.shape else float("inf")
        rows.append(Row(what, f"{peer} {said['version']}", difference, "OK" if difference <= TOLERANCE else "DIFFERS"))
    return rows


if __name__ == "__main__":
    try:
        found = fire.Fire(main, serialize=lambda result: None)
    except LlamaRefError as error:
        raise SystemExit(f"compare_study: {error}") from None
    sys.exit(any(row.is_fault for row in found))
