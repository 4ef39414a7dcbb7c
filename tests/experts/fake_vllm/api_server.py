"""Stands in for `vllm.entrypoints.openai.api_server`: the same command line and API, no model, and it can misbehave.

The fixture `fake_vllm` of test_vllm.py puts it into a package of that name. FAKE_VLLM names a folder: `plan.json` there
says how to behave, and is read again at every start and request; `seen.jsonl` gets what was seen.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

FOLDER = Path(os.environ["FAKE_VLLM"])
KEY = os.environ.get("VLLM_API_KEY")
METRICS = (FOLDER / "metrics.txt").read_text() if (FOLDER / "metrics.txt").exists() else ""


def plan() -> dict[str, Any]:
    return json.loads((FOLDER / "plan.json").read_text())


def saw(**what: Any) -> None:
    with (FOLDER / "seen.jsonl").open("a") as file:
        file.write(json.dumps(what) + "\n")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served = ""
    adapters: ClassVar[dict[str, str]] = {}

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, body: Any, status: int = 200, kind: str = "application/json") -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, message: str, status: int) -> None:
        self.reply({"error": {"message": message, "type": "Error", "code": status}}, status)

    def allowed(self) -> bool:
        if self.path.startswith("/v1") and KEY and self.headers.get("Authorization") != f"Bearer {KEY}":
            self.reply({"error": "Unauthorized"}, 401)
            return False
        return True

    def do_GET(self) -> None:
        if not self.allowed():
            return
        if self.path == "/metrics":
            self.reply(METRICS, kind="text/plain; version=1.0.0; charset=utf-8")
        elif self.path == "/v1/models":
            models = [{"id": self.served, "max_model_len": 2048, "root": "here", "parent": None}]
            models += [{"id": n, "root": p, "parent": self.served} for n, p in self.adapters.items()]
            self.reply({"object": "list", "data": models})
        else:
            self.refuse("Not Found", 404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.allowed():
            return
        saw(path=self.path, body=body)
        now = plan()
        if self.path == "/v1/load_lora_adapter":
            self.load(body, now)
        elif self.path == "/v1/unload_lora_adapter":
            if self.adapters.pop(body["lora_name"], None) is None:
                self.refuse(f"The lora adapter '{body['lora_name']}' cannot be found.", 404)
            else:
                self.reply("Success", kind="text/plain")
        elif self.path == "/tokenize":
            chat = now.get("chat_template", True)
            self.reply({"tokens": [1, 2]}) if chat else self.refuse("no chat template is defined", 400)
        elif self.path in ("/v1/completions", "/v1/chat/completions"):
            self.generate(body, now)
        else:
            self.refuse("Not Found", 404)

    def load(self, body: dict[str, str], now: dict[str, Any]) -> None:
        name, path = body["lora_name"], body["lora_path"]
        if now.get("adapters") == "not allowed":
            self.refuse("Not Found", 404)
        elif now.get("adapters") == "refused":
            self.refuse("LoRA rank 99 is greater than max_lora_rank 16.", 500)
        elif name in self.adapters:
            self.refuse(f"The lora adapter '{name}' has already been loaded.", 400)
        elif not (Path(path) / "adapter_model.safetensors").exists():
            self.refuse(f"Loading lora {name} failed: No adapter found for {path}", 404)
        else:
            self.adapters[name] = path
            self.reply("Success", kind="text/plain")

    def generate(self, body: dict[str, Any], now: dict[str, Any]) -> None:
        mode = now.get("mode", "ok")
        if mode == "hang":
            time.sleep(60)
        elif mode == "stalls":
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            self.wfile.write(b'data: {"choices": [{"index": 0, "text": "x", "finish_reason": null}]}\n\n')
            self.wfile.flush()
            time.sleep(60)
        elif mode == "error":
            self.refuse("EngineCore encountered an issue.", 500)
        elif mode == "garbage":
            self.reply("<html>it works</html>", kind="text/html")
        elif mode == "empty":
            self.reply("", kind="application/json")
        elif body["model"] not in (self.served, *self.adapters):
            self.refuse(f"The model `{body['model']}` does not exist.", 404)
        else:
            self.answer(body)

    def answer(self, body: dict[str, Any]) -> None:
        text = f"{os.getpid()}"
        chat = "chat" in self.path
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        head = {"id": "x", "created": 0, "model": body["model"]}
        logprobs = None
        if body.get("logprobs") is not None:
            logprobs = {"content": [{"token": text, "logprob": -0.5, "top_logprobs": []}]} if chat else None
        if not body.get("stream"):
            said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            self.reply(
                {
                    **head,
                    "choices": [{"index": 0, **said, "logprobs": logprobs, "finish_reason": "stop"}],
                    "usage": usage,
                }
            )
            return
        said = {"delta": {"content": text}} if chat else {"text": text}
        events = [
            {**head, "choices": [{"index": 0, **said, "logprobs": logprobs, "finish_reason": None}]},
            {**head, "choices": [{"index": 0, **({"delta": {}} if chat else {"text": ""}), "finish_reason": "stop"}]},
            {**head, "choices": [], "usage": usage},
        ]
        stream = "".join(f"data: {json.dumps(e)}\n\n" for e in events) + "data: [DONE]\n\n"
        self.reply(stream, kind="text/event-stream")


def main() -> None:
    parser = argparse.ArgumentParser(prog="api_server.py")
    for option in ("--model", "--served-model-name", "--host", "--dtype", "--max-model-len", "--other"):
        parser.add_argument(option)
    for option in ("--port", "--max-lora-rank", "--max-loras"):
        parser.add_argument(option, type=int)
    for option in ("--enforce-eager", "--enable-lora"):
        parser.add_argument(option, action="store_true")
    options = parser.parse_args()
    now = plan()
    # Like vLLM, it does not do its work itself.
    engine = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(300)"])
    told = ("VLLM", "HF_", "FAKE")
    environment = {k: v for k, v in os.environ.items() if k.startswith(told)}
    saw(pid=os.getpid(), engine=engine.pid, argv=sys.argv[1:], env=environment, cwd=str(Path.cwd()))
    print("INFO 11-22 21:06:53 [core.py:1] starting with key", KEY, flush=True)
    if now.get("start") == "dies":
        print("loading: 1%\rloading: 99%\r", end="", flush=True)
        print("(EngineCore pid=1) ERROR 11-22 21:06:53 [core.py:1] ValueError: no weights in here", flush=True)
        raise RuntimeError("Engine core initialization failed. See root cause above.")
    time.sleep(now.get("start_s", 0))
    Handler.served = options.served_model_name
    server = ThreadingHTTPServer((options.host, options.port), Handler)
    server.daemon_threads = True
    server.serve_forever(poll_interval=0.05)


main()
