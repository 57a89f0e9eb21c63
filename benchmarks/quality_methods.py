"""The methods that quality.py compares: from an --editor option to an editor, from an editor and facts to a shift."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from malmen_cli.base.model import Base
from malmen_cli.edit import Ready, Tuning, calibrated_identity, find_ready, finishing, make_shift
from malmen_cli.editing.methods import method_entry
from malmen_cli.editing.settings import FinetuneSettings, MalmenSettings, MemitSettings
from malmen_cli.editing.shift import Shift
from malmen_cli.editing.spec import FinetuneSpec, MemitSpec, Spec, read_spec
from malmen_cli.exceptions import EditorError
from malmen_cli.facts.fact import Fact
from malmen_cli.insertion import Insertion, prepare

# They need no editor; `=FILE` is a spec with their settings.
UNTRAINED = ("identity", "finetune", "memit", "rome", "alphaedit")
STATS_BATCH = 32  # windows a forward, for key statistics


@dataclass(frozen=True)
class Method:
    """One way to edit. `ready` is None where it depends on the facts; `source`: the folder or spec it was given by."""

    name: str
    settings: MalmenSettings | FinetuneSettings | MemitSettings | None = None
    ready: Ready | Tuning | Insertion | None = None
    source: str | None = None
    training_seconds: float | None = None

    def record(self) -> dict[str, Any]:
        editor = self.ready.record() if isinstance(self.ready, Ready) else None
        settings = asdict(self.settings) if self.settings is not None else None
        return {"name": self.name, "settings": settings, "editor": editor, "source": self.source}


def method_of(base: Base, option: str, seed: int, trained_in: Mapping[str, float]) -> Method:
    """The method of one --editor option. Raises EditorError where there is no such editor, SpecError.

    trained_in: seconds by method. An editor does not say itself, so that the same training has the same bytes.
    """
    name, _, where = option.partition("=")
    method_entry(name)
    place = Path(where) if where else None
    source = place.name if place else None
    if name in UNTRAINED:
        spec = read_spec(place, method=name)
        ready: Tuning | Insertion | None = None
        if isinstance(spec, FinetuneSpec):
            ready = Tuning(spec.settings, seed)
        elif isinstance(spec, MemitSpec):  # like an editor's training, its statistics are not counted as an edit's time
            ready = prepare(base, name, spec.settings, stats_from=None, seed=seed, batch_size=STATS_BATCH)
        return Method(name, spec.settings, ready, source)
    trained = find_ready(base, Spec(name, method_given=True), place)
    if trained is None or trained.source is None:
        raise EditorError(f"no {name} editor is installed or shipped for {base.name}; give one with {name}=DIR")
    return Method(name, trained.settings, trained, source or "installed", trained_in.get(name))


def shift_of(
    base: Base,
    method: Method,
    facts: Sequence[Fact],
    *,
    seed: int,
    batch_size: int,
    note: Callable[[str], None] = lambda text: None,
) -> Shift:
    """All facts as one shift by this method, as `malmen apply` would make it. The one place where methods differ.

    note: as that of `make_shift`.
    """
    ready = method.ready
    if ready is None:
        assert isinstance(method.settings, MalmenSettings)
        ready = calibrated_identity(base, facts, method.settings, seed=seed, batch_size=batch_size)
    elif isinstance(ready, Ready):
        ready = finishing(base, ready, facts)
    return make_shift(base, ready, facts, batch_size=batch_size, note=note)
