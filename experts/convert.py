"""Turns a GGUF file into a model folder that loads in seconds.

A GGUF holds quantised weights, tokenizer and chat template in one file. Loading it through transformers takes most
of a minute and yields a model that cannot be saved. So the dequantised weights are put into a plain model of the same
configuration once, and that is saved as safetensors with the tokenizer beside it.

The work is done in a process of its own: it takes gigabytes, which a server should not keep, and it holds the
interpreter for seconds at a time.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from agora.errors import ModelError
from experts.files import disk_errors

CONVERTER_VERSION: Final = 1
"""Raised whenever the same GGUF would be converted to other files, so that caches are made anew."""

GGUF_MAGIC: Final = b"GGUF"
"""First four bytes of a GGUF file."""


def _individual_digits(tokenizer: Any) -> None:
    # SmolLM2 splits every digit off before the byte-level rule
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _compose_unicode(tokenizer: Any) -> None:
    # Qwen2 reads text in Unicode's composed form, which a GGUF has no field for
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()


TOKENIZER_REPAIRS: Final[Mapping[str, Callable[[Any], None]]] = {
    "": lambda _: None,
    "smollm": _individual_digits,
    "qwen2": _compose_unicode,
}
"""What transformers does not rebuild of a tokenizer, by the name a GGUF gives the rules (`tokenizer.ggml.pre`)."""


def _plain_model(loaded: Any) -> Any:
    """The same weights in a model that knows nothing of GGUF; the tensors are shared, not copied."""
    import torch
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=loaded.dtype)
    plain.load_state_dict(loaded.state_dict(), strict=True, assign=True)
    plain.tie_weights()
    return plain


def _generation_config(config: Any, tokenizer: Any) -> Any:
    from transformers import GenerationConfig

    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id if tokenizer.bos_token_id is not None else config.bos_token_id,
        eos_token_id=eos if eos is not None else config.eos_token_id,
        pad_token_id=pad if pad is not None else eos,
    )


def convert_here(gguf_file: Path, target: Path, *, dtype: str, pre_tokenizer: str = "") -> None:
    """`convert_gguf` in this very process."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"gguf_file": gguf_file.name, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, **options)
        loaded = AutoModelForCausalLM.from_pretrained(gguf_file.parent, dtype=getattr(torch, dtype), **options)
    except (ValueError, KeyError, TypeError, IndexError, OSError, RuntimeError, NotImplementedError) as error:
        raise ModelError(f"{gguf_file} cannot be converted: {type(error).__name__}: {error}") from error
    if not tokenizer.chat_template or tokenizer.eos_token_id is None:
        raise ModelError(f"{gguf_file} holds no chat template or no end-of-text token: it is no chat model")
    TOKENIZER_REPAIRS[pre_tokenizer](tokenizer)
    tokenizer.model_max_length = loaded.config.max_position_embeddings
    plain = _plain_model(loaded)
    plain.generation_config = _generation_config(loaded.config, tokenizer)
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)


def convert_gguf(gguf_file: Path, target: Path, *, dtype: str, pre_tokenizer: str = "") -> None:
    """Writes the model in a GGUF file to a folder: safetensors, configuration and tokenizer with its chat template.

    Args:
        gguf_file: The GGUF file.
        target: An existing folder.
        dtype: Name of the torch type the weights are saved in, `float32` or `bfloat16`.
        pre_tokenizer: A key of `TOKENIZER_REPAIRS`.

    Raises:
        ModelError: If the file is no GGUF, holds no chat template or end-of-text token, is of a kind that
            transformers cannot read, or if the memory or disk does not suffice.
    """
    with gguf_file.open("rb") as file:
        if file.read(len(GGUF_MAGIC)) != GGUF_MAGIC:
            raise ModelError(f"{gguf_file} is no GGUF file")
    options = ["--dtype", dtype, "--pre-tokenizer", pre_tokenizer]
    # -P: a folder called experts in the caller's working directory must not be imported instead
    command = [sys.executable, "-P", "-m", "experts.convert", str(gguf_file), str(target), *options]
    paths = [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    alive_read, alive_write = os.pipe()
    try:
        child = subprocess.Popen(
            command, stdin=alive_read, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
        )
    finally:
        os.close(alive_read)
    try:
        out, err = child.communicate()
    finally:
        os.close(alive_write)
        child.kill()
        child.wait()
    if child.returncode != 0:
        raise _child_error(gguf_file, child.returncode, out, err)


def _child_error(gguf_file: Path, code: int, out: str, err: str) -> ModelError:
    try:
        told = json.loads(out)
        return ModelError(str(told["message"]), hint=told["hint"])
    except (ValueError, KeyError, TypeError):
        pass
    if code == -signal.SIGKILL:
        hint = "the machine has probably run out of memory: free some and run the same command again"
        return ModelError(f"converting {gguf_file.name} was killed", hint=hint)
    last_line = (err.strip().splitlines() or [f"status {code}, no reason given"])[-1][:300]
    return ModelError(f"converting {gguf_file.name} failed: {last_line}")


def _end_with_parent() -> None:
    """Ends this process when standard input does: a killed pull must not leave a converter writing behind it."""
    os.read(0, 1)  # unbuffered: a thread inside sys.stdin would upset the end of the interpreter
    os._exit(1)


def main(arguments: Sequence[str] | None = None) -> int:
    """The converting process: status 0, or 1 with the error as JSON on standard output."""
    parser = argparse.ArgumentParser(description=convert_gguf.__doc__)
    parser.add_argument("gguf_file", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    parser.add_argument("--pre-tokenizer", choices=tuple(TOKENIZER_REPAIRS), default="")
    chosen = parser.parse_args(arguments)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with disk_errors(chosen.target):
            convert_here(chosen.gguf_file, chosen.target, dtype=chosen.dtype, pre_tokenizer=chosen.pre_tokenizer)
    except ModelError as error:
        print(json.dumps({"message": error.message, "hint": error.hint}))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
