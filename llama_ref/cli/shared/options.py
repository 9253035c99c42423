"""Arguments and flags that several commands share, and loading a model with them."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from llama_ref.cli.parsing.flags import NO_VALUE, Flag
from llama_ref.errors import RequestError

if TYPE_CHECKING:
    from llama_ref.generation import Llama

# ---- single parameters

Name = Annotated[str, Flag("checkpoint folder, or release name such as Llama3.2-1B-Instruct")]
Json = Annotated[bool, Flag("print JSON instead of tables", short="j")]
Force = Annotated[bool, Flag("replace a checkpoint that is already at DST", short="f")]
Source = Annotated[str, Flag("checkpoint folder, or release name such as Llama3.1-70B")]
Target = Annotated[str, Flag("folder to write")]
Jobs = Annotated[int | None, Flag("number of files to hash in parallel", unset="one per core")]
Png = Annotated[str | None, Flag("folder to draw pictures into (needs matplotlib)", metavar="FOLDER")]

Images = Annotated[
    list[str] | tuple[()],
    Flag(
        "image that the text is about, for vision releases; may be given several times",
        metavar="FILE",
        read=json.loads,
        many=True,
    ),
]

SHORT_DTYPES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
}
Dtype = Literal["bfloat16", "float16", "float32"]
Quantize = Annotated[
    str | None,
    Flag(
        "quantize the weights to 8 or 4 bits while reading them: int8, int4, or int4:group=N with "
        "N = 32, 64, 128 or 256 weights per scale",
        short="q",
        metavar="SCHEME",
        unset="weights as stored",
    ),
]
Activations = Annotated[
    Literal["reference", "full"] | None,
    Flag(
        "for Meta's int4 and fp8 releases: round the inputs of matrices as Meta's code does (reference), or not (full)",
        unset="reference",
    ),
]
Verify = Annotated[
    Literal["auto", "always", "never"],
    Flag("compare files with checklist.chk: each file once, at every load, or not at all"),
]
InMemory = Annotated[
    bool,
    Flag("copy the weights into memory instead of mapping the files, which can then be changed or deleted"),
]
Compile = Annotated[bool, Flag("compile the decode step: faster decoding after some seconds of compiling")]
PipelineParallelSize = Annotated[int, Flag("number of pipeline stages under torchrun; the rest is tensor parallel")]
Seed = Annotated[int | None, Flag("random seed for sampling, or none for a new one each time")]
MaxSeqLen = Annotated[int, Flag("maximum length of a text in tokens, prompt and answer together")]
TokenizerPath = Annotated[
    str | None,
    Flag("another tokenizer.model", metavar="FILE", unset="the folder's own"),
]

SpecialTokens = Annotated[
    bool,
    Flag("read <|begin_of_text|>, <|eot_id|> and the like in the text as special tokens"),
]

MOST_THREADS = 1024


def thread_count(word: str) -> int | None:
    """Read a number of threads. Raises RequestError."""
    if word.lower() in NO_VALUE:
        return None
    if not (word.isascii() and word.isdigit() and 1 <= int(word[:9]) <= MOST_THREADS):
        raise RequestError(f"--threads is {word!r:.60}, expected a whole number from 1 to {MOST_THREADS:,}")
    return int(word)


Threads = Annotated[
    int | None,
    Flag(
        "number of CPU threads; fewer threads than cores are faster beside other busy programs",
        metavar="INT",
        unset="as PyTorch chooses",
        read=thread_count,
    ),
]

# ---- groups


@dataclass(frozen=True)
class Weights:
    """Flags of every command that loads weights."""

    heading: ClassVar[str] = "Loading"

    quantize: Quantize = None
    activations: Activations = None
    dtype: Annotated[
        Dtype | None,
        Flag(
            "data type of weights and activations",
            unset="bfloat16 where the device has it, else float16",
            aliases=SHORT_DTYPES,
        ),
    ] = None
    device: Annotated[
        str | None,
        Flag("cuda, mps or cpu", metavar="DEVICE", unset="the first of these that is available"),
    ] = None
    verify: Verify = "auto"
    in_memory: InMemory = False
    threads: Threads = None


@dataclass(frozen=True)
class WholeModel(Weights):
    """Flags of commands that load a whole model into one process."""

    max_seq_len: MaxSeqLen = 8192
    tokenizer_path: TokenizerPath = None


@dataclass(frozen=True)
class Scoring(Weights):
    """Flags of commands that score texts, also under torchrun."""

    compile: Compile = False
    pipeline_parallel_size: PipelineParallelSize = 1
    tokenizer_path: TokenizerPath = None


@dataclass(frozen=True)
class Building(Weights):
    """Flags that make decoding faster, for commands that generate."""

    compile: Compile = False
    speculate: Annotated[
        Literal["ngram"] | None,
        Flag("draft tokens from repetitions in the text; the model checks them in one pass"),
    ] = None
    draft: Annotated[
        str | None,
        Flag("draft tokens with a smaller model of the same vocabulary", metavar="NAME"),
    ] = None
    pipeline_parallel_size: PipelineParallelSize = 1


@dataclass(frozen=True)
class Loading(Building):
    """Flags of commands that load a model to generate with."""

    max_seq_len: MaxSeqLen = 8192
    tokenizer_path: TokenizerPath = None
    seed: Seed = 1


def text_or_list(word: str) -> str | list[str]:
    """Read a text, or a JSON list of texts."""
    if word.startswith("["):
        try:
            return json.loads(word)
        except ValueError:
            pass
    return word


@dataclass(frozen=True)
class Sampling:
    """Flags of commands that generate text."""

    heading: ClassVar[str] = "Sampling"

    max_gen_len: Annotated[
        int | None,
        Flag("generate at most this many tokens", short="n", unset="as many as the context holds"),
    ] = None
    temperature: Annotated[float, Flag("0 always takes the most likely token; higher is more random", short="t")] = 0.6
    top_p: Annotated[float, Flag("sample from the fewest most likely tokens with this total probability")] = 0.9
    top_k: Annotated[int | None, Flag("sample from this many most likely tokens", unset="no limit")] = None
    min_p: Annotated[float, Flag("sample from tokens at least this fraction as likely as the most likely one")] = 0.0
    repetition_penalty: Annotated[float, Flag("above 1, tokens already in the text become less likely")] = 1.0
    stop: Annotated[
        str | list[str] | tuple[()],
        Flag(
            "stop before this text, or before any of a JSON list of texts",
            metavar="TEXT",
            read=text_or_list,
        ),
    ] = ()


# ---- a model


def check_images(images: Sequence[str]) -> None:
    """Raise RequestError for a file that is not an image, before a model is loaded."""
    from llama_ref.images import open_image

    for image in images:
        open_image(image)


def build(name: str, sampling: Sampling, loading: Loading) -> "Llama":
    """Load a model to generate with. First raises RequestError for invalid sampling options."""
    from llama_ref.generation import check_stream_options

    check_stream_options(**asdict(sampling))
    return load(name, loading)


def load(name: str, options: Weights, max_batch_size: int = 32) -> "Llama":
    """Load a model by `Llama.build`, with a progress bar on stderr."""
    from llama_ref.cli.terminal import byte_bar
    from llama_ref.generation import Llama

    with byte_bar("loading") as progress:
        return Llama.build(name, max_batch_size=max_batch_size, progress=progress, **build_arguments(options))


def build_arguments(options: Weights) -> dict[str, Any]:
    """Apply --threads, and return the other options as arguments of `Llama.build`."""
    from llama_ref.device import use_threads

    arguments = asdict(options)
    use_threads(arguments.pop("threads"))
    return arguments
