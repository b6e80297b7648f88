"""Run EleutherAI's lm-evaluation-harness on a loaded model and on the unquantized one, offline.

A task is a YAML file of the harness, whose data set lies on this machine, or the name of one of the harness's own tasks
whose data set is in the local cache. Nothing is downloaded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moeplug.errors import InputOutputError, UsageError

for _name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):  # read when datasets is imported
    os.environ[_name] = "1"

try:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise UsageError(f"--lm-eval needs the lm-evaluation-harness ({error}): pip install 'moeplug[lm_eval]'") from error

Results = dict[str, dict[str, float]]


class Tasks:
    """The tasks of one evaluation, found before a model is loaded."""

    def __init__(self, tasks: Sequence[str]) -> None:
        """tasks: files (with a / or .yaml) and names. Raises UsageError for a name that the harness does not know."""
        files = [Path(task) for task in tasks if "/" in task or task.endswith((".yaml", ".yml"))]
        names = [task for task in tasks if Path(task) not in files]
        self._manager = TaskManager(
            include_path=[str(file.resolve().parent) for file in files] or None, include_defaults=bool(names)
        )
        self._names = [*map(_name_in, files), *names]
        unknown = [name for name in self._names if name not in self._manager.all_tasks]
        if unknown:
            raise UsageError(f"--lm-eval: the harness knows no task {', '.join(unknown)}; give its YAML file")

    def scores(self, model: Any, tokenizer: Any, limit: int | None = None, batch_size: int = 1) -> Results:
        """Return task → metric → value of a transformers model. limit: use only so many examples of each task."""
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        try:
            found = lm_eval.simple_evaluate(
                model=wrapped, tasks=list(self._names), task_manager=self._manager, limit=limit,
                bootstrap_iters=0, log_samples=False, batch_size=batch_size,
            )  # fmt: skip
        except (ConnectionError, FileNotFoundError) as error:
            reason = str(error).splitlines()[0]
            raise InputOutputError(f"--lm-eval: a task's data set is not on this machine: {reason}") from error
        assert found is not None
        return {task: _metrics(values) for task, values in found["results"].items()}


def _name_in(file: Path) -> str:
    """Return what a task file calls its task or group. Its YAML may hold the harness's own tags: it is not parsed."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise InputOutputError(f"{file}: cannot be read: {error.strerror}") from error
    match = re.search(r"^group:\s*(\S+)", text, re.MULTILINE) or re.search(r"^task:\s*(\S+)", text, re.MULTILINE)
    if match is None:
        raise UsageError(f"{file}: has no `task:` with a name; expected a task file of the lm-evaluation-harness")
    return match.group(1).strip("'\"")


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of one task, without their standard errors: "acc,none" is acc without a filter."""
    named = {key.removesuffix(",none"): value for key, value in values.items() if "_stderr" not in key}
    return {key: float(value) for key, value in named.items() if type(value) in (int, float) and "sample" not in key}
