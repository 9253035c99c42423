"""The tasks of bench_study.py with nnsight, on transformers' model."""

from pathlib import Path
from typing import Any

import torch
from nnsight import LanguageModel
from padding import passes
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


class Nnsight:
    """Each task returns the values it keeps, and a number to compare the contestants by."""

    def __init__(self, inputs: dict[str, Any], scratch: Path, task: str):
        self.inputs, self.scratch = inputs, scratch
        # Only eager attention returns patterns.
        attention = "eager" if task in ("everything", "patterns") else "sdpa"
        path = inputs["converted"]
        self.plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=attention).eval()
        self.lm = LanguageModel(self.plain, tokenizer=AutoTokenizer.from_pretrained(path))
        self.layers = self.lm.model.layers
        config = self.plain.config
        self.n_heads, self.last = config.num_attention_heads, config.num_hidden_layers - 1

    def module_outputs(self) -> tuple[Any, float]:
        return self._outputs(patterns=False)

    def everything(self) -> tuple[Any, float]:
        return self._outputs(patterns=True)

    def _outputs(self, patterns: bool) -> tuple[Any, float]:
        kept: dict[str, Tensor] = {}
        with torch.no_grad(), self.lm.trace(torch.tensor([self.inputs["text"]])):
            kept["embedding"] = self.lm.model.embed_tokens.output.save()
            for i, layer in enumerate(self.layers):
                kept[f"{i}.attention.norm"] = layer.input_layernorm.output.save()
                kept[f"{i}.q"] = layer.self_attn.q_proj.output.save()
                kept[f"{i}.k"] = layer.self_attn.k_proj.output.save()
                kept[f"{i}.v"] = layer.self_attn.v_proj.output.save()
                kept[f"{i}.heads"] = layer.self_attn.o_proj.input.save()
                kept[f"{i}.attention"] = layer.self_attn.o_proj.output.save()
                if patterns:
                    kept[f"{i}.pattern"] = layer.self_attn.output[1].save()
                kept[f"{i}.ffn.norm"] = layer.post_attention_layernorm.output.save()
                kept[f"{i}.gate"] = layer.mlp.gate_proj.output.save()
                kept[f"{i}.up"] = layer.mlp.up_proj.output.save()
                kept[f"{i}.hidden"] = layer.mlp.down_proj.input.save()
                kept[f"{i}.ffn"] = layer.mlp.down_proj.output.save()
                kept[f"{i}.residual"] = layer.output.save()
            kept["norm"] = self.lm.model.norm.output.save()
            kept["logits"] = self.lm.lm_head.output.save()
        if patterns:
            return kept, kept[f"{self.last}.pattern"].square().mean().item()
        return kept, kept[f"{self.last}.residual"].mean().item()

    def residual_grid(self) -> tuple[Any, float]:
        clean, corrupted = self._pair()
        n = clean.shape[1]
        sources: list[Tensor] = []
        with torch.no_grad(), self.lm.trace(clean):
            for layer in self.layers:
                sources.append(layer.input.save())
        rows = []
        for source, layer in zip(sources, self.layers, strict=True):
            with torch.no_grad(), self.lm.trace(corrupted.repeat(n, 1), logits_to_keep=1):
                for position in range(n):
                    layer.input[position, position] = source[0, position]
                logits = self.lm.lm_head.output.save()
            rows.append(self._metric(logits[:, -1]))
        grid = torch.stack(rows)
        return grid, grid.mean().item()

    def head_grid(self) -> tuple[Any, float]:
        clean, corrupted = self._pair()
        sources: list[Tensor] = []
        with torch.no_grad(), self.lm.trace(clean):
            for layer in self.layers:
                sources.append(layer.self_attn.o_proj.input.save())
        size = sources[0].shape[-1] // self.n_heads
        rows = []
        for source, layer in zip(sources, self.layers, strict=True):
            with torch.no_grad(), self.lm.trace(corrupted.repeat(self.n_heads, 1), logits_to_keep=1):
                for head in range(self.n_heads):
                    own = slice(head * size, (head + 1) * size)
                    layer.self_attn.o_proj.input[head, :, own] = source[0, :, own]
                logits = self.lm.lm_head.output.save()
            rows.append(self._metric(logits[:, -1]))
        grid = torch.stack(rows)
        return grid, grid.mean().item()

    def attribution(self) -> tuple[Any, float]:
        clean, corrupted = self._pair()
        ends: list[tuple[list[Tensor], list[Tensor]]] = []
        for ids in (clean, corrupted):
            streams: list[Tensor] = []
            heads: list[Tensor] = []
            with self.lm.trace(ids, logits_to_keep=1):
                for layer in self.layers:
                    streams.append(layer.input.save())
                    heads.append(layer.self_attn.o_proj.input.save())
                logits = self.lm.lm_head.output.save()
            ends.append((streams, heads))
        corrupted_metric = self._metric(logits[:, -1])
        kept = [*ends[1][0], *ends[1][1]]
        gradients = torch.autograd.grad(corrupted_metric.sum(), kept)
        effects = [(a - b) * g for a, b, g in zip([*ends[0][0], *ends[0][1]], kept, gradients, strict=True)]
        n_layers = len(self.layers)
        over_positions = torch.stack([effect[0].sum(-1) for effect in effects[:n_layers]])
        over_heads = torch.stack([effect[0].unflatten(-1, (self.n_heads, -1)).sum((0, 2)) for effect in effects[n_layers:]])
        grids = [(grid + corrupted_metric).detach() for grid in (over_positions, over_heads)]
        return grids, sum(grid.mean().item() for grid in grids)

    def logit_lens(self) -> tuple[Any, float]:
        found = []
        streams: list[Tensor] = []  # created here: variables of a trace's block end with it
        with torch.no_grad(), self.lm.trace(torch.tensor([self.inputs["text"]]), logits_to_keep=1):
            streams.append(self.lm.model.embed_tokens.output.save())
            for layer in self.layers:
                streams.append(layer.output.save())
        with torch.no_grad():
            for stream in streams:
                logprobs = self.plain.lm_head(self.plain.model.norm(stream[0])).log_softmax(-1)
                entropy = -(logprobs.exp() * logprobs).sum(-1)
                found.append((logprobs.topk(5), entropy))
        return found, torch.stack([entropy for _, entropy in found]).mean().item()

    def patterns(self) -> tuple[Any, float]:
        prompts = self.inputs["prompts"]
        found: list[Any] = [None] * len(prompts)
        for numbers, ids, mask in passes(prompts):
            values: list[Tensor] = []
            with torch.no_grad(), self.lm.trace({"input_ids": ids, "attention_mask": mask}, logits_to_keep=1):
                for layer in self.layers:
                    values.append(layer.self_attn.output[1].save())
            for row, i in enumerate(numbers):
                n = len(prompts[i])
                found[i] = [value[row, :, :n, :n] for value in values]
        return found, sum(own[-1].square().mean().item() for own in found)

    def collect(self) -> tuple[Any, float]:
        prompts = self.inputs["prompts"]
        total, count = 0.0, 0
        for numbers, ids, mask in passes(prompts):
            values: list[Tensor] = []
            with torch.no_grad(), self.lm.trace({"input_ids": ids, "attention_mask": mask}, logits_to_keep=1):
                for layer in self.layers:
                    values.append(layer.output.save())
            is_text = mask.bool()
            tensors = {f"layers.{i}": value[is_text] for i, value in enumerate(values)}
            save_file(tensors, self.scratch / f"{numbers[0]}.safetensors")
            last = tensors[f"layers.{self.last}"]
            total, count = total + last.abs().sum().item(), count + last.numel()
        return None, total / count

    def _pair(self) -> tuple[Tensor, Tensor]:
        return torch.tensor([self.inputs["clean"]]), torch.tensor([self.inputs["corrupted"]])

    def _metric(self, logits: Tensor) -> Tensor:
        return logits[:, self.inputs["target"]] - logits[:, self.inputs["other"]]
