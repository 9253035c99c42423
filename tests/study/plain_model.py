"""Llama 3 written out for one text: an oracle for gradients and saliency."""

import torch
import torch.nn.functional as F

from llama_ref.model import rope_frequencies, rope_rotations


class Plain:
    """Llama 3 from its weights, for one text; `kept` has the stream before each layer and the heads' outputs."""

    def __init__(self, model, embedded):
        w = dict(model.state_dict())
        args, self.kept = model.args, {}
        T, hd = len(embedded), args.head_dim
        cos, sin = (x[0, :, 0] for x in rope_rotations(torch.arange(T)[None], rope_frequencies(args)))  # (T, hd/2)
        turn = torch.complex(cos, sin)[:, None]

        def norm(x, weight):
            return x / (x.pow(2).mean(-1, keepdim=True) + args.norm_eps).sqrt() * weight

        def rotated(x):
            return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)

        x = embedded
        for i in range(args.n_layers):
            own = {key.removeprefix(f"layers.{i}."): value for key, value in w.items() if key.startswith(f"layers.{i}.")}
            self.kept[i, "residual_pre"] = x
            h = norm(x, own["attention_norm.weight"])
            q, k, v = ((h @ own[f"attention.{name}.weight"].T).unflatten(-1, (-1, hd)) for name in ("wq", "wk", "wv"))
            k, v = (part.repeat_interleave(args.n_heads // args.n_kv_heads, 1) for part in (rotated(k), v))
            scores = torch.einsum("thd,shd->hts", rotated(q), k) / hd**0.5
            scores = scores + torch.full((T, T), -torch.inf).triu(1)
            heads = torch.einsum("hts,shd->thd", scores.softmax(-1), v)
            self.kept[i, "attention.head_output"] = heads
            x = x + heads.flatten(1) @ own["attention.wo.weight"].T
            h = norm(x, own["ffn_norm.weight"])
            up = h @ own["feed_forward.w3.weight"].T
            x = x + (F.silu(h @ own["feed_forward.w1.weight"].T) * up) @ own["feed_forward.w2.weight"].T
        self.logits = norm(x, w["norm.weight"])[-1] @ w["output.weight"].T
