"""The harness's tasks, by name or from YAML files, with errors that say what is missing."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager

from llama_ref.errors import RequestError


class Tasks(TaskManager):
    """A TaskManager that raises RequestError for broken or unsupported tasks and missing data."""

    def load(self, task_list: Any) -> Any:
        try:
            loaded = super().load(task_list)
        except Exception as error:  # any error from YAML files, the code that they name, or data sets
            raise RequestError(_reason(task_list, error)) from error
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise RequestError(f"task {name} runs code that the model writes, which is not allowed here")
            if getattr(task, "MULTIMODAL", False):
                raise RequestError(f"task {name} has images, which is not supported")
        return loaded


def find_tasks(names: Sequence[str], include_path: str | None) -> Tasks:
    """A task manager that can load these tasks. Raises RequestError for an unknown name.

    If the folder has all of them, the harness's own 14,000 tasks are not listed, which takes
    seconds.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise RequestError(f"--include_path is {include_path}, expected a folder with YAML files of tasks")
    files = [name for name in names if name.endswith((".yaml", ".yml"))]
    if missing := [name for name in files if not Path(name).is_file()]:
        raise RequestError(f"--tasks has {missing[0]}, but there is no such file")
    others = [name for name in names if name not in files]
    tasks = Tasks(include_path=include_path, include_defaults=False)
    if not set(others) <= set(tasks.all_tasks):
        tasks = Tasks(include_path=include_path)
    for name in others:
        if name not in tasks.all_tasks:
            close = difflib.get_close_matches(name, tasks.all_tasks, 3, cutoff=0.7)
            hint = f"; did you mean {', '.join(close)}?" if close else "; tasks of your own come with --include_path FOLDER"
            raise RequestError(f"unknown task {name!r:.60}{hint}")
    return tasks


def _reason(names: object, error: Exception) -> str:
    shown = ", ".join(names) if isinstance(names, list) else str(names)
    said = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    if isinstance(error, ConnectionError) or "Offline" in f"{type(error).__name__} {said}":
        return (
            f"the data of {shown} is on Hugging Face's hub, which cannot be reached, and not in the local cache ({said}): run "
            "this once with a network, copy ~/.cache/huggingface from a machine that has the data, or give tasks with your "
            "own data with --include_path"
        )
    return f"cannot load {shown}: {type(error).__name__}: {said}"
