"""What fewer bits cost: perplexity, and divergence from the unquantized model, on English and on code.

    python scripts/bench_quality.py [--folder checkpoints/SmolLM2-135M-Instruct] [--windows 2] [--stored]

English is this repository's README.md, code the source of Python's argparse; what calibration reads is neither
(llama_ref/quantization/calibration.py). Everything but the weights is in float32, so that nothing but their bits differs.

The demo checkpoint had four bits before, a scale and a minimum for each 32 weights (Q4_1), and int4:group=32 would find these
very steps again. So its weights are spread evenly over their steps first, which makes a somewhat worse model without steps;
`--stored` takes them as they are.
"""

import argparse
import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import fire
import torch
from torch import Tensor

from llama_ref.checkpoint.folder import open_folder
from llama_ref.checkpoint.weights import load_model
from llama_ref.errors import LlamaRefError
from llama_ref.model import Transformer
from llama_ref.quantization.calibration import N_TOKENS, calibration_text, importances
from llama_ref.quantize import quantize_model, quantized_bytes

REPOSITORY = Path(__file__).resolve().parents[1]
DEMO = REPOSITORY / "checkpoints" / "SmolLM2-135M-Instruct"
SCHEMES = ("int8", "int4", "int4:group=32")
WINDOW_TOKENS = 512
STEPS_GROUP = 32  # weights that shared a scale in Q4_1


@dataclass(frozen=True)
class Quality:
    """`kl`: mean KL(unquantized || quantized) over positions, in nats; `agreement`: how often both like the same token best."""

    perplexity: float
    kl: float
    agreement: float


def main(folder: str | Path = DEMO, windows: int = 2, stored: bool = False) -> None:
    """Print a table of every scheme's bytes, perplexity, divergence and agreement."""
    opened = open_folder(folder)
    args = opened.read_args()
    tokenizer = opened.open_tokenizer(args)
    model = load_model(opened, args, dtype=torch.float32)
    if not stored:
        spread(model)
    texts = {"English": (REPOSITORY / "README.md").read_text(encoding="utf-8"), "code": inspect.getsource(argparse)}
    ids = {kind: cut(tokenizer.encode(text, bos=False, eos=False), tokenizer.bos_id, windows) for kind, text in texts.items()}
    seen = importances(model, tokenizer.encode(calibration_text(), bos=True, eos=False)[:N_TOKENS])
    expected = {kind: log_probabilities(model, tokens) for kind, tokens in ids.items()}
    print(f"{'':<27}{'MB':>6}" + "".join(f"   {kind + ': ppl':>13} {'KL':>8} {'same top':>8}" for kind in ids))
    for scheme in (None, *SCHEMES):
        for calibrated in (False, True) if scheme and scheme.startswith("int4") else (False,):
            name = f"{scheme or 'none'}{', calibrated' if calibrated else ''}"
            ours, n_bytes = quantized_copy(model, scheme, seen if calibrated else None)
            found = {kind: quality(ours, tokens, expected[kind]) for kind, tokens in ids.items()}
            cells = "".join(f"   {q.perplexity:13.3f} {q.kl:8.5f} {q.agreement:8.1%}" for q in found.values())
            print(f"{name:<27}{n_bytes / 1e6:6.0f}{cells}", flush=True)


def quantized_copy(model: Transformer, scheme: str | None, seen: Mapping[str, Tensor] | None) -> tuple[Transformer, int]:
    """A quantized copy of a model, and the bytes of its matrices (of unquantized ones, in bfloat16)."""
    if scheme is None:
        return model, 2 * sum(parameter.numel() for parameter in model.parameters())
    ours = copy.deepcopy(model)
    quantize_model(ours, scheme, seen)
    return ours, quantized_bytes(ours)


def spread(model: Transformer) -> None:
    """Move each weight by up to half the step that four bits would have in its group, so that no steps are left."""
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.dim() == 2:
            groups = weight.data.unflatten(1, (-1, STEPS_GROUP))
            step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15
            groups += step * (torch.rand(groups.shape, generator=generator) - 0.5)
            weight.data = groups.flatten(1).bfloat16().float()  # what a release would hold


def cut(ids: list[int], bos_id: int, windows: int) -> Tensor:
    """The text's first tokens, in rows that begin like a text: (windows, 1 + WINDOW_TOKENS)."""
    rows = torch.tensor(ids[: windows * WINDOW_TOKENS]).view(windows, WINDOW_TOKENS)
    return torch.nn.functional.pad(rows, (1, 0), value=bos_id)


@torch.inference_mode()
def log_probabilities(model: Transformer, tokens: Tensor) -> Tensor:
    """(B, T) -> float32 (B, T, V), a row at a time."""
    return torch.cat([model(row[None]).log_softmax(-1) for row in tokens])


def quality(model: Transformer, tokens: Tensor, expected: Tensor) -> Quality:
    found = log_probabilities(model, tokens)
    nll = -found[:, :-1].gather(-1, tokens[:, 1:, None]).mean()
    kl = (expected.exp() * (expected - found)).sum(-1).mean()
    agreement = (found.argmax(-1) == expected.argmax(-1)).float().mean()
    return Quality(nll.exp().item(), kl.item(), agreement.item())


if __name__ == "__main__":
    try:
        fire.Fire(main)
    except LlamaRefError as error:
        raise SystemExit(f"bench_quality: {error}") from None
