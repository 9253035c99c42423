"""A conversation that keeps its KV cache, so that a turn computes only its new tokens."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llama_ref.chat import ContentItem, Dialog, Message, ToolCall, content_items, images_in
from llama_ref.checkpoint.formats.atomic import atomic_file
from llama_ref.compiled.caches import new_cache
from llama_ref.decoding.stream import Stream
from llama_ref.errors import CheckpointError, RequestError
from llama_ref.files import read_json
from llama_ref.generation import Llama
from llama_ref.images import Tiles
from llama_ref.parallel.job import from_first
from llama_ref.tools.toolset import ToolLike, ToolSet

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from llama_ref.images import ImageSource
    from llama_ref.sampling import StreamOptions

DIALOG_LIMIT_BYTES = 64 << 20
NOT_A_FILE = (OSError, ValueError, RuntimeError)  # the last two: an invalid path, an unknown home directory


class Session:
    """A dialog with one model, turn by turn. In a parallel job each process has one; rank 0 does the file I/O.

    The ids of earlier turns are kept as sampled, never encoded again from their text: another
    tokenization of the same text would not match the cache. An interrupted answer stays in the dialog as
    far as it was shown.

    The model may call `tools`, as in `Llama.chat_completion`. They are written before the dialog
    for the model (`session.tools.write(session.dialog)`), and are not part of `dialog` or of the
    saved file.
    """

    def __init__(
        self,
        llama: Llama,
        system: str | None = None,
        *,
        tools: ToolSet | Iterable[ToolLike] | None = None,
        tool_format: str | None = None,
    ):
        self.llama = llama
        llama.formatter.warn_once()
        self.tools = llama.formatter.offered(tools, tool_format)
        self._cache = new_cache(llama.model, 1, llama.max_seq_len)
        self._images: Sequence[Tiles] = []  # of the dialog, in order
        # The last turn, until it is added to the dialog.
        self._turn: tuple[list[Message], Stream] | None = None
        self.reset(system)

    def reset(self, system: str | None = None) -> None:
        """Start a new conversation, with this system prompt or none."""
        self.load_dialog([{"role": "system", "content": system}] if system else [])

    @property
    def system(self) -> str | None:
        """The current system prompt."""
        first = self._dialog[0] if self._dialog else None
        return cast(str, first["content"]) if first and first["role"] == "system" else None

    @property
    def dialog(self) -> Dialog:
        """The messages so far, with the last answer as far as it was shown."""
        return self._dialog + self._last_turn()

    @property
    def tool_calls(self) -> list[ToolCall]:
        """The calls in the last answer, in any form; `say_results` answers them."""
        if self._turn is None:
            last = self._dialog[-1:]
        else:
            tokens = self._turn[1].answer_tokens
            last = [self.llama.formatter.decode_assistant_message(tokens, tools=self.tools)]
        return last[0].get("tool_calls", []) if last else []

    @property
    def cached_tokens(self) -> int:
        """Tokens that the next turn does not have to compute."""
        return self._cache.longest

    def say(self, text: str, images: Sequence["ImageSource"] = (), **options: "Unpack[StreamOptions]") -> Stream:
        """Add a user's message, images before its text, and stream the answer. `options` are `Llama.stream`'s.

        An image is encoded once. Raises RequestError if an image cannot be read or the conversation
        no longer fits the context; the session is then unchanged.
        """
        self._settle()
        message: Message = {"role": "user", "content": text}
        if not isinstance(images, list | tuple):
            raise RequestError(f"images is {images!r:.60}, expected a list of images")
        if images:
            items: list[ContentItem] = [{"type": "image", "image": image} for image in images]
            message["content"] = [*items, {"type": "text", "text": text}]
        return self._ask([message], images, options)

    def say_results(self, *results: str, **options: "Unpack[StreamOptions]") -> Stream:
        """Give the results of the last answer's calls, each as a message with the role `tool`, and stream the answer.

        Raises RequestError as `say` does, and for a result that is not a text.
        """
        self._settle()
        if not results:
            raise RequestError("no results: give a text for each call")
        return self._ask([{"role": "tool", "content": result} for result in results], (), options)

    def _ask(self, messages: list[Message], images: Sequence["ImageSource"], options: "StreamOptions") -> Stream:
        """Stream the answer to messages after the settled dialog."""
        formatter = self.llama.formatter
        tiles = [*self._images, *(self.llama.load_tiles(image) for image in images)]
        asked = [token for message in messages for token in formatter.encode_message(message)]
        prompt = self._ids + asked + formatter.encode_header("assistant")
        if len(prompt) >= self.llama.max_seq_len:
            raise RequestError(
                f"the conversation would have {len(prompt):,} tokens, but max_seq_len is {self.llama.max_seq_len:,}: "
                "/reset it, or start with a larger max_seq_len"
            )
        stream = self.llama.stream(prompt, images=tiles, cache=self._cache, **options)
        self._turn = messages, stream
        return stream

    def withdraw(self) -> None:
        """Remove the last question and its answer, as if it had not been asked.

        Only the latest turn can be removed: a second call does nothing.
        """
        self._end_turn()
        self._cache.truncate([min(self._cache.longest, len(self._ids))])

    def load_dialog(self, dialog: Dialog) -> None:
        """Continue from these messages.

        Raises RequestError if they are not a dialog; the session is then unchanged.
        """
        ids = self.llama.formatter.encode_messages(dialog, self.tools)
        images = [self.llama.load_tiles(image) for image in images_in(dialog)]
        self._end_turn()
        self._dialog, self._ids, self._images = list(dialog), ids, images
        self._cache.truncate([0])

    def save(self, path: str | Path) -> None:
        """Write the messages as JSON. Raises RequestError if the file cannot be written."""
        from_first(self.llama.job, lambda: _write_dialog(path, self.dialog))

    def load(self, path: str | Path) -> None:
        """Continue from a file that `save` wrote.

        Raises RequestError for any other; the session is then unchanged.
        """
        self.load_dialog(from_first(self.llama.job, lambda: _read_dialog(path)))

    def _last_turn(self) -> Dialog:
        """Question and answer as far as shown; empty if interrupted before anything was shown."""
        if self._turn is None:
            return []
        asked, stream = self._turn
        if not stream.text and not stream.finish_reason:
            return []
        if self.tools:
            return [*asked, self.llama.formatter.decode_assistant_message(stream.answer_tokens, tools=self.tools)]
        answer: Message = {"role": "assistant", "content": stream.text}
        if stream.row.stop_token == self.llama.tokenizer.eom_id:
            answer["stop_reason"] = "end_of_message"
        return [*asked, answer]

    def _settle(self) -> None:
        """Append the last turn to the dialog, and truncate the cache to it."""
        if self._turn is None:
            return
        messages, stream = self._last_turn(), self._turn[1]
        self._end_turn()
        known = len(self._ids)
        if messages:
            said = stream.row.prompt + stream.shown_tokens
            known = len(said)
            self._ids = [*said, self._end_token(stream)]
            self._dialog += messages
            self._images = stream.row.images
        self._cache.truncate([min(self._cache.longest, known)])

    def _end_token(self, stream: Stream) -> int:
        """The token that ends an answer: its stop token if it keeps its ids or waits for a tool."""
        tokenizer, stop = self.llama.tokenizer, stream.answer_tokens[-1:]
        kept = tokenizer.stop_tokens if self.tools else [tokenizer.eom_id]
        return stop[0] if stop and stop[0] in kept else tokenizer.eot_id

    def _end_turn(self) -> None:
        """End the last answer: a caller's iterator must not write to the cache any more."""
        if self._turn is not None:
            self._turn[1].close()
            self._turn = None


