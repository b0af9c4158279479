"""A model's scores on tasks of lm-evaluation-harness (the package lm_eval), a baseline's beside them.

The harness defines tasks, prompts and metrics, and finds the task's data; here a model is loaded as everywhere in
quantkit, packed or not, and handed over.
"""

import difflib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from quantkit.core.device import parse_dtype, pick_device
from quantkit.core.errors import QuantkitError, first_line
from quantkit.evals.evaluate import loaded, named, tokenizer_of

INSTALL = "pip install 'quantkit-llm[tasks]'"
"""How the harness is had."""


@dataclass(frozen=True)
class Score:
    """One metric of one task.

    Attributes:
        task: its name; of a group the mean over its tasks, as the harness defines it.
        metric: such as acc; with the name of the harness's filter where it is not "none".
        value, stderr: the model's figure and its standard error, None where the harness gives none.
        baseline, baseline_stderr: of the baseline, or None.
        samples: documents that were scored, None for a group.
        shots: examples in front of each.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    baseline: float | None = None
    baseline_stderr: float | None = None
    samples: int | None = None
    shots: int | None = None


@dataclass(frozen=True)
class TaskResults:
    """What `evaluate_tasks` measured.

    Attributes:
        scores: of all tasks and metrics.
        settings: model, baseline, tasks, limit, num_fewshot, version of the harness.
    """

    scores: tuple[Score, ...]
    settings: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """All figures as one JSON object."""
        return {**self.settings, "scores": [asdict(score) for score in self.scores]}


def evaluate_tasks(
    model: PreTrainedModel | str | Path,
    tasks: Sequence[str],
    *,
    tokenizer: Any = None,
    baseline: PreTrainedModel | str | Path | None = None,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    device: str | None = None,
    dtype: str | None = None,
    unpack: bool | None = None,
) -> TaskResults:
    """Scores a model on tasks.

    Args:
        model: a transformers model, or a folder or hub id of a packed checkpoint or of any causal language model.
        tasks: names of tasks, groups or tags; patterns with * stand for all that match.
        tokenizer: of a model in memory.
        baseline: a model to score on the same; it shares the tokenizer.
        include_path: a folder with tasks of one's own, as the harness's YAML; they go before its own.
        num_fewshot: examples in front of each document; by default the task's own number.
        limit: only so many documents of each task.
        batch_size: documents that run together.
        device, dtype, unpack: of models that are loaded here; see `quantkit.load`. By default a GPU if there is one,
            and float32 on a CPU.

    Raises:
        QuantkitError: the harness is not installed, a task is unknown, its data cannot be had, or a bad setting.
    """
    if not tasks:
        raise QuantkitError("no tasks are named; give one, such as `tasks` arc_easy")
    for name, value, least in (("limit", limit, 1), ("batch_size", batch_size, 1), ("num_fewshot", num_fewshot, 0)):
        if value is not None and value < least:
            raise QuantkitError(f"`{name}` {value}: give at least {least}")
    where, kind = pick_device(device), parse_dtype(dtype)
    tokenizer = tokenizer_of(model, tokenizer)
    manager, names = _found(tasks, include_path)
    found = []
    for one in (model, baseline):
        if one is not None:
            subject = loaded(one, where, kind, **({"unpack": unpack} if one is model else {}))
            found.append(_run(subject, tokenizer, manager, names, num_fewshot, limit, batch_size))
            del subject  # before the next comes
    settings: dict[str, Any] = {"model": named(model), "baseline": named(baseline), "tasks": names}
    settings |= {"num_fewshot": num_fewshot, "limit": limit, "harness": f"lm_eval {_version()}"}
    return TaskResults(tuple(_scores(*found)), settings)


def _version() -> str:
    from importlib.metadata import version

    return version("lm_eval")


def _found(tasks: Sequence[str], include_path: str | Path | None) -> tuple[Any, list[str]]:
    """(the harness's manager of tasks, the names that are meant), with all tasks' data at hand.

    Raises:
        QuantkitError: the harness is not installed, a task is unknown, or its data cannot be had.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise QuantkitError(
            f"tasks are run by lm-evaluation-harness, which is not installed ({first_line(error)}): {INSTALL}"
        ) from None
    folder = None if include_path is None else Path(include_path).expanduser()
    if folder is not None and not folder.is_dir():
        raise QuantkitError(f"`include_path` {folder} is not a folder; give one with the YAML files of tasks")
    if folder is not None:  # reading some ten thousand files of the harness's own takes a minute
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        if all(manager.match_tasks([name]) for name in tasks):
            names = _matching(manager, tasks)
            try:
                manager.load(names)
                return manager, names
            except KeyError:  # they refer to tasks of the harness's own
                pass
            except Exception as error:  # the harness, datasets and the hub raise many kinds
                raise _unavailable(names, error) from error
    manager = TaskManager(include_path=None if folder is None else str(folder))
    names = _matching(manager, tasks)
    try:
        manager.load(names)
    except Exception as error:  # as above
        raise _unavailable(names, error) from error
    return manager, names


def _matching(manager: Any, tasks: Sequence[str]) -> list[str]:
    """The names that tasks or patterns stand for.

    Raises:
        QuantkitError: one stands for none.
    """
    names: list[str] = []
    for task in tasks:
        matches = manager.match_tasks([task])
        if not matches:
            close = difflib.get_close_matches(task, manager.all_tasks, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "`lm_eval ls tasks` lists them;"
            raise QuantkitError(f"unknown task {task!r}; {hint} A folder of your own tasks is an `include_path`")
        names += [name for name in matches if name not in names]
    return names


def _unavailable(names: Sequence[str], error: Exception) -> QuantkitError:
    listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return QuantkitError(
        f"the tasks {listed} cannot be set up ({type(error).__name__}: {first_line(error)}); their data may need the "
        "hub, a package or another path"
    )


def _run(
    model: Any,
    tokenizer: Any,
    manager: Any,
    names: list[str],
    num_fewshot: int | None,
    limit: int | None,
    batch_size: int,
) -> dict[str, Any]:
    """The harness's results for one model."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    made: Any = simple_evaluate(
        wrapped, tasks=names, task_manager=manager, num_fewshot=num_fewshot, limit=limit, log_samples=False
    )
    return dict(made)


def _scores(found: dict[str, Any], beside: dict[str, Any] | None = None) -> list[Score]:
    """The figures of a model, and of a baseline beside them."""
    rows = []
    for task, figures in found["results"].items():
        other = {} if beside is None else beside["results"].get(task, {})
        counts = found.get("n-samples", {}).get(task, {})
        for key, value in figures.items():
            metric, mark, filtered = key.partition(",")
            if not mark or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = f"{metric}_stderr,{filtered}"
            rows.append(
                Score(
                    task=task,
                    metric=metric if filtered == "none" else f"{metric} ({filtered})",
                    value=float(value),
                    stderr=_number(figures.get(error)),
                    baseline=_number(other.get(key)),
                    baseline_stderr=_number(other.get(error)),
                    samples=counts.get("effective"),
                    shots=found.get("n-shot", {}).get(task),
                )
            )
    return rows


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
