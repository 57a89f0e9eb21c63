"""From a fresh editor to one worth training: normaliser, preserved keys, and the step that suits a probe batch.

The reference starts at a fixed step of 1e-6 that training hardly moves; here the step is searched in log space
on the meta-loss. Value shifts are linear in the step, so one solve serves the whole search.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from malmen_cli.base import ranks
from malmen_cli.base.prompts import Encoded
from malmen_cli.editing.capture import Rows, edit_rows
from malmen_cli.editing.editor import Editor, Group
from malmen_cli.editing.hypernetwork import Moments
from malmen_cli.editing.methods.malmen import Malmen
from malmen_cli.editing.moments import second_moments
from malmen_cli.editing.replay import Runner
from malmen_cli.editing.ridge import Preserved
from malmen_cli.editing.shift import ModuleShift, Shift, applied
from malmen_cli.editing.stacked import Captured, gather
from malmen_cli.exceptions import NumericsError
from malmen_cli.training.objective import meta_loss
from malmen_cli.training.references import Reference

STEPS = tuple(0.01 * 2**k for k in range(11))  # relative to the module's own output, 1% to 10 times
PUSH_LIMIT = 3.0  # times the median |(k . k~) g~| of a role's rows, beyond which a row pushes no harder
SHARE = 0.75  # of the best single step, for each of several passes by its number: small steps that correct each other
LIKELY = 4  # where in STEPS the search begins
PATIENCE = 2  # steps in a row that are worse than the best one, after which it goes no further
REFINEMENTS = 3  # halvings of the log-space bracket around the best of STEPS


@dataclass(frozen=True)
class Calibration:
    """What was found: the relative step, the meta-loss there, and the whole search."""

    step: float
    learned: float
    moved: float
    tried: dict[str, float] = field(default_factory=dict)


def preserve(editor: Editor, runner: Runner, sequences: Sequence[Encoded], batch_size: int) -> None:
    """Set every group's preserved keys from all tokens of `sequences` (prompts that must not change)."""
    rank = editor.settings.preserved_rank
    if rank == 0 or not sequences or editor.settings.aggregation == "sum":
        return
    # In fp64: C0 of few prompts has directions without energy, and rounding would give them some.
    moments = second_moments(runner, sequences, editor.names, batch_size, dtype=torch.float64)
    for group in editor.groups:
        preserved = Preserved.of(torch.stack([moments.pop(name) for name in group.names]), rank)
        group.preserved = preserved.to(group.network.mean.device)


def calibrate(
    editor: Editor,
    runner: Runner,
    edits: Sequence[Encoded],
    wordings: Sequence[Encoded],
    references: Sequence[Reference],
    *,
    locality_weight: float,
    batch_size: int,
    note: Callable[[str], None] = lambda text: None,
) -> Calibration:
    """Freeze the normaliser on `edits`, set lambda and mu to their spec values, and search the best single step.

    An editor of several passes takes SHARE of that step, divided by their number, in each; of one pass, all of it.
    Raises NumericsError when no step gives a finite meta-loss.
    """
    parts = list(edit_rows(runner, edits, editor.names, batch_size, editor.settings.tokens, keep=True))
    captured = [gather(group, parts) for group in editor.groups]
    for group, rows in zip(editor.groups, captured, strict=True):
        _normalise(group, rows, editor)
        _set_penalty(group, rows, editor)
        group.network.log_lr.data.copy_(_natural_log_lr(group, rows, parts))
    unit, _ = Malmen(editor).joined([rows.own() for rows in captured])
    tried: dict[float, tuple[float, float]] = {}

    def objective(step: float) -> float:
        with applied(runner.model, scaled(unit, step)):
            found = meta_loss(
                runner,
                wordings,
                references,
                editor.names,
                locality_weight=locality_weight,
                batch_size=batch_size,
                gradients=False,
            )
        tried[step] = (found.learned, found.moved)
        note(f"step {step:.3g}: learned {found.learned:.3f}, moved {found.moved:.3f}")
        total = found.total(locality_weight)
        return total if math.isfinite(total) else math.inf

    best = _search(objective)
    if not all(map(math.isfinite, tried[best])):
        raise NumericsError("calibration found no step with a finite meta-loss; the base gives NaN on these facts")
    passes = editor.settings.passes
    for group in editor.groups:
        group.network.log_lr.data.add_(math.log(best * (SHARE / passes if passes > 1 else 1)))
    totals = {
        f"{step:.4g}": round(learned + locality_weight * moved, 6)
        for step, (learned, moved) in sorted(tried.items())
        if math.isfinite(learned) and math.isfinite(moved)  # JSON has no NaN
    }
    return Calibration(best, *tried[best], totals)


