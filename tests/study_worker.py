"""A process of tests/parallel/test_study.py: studies every folder; rank 0 writes the results.

torchrun --nproc_per_node W study_worker.py TASK.json OUT
"""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llama_ref import study
from llama_ref.compiled.caches import new_cache
from llama_ref.errors import LlamaRefError
from llama_ref.generation import Llama
from llama_ref.model import Transformer
from llama_ref.parallel.agreement import digest
from llama_ref.parallel.job import end_process
from study.feature_folders import llama_scope

TEXTS = [[5, 9, 2, 7, 1, 3], [4, 4, 8]]
EDIT = {"layers.0.attention.head_output": study.zero().at(heads=[1]), "layers.2.ffn.output": study.scale(3)}


def main(task_file: str, out: str) -> None:
    task = json.loads(Path(task_file).read_text())
    found = {}
    for name, folder in task["folders"].items():
        llama = build(folder, task["pipeline_parallel_size"])
        if name == "demo":
            found[name] = trace_briefly(llama)
            continue
        found[name] = measure(llama, Path(task["to"], name), task["texts"][name], task["images"].get(name))
        found[name]["equal"] = _are_equal(found[name]["values"])
        found[name]["shared"] = are_random_edits_shared(llama.model)
        found[name]["failed"] = _message(lambda llama=llama: fail_in_the_last_layer(llama.model))
        found[name]["outside"] = _message(lambda llama=llama: fail_outside_of_a_pass(llama.model))
        found[name]["refused"] = refused(llama)
        found[name]["not collected again"] = not_collected_again(llama.model, Path(task["to"], name))
        found[name]["differing"] = _message(lambda llama=llama: study.trace(llama.model, [[1, 2 + dist.get_rank()]]))
    if dist.get_rank() == 0:
        torch.save(found, out)
    end_process(0)


def build(folder: str | Path, pipeline_parallel_size: int = 1) -> Llama:
    options = {"device": "cpu", "dtype": "float32", "pipeline_parallel_size": pipeline_parallel_size}
    return Llama.build(folder, max_seq_len=64, verify="never", **options)


def measure(llama: Llama, to: Path, texts: list, images: list | None = None) -> dict[str, Any]:
    """Everything that works with one process and with several: tensors by name, and text."""
    model, row = llama.model, texts[0]
    traced = study.trace(model, texts, images=images)
    values = dict(traced) | {"tokens": traced.tokens, "positions": traced.positions}
    if images:
        texts, row, images = TEXTS, texts[0], images[0]
    with study.recording(model, "*") as recorded:
        answer, _ = llama.generate([TEXTS[0]], 3, temperature=0)
    values |= {f"generated {name}": value for name, value in recorded.trace.items()}
    cache = new_cache(model, 1, 64)
    for some in (row[:2], row[2:]) if not images else ():
        values |= {f"cached {len(some)} {name}": value for name, value in study.trace(model, some, cache=cache).items()}
    lens = study.logit_lens(model, row, target=3, images=images)
    predicted = study.predict(model, row, images=images)
    heads = study.summarize_attention(model, row, images=images)
    values |= {"entropy": lens.entropy, "kl": lens.kl, "followed": lens.target_probability, "rank": lens.target_rank}
    values |= {"predicted": predicted.probability, "likely": predicted.top_ids, "likeliest": predicted.top_probabilities}
    values |= {
        "sink": heads.sink,
        "induction": heads.induction,
        "norm of stream": study.residual_stream(model, row, images=images).norm,
    }
    values["pattern"] = study.attention_pattern(model, row, 2, 1, images=images)
    if not images:
        values |= edited(model)
    if model.args.n_heads == 12:  # one of the models
        values |= experiments(llama) | explained(model, TEXTS)
    if images:
        looks = study.image_attention(model, row, images)
        values |= {f"look at {i}": found.patches for i, found in enumerate(looks)} | {"before": torch.tensor(looks[0].before)}
        with study.patch(model, {"vision.tokens": study.scale(2), "cross_layers.*.attention.v": study.mean()}):
            values |= {f"edited image: {name}": value for name, value in study.trace(model, row, images=images).items()}
    collected = study.collect(model, TEXTS, ["layers.*.attention.k", "layers.2.ffn.hidden", "norm"], to=to)
    values |= {f"collected {name}": collected.select(name, positions=-1) for name in collected.names}
    with study.patch(model, EDIT):
        found = study.collect(model, TEXTS, "layers.*.residual_post", to=to.with_name(f"{to.name} edited"))
        values |= {f"collected with an edit: {name}": found.select(name) for name in found.names}
    return {"values": values, "answer": answer, "args": traced.model_args}


