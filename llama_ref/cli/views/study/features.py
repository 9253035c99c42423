"""What `llama-ref features` prints."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from llama_ref.cli.terminal import print_rich
from llama_ref.cli.views.study.shared import cut, elastic, new_table, say, token_json
from llama_ref.study.features.contexts import Context
from llama_ref.study.features.dictionary import Features
from llama_ref.study.features.firing import Firing
from llama_ref.study.inputs import label
from llama_ref.tokenizer import Tokenizer


def print_firing(found: Firing, tokenizer: Tokenizer, top: int, *, as_json: bool) -> None:
    """Print the strongest features at each token; as JSON, all that fire."""
    if as_json:
        print(json.dumps(_firing_json(found, tokenizer), indent=2))
        return
    table = new_table("token", "fire")
    table.add_column("strongest: feature and value")
    counts = found.active.counts().tolist()
    for position, token in enumerate(found.tokens):
        strongest = "  ".join(f"{found.label(feature)} {value:.3g}" for feature, value in found.active.at(position, top))
        name = f"{cut(label(tokenizer, token))}@{position}"
        table.add_row(Text(name), f"{counts[position]:,}", elastic(strongest))
    print_rich(table)
    mean = sum(counts) / len(counts)
    what = f"{found.form}: {found.active.n_features:,} features of {found.where}; {mean:.1f} fire at a token."
    say(" ".join(filter(None, (what, found.legend, "--json has all."))))


def print_contexts(features: Features, found: Mapping[int, Sequence[Context]], tokenizer: Tokenizer, *, as_json: bool) -> None:
    """Print the strongest contexts of features, the strongest token between « and »."""
    if as_json:
        parts = [_contexts_json(feature, contexts, tokenizer) for feature, contexts in found.items()]
        print(json.dumps({"reads": features.reads, "features": parts}, indent=2))
        return
    for feature, contexts in found.items():
        if not contexts:
            say(f"Feature {feature} fires nowhere in these texts.")
            continue
        table = new_table(f"feature {feature}", "line", "token")
        table.add_column("around it")
        for each in contexts:
            table.add_row(f"{each.value:.3g}", f"{each.text + 1:,}", str(each.position), _window(each, tokenizer))
        print_rich(table)
    if any(found.values()):
        say("Line: line of the file. Each text counts with its strongest token.")


def _window(found: Context, tokenizer: Tokenizer) -> Text:
    out = elastic("")
    for i, (token, value) in enumerate(zip(found.tokens, found.values, strict=True)):
        shown = label(tokenizer, token).replace("␣", " ")
        if i == found.at:
            out.append(f"«{shown}»", style="bold green")
        else:
            out.append(shown, style="green" if value > 0 else "")
    return out


def _firing_json(found: Firing, tokenizer: Tokenizer) -> dict[str, Any]:
    """Make the JSON; with a cross-layer transcoder, `reads` is a list and features have a layer."""

    def entry(feature: int, value: float) -> dict[str, Any]:
        layer, number = found.place(feature)
        return ({} if layer is None else {"layer": layer}) | {"feature": number, "value": value}

    return {
        "format": found.form,
        "reads": list(found.reads) if found.starts else found.reads[0],
        "writes": list(found.writes),
        "n_features": found.active.n_features,
        "tokens": [
            token_json(token, tokenizer) | {"features": [entry(*each) for each in found.active.at(position)]}
            for position, token in enumerate(found.tokens)
        ],
    }


def _contexts_json(feature: int, contexts: Sequence[Context], tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "feature": feature,
        "contexts": [
            {
                "value": each.value,
                "text": each.text,
                "position": each.position,
                "at": each.at,
                "tokens": [
                    token_json(token, tokenizer) | {"value": value}
                    for token, value in zip(each.tokens, each.values, strict=True)
                ],
            }
            for each in contexts
        ],
    }
