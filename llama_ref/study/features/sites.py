"""Which activations a dictionary of features reads and writes, by the names in study/names.py."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from llama_ref.errors import RequestError
from llama_ref.study.inputs import check_count

T = TypeVar("T", int, str)

ENDINGS = {  # values of `site`: (read, written) activation of one layer
    "residual_pre": ("residual_pre", "residual_pre"),
    "residual_mid": ("residual_mid", "residual_mid"),
    "residual_post": ("residual_post", "residual_post"),
    "attention": ("attention.output", "attention.output"),
    "ffn": ("ffn.output", "ffn.output"),
    "transcoder": ("ffn.norm", "ffn.output"),
    "transcoder_mid": ("residual_mid", "ffn.output"),
    "transcoder_unscaled": ("residual_mid", "ffn.output"),  # reads the norm without its weights
}
HOOKS = {  # TransformerLens's names of a layer's activations
    "hook_resid_pre": "residual_pre",
    "hook_resid_mid": "residual_mid",
    "hook_resid_post": "residual_post",
    "hook_attn_out": "attention.output",
    "hook_mlp_out": "ffn.output",
    "mlp.hook_out": "ffn.output",
    "mlp.hook_in": "ffn.norm",
    "ln2.hook_normalized": "unscaled",
}


@dataclass(frozen=True)
class Site:
    """The activations of one layer that are read and written; `kind` is a key of ENDINGS.

    A dictionary of kind `transcoder_unscaled` gets residual_mid and divides it by its root mean square:
    the norm without its weights.
    """

    layer: int
    kind: str

    @property
    def reads(self) -> str:
        return f"layers.{self.layer}.{ENDINGS[self.kind][0]}"

    @property
    def writes(self) -> str:
        return f"layers.{self.layer}.{ENDINGS[self.kind][1]}"

    @property
    def reads_unscaled_norm(self) -> bool:
        return self.kind == "transcoder_unscaled"


@dataclass
class Claims:
    """What a folder's files, its name and the caller say about the site: {source: value}."""

    layers: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)

    def hooks(self, who: str, reads: str, writes: str) -> None:
        """Add the claim of two hooks, such as blocks.8.hook_resid_post. Raises RequestError for an unknown one."""
        numbers, ends = zip(*(_hook(who, each) for each in (reads, writes)), strict=True)
        if None not in numbers:
            if numbers[0] != numbers[1]:
                raise RequestError(
                    f"{who} has hooks of two layers, {reads} and {writes}: only features of one layer can be used"
                )
            self.layers[who] = numbers[0]
        kind = next((kind for kind, pair in ENDINGS.items() if pair == ends), None)
        self.kinds[who] = kind or _unscaled(who, ends)

    def settle(self, path: object) -> Site:
        """The site on which all sources agree. Raises RequestError if they differ, or there are none."""
        layer = _agreed(path, "layer", self.layers)
        kind = _agreed(path, "site", self.kinds)
        if kind not in ENDINGS:
            raise RequestError(f"site is {kind!r:.60}, expected one of {', '.join(ENDINGS)}")
        return Site(layer, kind)


def claims_of(layer: int | None, site: str | None) -> Claims:
    """The caller's claims. Raises RequestError for a layer that is not a whole number from 0, or an unknown site."""
    if layer is not None:
        layer = check_count("layer", layer)
    if site is not None and site not in ENDINGS:
        raise RequestError(f"site is {site!r:.60}, expected one of {', '.join(ENDINGS)}")
    return Claims({} if layer is None else {"the caller": layer}, {} if site is None else {"the caller": site})


def _agreed(path: object, what: str, said: Mapping[str, T]) -> T:
    if not said:
        raise RequestError(f"{path} does not say its {what}: pass {what}=…")
    if len(set(said.values())) > 1:
        each = ", but ".join(f"{who} says {value}" for who, value in said.items())
        raise RequestError(f"the {what} of {path} is not clear: {each}; correct the one that is wrong")
    return next(iter(said.values()))


def _hook(who: str, hook: str) -> tuple[int | None, str]:
    """The layer (or None) and the ending of a hook's name."""
    found = re.fullmatch(r"(?:blocks\.(\d{1,4})\.)?([\w.]+)", hook)
    if found is None or found[2] not in HOOKS:
        raise RequestError(f"{who} has the hook {hook!r:.80}, expected one of {', '.join(HOOKS)}")
    return None if found[1] is None else int(found[1]), HOOKS[found[2]]


def _unscaled(who: str, ends: tuple[str, ...]) -> str:
    if ends == ("unscaled", "ffn.output"):
        return "transcoder_unscaled"
    raise RequestError(
        f"{who} reads {ends[0]} and writes {ends[1]}: only autoencoders and transcoders of a feed-forward are supported"
    )
