"""What `agora doctor` looks at of the nodes: API keys, vLLM's and llama.cpp's installations, whether they answer."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from agora.cli.checks import Finding, used_nodes, version
from agora.errors import AgoraError, ModelError

if TYPE_CHECKING:
    from agora.config import Config
    from experts.vllm_launch import Install

ASK_S: Final = 30.0
"""Seconds for an interpreter to import vLLM or llama.cpp: vLLM takes 6 on two busy cores, five times that."""

_VLLM: Final = """
import json, platform, torch, vllm
print(json.dumps([platform.python_version(), torch.__version__]))
"""

_LLAMA: Final = """
import json, llama_cpp
print(json.dumps([llama_cpp.__version__]))
"""


class _Fails(Exception):
    """An interpreter cannot do what it was asked."""


def keys(config: Config) -> Iterator[Finding]:
    """Whether the API keys of the nodes are set; never what they are."""
    from agora.config import OpenAINode, VllmNode
    from experts.build import missing_keys

    missing = {m.key for m in missing_keys(config)}
    for name, node in used_nodes(config).items():
        if isinstance(node, OpenAINode | VllmNode) and node.api_key_env:
            there = f"nodes.{name}.api_key_env" not in missing
            yield Finding(
                what=f"node {name}",
                status="ok" if there else "fail",
                detail=f"{node.api_key_env} is {'set' if there else 'not set'}",
                hint=None if there else f"export {node.api_key_env}=…",
            )


async def vllm(config: Config) -> list[Finding]:
    """Whether the interpreters of the vLLM servers that agora starts have a vLLM that can be imported."""
    from agora.config import VllmNode
    from experts.vllm_launch import default_python

    wanted: dict[tuple[Path, tuple[tuple[str, str], ...]], list[str]] = {}
    for name, node in used_nodes(config).items():
        if isinstance(node, VllmNode) and node.url is None:
            key = (node.python or default_python(), tuple(sorted(node.env.items())))
            wanted.setdefault(key, []).append(name)
    found = await asyncio.gather(*(_vllm(", ".join(names), p, dict(env)) for (p, env), names in wanted.items()))
    return list(found)


async def _vllm(nodes: str, python: Path, more: Mapping[str, str]) -> Finding:
    from experts.vllm_launch import find_install

    what = f"vLLM of {nodes}"
    environment = {**os.environ, **more}
    install: Install | None = None
    try:
        with tempfile.TemporaryDirectory(prefix="agora-doctor-") as folder:
            async with asyncio.timeout(ASK_S):
                install = await find_install(python, environment, Path(folder))
                python_version, torch = await _ask(install.python, _VLLM, environment, Path(folder))
    except ModelError as e:
        return Finding(what=what, status="fail", detail=e.message, hint=e.hint)
    except _Fails as e:
        assert install is not None
        hint = "run: make vllm, or name an interpreter that has vLLM as the node's `python`"
        detail = f"vLLM {install.version} of {python} cannot be imported: {e}"
        return Finding(what=what, status="fail", detail=detail, hint=hint)
    except TimeoutError:
        had = f"vLLM {install.version} was not imported" if install is not None else "it did not say what it has"
        return Finding(what=what, status="note", detail=f"{python}: {had} within {ASK_S:g} s")
    on = "a GPU" if install.gpu else "the CPU"
    detail = f"{install.version} for {on}, torch {torch}, Python {python_version} ({python})"
    return Finding(what=what, status="ok", detail=detail)


async def llamacpp(config: Config) -> list[Finding]:
    """Whether llama.cpp can be loaded where a node needs it. Asked of another process: one that was built for another
    processor ends the one it is loaded into."""
    from agora.config import LlamaCppNode

    names = [n for n, node in used_nodes(config).items() if isinstance(node, LlamaCppNode)]
    if not names or version("llama-cpp-python") is None:
        return []
    what = f"llama.cpp of {', '.join(names)}"
    try:
        with tempfile.TemporaryDirectory(prefix="agora-doctor-") as folder:
            async with asyncio.timeout(ASK_S):
                (there,) = await _ask(Path(sys.executable), _LLAMA, os.environ, Path(folder))
    except _Fails as e:
        hint = "build it on this machine: pip install --force-reinstall --no-cache-dir llama-cpp-python"
        return [Finding(what=what, status="fail", detail=f"llama-cpp-python cannot be loaded: {e}", hint=hint)]
    except TimeoutError:
        return [Finding(what=what, status="note", detail=f"llama-cpp-python was not loaded within {ASK_S:g} s")]
    return [Finding(what=what, status="ok", detail=f"llama-cpp-python {there} loads")]


async def _ask(python: Path, code: str, environment: Mapping[str, str], folder: Path) -> list[str]:
    """What the last line says that an interpreter prints.

    Raises:
        _Fails: If it says nothing of the kind; with its last words.
    """
    asked = await asyncio.create_subprocess_exec(
        *(python, "-c", code),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=dict(environment),
        cwd=folder,
    )
    try:
        out, err = await asked.communicate()
    finally:
        if asked.returncode is None:
            asked.kill()
            await asked.wait()
    assert asked.returncode is not None
    if asked.returncode < 0:
        raise _Fails(f"it ends with {signal.Signals(-asked.returncode).name}")
    try:
        said = json.loads(out.splitlines()[-1]) if asked.returncode == 0 else None
    except (ValueError, IndexError):
        said = None
    if not isinstance(said, list):
        last = (err.decode("utf-8", "replace").strip().splitlines() or ["it said nothing"])[-1]
        raise _Fails(last[:300])
    return [str(v) for v in said]


async def nodes(config: Config) -> list[Finding]:
    """Opens every node and asks it for one token."""
    from experts.build import open_square

    try:
        square = await open_square(config, pull=False)
    except AgoraError as e:
        return [Finding(what="nodes", status="fail", detail=e.message, hint=e.hint)]
    try:
        health = await square.health()
    finally:
        await square.aclose()
    by_node = {e.node: health[e.name] for e in square}
    return [
        Finding(
            what=f"node {name}",
            status="ok" if h.ok else "fail",
            detail=f"generated a token in {h.seconds:.2f} s" if h.ok else h.detail or "generated nothing",
            hint=None if h.ok else f"see [nodes.{name}] in {config.origin}",
        )
        for name, h in by_node.items()
    ]
