"""The README.md of an artifact: what it is, from what, and how to load it. No dates, so that bytes stay stable."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from malmen_cli.base.tasks import recorded_task

_LOADING = {
    "merged": (
        "transformers",
        "```python\nfrom transformers import {auto_class}, AutoTokenizer\n\n"
        'model = {auto_class}.from_pretrained("path/to/this/folder")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")\n```\n\nmalmen is not needed to use it.',
    ),
    "adapter": (
        "peft",
        "```python\nfrom peft import PeftModel\nfrom transformers import {auto_class}\n\n"
        "base = {auto_class}.from_pretrained({base})\n"
        'model = PeftModel.from_pretrained(base, "path/to/this/folder")\n```\n\nmalmen is not needed to use it.',
    ),
    "delta": (
        "malmen",
        "```sh\nmalmen eval path/to/this/folder facts.jsonl --base {base}\n"
        "malmen diff {base} path/to/this/folder\n```\n\n"
        "`delta.safetensors` holds the change of every edited weight matrix in fp32; `malmen.json` describes it.",
    ),
    "editor": (
        "malmen",
        "```sh\nmalmen apply {base} facts.jsonl -o edited/ --editor path/to/this/folder\n```",
    ),
}
_TOLD = (
    "Facts were edited into the weights of this model. Only the modules listed below differ from the base.\n"
    "How well that worked is not part of this card: measure it with `malmen eval`."
)
_TITLES = {"merged": "edited", "adapter": "edited (LoRA adapter)", "delta": "edited (delta)", "editor": "editor"}


def model_card(format: str, manifest: Mapping[str, Any]) -> str:
    """Markdown with the front matter the hub reads, for a merged checkpoint, a delta or an adapter.

    format: merged, delta or adapter. manifest: as the `write_*` functions take it; what it lacks is left out.
    """
    facts = _part(manifest, "facts")
    lines = []
    if "count" in facts:
        lines.append(f"- facts: {facts['count']}" + (f" (sha256 {facts['sha256']})" if "sha256" in facts else ""))
    modules = _part(manifest, "modules")
    if modules:
        lines.append("- edited modules: " + ", ".join(f"`{name}`" for name in modules))
    lines += _base_lines(manifest) + _settings("method", _part(manifest, "method"))
    lines += _settings("editor", _part(manifest, "editor"))
    if "seed" in manifest:
        lines.append(f"- seed: {manifest['seed']}")
    return _page(format, manifest, [_TOLD, "\n".join(lines)])


def editor_card(description: Mapping[str, Any]) -> str:
    """Markdown for a trained editor; `description` as `save_editor` takes it."""
    settings = {
        key: value
        for key, value in sorted(description.items())
        if isinstance(value, str | int | float) and key not in ("fingerprint", "seal")
    }
    lines = _base_lines(description) + [f"- {key}: {value}" for key, value in settings.items()]
    for key in ("facts", "validation_facts"):
        if part := _part(description, key):
            files = ", ".join(part.get("sources") or ["unnamed files"])
            lines.append(f"- {key.replace('_', ' ')}: {part.get('count')} of {files}, sha256 {part.get('sha256')}")
    lines += _settings("settings", _part(description, "settings"))
    lines += _settings("training", _part(description, "training"))
    lines += _settings("validation scores", _part(_part(description, "scores"), "saved"))
    lines += [f"- sha256 of {name}: {digest}" for name, digest in _part(description, "files").items()]
    return _page(
        "editor",
        description,
        ["Turns facts into changes of one base's weights; it works for that base only.", "\n".join(lines)],
    )


def _page(format: str, content: Mapping[str, Any], paragraphs: list[str]) -> str:
    base = _base_name(content)
    quoted = json.dumps(base, ensure_ascii=False)
    library, loading = _LOADING[format]
    task = recorded_task(content)
    tags = ["malmen", "model-editing", "knowledge-editing"]
    front = ["---", f"base_model: {quoted}", f"library_name: {library}"]
    front += [] if format == "editor" else [f"pipeline_tag: {task.pipeline}"]
    front += ["tags:", *(f"- {tag}" for tag in tags), "---"]
    text = loading.replace("{base}", quoted).replace("{auto_class}", task.auto_class)
    blocks = ["\n".join(front), f"# {base}, {_TITLES[format]}", *paragraphs, "## Loading", text]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _base_name(content: Mapping[str, Any]) -> str:
    """The base's hub id; of a path only the last part, since a card must not carry a machine's folders."""
    name = str(_part(content, "base").get("name") or "unnamed")
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or name.endswith(".gguf")
    return PurePath(name).name or "unnamed" if is_path else name


def _base_lines(content: Mapping[str, Any]) -> list[str]:
    base = _part(content, "base")
    lines = [f"- base: {_base_name(content)}"]
    lines += [f"- {key}: {base[key]}" for key in ("revision", "fingerprint") if base.get(key)]
    return lines


def _settings(title: str, settings: Mapping[str, Any]) -> list[str]:
    if not settings:
        return []
    told = ", ".join(
        f"{key}={json.dumps(value, sort_keys=True, ensure_ascii=False)}" for key, value in sorted(settings.items())
    )
    return [f"- {title}: {told}"]


def _part(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = content.get(key)
    return value if isinstance(value, Mapping) else {}
