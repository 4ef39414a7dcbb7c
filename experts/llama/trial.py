"""Has a process of its own look at a GGUF file first: on some damaged ones llama.cpp ends the process it runs in.

python -m experts.llama.trial FILE
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

from agora.errors import ModelError
from experts.llama.library import library

TIMEOUT_S: Final = 120.0
"""Seconds the look may take: it reads no weights and takes half a second, on a crowded machine many times that."""


def try_loading(path: Path) -> None:
    """Loads everything but the weights, elsewhere. Errors that llama.cpp can tell are left to the real loading.

    Raises:
        ModelError: If llama.cpp ended its process, or did not come to an end.
    """
    # -P: a folder called experts in the caller's working directory must not be imported instead
    command = [sys.executable, "-P", "-m", __name__, str(path)]
    paths = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    # Without this, llama.cpp attaches a debugger to tell where it failed.
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "GGML_NO_BACKTRACE": "1"}
    hint = "the file is damaged, or newer than this llama.cpp: fetch it again, or update llama-cpp-python"
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_S, check=False, env=env
        )
    except subprocess.TimeoutExpired:
        raise ModelError(f"{path} cannot be loaded: llama.cpp hangs on it", hint=hint) from None
    if done.returncode:
        said = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
        raise ModelError(
            f"{path} cannot be loaded: llama.cpp fails on it: {(said or ['no reason'])[-1][-300:]}", hint=hint
        )


def main() -> None:
    """The process of its own."""
    api = library().api
    wishes = api.llama_model_default_params()
    wishes.no_alloc = True
    wishes.load_mode = api.LLAMA_LOAD_MODE_NONE  # what is not allocated cannot be mapped
    wishes.n_gpu_layers = 0
    api.llama_model_load_from_file(sys.argv[1].encode(), wishes)


if __name__ == "__main__":
    main()
