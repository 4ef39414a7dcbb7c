"""The five ready experts, and what is said of a file that is wrong."""

from pathlib import Path

import pytest

from agora.errors import ConfigError
from agora.routing import KeywordRouter
from agora.square import Expert, Square
from agora.types import Subtask
from experts.fake import FakeBackend
from experts.ready import ORDER, ReadyExpert, read_ready, ready_experts

GOOD = """
name = "cook"
description = "Cooking and baking."
system_prompt = "You are a cook."
examples = ["How long does an egg boil?"]
keywords = ["egg", "oven"]
samples = ["How is bread made, and why does it rise?"]
"""


def written(folder: Path, text: str) -> Path:
    file = folder / "cook.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_the_five_fields_are_there_in_order() -> None:
    assert tuple(ready_experts()) == ORDER
    assert ORDER == ("communications", "robotics", "healthcare", "finance", "education")
    for name, ready in ready_experts().items():
        assert ready.card.name == name
        assert len(ready.card.examples) >= 8 and len(ready.samples) >= 5


def test_what_is_shared_between_experts_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        ready_experts()["cook"] = ready_experts()["finance"]  # type: ignore[index]


def test_no_text_stands_on_two_cards_nor_among_the_samples() -> None:
    texts = [t for r in ready_experts().values() for t in (*r.card.examples, *r.samples, r.card.description)]
    assert len(texts) == len(set(texts))


def test_prompts_leave_room_in_a_small_model_and_name_their_limits() -> None:
    ready = ready_experts()
    assert all(len(r.system_prompt) < 300 for r in ready.values())
    assert "no medical advice" in ready["healthcare"].system_prompt and "doctor" in ready["healthcare"].system_prompt
    assert "not advice to buy or sell" in ready["finance"].system_prompt


def test_a_file_of_ones_own_is_read(tmp_path: Path) -> None:
    found = read_ready(written(tmp_path, GOOD))
    assert isinstance(found, ReadyExpert) and found.card.keywords == ("egg", "oven")
    assert found.system_prompt == "You are a cook." and found.samples[0].startswith("How is bread")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('name = "cook"', "", "name is missing"),
        ('name = "cook"', 'name = "a cook"', "expert name 'a cook' must match"),
        ('name = "cook"', "name = 3", "name is '3'"),
        ('description = "Cooking and baking."', 'description = " "', "description is"),
        ("samples", "sample", "unknown key 'sample'"),
        ('keywords = ["egg", "oven"]', "keywords = []", r"keywords is '\[\]'"),
        ('keywords = ["egg", "oven"]', 'keywords = ["egg", 7]', "keywords.1 is '7'"),
        ('keywords = ["egg", "oven"]', 'keywords = ["egg", "Egg "]', "keywords has 'Egg' twice"),
        ("How is bread made, and why does it rise?", "How long does an  egg boil?", "among examples and samples"),
        ("How is bread made, and why does it rise?", r"a\u0000b", "NUL"),
        ("[", "[[[", "not valid TOML"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_key(tmp_path: Path, old: str, new: str, says: str) -> None:
    with pytest.raises(ConfigError, match=rf"cook\.toml: .*{says}"):
        read_ready(written(tmp_path, GOOD.replace(old, new, 1)))


def test_files_that_are_no_text_at_all_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "cook.toml"
    with pytest.raises(ConfigError, match="cannot be read"):
        read_ready(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8 at byte 0"):
        read_ready(file)
    file.write_bytes(b"#" * 300_000)
    with pytest.raises(ConfigError, match="larger than"):
        read_ready(file)


def square() -> Square:
    return Square([Expert(card=r.card, backend=FakeBackend()) for r in ready_experts().values()])


async def test_keywords_find_the_expert_of_most_samples() -> None:
    here, right, asked = square(), 0, 0
    for name, ready in ready_experts().items():
        for sample in ready.samples:
            ranking = await KeywordRouter().rank(Subtask(id="q", question=sample), sample, here)
            right += ranking.candidates[0].expert == name
            asked += 1
    assert right / asked >= 0.6  # 0.73 when written; chance is 0.2


@pytest.mark.model
async def test_embeddings_find_the_expert_of_nearly_every_sample() -> None:
    from agora.routing import EmbeddingRouter
    from experts.embed import MiniLM

    embedder = MiniLM(pull=True)
    router, here = EmbeddingRouter(embedder), square()
    try:
        wrong = []
        for name, ready in ready_experts().items():
            for sample in ready.samples:
                ranking = await router.rank(Subtask(id="q", question=sample), sample, here)
                assert ranking.close, ranking.why(name)
                if ranking.candidates[0].expert != name:
                    wrong.append(sample)
        assert len(wrong) <= 1, wrong  # none when written
    finally:
        await embedder.aclose()
