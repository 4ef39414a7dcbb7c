"""What `agora.toml` may say, and how clearly it is told what is wrong with it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agora.config import (
    Config,
    FakeNode,
    LlamaCppNode,
    LocalNode,
    OpenAINode,
    VllmNode,
    default_config,
    find_config,
    load_config,
    parse_config,
    template,
)
from agora.config.problems import MAX_PROBLEMS, lines_of
from agora.errors import ConfigError
from agora.types import Modality, Tier

SMALL = """
[nodes.n]
kind = "fake"
[experts.a]
node = "n"
description = "all things"
"""


def refused(text: str, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, file=Path("/somewhere/agora.toml"), **options)
    return str(caught.value)


def test_without_a_file_five_ready_experts_share_one_local_node() -> None:
    config = default_config()
    assert sorted(config.experts) == ["communications", "education", "finance", "healthcare", "robotics"]
    assert {e.node for e in config.experts.values()} == {"here"}
    node = config.nodes["here"]
    assert isinstance(node, LocalNode)
    assert config.models[node.model].source == "smollm2-135m"
    assert (config.server.host, config.server.port) == ("127.0.0.1", 8711)
    assert config.file is None


def uncommented(folder: Path) -> Config:
    """The template with everything it shows in comments."""
    (folder / "adapters" / "law").mkdir(parents=True)
    shown = re.sub(r"(?m)^# (?=\[|\w+ = )", "", template())
    shown = shown.replace('planner = "rules"', 'planner = "static"')
    shown = shown.replace('node = "cloud"', 'node = "here"')
    return parse_config(shown, file=folder / "agora.toml")


def test_every_key_that_the_template_shows_in_a_comment_is_a_real_one(tmp_path: Path) -> None:
    config = uncommented(tmp_path)
    assert config.models["small"].threads == 2
    assert isinstance(config.nodes["cloud"], OpenAINode)
    assert config.nodes["cloud"].capabilities.json_schema is True
    assert isinstance(config.nodes["scripted"], FakeNode)
    assert config.experts["law"].adapter is not None
    assert config.experts["law"].adapter.folder == tmp_path / "adapters" / "law"
    assert config.graph.plan is not None
    assert [s.id for s in config.graph.plan] == ["facts", "answer"]
    assert (config.graph.deadline_s, config.graph.cost, config.graph.tokens) == (60, 0.05, 20000)
    assert config.store.where == tmp_path / "runs.sqlite"
    assert isinstance(vllm := config.nodes["gpu"], VllmNode)
    assert vllm.python == tmp_path / ".venv-vllm" / "bin" / "python"
    assert isinstance(farm := config.nodes["farm"], VllmNode)
    assert farm.url == "http://127.0.0.1:8000/v1"
    assert isinstance(config.nodes["quick"], LlamaCppNode)
    assert config.server.keys == tmp_path / "keys.json"
    assert config.neighbours["edge"].experts == ("law",)


def test_the_template_shows_every_key_of_serving_and_of_the_nodes_that_agora_starts(tmp_path: Path) -> None:
    config = uncommented(tmp_path)
    ours = (config.vertical, config.multi_access, config.links["wifi"])
    for table in (config.server, config.neighbours["edge"], config.nodes["quick"], *ours):
        assert table.model_fields_set == set(type(table).model_fields)
    shown = config.nodes["gpu"].model_fields_set | config.nodes["farm"].model_fields_set
    assert shown == set(VllmNode.model_fields)


def test_what_the_template_shows_of_limits_is_what_holds_without_them(tmp_path: Path) -> None:
    shown, usual = uncommented(tmp_path), default_config()
    chosen = {"name", "tier", "keys", "requests_per_minute"}
    assert shown.server.model_dump(exclude=chosen) == usual.server.model_dump(exclude=chosen)


def test_a_file_that_names_no_experts_gets_the_built_in_ones() -> None:
    config = parse_config("[graph]\nmax_parallel = 2\n", file=Path("/x/agora.toml"))
    assert sorted(config.experts) == sorted(default_config().experts)
    assert config.graph.max_parallel == 2


def test_the_working_folder_comes_before_the_users_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user, work = tmp_path / "user", tmp_path / "work"
    (user / "agora").mkdir(parents=True)
    work.mkdir()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(user))
    monkeypatch.setattr("platformdirs.user_config_path", lambda name: user / name)
    monkeypatch.chdir(work)
    assert find_config() is None
    assert load_config().file is None
    (user / "agora" / "agora.toml").write_text(SMALL)
    assert load_config().file == user / "agora" / "agora.toml"
    (work / "agora.toml").write_text(SMALL)
    assert load_config().file == work / "agora.toml"


def test_all_problems_are_told_at_once_each_with_its_line_key_value_and_what_is_allowed() -> None:
    message = refused(
        """
