"""The nine zero-shot tasks of the paper, run by lm-eval on its own data from the hub or on local files."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import env

from specquant.custom_ops.errors import SpecQuantError

# task -> (the metric that counts, its file of --data-dir, what a row of that must have). acc_norm, where a choice's
# log-likelihood is divided by its length, wherever lm-eval has it: so do QuaRot's and OSTQuant's tables.
TASKS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "lambada_openai": ("acc", "lambada_openai_test.jsonl", ("text",)),
    "hellaswag": ("acc_norm", "hellaswag_validation.jsonl", ("activity_label", "ctx_a", "ctx_b", "endings", "label")),
    "piqa": ("acc_norm", "piqa_validation.jsonl", ("goal", "sol1", "sol2", "label")),
    "winogrande": ("acc", "winogrande_xl_validation.jsonl", ("sentence", "option1", "option2", "answer")),
    "boolq": ("acc", "boolq_validation.jsonl", ("question", "answer", "passage")),
    "social_iqa": (
        "acc",
        "social_iqa_validation.jsonl",
        ("context", "question", "answerA", "answerB", "answerC", "label"),
    ),
    "arc_easy": ("acc_norm", "arc_easy_test.jsonl", ("question", "choices", "answerKey")),
    "arc_challenge": ("acc_norm", "arc_challenge_test.jsonl", ("question", "choices", "answerKey")),
    "openbookqa": ("acc_norm", "openbookqa_test.jsonl", ("question_stem", "choices", "answerKey")),
}


@dataclass(frozen=True)
class TaskResult:
    """metric is the one that counts in the average; values and stderr: every metric as lm-eval reports it."""

    metric: str
    values: dict[str, float]
    stderr: dict[str, float]
    documents: int
    version: float

    @property
    def value(self) -> float:
        return self.values[self.metric]


def average(results: dict[str, TaskResult]) -> float:
    """The mean over tasks, each counting the same."""
    return sum(result.value for result in results.values()) / len(results)


def task_names(wanted: str | None) -> list[str]:
    """The tasks of a comma-separated list (None: all). Raises SpecQuantError for one that is not of the nine."""
    names = list(TASKS) if wanted is None else [name.strip() for name in wanted.split(",")]
    for name in names:
        if name not in TASKS:
            raise SpecQuantError(f"there is no task '{name}'; there are {', '.join(TASKS)}")
    return list(dict.fromkeys(names))


def hub_tasks(names: list[str]) -> dict[str, Any]:
    """lm-eval's own tasks with the hub's data. Raises SpecQuantError where that cannot be had."""
    manager = TaskManager()
    tasks: dict[str, Any] = {}
    for name in names:
        try:
            tasks |= manager.load([name])["tasks"]
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise SpecQuantError(
                f"task {name}: its data cannot be had from the hub; give local files with --data-dir ({reason})"
            ) from None
    return tasks


def local_tasks(names: list[str], folder: Path) -> dict[str, Any]:
    """The same tasks, by our own definitions in runtime/tasks, on JSON-lines files in the original data sets' schema.

    Raises SpecQuantError if a file is missing or is not what its name says.
    """
    return {name: local_task(name, read_rows(name, folder)) for name in names}


def local_task(name: str, rows: list[dict[str, Any]]) -> Any:
    """An lm-eval task on documents that are in memory."""
    from datasets import Dataset

    definition = resources.files("specquant.runtime").joinpath("tasks", f"{name}.yaml").read_text(encoding="utf-8")
    documents = Dataset.from_list(rows)
    return ConfigurableTask(
        config=yaml.safe_load(definition) | {"custom_dataset": lambda **metadata: {"test": documents}}
    )


def read_rows(name: str, folder: Path) -> list[dict[str, Any]]:
    _, file, keys = TASKS[name]
    path = folder / file
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise SpecQuantError(f"task {name}: {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise SpecQuantError(f"task {name}: {path} is not UTF-8 text (byte {error.start})") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise SpecQuantError(f"task {name}: line {number} of {path} is not JSON") from None
        if not isinstance(row, dict) or any(row.get(key) is None for key in keys):
            raise SpecQuantError(f"task {name}: line {number} of {path} must have {', '.join(keys)}")
        rows.append({key: row[key] for key in (*keys, "title") if key in row})  # BoolQ's title is optional
    if not rows:
        raise SpecQuantError(f"task {name}: {path} is empty")
    return rows


def requests_of(tasks: dict[str, Any], limit: int | None) -> int:
    """How many continuations lm-eval will ask a model to score."""
    total = 0
    with _compiled_once():
        for task in tasks.values():
            documents = task.eval_docs
            for index in range(min(len(documents), limit or len(documents))):
                total += 1 if task.config.doc_to_choice is None else len(task.doc_to_choice(documents[index]))
    return total


@contextlib.contextmanager
def _compiled_once() -> Iterator[None]:
    """lm-eval compiles its templates anew for every document, which is nine tenths of its own time; keep them."""
    env.from_string = functools.cache(env.from_string)
    try:
        yield
    finally:
        del env.from_string  # the class's method shows again


def run_tasks(lm: Any, tasks: dict[str, Any], limit: int | None = None) -> dict[str, TaskResult]:
    """Every task on `lm` (an lm_eval.api.model.LM), zero-shot, on its first `limit` documents or all."""
    for task in tasks.values():
        task.set_config(key="num_fewshot", value=0)
    # bootstrap_iters only matters for LAMBADA's perplexity (the error of a mean is computed directly), and it prints on
    # stdout, which belongs to the result.
    with contextlib.redirect_stdout(io.StringIO()), _compiled_once():
        found = evaluate(
            lm=lm, task_dict={"tasks": tasks, "groups": {}}, limit=limit, bootstrap_iters=100, log_samples=False
        )
    results = {}
    for name in tasks:
        values, errors = {}, {}
        for key, value in found["results"][name].items():
            metric, _, _ = key.partition(",")
            if not isinstance(value, int | float) or "," not in key:
                continue
            if metric.endswith("_stderr"):
                errors[metric.removesuffix("_stderr")] = float(value)
            else:
                values[metric] = float(value)
        results[name] = TaskResult(
            TASKS[name][0], values, errors, found["n-samples"][name]["effective"], float(found["versions"][name])
        )
    return results


def quieten() -> None:
    """lm-eval's and datasets' own notes; what matters reaches the user through us."""
    for name in ("lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
