"""`llama-ref features`."""

import re
from dataclasses import replace
from typing import Annotated, Literal, get_args

from llama_ref.cli.parsing.flags import Flag, Section, command
from llama_ref.cli.shared.options import Json, Name, SpecialTokens, WholeModel
from llama_ref.cli.shared.studying import check_outputs, open_to_study, overview_of, write_page
from llama_ref.cli.shared.text_input import text_word
from llama_ref.errors import RequestError

Site = Literal[
    "residual_pre",
    "residual_mid",
    "residual_post",
    "attention",
    "ffn",
    "transcoder",
    "transcoder_mid",
    "transcoder_unscaled",
]


@command(Section.STUDY)
def features(
    name: Name,
    dictionary: Annotated[str, Flag("folder or file of a sparse autoencoder or a transcoder")],
    prompt: Annotated[str | None, Flag("text for the model to read", unset="none, with --contexts", read=text_word)] = None,
    *,
    top: Annotated[int, Flag("number of features to show per token, or of contexts per feature")] = 5,
    feature: Annotated[
        str | None,
        Flag("feature to look for: a number, or several such as 12,345; 3:12 is feature 12 of layer 3", metavar="N"),
    ] = None,
    contexts: Annotated[
        str | None, Flag("find where --feature fires in the texts of this file, one per line", metavar="FILE")
    ] = None,
    layer: Annotated[
        int | None, Flag("layer of the features", unset="as their files say; all layers for a cross-layer transcoder")
    ] = None,
    site: Annotated[
        Site | None,
        Flag(
            f"activation that the features were trained on: {', '.join(get_args(Site))}",
            metavar="SITE",
            unset="as their files say",
        ),
    ] = None,
    k: Annotated[int | None, Flag("number of features that fire per token, for TopK", unset="as their files say")] = None,
    out: Annotated[str | None, Flag("write an HTML page about the text, with its features", metavar="FILE")] = None,
    special_tokens: SpecialTokens = False,
    json: Json = False,
    loading: WholeModel,
) -> None:
    """Show where the features of a sparse autoencoder fire.

    Reads Llama Scope, sparsify, Goodfire, dictionary_learning and circuit-tracer files.

      llama-ref features Llama3.1-8B Llama3_1-8B-Base-L15R-8x "The capital of"
    """

    from llama_ref.checkpoint.folder import open_folder
    from llama_ref.cli.terminal import progress_bar
    from llama_ref.cli.views.study.features import print_contexts, print_firing
    from llama_ref.study.datasets.prompt_file import read_prompts
    from llama_ref.study.features.contexts import top_contexts
    from llama_ref.study.features.cross_layer import CrossLayerTranscoder
    from llama_ref.study.features.edits import chosen_features
    from llama_ref.study.features.firing import firing
    from llama_ref.study.features.opening import open_dictionary
    from llama_ref.study.inputs import prompt_tokens

    _check(prompt, feature, contexts, out, top)
    check_outputs(out)
    prompts = [] if contexts is None else read_prompts(contexts)
    layer, numbers = (layer, []) if feature is None else _chosen(feature, layer)
    opened = open_dictionary(dictionary, layer=layer, site=site, k=k)
    opened.check_args(open_folder(name).read_args())
    if prompt is not None:
        llama = open_to_study(name, loading, prompt=prompt)
        tokens = prompt_tokens(llama, prompt, special_tokens=special_tokens)
        fired = firing(llama.model, opened, tokens)
        if out is not None:
            write_page(replace(overview_of(llama, tokens, None, 5), features=fired), llama, name, out)
        print_firing(fired, llama.tokenizer, top, as_json=json)
        return
    if isinstance(opened, CrossLayerTranscoder):
        raise RequestError(f"{dictionary} has features of every layer: choose one layer, such as --feature 3:{numbers[0]}")
    chosen = chosen_features(opened, numbers)
    llama = open_to_study(name, loading)
    texts = [prompt_tokens(llama, text, f"text {i}", special_tokens=special_tokens) for i, text in enumerate(prompts, 1)]
    with progress_bar("reading") as progress:
        found = top_contexts(opened, chosen, texts, model=llama.model, n=top, progress=progress)
    print_contexts(opened, found, llama.tokenizer, as_json=json)


def _check(prompt: str | None, feature: str | None, contexts: str | None, out: str | None, top: int) -> None:
    """Raise RequestError for conflicting arguments, before a long load."""
    if (feature is None) != (contexts is None):
        raise RequestError("--feature and --contexts go together: a feature, and the texts to look for it in")
    if (prompt is None) == (contexts is None):
        raise RequestError("pass a text, to see which features fire in it, or --contexts and --feature")
    if contexts is not None and out is not None:
        raise RequestError("--out is given, but the page is about one text: pass a text instead of --contexts")
    if top < 1:
        raise RequestError(f"--top is {top}, expected a whole number from 1")


def _chosen(word: str, layer: int | None) -> tuple[int | None, list[int]]:
    """Read --feature: its layer (or that of --layer), and the features. Raises RequestError."""
    layers, numbers = [], []
    for part in word.split(","):
        found = re.fullmatch(r"(?:(\d{1,3}):)?(\d{1,9})", part, re.ASCII)
        if not found:
            raise RequestError(
                f"--feature is {word!r:.60}, expected a number, or several such as 12,345; for a cross-layer transcoder, a"
                " layer and a number such as 3:12"
            )
        layers.append(layer if found[1] is None else int(found[1]))
        numbers.append(int(found[2]))
    if len({layer, *layers} - {None}) > 1:
        raise RequestError(f"--feature is {word!r:.60}, with features of several layers, expected one layer at a time")
    return layers[0], numbers
