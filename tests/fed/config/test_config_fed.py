"""fed.toml: what is written is what runs, and every mistake is told with its place and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from agora.errors import ConfigError
from fed.adapter import Method
from fed.chain import Clip, Int8
from fed.config import FedConfig, load_config, parse_config, template, to_toml
from fed.data import ByQuantity, Dirichlet
from fed.pace import Pace

LEAST = """
[model]
source = "smollm2-135m"
[data]
source = "glue"
name = "sst2"
clients = 4
[server]
publications = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": "x"}\n')
    return tmp_path / "fed.toml"


def parsed(text: str, file: Path) -> FedConfig:
    return parse_config(text, file=file)


def wrong(text: str, file: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, file=file)
    return caught.value.message


def test_the_template_is_accepted_and_its_comments_show_true_defaults(file: Path) -> None:
    (file.parent / "example.jsonl").write_text("")
    file.write_text(template())
    config = load_config(file)
    assert config.data.path == file.parent / "example.jsonl"
    assert config.run.out == file.parent / "fed-run"
    shown = [line for line in template().splitlines() if line.startswith(("# share_cap", "# clip", "# job_timeout"))]
    assert len(shown) == 3
    pace = Pace()
    assert f"# share_cap = {pace.share_cap}" in template()
    assert f"# job_timeout_s = {pace.job_timeout_s}" in template()
    assert f"# clip = {config.training.clip}" in template()


ALL = """
[model]
source = "./model"
threads = 2
[data]
source = "jsonl"
path = "rows.jsonl"
clients = 5
[data.template]
prompt = "{text}\\u007f\\n\\"quoted\\" {{x}}"
response = "{label}"
choices = { x = " good", "y z" = " bad" }
[data.partition]
kind = "quantity"
exponent = 2
[adapter]
rank = 4
targets = ["up_proj"]
[training]
clip = "none"
learning_rate = 1e-4
[server]
preset = "synchronous"
cohort = 4
over_select = 1.25
seconds = 1e4
weighting = "equal"
max_staleness = 3
[aggregate]
rule = "delta"
momentum = 0.5
normalise = "count"
[[chain]]
kind = "clip"
norm = 1
[[chain]]
kind = "int8"
block = "none"
[clusters]
kind = "ifca"
clusters = 2
every = "none"
[fleet]
speeds = "tiers"
parameters = { factors = [1, 3] }
ranks = [2, 4]
loss_of = { "client-0" = 1.0 }
[[fleet.changes]]
at = 3
client = "client-1"
what = "dies"
[[fleet.changes]]
at = 9
client = "client-1"
what = "joins"
[run]
seed = 3
checkpoint_every = 2
"""


def test_everything_read_is_there_and_is_read_again_from_what_is_written(file: Path, tmp_path: Path) -> None:
    config = parsed(ALL, file)
    assert config.model.source == str(tmp_path / "model")
    assert config.data.partition == ByQuantity(exponent=2)
    assert config.training.clip is None
    assert config.server.pace == Pace.synchronous(4, over_select=1.25, seconds=1e4, max_staleness=3).but(
        weighting="equal"
    )
    assert config.chain.stages == (Clip(norm=1), Int8(block=None))
    assert config.aggregate.settings["momentum"] == 0.5
    assert config.clusters is not None and config.clusters.settings["every"] is None
    assert [c.what for c in config.fleet.changes] == ["dies", "joins"]
    elsewhere = parse_config(to_toml(config), file=Path("/elsewhere/fed.toml"))
    assert elsewhere == config


@pytest.mark.parametrize("preset", ["default", "synchronous", "fedbuff", "fedasync"])
def test_a_preset_is_changed_only_where_the_file_says_so(file: Path, preset: str) -> None:
    changed = parsed(LEAST.replace("[server]", f'[server]\npreset = "{preset}"\ncohort = 8\nlinger_s = 5'), file)
    expected = {
        "default": Pace.default(8),
        "synchronous": Pace.synchronous(8),
        "fedbuff": Pace.fedbuff(8, 4),
        "fedasync": Pace.fedasync(8),
    }
    assert changed.server.pace == expected[preset].but(linger_s=5.0, publications=3)


