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

A model that reads images (vision.py) has more. I = images of all texts, in order; E = tokens of an
image's tiles, followed by padding and empty tiles; M = tokens of its own tiles only; N = vision tokens of
a text's images; W = vision_dim, A = vision_n_heads, C = features of the encoder's output.

| name | shape | what it is |
|---|---|---|
| `vision.layers.i.residual_pre` | (I, E, W) | the encoder's residual stream before local block i |
| `vision.layers.i.attention.norm` | (I, E, W) | its norm, attention's input |
| `vision.layers.i.attention.q` | (I, E, A, hd) | queries; hd = W / A |
| `vision.layers.i.attention.k` | (I, E, A, hd) | keys |
| `vision.layers.i.attention.v` | (I, E, A, hd) | values |
| `vision.layers.i.attention.scores` | (I, A, E, E) | q · k / √hd in float32: 2.6 GB at 560 pixels |
| `vision.layers.i.attention.pattern` | (I, A, E, E) | softmax of the scores in float32 |
| `vision.layers.i.attention.head_output` | (I, E, A, hd) | weighted sums of values, before `wo` |
| `vision.layers.i.attention.output` | (I, E, W) | what attention adds to the residual |
| `vision.layers.i.residual_mid` | (I, E, W) | the stream between attention and feed-forward |
| `vision.layers.i.ffn.norm` | (I, E, W) | its norm, the feed-forward's input |
| `vision.layers.i.ffn.up` | (I, E, 4W) | `c_fc`'s output, before GELU |
| `vision.layers.i.ffn.hidden` | (I, E, 4W) | gelu(up), `c_proj`'s input |
| `vision.layers.i.ffn.output` | (I, E, W) | what the feed-forward adds to the residual |
| `vision.layers.i.residual_post` | (I, E, W) | the encoder's residual stream after local block i |
| `vision.global.i.…` | | the same for global block i; outputs are after its gates |
| `vision.features` | (I, M, C) | the encoder's output |
| `vision.tokens` | (I, M, D) | projected: what cross-attention layers read |
| `cross_layers.i.residual_pre` | (B, T, D) | the residual stream before cross-attention layer i |
| `cross_layers.i.attention.norm` | (B, T, D) | its norm, attention's input |
| `cross_layers.i.attention.q` | (B, T, H, hd) | queries, normed |
| `cross_layers.i.attention.k` | (B, N, K, hd) | keys of the vision tokens, normed |
| `cross_layers.i.attention.v` | (B, N, K, hd) | values of the vision tokens |
| `cross_layers.i.attention.scores` | (B, H, T, N) | as a layer's; −∞ where an image is not seen |
| `cross_layers.i.attention.pattern` | (B, H, T, N) | their softmax; 0 at tokens that see no image |
| `cross_layers.i.attention.head_output` | (B, T, H, hd) | weighted sums of values, before `wo` |
| `cross_layers.i.attention.head_result` | (B, T, H, D) | each head's share, before the gate |
| `cross_layers.i.attention.output` | (B, T, D) | what attention adds: gated; 0 where no image is seen |
| `cross_layers.i.residual_mid` | (B, T, D) | the stream between attention and feed-forward |
| `cross_layers.i.ffn.norm` | (B, T, D) | its norm, the feed-forward's input |
| `cross_layers.i.ffn.gate` | (B, T, F) | `w1`'s output, before SiLU |
| `cross_layers.i.ffn.up` | (B, T, F) | `w3`'s output |
| `cross_layers.i.ffn.hidden` | (B, T, F) | silu(gate) · up, `w2`'s input |
| `cross_layers.i.ffn.output` | (B, T, D) | what it adds: gated; 0 where no image is seen |
| `cross_layers.i.residual_post` | (B, T, D) | the residual stream after cross-attention layer i |

