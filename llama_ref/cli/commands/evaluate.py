"""`llama-ref evaluate`."""

from dataclasses import asdict, dataclass
from typing import Annotated

from llama_ref.cli.parsing.flags import Flag, Section, command
from llama_ref.cli.shared.options import Json, MaxSeqLen, Name, Scoring, Seed


@dataclass(frozen=True)
class Generating(Scoring):
    """Flags of a model that scores texts and generates."""

    max_seq_len: MaxSeqLen = 8192
    seed: Seed = 1


@command(Section.EVALUATE)
def evaluate(
    name: Name,
    *,
    tasks: Annotated[str, Flag("tasks of lm-evaluation-harness, or YAML files of tasks", metavar="TASK,...")],
    include_path: Annotated[str | None, Flag("folder with YAML files of your own tasks", metavar="FOLDER")] = None,
    limit: Annotated[int | None, Flag("use only this many documents of each task, from its first on", unset="all")] = None,
    batch: Annotated[int, Flag("number of sequences at a time")] = 8,
    num_fewshot: Annotated[int | None, Flag("examples before each question", unset="as each task says")] = None,
    apply_chat_template: Annotated[bool, Flag("format questions and examples as chat turns, for Instruct models")] = False,
    system_instruction: Annotated[str | None, Flag("system message of every chat")] = None,
    use_cache: Annotated[
        str | None,
        Flag("store answers in a file whose name starts with FILE, and resume from it", metavar="FILE"),
    ] = None,
    json: Json = False,
    loading: Generating,
) -> None:
    """Run benchmarks of lm-evaluation-harness (needs lm-eval).

    The harness's tasks load their data from the Hugging Face Hub; your own tasks need no network.

      llama-ref evaluate Llama3.2-1B --tasks arc_easy,hellaswag --limit 100
    """
    from llama_ref.evaluation.harness.installed import prepare_harness

    prepare_harness()
    from llama_ref.cli.shared.options import load
    from llama_ref.cli.terminal import is_first_process, progress_bar
    from llama_ref.cli.views.evaluate import print_results
    from llama_ref.evaluation.candidates import Candidate
    from llama_ref.evaluation.harness.run import EvaluationSettings, identity, run_tasks
    from llama_ref.evaluation.harness.tasks import find_tasks

    settings = EvaluationSettings.parse(
        tasks,
        include_path=include_path,
        limit=limit,
        batch=batch,
        num_fewshot=num_fewshot,
        chat=apply_chat_template,
        system_instruction=system_instruction,
        use_cache=use_cache,
    )
    known = identity(name, asdict(loading))
    found = find_tasks(settings.tasks, include_path)  # before a long load
    llama = load(name, loading, max_batch_size=batch)
    with progress_bar("evaluating") as progress:
        results = run_tasks(llama, settings, tasks=found, identity=known, progress=progress)
    if is_first_process():
        print_results(results, Candidate(name, loading.quantize).label, settings, as_json=json)
