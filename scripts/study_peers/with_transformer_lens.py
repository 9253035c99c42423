"""The tasks of bench_study.py with TransformerLens, on transformers' model."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from padding import passes
from safetensors.torch import save_file
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

PARTS = (  # the same values as the outputs of modules
    *("ln1.hook_out", "attn.q.hook_out", "attn.k.hook_out", "attn.v.hook_out", "attn.hook_z", "attn.hook_out"),
    *("ln2.hook_out", "mlp.gate.hook_out", "mlp.in.hook_out", "mlp.out.hook_in", "mlp.hook_out", "hook_resid_post"),
)
OTHERS = ("embed.hook_out", "ln_final.hook_out", "unembed.hook_out")


class Lens:
    """Each task returns the values it keeps, and a number to compare the contestants by."""

    def __init__(self, inputs: dict[str, Any], scratch: Path, task: str):
        self.inputs, self.scratch = inputs, scratch
        self.bridge = TransformerBridge.boot_transformers(inputs["converted"], dtype=torch.float32)
        self.n_layers, self.n_heads = self.bridge.cfg.n_layers, self.bridge.cfg.n_heads
        self.last = self.n_layers - 1

    def module_outputs(self) -> tuple[Any, float]:
        cache = self._cache(self._text(), [*OTHERS, *self._names(*PARTS)])
        return cache, cache[f"blocks.{self.last}.hook_resid_post"].mean().item()

    def everything(self) -> tuple[Any, float]:
        cache = self._cache(self._text(), [*OTHERS, *self._names(*PARTS, "attn.hook_pattern")])
        return cache, cache[f"blocks.{self.last}.attn.hook_pattern"].square().mean().item()

    def residual_grid(self) -> tuple[Any, float]:
        clean, corrupted = self._pair()
        n = clean.shape[1]

        def copy(value: Tensor, hook: Any, source: Tensor) -> Tensor:
            for position in range(n):
                value[position, position] = source[0, position]
            return value

        return self._grid(clean, corrupted.repeat(n, 1), "hook_resid_pre", copy)

    def head_grid(self) -> tuple[Any, float]:
        clean, corrupted = self._pair()

        def copy(value: Tensor, hook: Any, source: Tensor) -> Tensor:
            for head in range(self.n_heads):
                value[head, :, head] = source[0, :, head]
            return value

        return self._grid(clean, corrupted.repeat(self.n_heads, 1), "attn.hook_z", copy)

    def _grid(self, clean: Tensor, batch: Tensor, part: str, copy: Any) -> tuple[Any, float]:
        names = self._names(part)
        sources = self._cache(clean, names, logits_to_keep=1)
        rows = []
        for name in names:
            hook = partial(copy, source=sources[name])
            with torch.no_grad():
                logits = self.bridge.run_with_hooks(batch, fwd_hooks=[(name, hook)], logits_to_keep=1)
            rows.append(self._metric(logits[:, -1]))
        grid = torch.stack(rows)
        return grid, grid.mean().item()

    def attribution(self) -> tuple[Any, float]:
        clean, corrupted = self._pair()
        names = self._names("hook_resid_pre", "attn.hook_z")
        sources = self._cache(clean, names, logits_to_keep=1)
        values: dict[str, Tensor] = {}

        def keep(value: Tensor, hook: Any, name: str) -> Tensor:
            values[name] = value
            return value  # hooks get heads as a view, which the model uses only if it is returned

        hooks = [(name, partial(keep, name=name)) for name in names]
        metric = self._metric(self.bridge.run_with_hooks(corrupted, fwd_hooks=hooks, logits_to_keep=1)[:, -1])
        gradients = torch.autograd.grad(metric.sum(), [values[name] for name in names])
        effects = {name: (sources[name] - values[name]) * own for name, own in zip(names, gradients, strict=True)}
        over_positions = torch.stack([effects[name][0].sum(-1) for name in self._names("hook_resid_pre")])
        over_heads = torch.stack([effects[name][0].sum((0, 2)) for name in self._names("attn.hook_z")])
        grids = [(grid + metric).detach() for grid in (over_positions, over_heads)]
        return grids, sum(grid.mean().item() for grid in grids)

    def logit_lens(self) -> tuple[Any, float]:
        names = ["embed.hook_out", *self._names("hook_resid_post")]
        cache = self._cache(self._text(), names, logits_to_keep=1)
        found = []
        with torch.no_grad():
            for name in names:
                logprobs = self.bridge.unembed(self.bridge.ln_final(cache[name][0][None]))[0].log_softmax(-1)
                entropy = -(logprobs.exp() * logprobs).sum(-1)
                found.append((logprobs.topk(5), entropy))
        return found, torch.stack([entropy for _, entropy in found]).mean().item()

    def patterns(self) -> tuple[Any, float]:
        prompts = self.inputs["prompts"]
        names = self._names("attn.hook_pattern")
        found: list[Any] = [None] * len(prompts)
        for numbers, ids, mask in passes(prompts):
            cache = self._cache(ids, names, logits_to_keep=1, attention_mask=mask)
            for row, i in enumerate(numbers):
                n = len(prompts[i])
                found[i] = [cache[name][row, :, :n, :n] for name in names]
        return found, sum(own[-1].square().mean().item() for own in found)

    def collect(self) -> tuple[Any, float]:
        prompts = self.inputs["prompts"]
        names = self._names("hook_resid_post")
        total, count = 0.0, 0
        for numbers, ids, mask in passes(prompts):
            cache = self._cache(ids, names, logits_to_keep=1, attention_mask=mask)
            tensors = {name: cache[name][mask.bool()] for name in names}
            save_file(tensors, self.scratch / f"{numbers[0]}.safetensors")
            total, count = total + tensors[names[-1]].abs().sum().item(), count + tensors[names[-1]].numel()
        return None, total / count

    def _cache(self, ids: Tensor, names: list[str], **settings: Any) -> Any:
        with torch.no_grad():
            _, cache = self.bridge.run_with_cache(ids, names_filter=names, **settings)
        return cache

    def _names(self, *parts: str) -> list[str]:
        return [f"blocks.{layer}.{part}" for part in parts for layer in range(self.n_layers)]

    def _text(self) -> Tensor:
        return torch.tensor([self.inputs["text"]])

    def _pair(self) -> tuple[Tensor, Tensor]:
        return torch.tensor([self.inputs["clean"]]), torch.tensor([self.inputs["corrupted"]])

    def _metric(self, logits: Tensor) -> Tensor:
        return logits[:, self.inputs["target"]] - logits[:, self.inputs["other"]]
