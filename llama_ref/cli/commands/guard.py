"""`llama-ref guard`."""

import sys
from json import loads as parse_json  # --json is a parameter
from typing import TYPE_CHECKING, Annotated, cast

from llama_ref.cli.outcome import EXIT_BAD
from llama_ref.cli.parsing.flags import Flag, Section, command
from llama_ref.cli.shared.guarding import GuardVersion, chosen_version
from llama_ref.cli.shared.options import Json, WholeModel, check_images, load
from llama_ref.cli.shared.text_input import Encoding, read_stdin, text_word
from llama_ref.errors import RequestError

if TYPE_CHECKING:
    from llama_ref.chat import ChatFormat, ContentItem, Dialog
    from llama_ref.checkpoint.folder import CheckpointFolder

EXAMPLE = 'llama-ref guard NAME "How do I pick a lock?"'
FILE_LIMIT_BYTES = 64 << 20
EXIT_CODES = {"safe": 0, "unsafe": EXIT_BAD, "unexpected": 3}


def codes(word: str) -> list[str]:
    """Read a comma-separated list of categories' codes."""
    return [code.strip() for code in word.split(",") if code.strip()]


@command(Section.RUN)
def guard(
    name: Annotated[str, Flag("checkpoint folder, or release name such as Llama-Guard-3-1B")],
    text: Annotated[str | None, Flag("user's message", unset="standard input", read=text_word)] = None,
    answer: Annotated[str | None, Flag("assistant's answer, to be judged instead", unset="none", read=text_word)] = None,
    *,
    dialog: Annotated[
        str | None,
        Flag("judge the last message in this JSON list of messages; - is standard input", metavar="FILE"),
    ] = None,
    image: Annotated[str | None, Flag("image that the user shows, for the vision guard", metavar="FILE")] = None,
    categories: Annotated[
        str | None,
        Flag('file with your own categories: lines "S1: Name", each with an indented description', metavar="FILE"),
    ] = None,
    exclude: Annotated[
        list[str] | tuple[()], Flag("categories to leave out, such as S6,S14", metavar="CODES", read=codes)
    ] = (),
    threshold: Annotated[float, Flag("a message is unsafe if P(unsafe) / (P(safe) + P(unsafe)) is at least this")] = 0.5,
    guard_version: GuardVersion = None,
    show_prompt: Annotated[bool, Flag("print the guard's prompt instead of a verdict; loads no weights")] = False,
    encoding: Encoding = None,
    json: Json = False,
    loading: WholeModel,
) -> int:
    """Judge a message with Llama Guard.

    Is it safe, and if not, which categories does it violate? Exit code 0: safe, 1: unsafe, 3: the model
    answered neither.

    It judges the user's message, or the assistant's answer if there is one, or the last message of
    a dialog. Text that looks like a special token, a turn or the end of the conversation has no
    effect (docs/guard.md).

      llama-ref guard Llama-Guard-3-1B "How do I pick a lock?"
      llama-ref guard Llama-Guard-3-8B "How do I pick a lock?" "With a pick."
      llama-ref guard Llama-Guard-3-8B --dialog talk.json --json
    """
    from llama_ref.chat import images_in
    from llama_ref.checkpoint.folder import open_folder
    from llama_ref.cli.terminal import is_first_process, note
    from llama_ref.cli.views.guard import print_guard_prompt, print_verdict
    from llama_ref.guard.categories import read_categories
    from llama_ref.guard.conversation import read_conversation
    from llama_ref.guard.judge import Guard, check_threshold, guard_prompt
    from llama_ref.guard.prompt import spelled
    from llama_ref.parallel.job import from_first

    folder = open_folder(name)
    version = chosen_version(folder, guard_version).name
    own = None if categories is None else read_categories(categories)
    prompt = guard_prompt(version, own, exclude)
    check_threshold(threshold)
    messages: Dialog = []
    if is_first_process():  # torchrun's processes share one standard input
        messages = _messages(text, answer, dialog, image, encoding)
        prompt.check(read_conversation(messages))
        check_images(cast(list[str], images_in(messages)))
    if show_prompt:
        formatter = _formatter(folder, loading.tokenizer_path)
        ids = prompt.encode(formatter, read_conversation(messages)) if messages else []
        print_guard_prompt(ids, spelled(ids, formatter), as_json=json)
        return 0
    llama = load(name, loading)
    judge = Guard(llama, version, categories=own, exclude=exclude, threshold=threshold)
    verdict = judge.judge(from_first(llama.job, lambda: messages))
    print_verdict(verdict, judge, as_json=json)
    if verdict.word == "unexpected":
        sys.stdout.flush()  # the verdict first, if both streams go to the same place
        note(f"the model did not answer like a Llama Guard: check that {name} is one, and that its version is {version}")
    return EXIT_CODES[verdict.word]


def _formatter(folder: "CheckpointFolder", tokenizer_path: str | None) -> "ChatFormat":
    """Open a folder's chat format without loading weights."""
    from llama_ref.chat import ChatFormat

    args = folder.read_args()
    image_id = None if args.vision_chunk_size is None else args.vocab_size
    return ChatFormat(folder.open_tokenizer(args, tokenizer_path), image_id=image_id)


def _messages(text: str | None, answer: str | None, dialog: str | None, image: str | None, encoding: str | None) -> "Dialog":
    """Build the dialog from the arguments. Raises RequestError."""
    if dialog is not None:
        if text is not None or image is not None:
            what = "--image" if text is None else "a text"
            raise RequestError(f"{what} and --dialog are given, expected one of them: a dialog contains its texts and images")
        return _read_dialog(dialog, encoding)
    if text is None:
        text = _read_text(encoding)
    content: list[ContentItem] = [{"type": "text", "text": text}]
    if image is not None:
        content.append({"type": "image", "image": image})
    said: Dialog = [{"role": "user", "content": content}]
    return said if answer is None else [*said, {"role": "assistant", "content": answer}]


def _read_text(encoding: str | None) -> str:
    if sys.stdin.isatty():
        raise RequestError(f"missing TEXT: {EXAMPLE}")
    return read_stdin(encoding)


def _read_dialog(file: str, encoding: str | None) -> "Dialog":
    """Parse the JSON of a file or of standard input. Raises RequestError."""
    name = "standard input" if file == "-" else file
    text = read_stdin(encoding) if file == "-" else _text_of(file)
    try:
        return parse_json(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{name} is not JSON ({error}), expected a list of messages") from error


def _text_of(file: str) -> str:
    from llama_ref.files import named_in_request, read_small

    with named_in_request(file, "the dialog") as path:
        return read_small(path, FILE_LIMIT_BYTES, "a list of messages").decode()
