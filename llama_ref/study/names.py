"""Names and shapes of all activations.

In the shapes: B sequences, T new tokens, S tokens seen so far (T without a cache), D = dim, H query
heads, K key/value heads, hd = head_dim, F = ffn_dim, V = vocab_size; layers count from 0.

| name | shape | what it is |
|---|---|---|
| `embedding` | (B, T, D) | the tokens' rows of the embedding |
| `layers.i.residual_pre` | (B, T, D) | the residual stream before layer i |
| `layers.i.attention.norm` | (B, T, D) | its norm, attention's input |
| `layers.i.attention.q_unrotated` | (B, T, H, hd) | queries before RoPE |
| `layers.i.attention.k_unrotated` | (B, T, K, hd) | keys before RoPE, in Meta's order: neighbours are a pair |
| `layers.i.attention.v` | (B, T, K, hd) | values |
| `layers.i.attention.q` | (B, T, H, hd) | queries after RoPE |
| `layers.i.attention.k` | (B, T, K, hd) | keys after RoPE, as the cache stores them |
| `layers.i.attention.scores` | (B, H, T, S) | q · k / √hd in float32; −∞ where masked |
| `layers.i.attention.pattern` | (B, H, T, S) | softmax of the scores in float32 |
| `layers.i.attention.head_output` | (B, T, H, hd) | each head's weighted sum of values, before `wo` |
| `layers.i.attention.head_result` | (B, T, H, D) | each head's share: its output times its columns of `wo` |
| `layers.i.attention.output` | (B, T, D) | what attention adds to the residual: the sum of the shares |
| `layers.i.residual_mid` | (B, T, D) | the residual stream between attention and feed-forward |
| `layers.i.ffn.norm` | (B, T, D) | its norm, the feed-forward's input |
| `layers.i.ffn.gate` | (B, T, F) | `w1`'s output, before SiLU |
| `layers.i.ffn.up` | (B, T, F) | `w3`'s output |
| `layers.i.ffn.hidden` | (B, T, F) | silu(gate) · up, `w2`'s input |
| `layers.i.ffn.output` | (B, T, D) | what the feed-forward adds to the residual |
| `layers.i.residual_post` | (B, T, D) | the residual stream after layer i |
| `norm` | (B, T, D) | the final norm of the last residual |
| `logits` | (B, T, V) | float32 |

All but scores, pattern and logits are in the model's dtype.
"""

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import Tensor

from llama_ref.args import ModelArgs
from llama_ref.errors import RequestError

STREAM = ("batch", "position", "dim")
HEADS = ("batch", "position", "head", "head_dim")
SCORES = ("batch", "head", "position", "key_position")
HIDDEN = ("batch", "position", "ffn_dim")

LAYER_AXES = {  # in the order in which a layer computes them
    "residual_pre": STREAM,
    "attention.norm": STREAM,
    "attention.q_unrotated": HEADS,
    "attention.k_unrotated": HEADS,
    "attention.v": HEADS,
    "attention.q": HEADS,
    "attention.k": HEADS,
    "attention.scores": SCORES,
    "attention.pattern": SCORES,
    "attention.head_output": HEADS,
    "attention.head_result": ("batch", "position", "head", "dim"),
    "attention.output": STREAM,
    "residual_mid": STREAM,
    "ffn.norm": STREAM,
    "ffn.gate": HIDDEN,
    "ffn.up": HIDDEN,
    "ffn.hidden": HIDDEN,
    "ffn.output": STREAM,
    "residual_post": STREAM,
}
OTHER_AXES = {"embedding": STREAM, "norm": STREAM, "logits": ("batch", "position", "vocab")}


def all_names(args: ModelArgs) -> list[str]:
    """Names of all activations, in the order in which the model computes them."""
    layers = (f"layers.{i}.{name}" for i in range(args.n_layers) for name in LAYER_AXES)
    return ["embedding", *layers, "norm", "logits"]


def axes(name: str) -> tuple[str, ...]:
    """Names of an activation's dimensions, such as ("batch", "position", "head", "head_dim")."""
    return OTHER_AXES.get(name) or LAYER_AXES[name.split(".", 2)[2]]


def broadcastable(tensor: Tensor, name: str, *own_axes: str) -> Tensor:
    """Reshape a tensor with some of an activation's axes so that it broadcasts to it."""
    sizes = dict(zip(own_axes, tensor.shape, strict=True))
    return tensor.reshape([sizes.get(axis, 1) for axis in axes(name)])


def matching(args: ModelArgs, globs: str | Sequence[str]) -> list[str]:
    """Names that any of the globs matches, in the model's order.

    `*` matches any text, dots included, `?` any character, `[35]` either of these. Raises
    RequestError for a glob that matches nothing.
    """
    globs = [globs] if isinstance(globs, str) else globs
    if not isinstance(globs, Sequence) or not all(isinstance(glob, str) for glob in globs):
        raise RequestError(f"names is {globs!r:.60}, expected a name or glob ('layers.*.residual_post'), or a list of them")
    known = all_names(args)
    found = set()
    for glob in globs:
        matches = [name for name in known if fnmatchcase(name, glob)]
        if not matches:
            raise RequestError(f"no activation is called {glob!r:.80}{_advice(args, glob)}")
        found.update(matches)
    return [name for name in known if name in found]


def _advice(args: ModelArgs, glob: str) -> str:
    layers = f"the model has layers 0 to {args.n_layers - 1}"
    near = difflib.get_close_matches(glob[:80], all_names(args), n=3, cutoff=0.6)
    if not near:
        return f"; {layers}, and llama_ref/study/names.py has the table of names"
    return f"; {layers}; did you mean {' or '.join(near)}?"
