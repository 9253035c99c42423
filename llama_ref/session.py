"""A conversation that keeps its KV cache: a turn costs only its new tokens."""

import json
from pathlib import Path
from typing import Any

from llama_ref.chat import Dialog, Message
from llama_ref.errors import RequestError
from llama_ref.generation import Llama
from llama_ref.loop import Row, new_cache
from llama_ref.streaming import Stream


class Session:
    """A dialog with one model, turn by turn.

    The ids of earlier turns are kept as they were sampled, never encoded anew from their text: another split of the same
    text would disagree with the cache. An answer that is broken off stays in the dialog as far as it came.
    """

    def __init__(self, llama: Llama, system: str | None = None):
        self.llama = llama
        self._cache = new_cache(llama.model, 1, llama.max_seq_len)
        self._answer: Row | None = None
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
        """The messages so far, a broken-off answer included."""
        self._settle()
        return self._dialog

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
        self._dialog.append(message)
        self._answer = stream.row
        return stream

    def load_dialog(self, dialog: Dialog) -> None:
        """Go on from these messages. Raises RequestError for what is not a dialog, leaving the session as it was."""
        formatter = self.llama.formatter
        ids = [self.llama.tokenizer.bos_id]
        for message in dialog:
            ids += formatter.encode_message(message)
        self._dialog, self._ids, self._answer = list(dialog), ids, None
        self._cache.set_lengths([0])

    def save(self, path: str | Path) -> None:
        """Write the messages as JSON. Raises RequestError when that cannot be done."""
        try:
            Path(path).expanduser().write_text(json.dumps(self.dialog, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise RequestError(f"cannot write {path}: {error.strerror}") from error

    def load(self, path: str | Path) -> None:
        """Go on from a file that `save` wrote. Raises RequestError when it is none, leaving the session as it was."""
        try:
            dialog = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        except OSError as error:
            raise RequestError(f"cannot read {path}: {error.strerror}") from error
        except ValueError as error:
            raise RequestError(f"{path} is not a saved conversation ({error})") from error
        if not isinstance(dialog, list):
            raise RequestError(f"{path} is not a saved conversation: expected a list of messages with role and content")
        self.load_dialog(dialog)

    def _settle(self) -> None:
        """Enter the last answer, as far as it came, into the dialog."""
        if self._answer is None:
            return
        row, tokenizer = self._answer, self.llama.tokenizer
        self._answer = None
        if not row.generated and not row.finish_reason:  # broken off before its first token: the turn never was
            self._dialog.pop()
            self._cache.set_lengths([min(self._cache.longest, len(self._ids))])
            return
        message: Message = {"role": "assistant", "content": tokenizer.decode(row.generated)}
        end = tokenizer.eot_id
        if row.stop_token == tokenizer.eom_id:
            message["stop_reason"], end = "end_of_message", tokenizer.eom_id
        self._dialog.append(message)
        self._ids = row.prompt + row.generated + [end]
