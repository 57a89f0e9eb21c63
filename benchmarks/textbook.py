"""MALMEN as the paper writes it, and nothing done about its cost: the yardstick of speed.py, and a second opinion.

Full forwards over every block and full logits, in the order and batches given; keys and gradients cached on disk; one
general solve a module; the base's logits on locality prompts asked again at every step; weight gradients by autograd.
Shares no code with malmen_cli.editing: it reads an editor's named tensors and the same equations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax, pad

PROMPT_END, ANSWER, SUBJECT = range(3)  # a row's role in its fact


class Prompt(Protocol):
    """A prompt and its answer: `ids[:n_prompt]` is the prompt; `subject` its subject's last token, if known."""

    ids: tuple[int, ...]
    n_prompt: int
    subject: int | None


@dataclass
class Network:
    """The hyper-network of one weight shape, from an editor's tensors; module axis m, role axis r.

    y <- y + scale * relu(y A B + bias) + shift, twice; d = -lr (k . k~) g~ with the norm of d / lr bounded.
    """

    tensors: dict[str, Tensor]
    dk: int

    def values(self, m: int, keys: Tensor, gradients: Tensor, roles: Tensor) -> Tensor:
        """V (n, dv) of module m."""
        t = self.tensors
        y = (torch.cat([keys, gradients], 1) - t["mean"][m, roles]) / t["std"][m, roles]
        for i in range(len(t["down"])):
            pushed = (y @ t["down"][i] @ t["up"][i] + t["bias"][i]).clamp(min=0)
            y = y + t["scale"][i, m, roles] * pushed + t["shift"][i, m, roles]
        push = (keys * y[:, : self.dk]).sum(1, keepdim=True) * y[:, self.dk :]
        size = push.norm(dim=1, keepdim=True).clamp(min=torch.finfo(push.dtype).tiny)
        return -t["log_lr"].exp()[m, roles, None] * push * (t["limit"][m, roles, None] / size).clamp(max=1)

    def second_moment(self, m: int) -> Tensor:
        """C0 (dk, dk) in fp64, from its kept basis and the mean of what was left out."""
        basis, energies, rest = (
            self.tensors[f"preserved_{part}"][m].double() for part in ("basis", "energies", "rest")
        )
        unit = torch.eye(self.dk, dtype=torch.float64, device=basis.device)
        return basis @ torch.diag(energies - rest) @ basis.T + rest * unit


LEARNED = ("down", "up", "bias", "scale", "shift", "log_lr", "log_lambda", "log_mu")


