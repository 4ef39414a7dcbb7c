"""A real vLLM behind a real `agora serve`, asked by the real client; both end together."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from openai import OpenAI

from experts.vllm_launch import default_python

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

TOML = """
[nodes.big]
kind = "vllm"
model = "smollm2-135m"
python = "{python}"
max_context = 1024

[experts.law]
node = "big"
description = "Contracts, tenancy, liability and data protection."
system_prompt = "You are a careful lawyer. Answer briefly."
max_tokens = 16

[graph]
router = "keywords"

[store]
path = "runs.sqlite"
"""

QUESTION = [{"role": "user", "content": "May a landlord keep the deposit?"}]


@pytest.fixture
def python() -> Path:
    found = default_python()
    has_vllm = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    if subprocess.run([str(found), "-c", has_vllm]).returncode:
        pytest.skip("vLLM is not installed: make vllm")
    return found


def test_a_vllm_server_of_the_configuration_is_served_and_ends_with_the_gateway(python: Path, tmp_path: Path) -> None:
    (tmp_path / "agora.toml").write_text(TOML.format(python=python))
    run = "from agora.cli.app import main; main()"
    serve = ["serve", "--config", str(tmp_path / "agora.toml"), "--port", "0", "--log", str(tmp_path / "log")]
    process = subprocess.Popen(
        [sys.executable, "-c", run, *serve], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+/v1", process.stdout.readline())
        assert found, (tmp_path / "log").read_text()
        started = psutil.Process(process.pid).children(recursive=True)
        assert any("vllm" in " ".join(p.cmdline()) for p in started)
        client = OpenAI(base_url=found[0], api_key="none", timeout=60, max_retries=0)
        answer = client.chat.completions.create(model="law", messages=QUESTION, logprobs=True, top_logprobs=2)
        assert answer.choices[0].message.content
        assert answer.usage is not None
        assert 1 <= answer.usage.completion_tokens <= 16
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert len(logprobs.content or ()) == answer.usage.completion_tokens
        chunks = list(
            client.chat.completions.create(
                model="law", messages=QUESTION, stream=True, stream_options={"include_usage": True}
            )
        )
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == answer.choices[0].message.content
        assert chunks[-1].usage is not None
        graph = client.chat.completions.create(model="agora", messages=QUESTION)
        assert graph.choices[0].message.content
        said = client.completions.create(model="law", prompt="Once upon a time", max_tokens=4)
        assert said.choices[0].text
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        until = time.monotonic() + 20
        while any(map(_there, started)):
            assert time.monotonic() < until, [p.cmdline() for p in started if _there(p)]
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _there(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