def edited(model: Transformer) -> dict[str, Tensor]:
    """The activations after edits of every kind."""
    row, other = [5, 9, 2, 7, 1, 3], [5, 8, 2, 6, 1, 3]
    source, out = study.trace(model, other), {}
    edits = {
        "heads": {
            "layers.0.attention.pattern": study.zero().at(heads=[2]),
            "layers.1.attention.head_result": study.scale(0.5).at(heads=[0, 3], positions=[2]),
            "layers.2.attention.head_output": study.zero().at(heads=[1, -1]),
        },
        "keys": {"layers.1.attention.k": study.swap_from(source).at(heads=[1]), "layers.2.attention.v": study.mean()},
        "others": {
            "embedding": study.scale(2),
            "layers.1.residual_mid": study.mean(),
            "layers.2.attention.scores": study.scale(0),
            "layers.2.ffn.hidden": study.swap_from(source).at(positions=[-1]),
            "norm": study.scale(0.9),
            "logits": study.scale(0.5),
        },
    }
    for what, edit in edits.items():
        with study.patch(model, edit):
            out |= {f"{what} edited: {name}": value for name, value in study.trace(model, [row, row[:4]]).items()}
    return out


def are_random_edits_shared(model: Transformer) -> bool:
    """Whether all processes have the result of the first, if an edit has other numbers in each."""
    torch.manual_seed(dist.get_rank())
    with study.patch(model, dict.fromkeys(("layers.*.ffn.*", "logits"), lambda value: value * torch.rand(value.shape))):
        hidden = model.hidden(torch.tensor(TEXTS[:1]))
        likely = study.predict(model, TEXTS[0]).top_probabilities
        return _are_equal(dict(study.trace(model, TEXTS[0])) | {"logits": model.logits(hidden), "likely": likely})


def fail_outside_of_a_pass(model: Transformer) -> None:
    """Read logits of other tokens than a pass's through an edit of the norm, which only the last stage applies."""
    with study.patch(model, {"norm": study.zero().at(positions=0)}):
        study.predict(model, TEXTS[0])


def fail_in_the_last_layer(model: Transformer) -> None:
    """Make an edit that only the last stage applies, where it fails."""
    with study.patch(model, {"layers.2.residual_post": study.zero().at(positions=[99])}):
        model.hidden(torch.tensor(TEXTS[:1]))


def experiments(llama: Llama) -> dict[str, Tensor]:
    """Steering, and functions that run a model with many edits."""
    model, row, other = llama.model, [5, 9, 2, 7], [5, 8, 2, 6]
    out: dict[str, Tensor] = {}
    direction = torch.arange(1.0, 1 + model.args.dim) / model.args.dim
    with study.steer(model, direction, 0.5, layers=[0, 2]), study.ablate(model, direction.flip(0)):
        out["steered"] = torch.tensor(llama.generate([row], 6, temperature=0)[0])
        out["margins"] = study.answer_margins(model, [row, row[:3]], [4], [7])
    with study.cut(model, queries=[-1], keys=[0, 1], layers=[1], heads=[1, 2]):
        out["cut"] = study.predict(model, row).top_probabilities
    windows = study.cut_windows(model, [row, row[:3]], study.probability(3), queries=[-1], keys=[1], width=2)
    out |= {"windows": windows.values, "whole": windows.whole}
    metric = study.logit_difference(3, 8)
    for over, name in (("layer×position", None), ("layer×head", "attention.k")):
        out[f"grid {over} {name}"] = torch.from_numpy(study.patch_grid(model, row, other, metric, over=over, name=name).values)
    with study.patch(model, {"embedding": study.scale(2)}):
        out["tracing"] = torch.from_numpy(study.patch_grid(model, row, study.noise([1], seeds=2), metric).values)
    out["without groups"] = study.sweep(model, [row, row[:3]], "kv_groups", study.resample()).losses
    together = study.ablate_together(model, [row, other], ["layers.0.heads.1", "layers.2.ffn"], controls=2)
    out |= {"without two": together.losses, "without others": together.controls}
    out["contrast"] = study.contrast_units(model, [row[:n] for n in (1, 2, 3, 4)], [other[:n] for n in (1, 2, 3, 4)]).difference
    return out


