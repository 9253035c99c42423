"""Flags that several commands share, and a model loaded by them."""

from typing import TYPE_CHECKING, Any

from llama_ref.cli.parser import Option

if TYPE_CHECKING:
    from llama_ref.generation import Llama

BUILDING = (  # the example scripts', too
    Option("quantize", None, "int8, int4 or int4:group=32: round the weights to so many bits as they are read."),
    Option("compile", False, "compile the decode step (on a CPU that of one sequence): faster after some seconds."),
    Option("speculate", None, "ngram: guess what comes from what came before, for text that repeats itself."),
    Option("draft", None, "a smaller model of the same vocabulary, which guesses what comes."),
    Option("verify", "auto", "compare with checklist.chk: auto (each file once), always or never."),
    Option("device", None, "cuda, mps or cpu (default: the first of these that is there)."),
    Option("dtype", None, "bfloat16, float16 or float32 (default: bfloat16 where the device has it, else float16)."),
    Option("pipeline_parallel_size", 1, "runs of layers to deal torchrun's processes out to."),
)
LOADING = (
    Option("max_seq_len", 8192, "the longest prompt and answer together, in tokens."),
    Option("seed", 1, "of the sampling."),
    Option("tokenizer_path", None, "a tokenizer.model other than the folder's own."),
    *BUILDING,
)
SAMPLING = (
    Option("max_gen_len", None, "tokens to make at most (default: as many as the context holds)."),
    Option("temperature", 0.6, "0 takes the likeliest token each time."),
    Option("top_p", 0.9, "sample from the fewest likeliest tokens that hold this probability together."),
    Option("top_k", None, "sample from this many likeliest tokens."),
    Option("min_p", 0.0, "sample from tokens at least this fraction as likely as the likeliest."),
    Option("repetition_penalty", 1.0, "above 1 discourages tokens that are already there."),
    Option("stop", (), "end before this text; or a JSON list of such texts."),
)


def build(name: str, options: dict[str, Any]) -> "Llama":
    """A model to generate with. Raises RequestError for senseless options of the sampling before it loads."""
    from llama_ref.generation import check_stream_options

    check_stream_options(**pick(SAMPLING, options))
    return load(name, pick(LOADING, options))


def load(name: str, options: dict[str, Any]) -> "Llama":
    """Llama.build with a bar on stderr."""
    from rich.progress import DownloadColumn, TransferSpeedColumn

    from llama_ref.cli.terminal import progress_bar
    from llama_ref.generation import Llama

    with progress_bar("loading", DownloadColumn(), TransferSpeedColumn()) as progress:
        return Llama.build(name, progress=progress, **options)


def pick(wanted: tuple[Option, ...], options: dict[str, Any]) -> dict[str, Any]:
    """Of all options those that are wanted."""
    return {option.name: options[option.name] for option in wanted}