def scaled(shift: Shift, by: float) -> Shift:
    """A dense shift times a number."""
    return Shift({name: ModuleShift(m.layout, dense=m.matrix() * by) for name, m in shift.modules.items()})


def _normalise(group: Group, rows: Captured, editor: Editor) -> None:
    """Each role by its own rows; a role with fewer than two, by all of them."""
    centre = editor.settings.centre and editor.settings.network != "identity"
    for role in range(group.network.roles):
        moments = Moments(len(group.names), group.dk + group.dv, rows.keys.device)
        mine = _of_role(rows.roles, role)
        moments.add(torch.cat([rows.keys[:, mine], rows.gradients[:, mine]], -1))
        group.network.normalise_by(moments, centre=centre, role=role)


def _of_role(roles: Tensor, role: int) -> Tensor:
    """Which rows (n,) have the role; every one where fewer than two have, since one alone has no spread."""
    mine = roles == role
    return mine if int(mine.sum()) > 1 else torch.ones_like(mine)


def _set_penalty(group: Group, rows: Captured, editor: Editor) -> None:
    entry = rows.keys.square().mean((1, 2)).clamp(min=torch.finfo(torch.float32).tiny)
    group.network.log_lambda.data.copy_((editor.settings.ridge_lambda * entry).log())
    weight = max(editor.settings.preserved_weight, torch.finfo(torch.float32).tiny)
    group.network.log_mu.data.fill_(math.log(weight))


def _natural_log_lr(group: Group, rows: Captured, parts: Sequence[Rows]) -> Tensor:
    """Log of the lr (m, roles) at which a row's value shift is, on average, as large as the module's output there."""
    tiny = torch.finfo(torch.float32).tiny
    natural, parts = [], group.own(parts)
    with torch.no_grad():
        pseudo_keys, pseudo_gradients = group.network.features(rows.keys, rows.gradients, rows.roles)
        agreement, push = (rows.keys * pseudo_keys).sum(-1).abs(), pseudo_gradients.norm(dim=-1)
        none = rows.keys.new_zeros(len(group.names), 0)  # of a rank without a fact
        outputs = torch.cat([none, *(group.stack(part.values).norm(dim=-1) for part in parts)], 1)
        roles = torch.cat([rows.roles[:0], *(part.roles for part in parts)])
        outputs, roles = ranks.collected(outputs, 1), ranks.collected(roles)  # which are not in the order of facts
        for role in range(group.network.roles):
            mine = _of_role(rows.roles, role)
            sizes = agreement[:, mine] * push[:, mine]
            # Of the rows that push at all: what nothing later reads has a gradient of 0 and says nothing of the others.
            size = sizes.masked_fill(sizes <= tiny, torch.nan).nanmedian(-1).values.nan_to_num(nan=0.0)
            group.network.limit[:, role] = PUSH_LIMIT * size.clamp(min=tiny)
            values = outputs[:, _of_role(roles, role)].mean(-1)
            # Where nothing later reads a role's tokens its gradients are zero, and any step will do.
            natural.append(torch.where(size > tiny, values.clamp(min=tiny) / size.clamp(min=tiny), 1.0).log())
    return torch.stack(natural, -1)


def _search(objective: Callable[[float], float]) -> float:
    """The best of STEPS, refined between its neighbours in log space. From LIKELY on in both directions, each until
    PATIENCE in a row are worse: past the best step the meta-loss is taken to grow."""
    scores = {STEPS[LIKELY]: objective(STEPS[LIKELY])}
    for way in (range(LIKELY - 1, -1, -1), range(LIKELY + 1, len(STEPS))):
        worse = 0
        for place in way:
            scores[STEPS[place]] = found = objective(STEPS[place])
            # Where nothing is finite yet, nothing is worse.
            worse = worse + 1 if found > min(scores.values()) else 0
            if worse == PATIENCE:
                break
    ratio = STEPS[1] / STEPS[0]
    for _ in range(REFINEMENTS):
        ratio **= 0.5
        best = min(scores, key=scores.__getitem__)
        for step in (best / ratio, best * ratio):
            scores[step] = objective(step)
    return float(min(scores, key=scores.__getitem__))
