"""`llama-ref tune_lens`."""

from typing import Annotated, Literal

from llama_ref.cli.parsing.flags import Flag, Section, command
from llama_ref.cli.shared.options import Json, Name, WholeModel
from llama_ref.cli.shared.studying import open_to_study


@command(Section.STUDY)
def tune_lens(
    name: Name,
    file: Annotated[str, Flag("UTF-8 text file to fit the lens to")],
    *,
    to: Annotated[str, Flag("folder to write", metavar="FOLDER")],
    context: Annotated[int, Flag("tokens per window of the text")] = 512,
    steps: Annotated[int, Flag("number of optimizer steps")] = 250,
    tokens_per_step: Annotated[int, Flag("tokens per optimizer step")] = 1024,
    held_out: Annotated[float, Flag("share of the windows held out to score the lens")] = 0.1,
    optimizer: Annotated[Literal["sgd", "adam"], Flag("optimizer to use")] = "sgd",
    rate: Annotated[float | None, Flag("first learning rate, which falls to 0", unset="1 for sgd, 0.001 for adam")] = None,
    seed: Annotated[int, Flag("random seed for the order of windows")] = 0,
    json: Json = False,
    loading: WholeModel,
) -> None:
    """Fit a tuned lens, which `lens --tuned` reads.

    For each layer, an affine map learns to translate the residual stream into that of the last
    layer. Ctrl-C saves what has been learned so far.

      llama-ref tune_lens Llama3.2-1B book.txt --to 1B-lens
    """
    from llama_ref.checkpoint.folder import find_folder
    from llama_ref.checkpoint.spelling import model_name
    from llama_ref.cli.terminal import progress_bar
    from llama_ref.cli.views.study.tuned_lens import print_fit
    from llama_ref.study.tuned.files import check_target
    from llama_ref.study.tuned.fit import FitSettings
    from llama_ref.study.tuned.lens import TunedLens
    from llama_ref.study.tuned.windows import read_long_text, windows_of

    FitSettings(steps, tokens_per_step, optimizer, rate, seed)
    check_target(to)
    text = read_long_text(file)
    llama = open_to_study(name, loading)
    with progress_bar("fitting") as progress:
        lens = TunedLens.fit(
            llama.model,
            windows_of(llama, text, context),
            steps=steps,
            tokens_per_step=tokens_per_step,
            held_out=held_out,
            optimizer=optimizer,
            rate=rate,
            seed=seed,
            to=to,
            base_model=model_name(find_folder(name).resolve()),
            progress=progress,
        )
    print_fit(lens, to, as_json=json)