[server]
port = 70000
[nodes.n]
kind = "fake"
latency_s = -1
[experts.a]
node = "m"
description = "d"
max_tokens = 0
[graph]
max_attempts = 0
deadline_s = -5
tokens = -1
planer = "rules"
"""
    )
    assert message.startswith("/somewhere/agora.toml: 7 problems")
    for line in (
        "line 3: server.port = 70000: must be less than or equal to 65535",
        "line 6: nodes.n.latency_s = -1: must be greater than or equal to 0",
        "line 10: experts.a.max_tokens = 0: must be greater than or equal to 1",
        "line 12: graph.max_attempts = 0: must be greater than or equal to 1",
        "line 13: graph.deadline_s = -5: must be greater than 0",
        "line 14: graph.tokens = -1: must be greater than or equal to 1",
        'line 15: graph.planer: unknown key; did you mean "planner"? allowed: name, planner,',
    ):
        assert line in message


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[server]\nport = '80'", 'server.port = "80": must be a whole number'),
        ("[server]\nport = true", "server.port = true: must be a whole number"),
        ("[graph]\ncost = nan", "graph.cost = nan: must be"),
        ("[graph]\ndeadline_s = inf", "graph.deadline_s = inf: must be"),
        (
            "[nodes.n]\nkind = 'locl'",
            'nodes.n.kind = "locl": did you mean "local"? allowed: local, openai, vllm, llamacpp, fake',
        ),
        ("[nodes.n]\nmodel = 'x'", "nodes.n.kind: is required; allowed: local, openai, vllm, llamacpp, fake"),
        ("[nodes.n]\nkind = 'openai'\nmodel = 'x'", "nodes.n.url: is required"),
        ("[nodes.n]\nkind = 'openai'\nmodel = 'x'\nurl = 'ftp://h'", "must look like http://host:port/v1"),
        ("[nodes.n]\nkind = 'fake'\nfail_first = 2", "nodes.n: fail_first needs fail"),
        ("[nodes.n]\nkind = 'fake'\nmax_waiting = 2\n" + SMALL.replace("[nodes.n]\nkind = \"fake\"\n", ""),
         "nodes.n.max_waiting: needs max_running"),
        ("[nodes.'a b']\nkind = 'fake'", "a name must be 1 to 64 letters, digits"),
        ("[nodes.n]\nkind = 'fake'\ntier = 'sky'", "must be 'end', 'edge' or 'cloud'"),
        ("[experts.a]\nnode = 'n'", 'experts.a: needs either ready = "…"'),
        ("[experts.a]\nnode = 'n'\ndescription = '  '", "experts.a.description"),
        ("[experts.a]\nnode = 'n'\nexamples = [1]", "experts.a.examples.0 = 1: must be text in quotes"),
        ("[experts.a]\nnode = 'n'\nexamples = 'x'", 'experts.a.examples = "x": must be a list'),
        ("server = 3", "server = 3: must be a table, written [server]"),
        ("[graphs]", 'graphs: unknown key; did you mean "graph"? allowed: server, models, nodes'),
        ("[nodes.n]\nkind = 'fake'\n", "experts: nobody to ask: add at least one [experts.NAME]"),
        (SMALL.replace('node = "n"', 'node = "m"'), 'experts.a.node = "m": not in [nodes]; allowed: n'),
        (SMALL.replace('kind = "fake"', 'kind = "local"\nmodel = "x"'), 'nodes.n.model = "x": not in [models]'),
        (SMALL + "adapter = { name = 'a' }", "needs a version, like 'finance@v1'"),
        (SMALL + "adapter = { name = 'a@v1', folder = 'there' }", "experts.a.adapter.folder"),
        (SMALL + "[graph]\nplanner = 'llm'", 'graph.planner_expert: is required for planner = "llm"; allowed: a'),
        (SMALL + "[graph]\nsynthesiser_expert = 'b'", 'graph.synthesiser_expert = "b": not in [experts]'),
        (SMALL + "[graph]\nplanner = 'static'", "a fixed plan needs both"),
        (SMALL + "[store]\npath = 'a'\nurl = 'postgresql://h/d'", "store: has both path and url"),
        (SMALL + "[store]\nurl = 'postgresql://me:verysecret@h/d'", "store.url = \"postgresql://…@h/d\": must not"),
        (SMALL + "[models.m]\nsource = 'x'\ndevice = 'gpu'", 'models.m.device = "gpu": must be cpu, cuda'),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_key_and_what_is_allowed(text: str, told: str) -> None:
    assert told in refused(text)


EDGE = SMALL + '[neighbours.edge]\nurl = "http://127.0.0.1:8712"\n'


@pytest.mark.parametrize("key", ["planner_expert", "synthesiser_expert", "subtasks"])
def test_an_expert_of_a_neighbour_may_be_named_before_anybody_knows_it(key: str) -> None:
    def graph(name: str) -> str:
        if key == "subtasks":
            return f'[graph]\nplanner = "static"\nsubtasks = [{{ id = "t", question = "q", expert = "{name}" }}]\n'
        return f'[graph]\n{key.removesuffix("_expert")} = "llm"\n{key} = "{name}"\n'

    for name in ("edge.law", "edge.deep.law", "a"):
        parse_config(EDGE + graph(name), file=None)
    for name in ("edge", "edg.law", "edge.", "law"):
        assert f'= "{name}": not in [experts]; ' in (message := refused(EDGE + graph(name)))
        assert "allowed: a, edge.NAME" in message
    few = EDGE + 'experts = ["law", "tax"]\n'
    parse_config(few + graph("edge.law"), file=None)
    assert 'did you mean "edge.law"? allowed: a, edge.law, edge.tax' in refused(few + graph("edge.lav"))
    assert "not in [experts]; allowed: a" in refused(SMALL + graph("edge.law"))


def test_a_cyclic_plan_is_refused_with_the_cycle() -> None:
    tasks = "".join(f"[[graph.subtasks]]\nid = '{i}'\nquestion = 'q'\ninputs = ['{j}']\n" for i, j in ("ab", "ba"))
    assert "graph.subtasks: the plan has a cycle: a → b → a" in refused(SMALL + "[graph]\nplanner = 'static'\n" + tasks)


def test_a_plan_of_ten_thousand_subtasks_is_refused() -> None:
    tasks = "".join(f"[[graph.subtasks]]\nid = 't{i}'\nquestion = 'q'\n" for i in range(10_000))
    assert "graph.subtasks" in refused(SMALL + "[graph]\nplanner = 'static'\n" + tasks)


def test_names_from_the_registries_are_checked_with_everything_else() -> None:
    text = SMALL + "ready = 'finanse'\n[graph]\nplanner = 'rule'\nmax_parallel = 0\n"
    names = {"graph.planner": ("rules", "llm"), "experts.*.ready": ("finance",)}
    message = refused(text, names=names)
    assert "3 problems" in message
    assert 'graph.planner = "rule": did you mean "rules"? allowed: rules, llm' in message
    assert 'experts.a.ready = "finanse": did you mean "finance"? allowed: finance' in message


@pytest.mark.parametrize(
    "line",
    [
        'api_key = "sk-verysecret"',
        'api_key_env = "sk-verysecret"',
        'url = "https://me:sk-verysecret@host/v1"',
        'url = "https://host/v1?key=sk-verysecret"',
        'token = "sk-verysecret"',
    ],
)
def test_a_secret_in_the_wrong_place_is_not_repeated(line: str) -> None:
    message = refused(f'[nodes.n]\nkind = "openai"\nmodel = "m"\n{line}\n')
    assert "nodes.n" in message
    assert "verysecret" not in message


def test_toml_that_does_not_parse_is_told_with_its_line() -> None:
    assert "not valid TOML" in (message := refused("[server]\nport = = 3"))
    assert "line 2" in message


def test_a_deeply_nested_file_is_one_error() -> None:
    assert "not valid TOML" in refused("a = " + "[" * 100_000)


def test_bytes_that_are_not_utf8_are_told_with_their_line(tmp_path: Path) -> None:
    file = tmp_path / "agora.toml"
    file.write_bytes(b'[server]\nhost = "\xff"\n')
    with pytest.raises(ConfigError, match=r"line 2: byte 0xff is not valid UTF-8"):
        load_config(file)


@pytest.mark.parametrize("what", ["missing", "folder", "huge"])
def test_a_file_that_cannot_be_read_is_one_error(tmp_path: Path, what: str) -> None:
    file = tmp_path / "agora.toml"
    if what == "folder":
        file.mkdir()
    if what == "huge":
        file.write_bytes(b"#" * 1_000_001)
    with pytest.raises(ConfigError, match=re.escape(str(file))):
        load_config(file)


def test_windows_line_ends_and_a_byte_order_mark_are_no_problem(tmp_path: Path) -> None:
    file = tmp_path / "agora.toml"
    file.write_bytes(b"\xef\xbb\xbf" + SMALL.replace("\n", "\r\n").encode())
    assert list(load_config(file).experts) == ["a"]


def test_relative_paths_count_from_the_folder_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "deep" / "agora.toml"
    file.parent.mkdir()
    file.write_text(SMALL + "[models.m]\nsource = './weights'\n[models.k]\nsource='owner/name'\n[store]\npath = 'r.db'")
    monkeypatch.chdir(tmp_path)
    config = load_config("deep/agora.toml")
    assert config.store.where == tmp_path / "deep" / "r.db"
    assert config.models["m"].source == str(tmp_path / "deep" / "weights")
    assert config.models["k"].source == "owner/name"


def test_values_arrive_as_the_vocabulary_has_them() -> None:
    config = parse_config(SMALL + 'modalities = ["text", "image"]\nexamples = ["a?"]', file=None)
    assert config.experts["a"].modalities == (Modality.TEXT, Modality.IMAGE)
    assert config.experts["a"].examples == ("a?",)
    assert config.nodes["n"].tier is Tier.END


def test_control_characters_of_a_file_do_not_reach_the_terminal() -> None:
    assert "\x1b" not in refused('[server]\nport = "\\u001b[2J"\n["\\u001b[31m"]\n')


def test_hundreds_of_problems_stay_a_screenful() -> None:
    message = refused("[server]\n" + "".join(f"k{i} = 1\n" for i in range(300)))
    assert len(message.splitlines()) == MAX_PROBLEMS + 2
    assert f"and {300 - MAX_PROBLEMS} more" in message


def test_lines_are_found_through_lists_strings_and_tables_that_span_several() -> None:
    text = '''# first
[a]
list = [
  1,   # [b]
  2,
]
text = """
[c]
x = 1
"""
[d."e.f"]
inline = { g = 1 }
h.i = 2
[[k]]
l = 1
'''
    found = lines_of(text)
    assert found[("a",)] == 2
    assert found[("a", "list")] == 3
    assert found[("a", "text")] == 7
    assert found[("d", "e.f")] == 11
    assert found[("d", "e.f", "inline", "g")] == 12
    assert found[("d", "e.f", "h", "i")] == 13
    assert found[("k", "l")] == 15
    assert ("c",) not in found


@given(st.text(max_size=200))
def test_no_text_does_anything_but_parse_or_be_refused(text: str) -> None:
    try:
        parse_config(text, file=None)
    except ConfigError as e:
        assert e.message
