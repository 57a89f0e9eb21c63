"""The three tasks, by what a model is: see task.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from malmen_cli.base.causal import CausalTask
from malmen_cli.base.classifier import ClassifierTask
from malmen_cli.base.families import CAUSAL, kind_of
from malmen_cli.base.seq2seq import Seq2SeqTask
from malmen_cli.base.task import Task

__all__ = ["TASKS", "Task", "recorded_task", "task_of"]

TASKS: dict[str, type[Task]] = {task.kind: task for task in (CausalTask, Seq2SeqTask, ClassifierTask)}


def task_of(model: Any, tokenizer: Any) -> Task:
    """The task of a loaded model."""
    return TASKS[kind_of(model)](model, tokenizer)


def recorded_task(manifest: Mapping[str, Any]) -> type[Task]:
    """The task of the base that a manifest is about; one that says nothing is about a causal language model."""
    base = manifest.get("base")
    return TASKS[str(base.get("task", CAUSAL)) if isinstance(base, Mapping) else CAUSAL]
