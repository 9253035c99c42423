"""`llama-ref collect`."""

import json as json_module
from typing import Annotated

from llama_ref.cli.parsing.flags import Flag, Section, command
from llama_ref.cli.shared.options import Json, Name, SpecialTokens, WholeModel
from llama_ref.cli.shared.studying import open_to_study
from llama_ref.errors import RequestError
from llama_ref.formatting import did_you_mean


@command(Section.STUDY)
def collect(
    name: Name,
    file: Annotated[str, Flag('file of prompts: one per line, or a .jsonl of texts or {"prompt": "…"}')],
    *,
    names: Annotated[str, Flag("activations, separated by commas: names or globs (llama_ref/study/names.py)")],
    to: Annotated[str, Flag("folder to write", metavar="FOLDER")],
    positions: Annotated[str, Flag("last, all, or numbers such as 0,-1; -1 is a prompt's last token")] = "last",
    special_tokens: SpecialTokens = False,
    json: Json = False,
    loading: WholeModel,
) -> None:
    """Store activations of many prompts as safetensors.

    An interrupted run resumes when it is started again. In Python, study.Collected reads the
    folder.

      llama-ref collect Llama3.2-1B prompts.txt --names "*.residual_post" --to acts
    """
    from llama_ref.cli.terminal import progress_bar
    from llama_ref.formatting import human_bytes, printable
    from llama_ref.study.datasets.collect import collect as run
    from llama_ref.study.datasets.prompt_file import read_prompts

    wanted, prompts = _positions(positions), read_prompts(file)
    llama = open_to_study(name, loading)
    with progress_bar("collecting") as progress:
        found = run(
            llama,
            prompts,
            names.split(","),
            to=to,
            positions=wanted,
            special_tokens=special_tokens,
            progress=progress,
        )
    facts = {"prompts": len(found), "texts": found.n_texts, "positions": found.n_rows, "bytes": found.nbytes}
    if json:
        print(json_module.dumps({"names": found.names, **facts}))
        return
    size = f"{found.n_rows:,} positions of {len(found):,} prompts, {human_bytes(found.nbytes)}"
    print(printable(f"{to}: {len(found.names)} activations, {size}"))


def _positions(word: str) -> str | list[int]:
    """Read --positions. Raises RequestError."""
    if word in ("last", "all"):
        return word
    try:
        return [int(part) for part in word.split(",")]
    except ValueError:
        meant = did_you_mean(word, ("last", "all"))
        raise RequestError(f"--positions is {word!r:.60}, expected last, all, or numbers such as 0,-1{meant}") from None
