"""Edge attribution patching: the effect of every edge of a model, estimated with one gradient.

To cut an edge, its receiver reads what the sender writes in the corrupted text's run. To first order the
metric falls by the difference of the sender's two outputs times the metric's gradient at the receiver's
input. Sources: Syed et al., arXiv:2310.10348 (EAP); Hanna et al., arXiv:2403.17806 (EAP-IG).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from llama_ref.model import Transformer
from llama_ref.progress import Progress, ProgressCounter
from llama_ref.study.circuits.graph import EdgeScores, edge_mask, first_receiver, receiver_names, sender_names
from llama_ref.study.circuits.runs import Run, as_runs, differences, layer_ports, written_names
from llama_ref.study.passes.gradients import gradients
from llama_ref.study.passes.hooks import check_model
from llama_ref.study.patching.gradient import gradient_of, path_shares
from llama_ref.study.patching.metrics import Metric, measure_hidden
from llama_ref.study.patching.pairs import Corrupted
from llama_ref.study.texts import Batch, Texts


@torch.no_grad()
def attribute_edges(
    model: Transformer,
    clean: Texts,
    corrupted: Corrupted,
    metrics: Metric | Sequence[Metric],
    *,
    steps: int | None = None,
    progress: Progress | None = None,
) -> EdgeScores:
    """Score every edge: how much the clean text's metric falls if the edge is cut; means over pairs.

    Texts, noise and metrics are those of `patch_grids`. By default the gradient is the clean text's;
    with `steps`, the mean of that many gradients along the path of the embeddings from the corrupted to the
    clean text. Memory: the output of every sender, (senders, T, D) in float32, for one text. `progress` is
    called with the backward passes done and their number. Raises RequestError as `attribution_patch` does.
    """
    check_model(model)
    runs = as_runs(model, clean, corrupted, metrics)
    shares = [1.0] if steps is None else path_shares(steps)
    counter = ProgressCounter(len(runs) * len(shares), progress)
    mask = edge_mask(model.args)
    scores = torch.zeros(mask.shape, device=model.device)
    totals = [0.0, 0.0]
    for run in runs:
        ends = [run.trace(model, share, [*written_names(model), "norm"]) for share in (1.0, 0.0)]
        batch = Batch.from_texts(model, [run.text])
        for i, end in enumerate(ends):
            totals[i] += run.weight * measure_hidden(model, batch, end["norm"], [run.metric]).item()
        written = differences(model, run, *ends)
        for share in shares:
            scores += _scores(model, run, share, written) * (run.weight / len(shares))
            counter.advance()
    return EdgeScores(scores.cpu() * mask, mask, sender_names(model.args), receiver_names(model.args), *totals)


def _scores(model: Transformer, run: Run, share: float, written: Tensor) -> Tensor:
    """One gradient times the differences (senders, T, D): (receivers, senders)."""
    layers = range(model.args.n_layers)
    last = f"layers.{layers[-1]}.residual_post"
    read = [f"layers.{i}.{part}" for i in layers for part in ("attention.q_unrotated", "attention.k_unrotated", "attention.v")]
    read += [f"layers.{layer}.ffn.norm" for layer in layers] + [last]
    streams = [f"layers.{layer}.{part}" for layer in layers for part in ("residual_pre", "residual_mid")]
    traced = run.trace(model, share, [*read, *streams, "norm"], requires_grad=True)
    with gradients(model):
        metric = measure_hidden(model, Batch.from_texts(model, [run.text]), traced["norm"], [run.metric])
        grads = dict(zip(read, gradient_of(metric.sum(), [traced[name] for name in read]), strict=True))
    out = torch.zeros(first_receiver(model.args, len(layers)) + 1, len(written), device=written.device)
    for layer in layers:
        heads = [torch.einsum("the,hed->htd", grads[name][0].float(), weights) for name, weights in layer_ports(model, layer)]
        block, first = model.layers[layer], first_receiver(model.args, layer)
        attention = _through_norm(block.attention_norm, traced[f"layers.{layer}.residual_pre"][0], torch.cat(heads))
        ffn = _through_norm(block.ffn_norm, traced[f"layers.{layer}.residual_mid"][0], grads[f"layers.{layer}.ffn.norm"])
        at_inputs = torch.cat([attention, ffn])  # (receivers of the layer, T, D)
        out[first : first + len(at_inputs)] = torch.einsum("rtd,std->rs", at_inputs, written)
    out[-1] = torch.einsum("td,std->s", grads[last][0].float(), written)
    return out


def _through_norm(norm: nn.Module, x: Tensor, grads: Tensor) -> Tensor:
    """Propagate gradients (n, T, D) at a norm's output to its input x (T, D)."""
    with torch.inference_mode(False), torch.enable_grad():
        point = x.detach().float().requires_grad_()
        (out,) = torch.autograd.grad(norm(point), point, grads.float(), is_grads_batched=True)
    return out