def _written(message: Message) -> Any:
    """A message's content as JSON: images as their files' paths."""
    if isinstance(message["content"], str):
        return message["content"]
    items: list[dict[str, str]] = []
    for item in content_items(message):
        if item["type"] == "text":
            items.append({"type": "text", "text": item["text"]})
        elif isinstance(item["image"], str | Path):
            items.append({"type": "image", "image": str(Path(item["image"]).expanduser().resolve())})
        else:
            raise RequestError("the conversation has an image that is not a file: give images as paths to save it")
    return items


def _write_dialog(path: str | Path, dialog: Dialog) -> None:
    """Replace the file when the new one is complete: a full disk must not lose the conversation."""
    written = [{**message, "content": _written(message)} for message in dialog]
    text = json.dumps(written, ensure_ascii=False, indent=2) + "\n"
    try:
        target = Path(path).expanduser().resolve()
        is_special = target.exists() and not target.is_file()
        if not is_special:
            with atomic_file(target) as file:
                file.write(text.encode(errors="backslashreplace"))  # JSON's own \udc80
    except NOT_A_FILE as error:
        raise RequestError(f"cannot write {path}: {_reason(error)}") from error
    if is_special:
        raise RequestError(f"cannot write {path}: it is not a plain file")


def _read_dialog(path: str | Path) -> Dialog:
    try:
        dialog = read_json(Path(path).expanduser(), DIALOG_LIMIT_BYTES, "a saved conversation")
    except (CheckpointError, *NOT_A_FILE) as error:
        said = _reason(error)
        raise RequestError(said if str(path) in said else f"cannot read {path}: {said}") from error
    if not isinstance(dialog, list):
        raise RequestError(f"{path} is not a saved conversation: expected a list of messages with role and content")
    return dialog


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