@dataclass
class Textbook:
    """The method on one loaded transformers model. `groups`: names of the modules of each shape, in the editor's order.

    state: `Editor.state()`. tokens: answer or subject. folder: where keys and gradients are cached.
    """

    model: Any
    groups: Sequence[Sequence[str]]
    state: Mapping[str, Tensor]
    folder: Path
    tokens: str = "answer"
    batch_size: int = 32
    networks: list[Network] = field(init=False)

    def __post_init__(self) -> None:
        self.networks = []
        for index, names in enumerate(self.groups):
            mine = {k.removeprefix(f"{index}."): v.clone() for k, v in self.state.items() if k.startswith(f"{index}.")}
            for name in LEARNED:
                mine[name].requires_grad_(True)
            layer = self.model.get_submodule(names[0])
            self.networks.append(Network(mine, layer.weight.shape[1 if isinstance(layer, nn.Linear) else 0]))

    def parameters(self) -> list[Tensor]:
        return [network.tensors[name] for network in self.networks for name in LEARNED]

    def shift(self, edits: Sequence[Prompt]) -> dict[str, Tensor]:
        """The (dk, dv) fp32 shift of every module: S = (K'K + lambda I + n mu C0)^-1 K'V by a general solve."""
        roles = self._cache_rows(edits)
        shifts = {}
        for network, m, name in self._modules():
            keys, gradients = self._rows(name)
            with torch.no_grad():
                values = network.values(m, keys, gradients, roles).double()
                system = self._system(network, m, keys)
                shifts[name] = torch.linalg.solve(system, keys.double().T @ values).float()
        return shifts

    def step(
        self,
        edits: Sequence[Prompt],
        wordings: Sequence[Prompt],
        probes: Sequence[Prompt],
        locality_weight: float,
        optimizer: torch.optim.Optimizer | None = None,
        clip: float = 1.0,
    ) -> tuple[float, float]:
        """One step of meta-training: mean cross-entropy of the wordings and mean divergence on the probes."""
        shifts = self.shift(edits)
        with torch.no_grad():
            base = [self._logits(batch)[0] for batch in self._batches(probes)]  # before editing, whole and kept
        with self._edited(shifts):
            learned = moved = 0.0
            for batch in self._batches(wordings):
                loss = _fact_loss(*self._logits(batch)) / len(wordings)
                loss.backward()
                learned += float(loss.detach())
            for batch, said in zip(self._batches(probes), base, strict=True):
                loss = _divergence(said, *self._logits(batch)) / len(probes)
                (locality_weight * loss).backward()
                moved += float(loss.detach())
            by_weight = {name: self._taken_gradient(name) for name in shifts}
        self._pull_back(edits, shifts, by_weight)
        nn.utils.clip_grad_norm_(self.parameters(), clip)
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        return learned, moved

    def _pull_back(
        self, edits: Sequence[Prompt], shifts: Mapping[str, Tensor], by_weight: Mapping[str, Tensor]
    ) -> None:
        """M = A^-1 dL/dW; dL/dV = K M; dL/dlog lambda = -lambda <M, S>; dL/dlog mu = -n mu <M, C0 S>."""
        roles = self._roles(edits)
        for network, m, name in self._modules():
            keys, gradients = self._rows(name)
            shift, t = shifts[name].double(), network.tensors
            inner = torch.linalg.solve(self._system(network, m, keys), by_weight[name].double())
            weight = len(keys) * t["log_mu"][m].exp()
            by_lambda = -(t["log_lambda"][m].exp() * (inner * shift).sum()).detach()
            by_mu = -(weight * (inner * (network.second_moment(m) @ shift)).sum()).detach()
            by_value = (keys.double() @ inner).to(keys.dtype)
            values = network.values(m, keys, gradients, roles)
            ((by_value * values).sum() + by_lambda * t["log_lambda"][m] + by_mu * t["log_mu"][m]).backward()

    def _system(self, network: Network, m: int, keys: Tensor) -> Tensor:
        t, exact = network.tensors, keys.double()
        unit = torch.eye(network.dk, dtype=torch.float64, device=keys.device)
        lam, mu = t["log_lambda"][m].detach().double().exp(), t["log_mu"][m].detach().double().exp()
        return exact.T @ exact + lam * unit + len(keys) * mu * network.second_moment(m)

    def _modules(self) -> Iterator[tuple[Network, int, str]]:
        for network, names in zip(self.networks, self.groups, strict=True):
            yield from ((network, m, name) for m, name in enumerate(names))

    def _batches(self, sequences: Sequence[Prompt]) -> Iterator[Sequence[Prompt]]:
        for start in range(0, len(sequences), self.batch_size):
            yield sequences[start : start + self.batch_size]

    def _logits(self, batch: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
        """Logits (B, T - 1, vocabulary) of every position, and labels (B, T - 1), -100 where there is no answer."""
        device = next(self.model.parameters()).device
        width = max(len(s.ids) for s in batch)
        ids = torch.stack([pad(torch.tensor(s.ids), (0, width - len(s.ids))) for s in batch]).to(device)
        mask = torch.tensor([[1] * len(s.ids) + [0] * (width - len(s.ids)) for s in batch], device=device)
        labels = torch.full_like(ids, -100)
        for row, s in enumerate(batch):
            labels[row, s.n_prompt : len(s.ids)] = ids[row, s.n_prompt : len(s.ids)]
        logits = self.model(ids, attention_mask=mask, use_cache=False).logits
        return logits[:, :-1].float(), labels[:, 1:]

    def _cache_rows(self, edits: Sequence[Prompt]) -> Tensor:
        """Keys and value gradients of every module to disk, one file a batch; the rows' roles (n,)."""
        for file in self.folder.glob("*.safetensors"):
            file.unlink()
        for number, batch in enumerate(self._batches(edits)):
            with self._watched() as (inputs, outputs):
                logits, labels = self._logits(batch)
                _fact_loss(logits, labels).backward()
            rows = [row for row, edit in enumerate(batch) for _ in self._places(edit)]
            columns = [column for edit in batch for column, _ in self._places(edit)]
            kept = {f"{name}.keys": inputs[name].detach()[rows, columns].float() for name in inputs}
            for name, output in outputs.items():
                assert output.grad is not None
                kept[f"{name}.gradients"] = output.grad[rows, columns].float()
            save_file({name: t.cpu().contiguous() for name, t in kept.items()}, self._file(number))
            for name in outputs:
                self.model.get_submodule(name).weight.grad = None
        return self._roles(edits)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06}.safetensors"

    def _rows(self, name: str) -> tuple[Tensor, Tensor]:
        device = next(self.model.parameters()).device
        files = [load_file(file) for file in sorted(self.folder.glob("*.safetensors"))]
        return tuple(torch.cat([kept[f"{name}.{part}"] for kept in files]).to(device) for part in ("keys", "gradients"))  # type: ignore[return-value]

    def _roles(self, edits: Sequence[Prompt]) -> Tensor:
        roles = [role for edit in edits for _, role in self._places(edit)]
        return torch.tensor(roles, device=next(self.model.parameters()).device)

    def _places(self, edit: Prompt) -> list[tuple[int, int]]:
        """Positions of the fact's rows with their roles: those whose next token is an answer token, and the subject."""
        last = edit.n_prompt - 1
        found = {column: PROMPT_END if column == last else ANSWER for column in range(last, len(edit.ids) - 1)}
        if self.tokens == "subject" and edit.subject:
            found.setdefault(edit.subject, SUBJECT)
        return sorted(found.items())

    @contextmanager
    def _watched(self) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}

        def hook_of(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                inputs[name], outputs[name] = args[0], output
                output.retain_grad()

            return hook

        names = [name for _, _, name in self._modules()]
        weights = [self.model.get_submodule(name).weight.requires_grad_(True) for name in names]
        hooks = [self.model.get_submodule(name).register_forward_hook(hook_of(name)) for name in names]
        try:
            yield inputs, outputs
        finally:
            for hook in hooks:
                hook.remove()
            for weight in weights:
                weight.requires_grad_(False)

    @contextmanager
    def _edited(self, shifts: Mapping[str, Tensor]) -> Iterator[None]:
        kept = {}
        try:
            for name, shift in shifts.items():
                layer = self.model.get_submodule(name)
                kept[name] = layer.weight.detach().clone()
                own = shift.T if isinstance(layer, nn.Linear) else shift
                layer.weight.data.copy_(layer.weight.detach().float() + own)
                layer.weight.requires_grad_(True)
            yield
        finally:
            for name, weight in kept.items():
                layer = self.model.get_submodule(name)
                layer.weight.requires_grad_(False)
                layer.weight.data.copy_(weight)

    def _taken_gradient(self, name: str) -> Tensor:
        """dL/dW (dk, dv) in fp32, taken from the parameter."""
        layer = self.model.get_submodule(name)
        gradient, layer.weight.grad = layer.weight.grad.float(), None
        return gradient.T if isinstance(layer, nn.Linear) else gradient


def _fact_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over facts of the mean cross-entropy of the fact's answer tokens."""
    losses = cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return (losses.sum(1) / (labels != -100).sum(1)).sum()


def _divergence(base: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over probes of the mean over answer positions of KL(base || edited), in nats."""
    said = log_softmax(base, -1)
    terms = (said.exp() * (said - log_softmax(logits, -1))).sum(-1) * (labels != -100)
    return (terms.sum(1) / (labels != -100).sum(1)).sum()
