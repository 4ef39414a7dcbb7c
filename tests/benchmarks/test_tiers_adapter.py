"""The edge's adapter is trained once, learns what it is shown, and is trained again when it is not what was kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from agora.protocols import ScoreRequest
from agora.types import AdapterRef
from benchmarks.tiers_parts.adapter import Recipe, adapter
from benchmarks.tiers_parts.questions import Phrase, review_question
from benchmarks.tiers_parts.recording import chat
from experts.adapters import WEIGHTS_FILE
from experts.local import LocalBackend

PROMPT = "Good or bad?"
RECIPE = Recipe(phrases=480, batch=16, learning_rate=2e-2)
PHRASES = [
    Phrase(text=f"{word} film {i}", label=label)
    for i in range(240)
    for word, label in (("lovely", "positive"), ("dreary", "negative"))
]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers, with a tokenizer of whole words."""
    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("base")
    special = ["<unk>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|\s|[^\w\s]"), "isolated")
    texts = [f"{review_question(p.text)} {p.label} {PROMPT} system user assistant" for p in PHRASES]
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=special, show_progress=False))
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|im_end|>", chat_template=TEMPLATE
    )
    whole.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(whole), max_position_embeddings=256, initializer_range=0.2, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def trained(
    root: Path, base: Path, phrases: list[Phrase], *, system_prompt: str = PROMPT
) -> tuple[list[float], Path, bool]:
    losses: list[float] = []
    found = adapter(
        root,
        base,
        phrases,
        RECIPE,
        system_prompt=system_prompt,
        threads=1,
        progress=lambda done, total, loss: losses.append(loss),
    )
    return losses, found.folder, found.cached


async def test_it_learns_and_is_served_as_it_was_trained(base: Path, tmp_path: Path) -> None:
    losses, folder, cached = trained(tmp_path, base, PHRASES)
    assert not cached
    assert len(losses) == RECIPE.phrases // RECIPE.batch
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])
    ref = AdapterRef.parse("sst2@v1")
    async with await LocalBackend.open(base, threads=1) as backend:
        await backend.load_adapter(ref, folder)
        for phrase in PHRASES[:4]:
            asked = chat(PROMPT, review_question(phrase.text))
            request = ScoreRequest(messages=asked, continuations=("positive", "negative"), adapter=ref)
            assert (await backend.score(request)).best.text == phrase.label


def test_it_is_trained_once_and_again_when_anything_is_different(base: Path, tmp_path: Path) -> None:
    _, folder, _ = trained(tmp_path, base, PHRASES[:32])
    assert trained(tmp_path, base, PHRASES[:32]) == ([], folder, True)
    losses, other, cached = trained(tmp_path, base, PHRASES[:32], system_prompt="Which is it?")
    assert losses
    assert not cached
    assert other != folder
    kept = (folder / WEIGHTS_FILE).read_bytes()
    # One bit of the last weight: still a whole file, but not the one that was trained.
    (folder / WEIGHTS_FILE).write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    losses, again, cached = trained(tmp_path, base, PHRASES[:32])
    assert losses
    assert (again, cached) == (folder, False)
    assert (folder / WEIGHTS_FILE).read_bytes() == kept, "same recipe, same weights"
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_what_breaks_off_leaves_nothing_half(base: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int, loss: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adapter(
            tmp_path, base, PHRASES[:16], replace(RECIPE, phrases=16), system_prompt=PROMPT, threads=1, progress=stop
        )
    assert list(tmp_path.iterdir()) == []