def test_the_rule_fits_the_method_by_default(file: Path) -> None:
    assert parsed(LEAST, file).aggregate.rule == "delta"
    prefix = parsed(LEAST + '[adapter]\nmethod = "prefix"\n', file)
    assert (prefix.aggregate.rule, prefix.adapter.method) == ("mean", Method.PREFIX)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("[modle]", 'modle: unknown key; did you mean "model"?'),
        ("[adapter]\nrank = 0", "line 11: adapter.rank = 0: allowed: whole numbers from 1 to"),
        ("[adapter]\nrank = 2.5", "adapter.rank = 2.5: must be"),
        ("[adapter]\nmethod = 'lorra'", "adapter.method"),
        ("[training]\nlerning_rate = 1", 'training.lerning_rate: unknown key; did you mean "learning_rate"?'),
        ("[training]\nfreeze_a = true\n[adapter]\nmethod = 'prompt'", "training.freeze_a: is for LoRA"),
        ("[aggregate]\nrule = 'mena'", 'aggregate.rule = "mena": did you mean "mean"?'),
        ("[aggregate]\nmomentum = 2.0", "aggregate.momentum = 2.0: must be from 0 to below 1"),
        ("[aggregate]\nrule = 'freeze_a'", "needs freeze_a = true in [training]"),
        ("[adapter]\nmethod = 'prefix'\n[aggregate]\nrule = 'stacking'", "not for prefix adapters; allowed: mean, mix"),
        ("[[chain]]\nkind = 'zip'", 'chain.0.kind = "zip": allowed: clip, weight, noise, top_k, int8'),
        ("[[chain]]\nkind = 'clip'", "chain.0.norm: is required"),
        ("[[chain]]\nkind = 'clip'\nnorm = -1.0", "chain.0.norm = -1.0: must be a number above 0"),
        ("[[chain]]\nkind = 'int8'\n[[chain]]\nkind = 'clip'\nnorm = 1.0", "clip stands after int8"),
        ("[clusters]\nclusters = 9", "clusters.clusters = 9: more clusters than clients; allowed: up to 4"),
        ("[clusters]\nkind = 'kmeans'", "clusters.kind"),
        ("[hierarchy]", "hierarchy: a run through edges is not read from a file yet"),
        ("[fleet]\nloss = 1.5", "fleet.loss = 1.5: a probability is from 0 to 1"),
        ("[fleet]\nspeeds = 'lognormal'\nparameters = { sigm = 1 }", "has no parameter 'sigm'; it has sigma"),
        ("[fleet]\nranks = [4]\n[adapter]\nmethod = 'prompt'", "fleet.ranks: are LoRA's"),
        ("[[fleet.changes]]\nat = 1\nclient = 'a'\nwhat = 'sleeps'", "fleet.changes.0.what"),
        ("[run]\nseed = -1", "run.seed = -1: must be from 0"),
        ("[data.partition]\nkind = 'dirichle'", 'data.partition.kind = "dirichle": did you mean "dirichlet"?'),
        (
            "[data.partition]\nkind = 'dirichlet'\nalpha = 0",
            "data.partition.alpha: alpha of a Dirichlet partition is 0.0; allowed: numbers",
        ),
        ("[data.template]\nprompt = '{a.b}'\nresponse = 'x'", "{a.b}"),
    ],
)
def test_a_mistake_is_told_with_its_key_and_what_is_allowed(file: Path, more: str, told: str) -> None:
    message = wrong(LEAST + more, file)
    assert message.startswith(str(file))
    assert told in message


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('name = "sst2"', 'name = "sst3"', 'data.name = "sst3": did you mean "sst2"?'),
        ('name = "sst2"', "", 'data.name: is required with source = "glue"'),
        ('name = "sst2"', 'name = "sst2"\npath = "rows.jsonl"', "data.path: is not for"),
        ('name = "sst2"', 'name = "sst2"\nfolder = "nowhere"', "is not a folder"),
        ("clients = 4", "", "data.clients: is required with this partition"),
        ("clients = 4", "clients = 0", "data.clients = 0"),
        ('source = "smollm2-135m"', "source = 3", "model.source = 3: must be text in quotes"),
        ("publications = 3", "", "nothing ends the run: set publications, jobs or seconds"),
        ("publications = 3", "publications = 3\nshare_cap = 2.0", "server.share_cap = 2.0: must be above 0"),
        ("publications = 3", "publications = 3\nbuffer = 'x'", "server.buffer"),
        ("publications = 3", "publications = 3\npreset = 'fast'", 'server.preset = "fast"'),
        ("[server]", "[server", "not valid TOML"),
    ],
)
def test_a_key_that_is_missing_or_does_not_go_with_others_is_told(file: Path, old: str, new: str, told: str) -> None:
    assert told in wrong(LEAST.replace(old, new, 1), file)


def test_all_mistakes_are_told_at_once_each_with_its_line(file: Path) -> None:
    message = wrong(LEAST + "[adapter]\nrank = 0\n[run]\nseed = -1\n[fleet]\nloss = 7\n", file)
    assert "3 problems" in message
    assert "line 11: adapter.rank" in message
    assert "line 13: run.seed" in message
    assert "line 15: fleet.loss" in message


def test_a_group_partition_needs_no_number_of_clients(file: Path) -> None:
    text = LEAST.replace("clients = 4", "") + "[data.partition]\nkind = 'group'\n"
    assert parsed(text, file).data.clients is None


def test_dirichlet_takes_its_own_settings(file: Path) -> None:
    assert parsed(LEAST + "[data.partition]\nkind = 'dirichlet'\nalpha = 0.3\nleast = 5\n", file).data.partition == (
        Dirichlet(alpha=0.3, least=5)
    )


def test_a_file_that_is_not_there_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="agora fed init"):
        load_config(tmp_path / "fed.toml")
