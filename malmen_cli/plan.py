"""What an edit would take, before anything heavy is done: what `apply --dry-run` says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from malmen_cli.artifact.merged import Sharing, unedited_shards
from malmen_cli.artifact.output import check_disk, check_output, plan_bytes
from malmen_cli.base.families import chosen_modules, matrix_shape, stack_of
from malmen_cli.base.model import Base
from malmen_cli.base.prompts import Encoded
from malmen_cli.edit import encode_edits, finishing, trained_or_none
from malmen_cli.editing.capture import row_count
from malmen_cli.editing.methods.finetune import tuned_module
from malmen_cli.editing.methods.memit import memit_modules
from malmen_cli.editing.settings import FinetuneSettings, MalmenSettings, MemitSettings
from malmen_cli.editing.spec import FinetuneSpec, MemitSpec, Spec
from malmen_cli.editing.states import edit_cache
from malmen_cli.facts.fact import Fact
from malmen_cli.insertion import encode_wordings
from malmen_cli.key_statistics import Text, counted, missing_statistics


@dataclass(frozen=True)
class Plan:
    """What an edit would take, before anything heavy is done. Bytes are estimates."""

    modules: dict[str, tuple[int, int]]
    facts: int
    tokens: int
    rows: int
    memory: int
    passes: int = 1
    tuned: bool = False  # by gradient steps, each of full rank

    @property
    def rank(self) -> int | None:
        """Columns of every module's exact factors; None where the shift will be dense."""
        rank = self.rows * self.passes
        return rank if not self.tuned and all(rank <= dk for dk, _ in self.modules.values()) else None


@dataclass(frozen=True)
class Outlook:
    """A plan, with what it would be done (`editor`: the trained one, if so), and the bytes it would leave on disk."""

    work: Plan
    using: str
    editor: Path | None
    disk: int


def outlook(
    base: Base,
    spec: Spec | FinetuneSpec | MemitSpec,
    facts: Sequence[Fact],
    out: Path,
    *,
    editor: Path | None,
    stats_from: str | None,
    format: str,
    share: Sharing,
    batch_size: int,
    force: bool,
) -> Outlook:
    """What `apply` would do. Raises what it would: EditorError, FactsError, OutputError."""
    found = None
    if isinstance(spec, MemitSpec):
        work = plan(base, facts, spec.settings, batch_size)
        statistics = _statistics(base, spec, work, stats_from)
        using = f"{spec.method}, at most {spec.settings.steps} steps a fact, {statistics}"
    elif isinstance(spec, FinetuneSpec):
        work = plan(base, facts, spec.settings, batch_size)
        using = f"fine-tuning, at most {spec.settings.epochs} epochs in batches of {spec.settings.batch_facts} facts"
    elif (ready := trained_or_none(base, spec, editor)) is not None:
        found = ready.source
        work = plan(base, facts, finishing(base, ready, facts).settings, batch_size)
        using = f"editor {found}"
    else:
        work = plan(base, facts, replace(spec.settings, network="identity"), batch_size)
        using = "no trained editor: an untrained one, calibrated on the facts"
    linked = unedited_shards(base.folder, work.modules, out) if share == "hardlink" else ()
    shapes = list(work.modules.values())
    need = plan_bytes(format, base_folder=base.folder, shapes=shapes, rank=work.rank, linked=linked)
    check_output(out, base_folder=base.folder, force=force)
    check_disk(out, need)
    return Outlook(work, using, found, need)


def _statistics(base: Base, spec: MemitSpec, work: Plan, stats_from: str | None) -> str:
    """What a run would do for its key statistics."""
    text = Text(base, stats_from, spec.settings.stats_tokens)
    missing = missing_statistics(base, list(work.modules), text)
    where = f"{text.source['tokens']} tokens of {text.source['name']}"
    if not missing:
        return f"key statistics over {where} from the cache"
    return f"key statistics of {counted(missing)} over {where} built first"


def plan(
    base: Base, facts: Sequence[Fact], settings: MalmenSettings | FinetuneSettings | MemitSettings, batch_size: int
) -> Plan:
    """What editing `facts` would take with these settings."""
    if isinstance(settings, MemitSettings):
        return _insertion_plan(base, facts, settings, batch_size)
    edits = encode_edits(base, facts, end_of_text=settings.end_of_text)
    if isinstance(settings, FinetuneSettings):
        return _tuning_plan(base, edits, settings, batch_size)
    names = chosen_modules(base.model, settings.modules, settings.last_blocks)
    shapes = {name: matrix_shape(base.model.get_submodule(name)) for name in names}
    rows = max(row_count(edits, settings.tokens, stack_of(base.model, name).reads) for name in names)
    sums = sum(
        8 * (min(rows, dk) * (dk + dv) if rows <= dk else dk * (dk + dv)) + 4 * dk * dv for dk, dv in shapes.values()
    )
    tokens = sum(edit.length for edit in edits)
    return Plan(shapes, len(facts), tokens, rows, sums + _forward_bytes(base, edits, batch_size), settings.passes)


def _tuning_plan(base: Base, edits: Sequence[Encoded], settings: FinetuneSettings, batch_size: int) -> Plan:
    """One matrix: its shift, gradient, Adam's two moments and the sum put into the model; and the kept block inputs."""
    name = tuned_module(base.model, settings)
    dk, dv = matrix_shape(base.model.get_submodule(name))
    tokens = sum(edit.length for edit in edits)
    kept = min(edit_cache(base.device), tokens * base.model.get_input_embeddings().embedding_dim * base.dtype.itemsize)
    memory = 5 * 4 * dk * dv + kept + _forward_bytes(base, edits, min(batch_size, settings.batch_facts))
    # Every token's key is in the gradient, not those of answers alone.
    return Plan({name: (dk, dv)}, len(edits), tokens, tokens, memory, settings.passes, tuned=True)


def _insertion_plan(base: Base, facts: Sequence[Fact], settings: MemitSettings, batch_size: int) -> Plan:
    """One key a fact and module; second moments, their basis and the whitened keys of one module at a time in fp64."""
    names = memit_modules(base.model, settings)
    wordings = encode_wordings(base, facts, settings)
    # Prefixes are not written yet: each fact is counted as often as it will be asked, at the length that will have.
    before = (0,) * (settings.prefix_tokens if settings.prefixes else 0)
    asked = [Encoded(before + fact.contexts[0].ids, 1) for fact in wordings for _ in range(1 + settings.prefixes)]
    shapes = {name: matrix_shape(base.model.get_submodule(name)) for name in names}
    widest = max(dk for dk, _ in shapes.values())
    moments = sum(4 * dk * dk for dk, _ in shapes.values())
    shifts = sum(4 * (len(facts) * (dk + dv) if len(facts) <= dk else dk * dv) for dk, dv in shapes.values())
    memory = moments + shifts + 4 * 8 * widest * widest + _forward_bytes(base, asked, batch_size)
    tokens = sum(len(fact.contexts[0].ids) for fact in wordings)
    return Plan(shapes, len(facts), tokens, len(facts), memory)


def _forward_bytes(base: Base, edits: Sequence[Encoded], batch_size: int) -> int:
    """The weights, and what a forward over the longest batch keeps for its gradient."""
    longest = sorted((edit.length for edit in edits), reverse=True)[:batch_size]
    width = base.model.get_input_embeddings().embedding_dim
    activations = sum(longest) * width * 4 * 24  # a block keeps about two dozen width-sized tensors for its gradient
    weights = sum(p.numel() * p.element_size() for p in base.model.parameters())
    return int(weights + activations)
