"""The command line as a whole: how it helps, how it fails, what it returns."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = ("ask", "experts", "models", "runs", "init", "doctor", "demo")


def test_help_names_every_command_and_the_exit_codes(agora):
    said = agora("--help")
    assert said.code == 0
    for command in COMMANDS:
        assert command in said.out
    assert "Exit codes: 0 done; 1 an error; 2 wrong usage; 3 an answer with parts missing" in " ".join(said.out.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(agora, command):
    assert agora(command, "--help").code == 0


def test_the_version_is_that_of_the_distribution(agora):
    from importlib.metadata import version

    said = agora("--version")
    assert (said.code, said.out) == (0, f"agora {version('agora-llm')}\n")


def test_without_a_command_it_shows_its_help_and_says_that_this_was_no_use(agora):
    said = agora()
    assert said.code == 2
    assert "Usage: agora" in said.out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("asq",), "No such command 'asq'"),
        (("ask",), "Missing argument 'QUESTION'"),
        (("ask", "q", "--deadlin", "3"), "--deadlin"),
        (("ask", "q", "--tokens", "many"), "Invalid value for '--tokens'"),
        (("runs", "show"), "Missing argument 'ID'"),
    ],
)
def test_wrong_usage_is_one_line_with_a_hint(agora, arguments, told):
    said = agora(*arguments)
    assert said.code == 2
    assert told in said.error
    assert "--help" in said.err.splitlines()[-1]
    assert said.out == ""


def test_wrong_usage_is_json_where_json_was_asked_for(agora):
    said = agora("runs", "list", "--json", "--limt", "3")
    assert said.code == 2
    assert said.json["error"]["code"] == "usage"


def test_an_unforeseen_error_is_one_line_that_says_how_to_see_more(agora, monkeypatch):
    def broken(path):
        raise RuntimeError("what now")

    monkeypatch.setattr("agora.cli.settings.load_config", lambda *a, **k: broken(a))
    said = agora("experts", "list")
    assert said.code == 70
    assert said.error == "error: a bug in agora: RuntimeError: what now"
    assert "AGORA_DEBUG=1" in said.err
    assert agora("experts", "list", "--json").json["error"]["code"] == "internal"
    said = agora("--debug", "experts", "list")
    assert "Traceback" in said.err
    assert "in broken" in said.err
    monkeypatch.setenv("AGORA_DEBUG", "1")
    assert "Traceback" in agora("experts", "list").err


def test_an_error_of_agora_is_one_line_a_hint_and_exit_code_1(agora):
    said = agora("models", "path", "smollm2-135")
    assert said.code == 1
    assert "smollm2-135" in said.error
    assert said.err.splitlines()[1] == "hint: did you mean smollm2-135m?"


def test_starting_loads_nothing_heavy():
    code = "import sys, agora.cli.app; print(*[m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["torch", "transformers", "langgraph", "pydantic", "aiohttp", "httpx", "huggingface_hub", "sqlite3"]
    done = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_reader_that_stops_early_is_no_error(home: Path, tmp_path: Path):
    (home / "agora.toml").write_text(
        '[nodes.n]\nkind = "fake"\n'
        + "".join(f'[experts.e{i}]\nnode = "n"\ndescription = "{"x" * 200}"\n' for i in range(1000))
    )
    command = f'"{sys.executable}" -c "from agora.cli import main; main()" experts list | head -n 1'
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, cwd=home)
    assert done.stderr == ""
    assert done.returncode == 0
    assert done.stdout.startswith("name")


def test_json_is_plain_ascii_so_that_any_terminal_takes_it(agora, fake):
    fake.write_text(fake.read_text().replace("A loan one can sell.", "Ein Wertpapier — ✓"))
    said = agora("ask", "What is a bond?", "--json")
    assert said.out.isascii()
    assert json.loads(said.out)["text"] == "Ein Wertpapier — ✓"


def shell(home: Path, line: str) -> subprocess.CompletedProcess[str]:
    """Runs a line of shell in which `agora` is the command."""
    script = f"agora() {{ '{sys.executable}' -c 'from agora.cli import main; main()' \"$@\"; }}; {line}"
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=home, timeout=60)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("form", ["--json", ""])
def test_an_answer_that_cannot_be_written_is_one_error_that_says_where_it_is(agora, fake, form):
    said = shell(fake.parent, f"agora ask 'What is a bond?' {form} --run-id r >/dev/full")
    assert said.returncode == 1
    assert said.stderr.splitlines()[-2:] == [
        "error: cannot write to standard output: No space left on device",
        "hint: see the answer again: agora runs show r",
    ]
    assert said.stderr.count("error: ") == 1
    assert "A loan one can sell." in agora("runs", "show", "r").out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_notes_that_cannot_be_written_do_not_cost_the_answer(fake):
    said = shell(fake.parent, "agora ask 'What is a bond?' 2>/dev/full")
    assert said.returncode == 0
    assert "A loan one can sell." in said.stdout


def test_with_standard_output_closed_nothing_is_asked(fake):
    said = shell(fake.parent, "agora ask 'What is a bond?' >&-")
    assert said.returncode == 1
    assert said.stderr.splitlines()[0] == "error: standard output is closed"
    assert not (fake.parent / "runs.sqlite").exists()


def test_with_standard_input_closed_there_is_no_question(fake):
    said = shell(fake.parent, "agora ask - <&-")
    assert said.returncode == 1
    assert said.stderr.splitlines()[0] == "error: standard input is closed"


def test_the_hint_is_the_same_in_both_forms(agora):
    hint = agora("runs", "list", "--limt", "3").err.splitlines()[-1]
    assert hint == f"hint: {agora('runs', 'list', '--json', '--limt', '3').json['error']['hint']}"


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [("--tokens", "abc", "'abc' is not a whole number"), ("--deadline", "soon", "'soon' is not a number")],
)
def test_a_value_of_the_wrong_kind_is_shown_with_what_is_allowed(agora, option, value, told):
    assert agora("ask", "q", option, value).error == f"error: Invalid value for '{option}': {told}"