They exist once an image is shown. Where images or texts have different numbers of vision tokens, zeros
(scores: −∞) pad the shorter ones. All but scores, pattern and logits are in the model's dtype.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
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
VISION_STREAM = ("image", "vision_position", "vision_dim")
VISION_HEADS = ("image", "vision_position", "head", "head_dim")
VISION_SCORES = ("image", "head", "vision_position", "vision_key_position")
VISION_HIDDEN = ("image", "vision_position", "vision_ffn_dim")

ENCODER_AXES = {
    "residual_pre": VISION_STREAM,
    "attention.norm": VISION_STREAM,
    "attention.q": VISION_HEADS,
    "attention.k": VISION_HEADS,
    "attention.v": VISION_HEADS,
    "attention.scores": VISION_SCORES,
    "attention.pattern": VISION_SCORES,
    "attention.head_output": VISION_HEADS,
    "attention.output": VISION_STREAM,
    "residual_mid": VISION_STREAM,
    "ffn.norm": VISION_STREAM,
    "ffn.up": VISION_HIDDEN,
    "ffn.hidden": VISION_HIDDEN,
    "ffn.output": VISION_STREAM,
    "residual_post": VISION_STREAM,
}

IMAGE_KEYS = ("batch", "vision_position", "head", "head_dim")
IMAGE_SCORES = ("batch", "head", "position", "vision_key_position")

CROSS_AXES = {
    "residual_pre": STREAM,
    "attention.norm": STREAM,
    "attention.q": HEADS,
    "attention.k": IMAGE_KEYS,
    "attention.v": IMAGE_KEYS,
    "attention.scores": IMAGE_SCORES,
    "attention.pattern": IMAGE_SCORES,
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

OTHER_AXES = {
    "vision.features": ("image", "vision_position", "feature"),
    "vision.tokens": ("image", "vision_position", "dim"),
    "embedding": STREAM,
    "norm": STREAM,
    "logits": ("batch", "position", "vocab"),
}
NUMBERED_AXES = {
    "layers": LAYER_AXES,
    "cross_layers": CROSS_AXES,
    "vision.layers": ENCODER_AXES,
    "vision.global": ENCODER_AXES,
}


def all_names(args: ModelArgs) -> list[str]:
    """Names of all activations, in the order in which the model computes them."""
    before = {layer: list(_numbered("cross_layers", i)) for i, layer in enumerate(args.cross_layers)}
    layers = (name for i in range(args.n_layers) for name in (*before.get(i, []), *_numbered("layers", i)))
    return [*(_vision_names(args) if args.has_vision else []), "embedding", *layers, "norm", "logits"]


def _vision_names(args: ModelArgs) -> Iterator[str]:
    for blocks, n_blocks in (("vision.layers", args.vision_n_layers), ("vision.global", args.vision_n_global_layers)):
        for i in range(n_blocks):
            yield from _numbered(blocks, i)
    yield from ("vision.features", "vision.tokens")


def _numbered(layers: str, i: int) -> Iterator[str]:
    return (f"{layers}.{i}.{name}" for name in NUMBERED_AXES[layers])


def axes(name: str) -> tuple[str, ...]:
    """Names of an activation's dimensions, such as ("batch", "position", "head", "head_dim")."""
    if name in OTHER_AXES:
        return OTHER_AXES[name]
    layers, part = re.split(r"\.\d+\.", name, maxsplit=1)
    return NUMBERED_AXES[layers][part]


def is_of_an_image(name: str) -> bool:
    """Whether an activation is computed by the image encoder, from an image alone."""
    return name.startswith("vision.")


def is_of_key_heads(name: str) -> bool:
    """Whether an activation's heads are the text model's key/value heads."""
    return not is_of_an_image(name) and name.endswith((".attention.k", ".attention.k_unrotated", ".attention.v"))


def broadcastable(tensor: Tensor, name: str, *own_axes: str) -> Tensor:
    """Reshape a tensor that has some of an activation's axes so that it broadcasts to the activation."""
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
        matches = [glob] if glob in known else [name for name in known if fnmatchcase(name, glob)]
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
