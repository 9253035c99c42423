"""The tasks of bench_study.py with `llama_ref.study`."""

from pathlib import Path
from typing import Any

import torch

from llama_ref import Llama, study

MODULES = (  # the outputs of a Llama's modules, which are all that the peers see
    *("embedding", "norm", "logits"),
    *(f"layers.*.attention.{part}" for part in ("norm", "q_unrotated", "k_unrotated", "v", "head_output", "output")),
    *(f"layers.*.ffn.{part}" for part in ("norm", "gate", "up", "hidden", "output")),
    "layers.*.residual_post",
)


class Ours:
    """Each task returns the values it keeps, and a number to compare the contestants by."""

    def __init__(self, inputs: dict[str, Any], scratch: Path, task: str):
        self.inputs, self.scratch = inputs, scratch
        self.llama = Llama.build(inputs["folder"], device="cpu", dtype="float32")
        self.model = self.llama.model
        self.last = self.model.args.n_layers - 1

    def module_outputs(self) -> tuple[Any, float]:
        traced = study.trace(self.model, self.inputs["text"], MODULES)
        return traced, traced[f"layers.{self.last}.residual_post"].mean().item()

    def everything(self) -> tuple[Any, float]:
        traced = study.trace(self.model, self.inputs["text"], [*MODULES, "layers.*.attention.pattern"])
        return traced, traced[f"layers.{self.last}.attention.pattern"].square().mean().item()

    def residual_grid(self) -> tuple[Any, float]:
        grid = study.patch_grid(self.model, *self._pair(), "layer×position")
        return grid, float(grid.values.mean())

    def head_grid(self) -> tuple[Any, float]:
        grid = study.patch_grid(self.model, *self._pair(), "layer×head")
        return grid, float(grid.values.mean())

    def attribution(self) -> tuple[Any, float]:
        grids = study.attribution_grids(self.model, *self._pair())
        return grids, sum(float(grid.values.mean()) for grid in grids)

    def logit_lens(self) -> tuple[Any, float]:
        points = ["embedding", *(f"layers.{layer}.residual_post" for layer in range(self.last + 1))]
        lens = study.logit_lens(self.model, self.inputs["text"], points=points)
        return lens, lens.entropy.mean().item()

    def patterns(self) -> tuple[Any, float]:
        prompts = self.inputs["prompts"]
        found: list[Any] = [None] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        traces = study.trace_each(self.model, [prompts[i] for i in order], "layers.*.attention.pattern")
        for i, traced in zip(order, traces, strict=True):
            found[i] = traced
        return found, sum(own[f"layers.{self.last}.attention.pattern"].square().mean().item() for own in found)

    def collect(self) -> tuple[Any, float]:
        name = f"layers.{self.last}.residual_post"
        study.collect(self.llama, self.inputs["prompts"], "layers.*.residual_post", to=self.scratch / "ours", positions="all")
        return None, study.Collected(self.scratch / "ours").select(name).abs().mean().item()

    def _pair(self) -> tuple[Any, ...]:
        names = ("clean", "corrupted")
        metric = study.logit_difference(self.inputs["target"], self.inputs["other"])
        return *(torch.tensor(self.inputs[name]) for name in names), metric
