"""An editor: the hyper-networks and preserved keys for one base's modules, and its state as named tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from malmen_cli.base.families import IDS, chosen_modules, matrix_shape, stack_of
from malmen_cli.editing.capture import ROLES, Rows
from malmen_cli.editing.hypernetwork import HyperNetwork
from malmen_cli.editing.ridge import Penalty, Preserved
from malmen_cli.editing.settings import MalmenSettings
from malmen_cli.editing.shift import weight_layout
from malmen_cli.exceptions import EditorError, NumericsError

HALVED = ("down", "up", "preserved_basis")  # nearly all of an editor; half the digits cost less than noise


@dataclass
class Group:
    """Modules of one stack and shape (dk, dv), edited as one batched computation with one hyper-network.

    reads: what their stack reads, and so where their rows come from (see capture.places).
    """

    names: tuple[str, ...]
    dk: int
    dv: int
    network: HyperNetwork
    preserved: Preserved
    reads: str = IDS

    def own(self, parts: Iterable[Rows]) -> list[Rows]:
        """The captured rows that are of these modules."""
        return [part for part in parts if self.names[0] in part.keys]

    def stack(self, by_name: Mapping[str, Tensor]) -> Tensor:
        """(m, n, *) from per-module (n, *)."""
        return torch.stack([by_name[name] for name in self.names])

    def penalty(self, rows: int, dtype: torch.dtype = torch.float32) -> Penalty:
        """The ridge penalty of a problem with so many rows, by the group's learned lambda and mu.

        mu is learned per row: what pulls at the weights grows with the rows, so what holds them has to grow too.
        """
        lam, mu = self.network.log_lambda.detach().exp(), self.network.log_mu.detach().exp() * rows
        return Penalty(lam, mu, self.preserved).to(dtype)


class Editor:
    """What turns captured rows into value shifts: groups of modules, each with its network and preserved keys."""

    def __init__(self, settings: MalmenSettings, groups: Sequence[Group], layouts: Mapping[str, str]) -> None:
        self.settings = settings
        self.groups = list(groups)
        self.layouts = dict(layouts)

    @classmethod
    def fresh(cls, model: Any, settings: MalmenSettings, *, seed: int = 0) -> Editor:
        """An untrained editor for a model's modules: the identity on normalised features, no preserved keys yet."""
        names = chosen_modules(model, settings.modules, settings.last_blocks)
        device = next(model.parameters()).device
        generator = torch.Generator().manual_seed(seed)
        alike: dict[tuple[str, int, int], list[str]] = {}
        for name in names:
            kind = stack_of(model, name).reads, *matrix_shape(model.get_submodule(name))
            alike.setdefault(kind, []).append(name)
        groups = []
        blocks = settings.blocks if settings.network == "mlp" else 0
        for (reads, dk, dv), members in alike.items():
            network = HyperNetwork(
                len(members),
                dk,
                dv,
                rank=settings.rank,
                blocks=blocks,
                roles=ROLES[settings.tokens],
                generator=generator,
            ).to(device)
            groups.append(Group(tuple(members), dk, dv, network, Preserved.none(len(members), dk, device), reads))
        return cls(settings, groups, {name: weight_layout(model.get_submodule(name)) for name in names})

    @property
    def names(self) -> list[str]:
        """Every edited module."""
        return [name for group in self.groups for name in group.names]

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        for group in self.groups:
            yield from group.network.parameters()

    def state(self) -> dict[str, Tensor]:
        """Every tensor of the editor by name, detached; the opposite of `restored`."""
        state: dict[str, Tensor] = {}
        for index, group in enumerate(self.groups):
            tensors = dict(group.network.state_dict()) | {f"preserved_{k}": v for k, v in vars(group.preserved).items()}
            state |= {f"{index}.{name}": tensor.detach() for name, tensor in tensors.items()}
        return state

    def description(self) -> dict[str, object]:
        """Which modules each group of the state belongs to."""
        return {"groups": [{"modules": list(g.names), "dk": g.dk, "dv": g.dv} for g in self.groups]}

    @classmethod
    def restored(
        cls, model: Any, settings: MalmenSettings, state: Mapping[str, Tensor], *, where: str = "editor"
    ) -> Editor:
        """The editor whose `state()` this was. Raises EditorError for missing, extra or mis-shaped tensors."""
        _check_size(where, settings, state)
        editor = cls.fresh(model, settings)
        expected = set(editor.state())
        if expected != set(state):
            odd = sorted(expected ^ set(state))[0]
            what = "missing" if odd in expected else "not known"
            raise EditorError(f"{where}: tensor {odd} is {what}; the editor does not fit this base and its settings")
        for index, group in enumerate(editor.groups):
            mine = {name.removeprefix(f"{index}."): t for name, t in state.items() if name.startswith(f"{index}.")}
            device = group.network.mean.device
            parts = (mine.pop(f"preserved_{k}").to(device, torch.float32) for k in ("basis", "energies", "rest"))
            group.preserved = Preserved(*parts)
            _check_shapes(where, index, group, mine)
            group.network.load_state_dict(mine)
        for name, tensor in state.items():
            if not bool(torch.isfinite(tensor).all()):
                raise NumericsError(f"{where}: tensor {name} is not finite; train the editor again")
        return editor


def compact(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An editor's state as it is saved: the large tensors in bfloat16, the others as they are."""
    return {name: t.bfloat16() if name.split(".", 1)[1] in HALVED else t for name, t in state.items()}


def _check_size(where: str, settings: MalmenSettings, state: Mapping[str, Tensor]) -> None:
    """The settings of a stranger's editor may ask for a network of any size: it is built only if its tensors are here.

    `down` is (blocks, dk + dv, rank) and the largest.
    """
    down = state.get("0.down")
    if down is None:
        raise EditorError(f"{where}: tensor 0.down is missing; the editor does not fit this base and its settings")
    given = (down.shape[0], down.shape[-1]) if down.dim() == 3 else (0, 0)
    asked = (settings.blocks if settings.network == "mlp" else 0, settings.rank)
    if given != asked:
        raise EditorError(
            f"{where}: tensor 0.down is for {given[0]} blocks of rank {given[1]}, its settings say {asked[0]} of rank "
            f"{asked[1]}; the editor does not fit its settings"
        )


def _check_shapes(where: str, index: int, group: Group, state: Mapping[str, Tensor]) -> None:
    wanted = {name: tuple(t.shape) for name, t in group.network.state_dict().items()}
    modules, energies = len(group.names), group.preserved.energies
    rank = energies.shape[1] if energies.dim() == 2 else 0
    wanted |= {
        "preserved_energies": (modules, rank),
        "preserved_basis": (modules, group.dk, rank),
        "preserved_rest": (modules,),
    }
    given = dict(state) | {f"preserved_{k}": v for k, v in vars(group.preserved).items()}
    for name, shape in wanted.items():
        found = tuple(given[name].shape)
        if found != shape:
            raise EditorError(
                f"{where}: tensor {index}.{name} is {found}, not {shape}; the editor does not fit this base"
            )
