"""A shift as a PEFT LoRA adapter, in the plain form that PEFT and serving stacks read.

A low-rank shift `left @ right` of at most `max_rank` rows is exactly a LoRA with A = left^T, B = right^T and scaling 1.
Anything else is the best approximation of rank `max_rank` (truncated SVD); the energy kept is in malmen.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from malmen_cli.artifact.atomic import Staging
from malmen_cli.artifact.delta import CARD, with_shift
from malmen_cli.artifact.manifest import MANIFEST, canonical, sealed
from malmen_cli.artifact.output import SIDE_FILES_BYTES, check_output
from malmen_cli.artifact.tensors import tensors_bytes, write_tensors
from malmen_cli.base.tasks import recorded_task
from malmen_cli.editing.shift import IN_OUT, ModuleShift, Shift

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
NEGLIGIBLE = 1e-7  # singular values below this share of the largest are below fp32's resolution


def write_adapter(
    out: Path,
    shift: Shift,
    manifest: Mapping[str, object],
    *,
    base_name: str,
    card: str,
    force: bool,
    max_rank: int = 512,
) -> None:
    """Write `shift` as a LoRA adapter for `base_name`; malmen.json says `adapter_rank`, `retained_energy` per module.

    retained_energy: ||kept||^2 / ||shift||^2, 1.0 when exact. Raises NumericsError, OutputError.
    """
    shift.check_finite()
    check_output(out, base_folder=None, force=force)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    measured: dict[str, dict[str, float]] = {}
    for name, module in shift.modules.items():
        left, right, retained = low_rank(module, max_rank)
        ranks[name] = int(left.shape[1])
        measured[name] = {"adapter_rank": ranks[name], "retained_energy": retained}
        tensors[f"base_model.model.{name}.lora_A.weight"] = left.T.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = right.T.contiguous()
    with Staging(out, force=force, need=tensors_bytes(tensors) + SIDE_FILES_BYTES) as staging:
        write_tensors(staging, TENSORS, tensors)
        config = adapter_config(shift, ranks, base_name, recorded_task(manifest).peft_type)
        staging.write(CONFIG, canonical(config).encode())
        staging.write(CARD, card.encode())
        content = with_shift(manifest, shift, measured) | {"format": "adapter", "files": dict(staging.sha256)}
        staging.write(MANIFEST, sealed(content))


def adapter_config(
    shift: Shift, ranks: Mapping[str, int], base_name: str, task: str | None = "CAUSAL_LM"
) -> dict[str, object]:
    """PEFT's LoraConfig. lora_alpha equals r everywhere, so that the scaling is 1."""
    rank = max(ranks.values(), default=1)
    others = {name: own for name, own in ranks.items() if own != rank}
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(shift.modules),
        "fan_in_fan_out": any(module.layout == IN_OUT for module in shift.modules.values()),
        "lora_dropout": 0.0,
        "bias": "none",
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
    }


def low_rank(module: ModuleShift, max_rank: int) -> tuple[Tensor, Tensor, float]:
    """(dk, r) and (r, dv) fp32 factors of at most `max_rank` columns, and the share of squared norm they keep."""
    if module.left is not None and module.right is not None and 1 <= module.left.shape[1] <= max_rank:
        return module.left.float(), module.right.float(), 1.0
    u, s, v = _svd(module)
    energy = s.square()
    total = float(energy.sum())
    rank = min(max_rank, max(1, int((s > NEGLIGIBLE * s.max().clamp(min=0.0)).sum()) if total else 1))
    kept = float(energy[:rank].sum()) / total if total else 1.0
    root = s[:rank].sqrt()
    return (u[:, :rank] * root).float(), (root[:, None] * v[:rank]).float(), kept


def _svd(module: ModuleShift) -> tuple[Tensor, Tensor, Tensor]:
    """Singular vectors and values in fp64; of factors through two thin QRs, never the (dk, dv) product."""
    if module.left is None or module.right is None or not module.left.shape[1]:
        u, s, v = torch.linalg.svd(module.matrix().double(), full_matrices=False)
        return u, s, v
    q_left, r_left = torch.linalg.qr(module.left.double())
    q_right, r_right = torch.linalg.qr(module.right.double().T)
    u, s, v = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return q_left @ u, s, v @ q_right.T
