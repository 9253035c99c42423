"""What every activation is called: the one table of names, their shapes and where each comes from.

In the shapes: B sequences, T new tokens, S tokens seen so far (T without a cache), D = dim, H query heads, K key/value heads,
hd = head_dim, F = ffn_dim, V = vocab_size; layers count from 0.

| name | shape | what it is |
|---|---|---|
| `embedding` | (B, T, D) | the tokens' rows of the embedding |
| `layers.i.residual_pre` | (B, T, D) | the residual stream as layer i gets it |
| `layers.i.attention.norm` | (B, T, D) | normed, as attention reads it |
| `layers.i.attention.q_unrotated` | (B, T, H, hd) | queries before their positions are turned in |
| `layers.i.attention.k_unrotated` | (B, T, K, hd) | keys, likewise; in Meta's order, where neighbours make a pair |
| `layers.i.attention.v` | (B, T, K, hd) | values |
| `layers.i.attention.q` | (B, T, H, hd) | queries after rotation |
| `layers.i.attention.k` | (B, T, K, hd) | keys after rotation, as the cache gets them |
| `layers.i.attention.scores` | (B, H, T, S) | q · k / √hd in float32; −∞ where a token may not look |
| `layers.i.attention.pattern` | (B, H, T, S) | softmax of the scores in float32: where each head looks |
| `layers.i.attention.head_output` | (B, T, H, hd) | the values as each head has mixed them, before `wo` |
| `layers.i.attention.head_result` | (B, T, H, D) | each head's share of the residual: its columns of `wo` times its output |
| `layers.i.attention.output` | (B, T, D) | what attention adds to the residual: the sum of the heads' shares |
| `layers.i.residual_mid` | (B, T, D) | the residual stream between attention and feed-forward |
| `layers.i.ffn.norm` | (B, T, D) | normed, as the feed-forward layer reads it |
| `layers.i.ffn.gate` | (B, T, F) | `w1`'s output, before SiLU |
| `layers.i.ffn.up` | (B, T, F) | `w3`'s output |
| `layers.i.ffn.hidden` | (B, T, F) | silu(gate) · up, which `w2` reads |
| `layers.i.ffn.output` | (B, T, D) | what the feed-forward layer adds to the residual |
| `layers.i.residual_post` | (B, T, D) | the residual stream as layer i leaves it |
| `norm` | (B, T, D) | the last residual, normed |
| `logits` | (B, T, V) | float32 |

All but scores, pattern and logits are in the model's dtype.
"""

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from llama_ref.args import ModelArgs
from llama_ref.errors import RequestError

STREAM = ("batch", "position", "dim")
HEADS = ("batch", "position", "head", "head_dim")
LOOKS = ("batch", "head", "position", "key_position")
HIDDEN = ("batch", "position", "ffn_dim")

LAYER_AXES = {  # in the order in which a layer computes them
    "residual_pre": STREAM,
    "attention.norm": STREAM,
    "attention.q_unrotated": HEADS,
    "attention.k_unrotated": HEADS,
    "attention.v": HEADS,
    "attention.q": HEADS,
    "attention.k": HEADS,
    "attention.scores": LOOKS,
    "attention.pattern": LOOKS,
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
    """Every activation's name in the order of the model's computation."""
    layers = (f"layers.{i}.{name}" for i in range(args.n_layers) for name in LAYER_AXES)
    return ["embedding", *layers, "norm", "logits"]


def axes(name: str) -> tuple[str, ...]:
    """What each dimension of an activation counts: ("batch", "position", "head", "head_dim"), say."""
    return OTHER_AXES.get(name) or LAYER_AXES[name.split(".", 2)[2]]


def matching(args: ModelArgs, globs: str | Sequence[str]) -> list[str]:
    """The names that any of the globs matches, in the model's order.

    `*` is any text, dots included, `?` any character, `[35]` one of these. Raises RequestError for a glob that matches nothing.
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
    return f"; {layers}. Near: {', '.join(near)}"
