"""`agora doctor`: it finds what is missing, says what to type, and changes nothing."""

from __future__ import annotations

import pytest

from agora.cli import checks_serving


@pytest.fixture(autouse=True)
def _port_is_free(monkeypatch):
    """Whoever uses agora's usual port on this machine is none of these tests' business."""
    monkeypatch.setattr(checks_serving, "_cannot_listen", lambda family, where: None)


def found(said) -> dict[str, dict]:
    return {f["what"]: f for f in said.json["findings"]}


def test_a_machine_without_models_is_told_what_to_type(agora, home):
    said = agora("doctor", "--json")
    assert said.code == 0
    findings = found(said)
    assert findings["configuration"]["detail"].startswith("the built-in configuration: 5 experts on 1 node")
    for alias in ("smollm2-135m", "minilm-l6"):
        assert findings[f"model {alias}"]["status"] == "note"
        assert findings[f"model {alias}"]["hint"] == f"type: agora models pull {alias}"
    assert "torch 2" in findings["packages"]["detail"]
    assert findings["run store"]["detail"].endswith("runs.sqlite will be made")
    assert "HF_HUB_OFFLINE" in findings["model hub"]["detail"]
    assert not any(home.parent.glob("data/**/*.sqlite"))


def test_for_people_there_is_a_line_for_each_finding_and_an_arrow_before_what_to_type(agora, home):
    said = agora("doctor")
    assert said.code == 0
    assert any(line.startswith("ok    configuration: ") for line in said.out.splitlines())
    assert "      → type: agora models pull smollm2-135m" in said.out.splitlines()


def test_a_wrong_configuration_fails_with_every_problem(agora, home):
    (home / "agora.toml").write_text("[server]\nport = 0\nhots = 1\n")
    said = agora("doctor")
    assert said.code == 1
    assert "FAIL  configuration: " in said.out
    assert "line 2: server.port = 0" in said.out
    assert "line 3: server.hots: unknown key" in said.out
    assert found(agora("doctor", "--json"))["configuration"]["status"] == "fail"


def test_a_store_that_is_none_fails(agora, fake):
    (fake.parent / "runs.sqlite").write_bytes(b"no database " * 100)
    said = agora("doctor", "--json")
    assert said.code == 1
    assert found(said)["run store"]["status"] == "fail"
    assert (fake.parent / "runs.sqlite").read_bytes().startswith(b"no database")


def test_a_missing_api_key_fails_by_name_and_a_set_one_is_not_shown(agora, fake, monkeypatch):
    fake.write_text(
        '[nodes.n]\nkind = "openai"\nurl = "http://127.0.0.1:9/v1"\nmodel = "m"\napi_key_env = "THE_KEY"\n'
        '[experts.a]\nnode = "n"\ndescription = "d"\n'
    )
    said = agora("doctor", "--json")
    assert said.code == 1
    assert found(said)["node n"]["hint"] == "export THE_KEY=…"
    monkeypatch.setenv("THE_KEY", "sk-verysecret")
    said = agora("doctor", "--json")
    assert found(said)["node n"]["detail"] == "THE_KEY is set"
    assert "verysecret" not in said.out + said.err


@pytest.mark.parametrize(("fail", "status", "code"), [("", "ok", 0), ('fail = "unavailable"', "fail", 1)])
def test_nodes_are_asked_for_a_token_on_demand(agora, fake, fail, status, code):
    fake.write_text(fake.read_text().replace('reply = "forty-three"', fail))
    said = agora("doctor", "--nodes", "--json")
    assert said.code == code
    assert found(said)["node quick"]["status"] == "ok"
    assert found(said)["node other"]["status"] == status
    assert "node other" not in found(agora("doctor", "--json"))