def explained(model: Transformer, texts: list[list[int]]) -> dict[str, Tensor]:
    """Dictionaries of features, which read and edit activations, and tuned lenses."""
    n_layers, dim = len(study.residual_stream(model, texts[0]).norm) // 2, model.args.dim
    with tempfile.TemporaryDirectory() as folder:
        features = study.open_features(llama_scope(Path(folder), dim, 32, layer=1, kind="TC").path)
        found = study.measure_reconstruction(model, features, texts)
        with study.patch(model, study.set_features(features, {3: 2.0}, positions=[1])):
            out = {"with a feature": study.predict(model, texts[0]).top_probabilities}
    numbers = torch.Generator().manual_seed(0)
    weights, biases = (torch.randn(n_layers, *shape, generator=numbers) / dim for shape in ((dim, dim), (dim,)))
    lens = study.TunedLens(list(weights), list(biases))
    scores = study.score_lens(model, texts, lens)
    out |= {"scores": scores.kl, "errors": scores.calibration_error}
    out |= {"tuned": study.logit_lens(model, texts[0], lens=lens).entropy}
    out["losses"] = torch.tensor([found.loss, found.loss_reconstructed, found.loss_zero, found.unexplained])
    return out


def trace_briefly(llama: Llama) -> dict[str, Tensor]:
    """Some values of a large model."""
    names = [f"layers.{layer}.{part}" for layer in (0, 29) for part in ("attention.*", "ffn.*", "residual_post")]
    likely = study.predict(llama.model, TEXTS[0]).top_probabilities
    return dict(study.trace(llama.model, TEXTS, [*names, "logits"])) | {"likely": likely}


def refused(llama: Llama) -> list[str]:
    """The error messages of what does not work with several processes."""
    model, row = llama.model, TEXTS[0]
    calls: list[Callable[[], Any]] = [
        lambda: study.trace(model, row, requires_grad=True),
        lambda: study.attribute(model, row, 3),
        lambda: study.sweep(model, row, over="units"),
        lambda: study.saliency(model, row, 3),
    ]
    return [_message(call) for call in calls]


def not_collected_again(model: Transformer, to: Path) -> list[str]:
    """The error messages of collecting into the folders of `measure` again, with an edit or other weights."""

    def again(folder: Path, names: list[str]) -> str:
        return _message(lambda: study.collect(model, TEXTS, names, to=folder))

    plain, edited = ["layers.*.attention.k", "layers.2.ffn.hidden", "norm"], ["layers.*.residual_post"]
    assert not again(to, plain)
    with study.patch(model, EDIT):
        messages = [again(to, plain), again(to.with_name(f"{to.name} edited"), edited)]
    if dist.get_rank() == dist.get_world_size() - 1:
        block = model.layers[-1].feed_forward
        weight = block.w1.weight.clone()
        weight[1, 1] += 1
        block.w1.weight = torch.nn.Parameter(weight, requires_grad=False)
    return [*messages, again(to, plain)]


def _message(call: Callable[[], Any]) -> str:
    """The message of the error that the call raises; empty if there is none."""
    try:
        call()
    except LlamaRefError as error:
        return str(error)
    return ""


def _are_equal(values: dict[str, Tensor]) -> bool:
    """Whether all processes have the same values, bit for bit."""
    sums = [""] * dist.get_world_size()
    dist.all_gather_object(sums, digest(b"".join(values[name].contiguous().numpy().tobytes() for name in values)))
    return len(set(sums)) == 1


if __name__ == "__main__":
    main(*sys.argv[1:])
