"""Run tasks of lm-evaluation-harness with a model."""

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llama_ref.checkpoint.folder import open_folder
from llama_ref.checkpoint.loading.fingerprint import fingerprint
from llama_ref.device import is_out_of_memory
from llama_ref.errors import LlamaRefError, RequestError
from llama_ref.evaluation.harness.installed import prepare_harness
from llama_ref.generation import Llama
from llama_ref.parallel.agreement import digest
from llama_ref.progress import Progress

if TYPE_CHECKING:
    from llama_ref.evaluation.harness.tasks import Tasks

ANSWERS_DEPEND_ON = ("quantize", "activations", "dtype", "max_seq_len", "seed")
BOOTSTRAP_ITERS = 1000  # only for standard errors that have no formula


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of an evaluation. `limit`: documents per task; None: all.

    `num_fewshot`: None uses each task's own number. `chat`: write requests in the chat format, with
    examples as separate messages. `use_cache`: the beginning of the name of a file that caches
    answers.
    """

    tasks: tuple[str, ...]
    include_path: str | None = None
    limit: int | None = None
    batch: int = 8
    num_fewshot: int | None = None
    chat: bool = False
    system_instruction: str | None = None
    use_cache: str | None = None

    @classmethod
    def parse(cls, tasks: str, **options: Any) -> "EvaluationSettings":
        """Parse a command line's values, tasks such as "arc_easy,gsm8k". Raises RequestError."""
        names = tuple(dict.fromkeys(name.strip() for name in tasks.split(",")))
        if not all(names):
            raise RequestError(f"tasks is {tasks!r:.60}, expected names separated by commas, like arc_easy,gsm8k")
        settings = cls(names, **options)
        for name, least in (("limit", 1), ("batch", 1), ("num_fewshot", 0)):
            value = getattr(settings, name)
            if value is not None and value < least:
                raise RequestError(f"{name} is {value}, expected {least} or more")
        if settings.use_cache == "":  # its file's name would lack the model's identity
            raise RequestError("use_cache is empty, expected the beginning of a file's name")
        if settings.system_instruction and not settings.chat:
            raise RequestError("system_instruction is for chats: add --apply_chat_template")
        return settings


def identity(name: str, loading: Mapping[str, Any]) -> str:
    """A string that identifies a model: its files, and how it is loaded. Raises CheckpointError."""
    folder = open_folder(name)
    facts = fingerprint(folder, folder.read_args(), loading["tokenizer_path"] or folder.tokenizer)
    return repr(facts | {each: loading[each] for each in ANSWERS_DEPEND_ON})


def run_tasks(
    llama: Llama,
    settings: EvaluationSettings,
    *,
    tasks: "Tasks | None" = None,
    identity: str = "",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run tasks and return the harness's own results.

    `tasks`: the result of `find_tasks` for the settings, if it was already called. `identity`
    identifies the model, so that cached answers of another model are not used. In a job only the
    first process gets results, the others an empty dict. Raises RequestError for tasks that cannot
    be run, LlamaRefError for NaN logits.
    """
    prepare_harness()
    from lm_eval import simple_evaluate

    from llama_ref.evaluation.harness.adapter import LlamaRefLM, silence_bars
    from llama_ref.evaluation.harness.tasks import find_tasks

    silence_bars()
    with _failures_in_words():
        found = simple_evaluate(
            model=LlamaRefLM(llama, batch=settings.batch, chat=settings.chat, progress=progress),
            tasks=list(settings.tasks),
            task_manager=tasks or find_tasks(settings.tasks, settings.include_path),
            num_fewshot=settings.num_fewshot,
            batch_size=settings.batch,
            use_cache=settings.use_cache and f"{settings.use_cache}-{digest(identity.encode())}",
            limit=settings.limit,
            bootstrap_iters=BOOTSTRAP_ITERS,
            apply_chat_template=settings.chat,
            fewshot_as_multiturn=settings.chat,
            system_instruction=settings.system_instruction,
            log_samples=False,
        )
    return found or {}


@contextmanager
def _failures_in_words() -> Iterator[None]:
    """Turn the harness's errors about a task, its data or its cache into LlamaRefError."""
    try:
        yield
    except LlamaRefError:
        raise
    except Exception as error:
        *_, innermost = traceback.walk_tb(error.__traceback__)
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        if innermost[0].f_globals.get("__name__", "").startswith("llama_ref"):
            raise
        said = next(iter(str(error).strip().splitlines()), "")
        raise LlamaRefError(f"lm-evaluation-harness failed: {type(error).__name__}: {said:.300}") from error
