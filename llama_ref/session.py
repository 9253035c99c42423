"""A conversation that keeps its KV cache: a turn costs only its new tokens."""

import json
from pathlib import Path
from typing import Any

from llama_ref.chat import Dialog, Message
from llama_ref.compiled.caches import new_cache
from llama_ref.decoding.stream import Stream
from llama_ref.errors import RequestError
from llama_ref.generation import Llama
from llama_ref.parallel.job import from_first

NOT_A_FILE = (OSError, ValueError, RuntimeError)  # besides the first: a name that no file can have, a home that nobody has


class Session:
    """A dialog with one model, turn by turn. Of several processes each has one; the first reads and writes its files.

    The ids of earlier turns are kept as they were sampled, never encoded anew from their text: another split of the same
    text would disagree with the cache. An answer that is broken off stays in the dialog as far as it was shown.
    """

    def __init__(self, llama: Llama, system: str | None = None):
        self.llama = llama
        self._cache = new_cache(llama.model, 1, llama.max_seq_len)
        self._turn: tuple[Message, Stream] | None = None  # the last one, until it is known how far its answer came
        self.reset(system)

    def reset(self, system: str | None = None) -> None:
        """Begin anew, with this system prompt or none."""
        self.load_dialog([{"role": "system", "content": system}] if system else [])

    @property
    def system(self) -> str | None:
        """The system prompt in force."""
        first = self._dialog[0] if self._dialog else None
        return first["content"] if first and first["role"] == "system" else None

    @property
    def dialog(self) -> Dialog:
        """The messages so far, the last answer as far as it was shown."""
        return self._dialog + self._last_turn()

    @property
    def cached_tokens(self) -> int:
        """How many tokens the next turn need not compute."""
        return self._cache.longest

    def say(self, text: str, **options: Any) -> Stream:
        """Add a user's message and stream the answer. `options` are `Llama.stream`'s.

        Raises RequestError when the conversation no longer fits the context; it is then as it was before.
        """
        self._settle()
        message: Message = {"role": "user", "content": text}
        prompt = self._ids + self.llama.formatter.encode_message(message) + self.llama.formatter.encode_header("assistant")
        if len(prompt) >= self.llama.max_seq_len:
            raise RequestError(
                f"the conversation would come to {len(prompt):,} tokens, but max_seq_len is {self.llama.max_seq_len:,}: "
                "/reset it, or start with a larger max_seq_len"
            )
        stream = self.llama.stream(prompt, cache=self._cache, **options)
        self._turn = message, stream
        return stream

    def load_dialog(self, dialog: Dialog) -> None:
        """Go on from these messages. Raises RequestError for what is not a dialog, leaving the session as it was."""
        formatter = self.llama.formatter
        ids = [self.llama.tokenizer.bos_id]
        for message in dialog:
            ids += formatter.encode_message(message)
        self._end_turn()
        self._dialog, self._ids = list(dialog), ids
        self._cache.set_lengths([0])

    def save(self, path: str | Path) -> None:
        """Write the messages as JSON. Raises RequestError when that cannot be done."""
        from_first(self.llama.job, lambda: _write_dialog(path, self.dialog))

    def load(self, path: str | Path) -> None:
        """Go on from a file that `save` wrote. Raises RequestError when it is none, leaving the session as it was."""
        self.load_dialog(from_first(self.llama.job, lambda: _read_dialog(path)))

    def _last_turn(self) -> Dialog:
        """Question and answer, as far as it was shown; none when it was broken off before anything was seen."""
        if self._turn is None:
            return []
        asked, stream = self._turn
        if not stream.text and not stream.finish_reason:
            return []
        answer: Message = {"role": "assistant", "content": stream.text}
        if stream.row.stop_token == self.llama.tokenizer.eom_id:
            answer["stop_reason"] = "end_of_message"
        return [asked, answer]

    def _settle(self) -> None:
        """Enter the last turn into what the next one goes on from, and cut the cache back to that."""
        if self._turn is None:
            return
        messages, stream = self._last_turn(), self._turn[1]
        self._end_turn()
        known = len(self._ids)
        if messages:
            said = stream.row.prompt + self._shown_tokens(stream)
            known = len(said)
            tokenizer = self.llama.tokenizer
            self._ids = [*said, tokenizer.eom_id if "stop_reason" in messages[-1] else tokenizer.eot_id]
            self._dialog += messages
        self._cache.set_lengths([min(self._cache.longest, known)])

    def _end_turn(self) -> None:
        """Make no more of the last answer: an iterator that somebody kept must not write to the cache."""
        if self._turn is not None:
            self._turn[1].close()
            self._turn = None

    def _shown_tokens(self, stream: Stream) -> list[int]:
        """The answer's ids without those of a stop string, or of a character that was not complete."""
        n = len(stream.tokens)
        while len(self.llama.tokenizer.decode(stream.tokens[:n])) > len(stream.text):
            n -= 1
        return stream.tokens[:n]


def _write_dialog(path: str | Path, dialog: Dialog) -> None:
    try:
        text = json.dumps(dialog, ensure_ascii=False, indent=2) + "\n"
        Path(path).expanduser().write_text(text, encoding="utf-8", errors="backslashreplace")  # JSON's own \udc80
    except NOT_A_FILE as error:
        raise RequestError(f"cannot write {path}: {_reason(error)}") from error


def _read_dialog(path: str | Path) -> Dialog:
    try:
        text = Path(path).expanduser().read_bytes()
    except NOT_A_FILE as error:
        raise RequestError(f"cannot read {path}: {_reason(error)}") from error
    try:
        dialog = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is not a saved conversation ({error})") from error
    if not isinstance(dialog, list):
        raise RequestError(f"{path} is not a saved conversation: expected a list of messages with role and content")
    return dialog


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
