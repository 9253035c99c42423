"""Judge conversations with a Llama Guard model."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from llama_ref.chat import Dialog
from llama_ref.errors import RequestError
from llama_ref.guard.categories import Category, checked, without
from llama_ref.guard.conversation import Conversation, read_conversation
from llama_ref.guard.prompt import GuardPrompt
from llama_ref.guard.reader import VerdictReader, word_id
from llama_ref.guard.verdict import Verdict, read_verdict
from llama_ref.guard.versions import VersionName, find_version, version_of

if TYPE_CHECKING:
    from llama_ref.generation import Llama

ANSWER_TOKENS = 32  # "unsafe" and fourteen codes


class Guard:
    """Judges the last message of conversations with a Llama Guard model.

    version: selects the prompt; None: inferred from the model's shape, which cannot distinguish
    Guard 2 from Guard 3 8B. categories: replace the version's own. exclude: codes to leave out.
    threshold: a message is unsafe if P(unsafe) / (P(safe) + P(unsafe)) is at least this. Raises
    RequestError for an unknown or ambiguous version, codes that are not in the list, a threshold
    outside 0 to 1, and a tokenizer that is not Llama 3's.
    """

    def __init__(
        self,
        llama: "Llama",
        version: VersionName | None = None,
        *,
        categories: Sequence[Category] | None = None,
        exclude: Collection[str] = (),
        threshold: float = 0.5,
    ) -> None:
        self.llama = llama
        self.version = version_of(llama.model.args) if version is None else find_version(version)
        self.prompt = guard_prompt(self.version.name, categories, exclude)
        self.excluded = frozenset(exclude)
        self.threshold = check_threshold(threshold)
        for word in ("safe", "unsafe"):
            word_id(llama.tokenizer, word)

    def judge(self, dialog: Dialog) -> Verdict:
        """The verdict on a dialog's last message, the user's or the assistant's.

        User and assistant must alternate, the user first. A guard that reads images also sees the
        dialog's last image. Raises RequestError for other dialogs and for those longer than the
        context.
        """
        return self.judge_all([dialog])[0]

    def judge_all(self, dialogs: Sequence[Dialog]) -> list[Verdict]:
        """The verdict on each dialog, the same as from `judge`, computed in batches."""
        conversations = [read_conversation(dialog) for dialog in dialogs]
        prompts = [self._encode(conversation) for conversation in conversations]
        size = self.llama.max_batch_size
        verdicts: list[Verdict] = []
        for begin in range(0, len(prompts), size):
            batch = slice(begin, begin + size)
            verdicts += self._judge(prompts[batch], conversations[batch])
        return verdicts

    def _judge(self, prompts: list[list[int]], conversations: list[Conversation]) -> list[Verdict]:
        reader = VerdictReader(self.llama.tokenizer, self.threshold, len(prompts))
        images = [[] if conversation.image is None else [conversation.image] for conversation in conversations]
        answers = self.llama.generate_by(prompts, reader, ANSWER_TOKENS, images=images)
        texts = ["safe" if safe else self.llama.decode(ids) for safe, ids in zip(reader.is_safe, answers, strict=True)]
        return [
            read_verdict(text, probabilities, self.prompt.categories, self.excluded)
            for text, probabilities in zip(texts, reader.probabilities, strict=True)
        ]

    def _encode(self, conversation: Conversation) -> list[int]:
        prompt = self.prompt.encode(self.llama.formatter, conversation)
        limit = self.llama.max_seq_len
        if len(prompt) + ANSWER_TOKENS > limit:
            raise RequestError(
                f"the guard's prompt has {len(prompt):,} tokens, and its answer up to {ANSWER_TOKENS}, but max_seq_len is "
                f"{limit:,}: give a shorter conversation, or a larger max_seq_len"
            )
        return prompt


def guard_prompt(version: str, categories: Sequence[Category] | None = None, exclude: Collection[str] = ()) -> GuardPrompt:
    """A version's prompt, with its own or the given categories, without excluded ones.

    Raises RequestError.
    """
    known = find_version(version)
    listed = known.categories if categories is None else checked(categories)
    if isinstance(exclude, str):
        raise RequestError(f"exclude is the string {exclude!r:.60}, expected a list of codes such as ['S6']")
    return GuardPrompt(known, without(listed, exclude))


def check_threshold(threshold: float) -> float:
    """Check a threshold and return it as a float. Raises RequestError unless it is from 0 to 1."""
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise RequestError(f"threshold is {threshold!r}, expected a number from 0 to 1")
    return float(threshold)
