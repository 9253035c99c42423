"""`llama-ref`: argument words to calls."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llama_ref.cli.options import LOADING, SAMPLING, build, pick
from llama_ref.cli.parser import EXIT_BAD, EXIT_MISUSE, command, complain, run
from llama_ref.cli.study_commands import STUDY_COMMANDS
from llama_ref.errors import CheckpointError, FolderNotFound, RequestError

# A command imports what it needs when it runs: `list` shall not wait for torch.


@command()
def list_(*, json: bool = False) -> None:
    """List the checkpoints under ~/.llama/checkpoints, or under $LLAMA_MODELS_CONFIG_DIR/checkpoints.

    Args:
        json: print it as JSON.
    """
    from llama_ref.cli.views.list import print_list

    print_list(as_json=json)


@command()
def info(name: str, *, json: bool = False) -> None:
    """Show a checkpoint's shape, its parameters, and the memory it needs.

    Args:
        name: a folder, or a release name such as Llama3.2-1B-Instruct.
        json: print it as JSON.
    """
    from llama_ref.checkpoint.describe import describe
    from llama_ref.checkpoint.folder import open_folder
    from llama_ref.cli.views.info import print_info

    print_info(describe(open_folder(name)), as_json=json)


@command()
def verify(
    name: str | None = None,
    *,
    all: bool = False,
    json: bool = False,
    jobs: int | None = None,
    quick: bool = False,
    deep: bool = False,
) -> int:
    """Is a checkpoint whole, which file is not, why, and what to do? Exit code 0: whole, 1: not, 2: could not be checked.

    Args:
        name: a folder, or a release name such as Llama3.2-1B-Instruct.
        all: check every checkpoint under ~/.llama/checkpoints.
        json: print it as JSON.
        jobs: files hashed at a time (default: one per core).
        quick: sizes, archives, tensor names and shapes only; finds all but silent damage in seconds.
        deep: also look for NaN and infinity in every weight.
    """
    from llama_ref.checkpoint import integrity
    from llama_ref.checkpoint.folder import checkpoints_root, find_folder, list_folders
    from llama_ref.cli.views.verify import hashing_bars, print_reports

    if (name is None) != all:
        raise RequestError("give a folder or a release's name, or --all")
    try:
        folders = list_folders() if all else [find_folder(name)]
    except CheckpointError as error:
        return complain(error, EXIT_MISUSE)
    if not folders:
        raise FolderNotFound(f"{checkpoints_root()} holds no checkpoints")
    with hashing_bars() as progress:
        reports = [integrity.verify(folder, jobs=jobs, quick=quick, deep=deep, progress=progress) for folder in folders]
    print_reports(reports, as_json=json, as_list=all)
    codes = {report.exit_code for report in reports}
    return EXIT_BAD if EXIT_BAD in codes else max(codes)


@command()
def checksum(name: str, *, algorithm: str = "md5", force: bool = False, jobs: int | None = None) -> None:
    """Write checklist.chk for a folder that has none, in the form that `md5sum -c` reads.

    Args:
        name: a folder, or a release name.
        algorithm: md5 or sha256.
        force: replace the list that is there.
        jobs: files hashed at a time (default: one per core).
    """
    from llama_ref.checkpoint.folder import find_folder
    from llama_ref.checkpoint.integrity import write_checklist
    from llama_ref.cli.views.verify import hashing_bars
    from llama_ref.formatting import printable

    with hashing_bars() as progress:
        path = write_checklist(find_folder(name), algorithm, force, jobs, progress)
    print(printable(str(path)))


@command()
def diff(a: str, b: str, *, json: bool = False) -> int:
    """Are two checkpoints the same model, whatever their shards? Exit code 0: identical, 1: not, 2: not comparable.

    Args:
        a: a folder, or a release name.
        b: another.
        json: print it as JSON.
    """
    from rich.progress import MofNCompleteColumn

    from llama_ref.checkpoint.diff import compare
    from llama_ref.cli.terminal import progress_bar
    from llama_ref.cli.views.verify import print_comparison

    try:
        with progress_bar("comparing", MofNCompleteColumn()) as progress:
            comparison = compare(a, b, progress)
    except CheckpointError as error:
        return complain(error, EXIT_MISUSE)
    print_comparison(comparison, as_json=json)
    return 0 if comparison.identical else EXIT_BAD


@command()
def plan(
    name: str,
    *,
    gpu_memory: float = 80,
    max_seq_len: int = 8192,
    max_batch_size: int = 4,
    quantize: str | None = None,
    dtype: str | None = None,
    json: bool = False,
) -> int:
    """How many cards does a model need, what takes their memory, and how to start? Exit code 0: it fits, 1: on none of these.

    Args:
        name: a release's name such as Llama3.1-70B, downloaded or not; or a folder.
        gpu_memory: GB of one card, as it is sold: 24, 80. (A T4 has 15 of its 16, an A10 or L4 22.4 of its 24: ECC takes some.)
        max_seq_len: the longest prompt and answer together, in tokens.
        max_batch_size: sequences at a time.
        quantize: int8, int4 or int4:group=32: the weights in so many bits.
        dtype: bfloat16, float16 or float32 (default: bfloat16, and float32 where nothing is quantized).
        json: print it as JSON.
    """
    from llama_ref.cli.views.plan import print_plan
    from llama_ref.plan import Workload, find_model

    workload = Workload(gpu_memory, max_seq_len, max_batch_size)
    return 0 if print_plan(find_model(name, quantize), workload, dtype, as_json=json) else EXIT_BAD


@command()
def reshard(src: str, dst: str, *, shards: int, force: bool = False, verify: str = "auto") -> None:
    """Write a checkpoint anew in another number of shards: consolidated.NN.pth, params.json, tokenizer.model, checklist.chk.

    The weights stay as they are, bit for bit. Not needed to load them: any number of shards loads on any number of processes.

    Args:
        src: a folder, or a release name such as Llama3.1-70B.
        dst: the folder to write.
        shards: how many; it must divide the query heads, the feed-forward width and the vocabulary.
        force: replace the checkpoint that is at dst.
        verify: compare src with its checklist.chk: auto (each file once), always or never.
    """
    from llama_ref.checkpoint.convert import to_meta
    from llama_ref.formatting import printable

    with _writing() as progress:
        path = to_meta(src, dst, shards=shards, force=force, verify=verify, progress=progress)
    print(printable(str(path)))


@command()
def convert(
    src: str,
    dst: str,
    *,
    to: str,
    dtype: str | None = None,
    max_shard_size: str | None = None,
    shards: int | None = None,
    chat: bool | None = None,
    force: bool = False,
    verify: str = "auto",
) -> None:
    """Write a checkpoint anew in Hugging Face's format (safetensors), or from that in Meta's.

    Not needed to use a Hugging Face folder here: every command reads one as it is.

    Args:
        src: a folder, or a release name such as Llama3.2-1B-Instruct.
        dst: the folder to write.
        to: hf or meta.
        dtype: bfloat16, float16 or float32 (default: as it is).
        max_shard_size: of one safetensors file, such as 5GB (the default) or 500MB.
        shards: how many consolidated.NN.pth (default: one, or as many as there are).
        chat: whether it is trained to chat, and so gets a chat template (default: unless its name is a base model's).
        force: replace the checkpoint that is at dst.
        verify: compare src with its checklist.chk: auto (each file once), always or never.
    """
    from llama_ref.checkpoint.convert import parse_bytes, to_hugging_face, to_meta
    from llama_ref.device import named_dtype
    from llama_ref.formatting import printable

    if to not in ("hf", "meta"):
        raise RequestError(f"--to is {to!r}, expected hf or meta")
    if any(option is not None for option in ((shards,) if to == "hf" else (max_shard_size, chat))):
        raise RequestError("--shards goes with --to meta, --max_shard_size and --chat with --to hf")
    cast = None if dtype is None else named_dtype(dtype)
    size = {} if max_shard_size is None else {"max_shard_bytes": parse_bytes(max_shard_size)}
    with _writing() as progress:
        same = {"dtype": cast, "force": force, "verify": verify, "progress": progress}
        path = (
            to_meta(src, dst, shards=shards, **same) if to == "meta" else to_hugging_face(src, dst, chat=chat, **size, **same)
        )
    print(printable(str(path)))


@command()
def quantize(src: str, dst: str, *, to: str, calibrate: bool = True, force: bool = False, verify: str = "auto") -> None:
    """Write a checkpoint anew in eight or four bits: a folder that loads at once, and takes as much less memory.

    Args:
        src: a folder, or a release name such as Llama3.2-1B-Instruct.
        dst: the folder to write.
        to: int8, int4 or int4:group=32 (groups of 32, 64, 128 or 256 weights share a scale).
        calibrate: to four bits, round by what the layers are given while the model reads a text (minutes for large models).
        force: replace the checkpoint that is at dst.
        verify: compare src with its checklist.chk: auto (each file once), always or never.
    """
    from llama_ref.checkpoint.quantized_writer import quantize_folder
    from llama_ref.formatting import printable
    from llama_ref.quantization.scheme import Scheme

    scheme = Scheme.parse(to, "--to")
    with _writing() as progress:
        path = quantize_folder(src, dst, scheme, calibrate=calibrate, force=force, verify=verify, progress=progress)
    print(printable(str(path)))


@contextmanager
def _writing() -> Iterator[Callable[[int, int], None]]:
    from rich.progress import DownloadColumn, TransferSpeedColumn

    from llama_ref.cli.terminal import progress_bar

    with progress_bar("writing", DownloadColumn(), TransferSpeedColumn()) as progress:
        yield progress


@command(*SAMPLING, *LOADING)
def complete(name: str, prompt: str | None = None, *, echo: bool = False, **options: Any) -> None:
    """Continue a text, printing it as it is made. Without a prompt, standard input is the prompt.

    Args:
        name: a folder, or a release name such as Llama3.2-1B.
        prompt: the text to continue.
        echo: print the prompt first.
    """
    from llama_ref.cli.terminal import is_first_process, note
    from llama_ref.cli.timing import Pace
    from llama_ref.parallel.job import from_first

    if prompt is None and is_first_process():  # torchrun's processes have one standard input
        prompt = _read_prompt()
    llama = build(name, options)
    prompt = from_first(llama.job, lambda: prompt)
    pace = Pace(llama.stream(prompt, **pick(SAMPLING, options)))
    if echo:
        print(prompt, end="", flush=True)
    for piece in pace:
        print(piece, end="", flush=True)
    print(flush=True)
    note(str(pace))


def _read_prompt() -> str:
    if sys.stdin.isatty():
        raise RequestError('give a prompt: llama-ref complete NAME "Once upon a time"')
    prompt = sys.stdin.read().removesuffix("\n")  # the one that `echo` adds
    if not prompt:
        raise RequestError('standard input is empty; give a prompt: llama-ref complete NAME "Once upon a time"')
    return prompt


@command(*SAMPLING, *LOADING)
def chat(name: str, *, system: str | None = None, **options: Any) -> None:
    """Talk with an instruct model. /help lists what it obeys; through a pipe, each line is a turn.

    Args:
        name: a folder, or a release name such as Llama3.2-1B-Instruct.
        system: the system prompt.
    """
    from llama_ref.cli import chat as repl
    from llama_ref.session import Session

    repl.chat(Session(build(name, options), system), pick(SAMPLING, options))


@command(*(option for option in LOADING if option.name in ("quantize", "compile", "device", "dtype", "verify")))
def bench(
    name: str,
    *,
    prompt_len: int = 512,
    gen_len: int = 128,
    batch: str = "1,8",
    context: str | None = None,
    against: str | None = None,
    rounds: int = 5,
    threads: int | None = None,
    json: bool = False,
    png: str | None = None,
    **options: Any,
) -> None:
    """How fast does a checkpoint run here: the prompt, each token, beside other programs and beside what memory allows?

    Args:
        name: a folder, or a release name such as Llama3.2-1B.
        prompt_len: tokens of the prompt.
        gen_len: tokens to make.
        batch: sequences at a time; several numbers, 1,8, are measured in turn.
        context: also decode one sequence after so many tokens, 8192,32768 say, whose keys and values are random numbers.
        against: transformers,llama.cpp,meta or some of them, where they are installed: the same weights in turn with ours.
        rounds: how often each takes its turn; medians are shown.
        threads: of every contestant (default: as PyTorch chooses).
        json: print it as JSON.
        png: a file for the roofline as a picture (needs matplotlib).
    """
    from llama_ref.bench.roofline import check_picture, draw_roofline
    from llama_ref.bench.runner import compare
    from llama_ref.bench.settings import Settings
    from llama_ref.cli.terminal import note
    from llama_ref.cli.views.bench import print_report

    if png is not None:
        check_picture(png)
    lengths = {"prompt_len": prompt_len, "gen_len": gen_len, "batch": batch, "context": context}
    settings = Settings.parse(name, **lengths, against=against, rounds=rounds, threads=threads, **options)
    report = compare(settings, note if sys.stderr.isatty() else lambda text: None)
    if png is not None:
        draw_roofline(report, png)
    print_report(report, as_json=json)


COMMANDS = {
    "list": list_,
    "info": info,
    "verify": verify,
    "checksum": checksum,
    "diff": diff,
    "plan": plan,
    "reshard": reshard,
    "convert": convert,
    "quantize": quantize,
    "complete": complete,
    "chat": chat,
    "bench": bench,
    **STUDY_COMMANDS,
}


def main(argv: list[str] | None = None) -> int:
    """`llama-ref` with these words (default: the process's own; none ask for help); the exit code."""
    words = sys.argv[1:] if argv is None else argv
    return run(COMMANDS, words or ["--help"], "llama-ref")
