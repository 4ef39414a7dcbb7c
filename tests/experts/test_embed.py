"""MiniLM on a tiny BERT of the same width and, where marked, on the real weights."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, BertTokenizerFast

from agora.errors import InvalidRequest, ModelError
from agora.protocols import Embedder
from experts.embed import MAX_TOKENS, MiniLM
from experts.hub import Hub
from experts.models import ModelStore

WORDS = ["the", "a", "cat", "dog", "sat", "on", "mat", "stock", "prices", "fell", "today", "network", "node"]
TEXTS = ["the cat sat on the mat", "a dog", "stock prices fell today on the network node", "the"]


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert") / "model"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    ids = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    # as the real one's file does; what MiniLM asks for must win over it
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    BertTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=384,
        num_hidden_layers=2,
        num_attention_heads=12,
        intermediate_size=64,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
async def embedder(tiny_bert: Path) -> AsyncIterator[MiniLM]:
    minilm = MiniLM(tiny_bert, batch_size=2)
    yield minilm
    await minilm.aclose()


def reference(folder: Path, text: str, limit: int = MAX_TOKENS) -> np.ndarray:
    """One text alone, no padding, pooled and scaled in numpy with double precision."""
    tokenizer = BertTokenizerFast.from_pretrained(folder)
    ids = tokenizer(text, truncation=True, max_length=limit, padding=False).input_ids
    model = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    with torch.no_grad():
        tokens = model(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy().astype(np.float64)
    mean = tokens.sum(axis=0) / len(ids)
    return mean / np.sqrt((mean**2).sum())


async def test_pooling_is_the_mean_of_a_text_alone(embedder: MiniLM, tiny_bert: Path) -> None:
    assert isinstance(embedder, Embedder)
    vectors = await embedder.embed(TEXTS)
    assert vectors.shape == (len(TEXTS), embedder.dim)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    for text, vector in zip(TEXTS, vectors, strict=True):
        np.testing.assert_allclose(vector, reference(tiny_bert, text), atol=2e-5)


async def test_order_duplicates_and_memory(embedder: MiniLM, monkeypatch: pytest.MonkeyPatch) -> None:
    first = await embedder.embed(TEXTS)
    encoded: list[str] = []
    encode = embedder._encode

    def counted(texts: list[str]) -> np.ndarray:
        encoded.extend(texts)
        return encode(texts)

    monkeypatch.setattr(embedder, "_encode", counted)
    again = await embedder.embed([TEXTS[2], "a new dog", TEXTS[0], "a new dog", TEXTS[2]])
    assert encoded == ["a new dog"]
    np.testing.assert_array_equal(again[[0, 2, 4]], first[[2, 0, 2]])
    np.testing.assert_array_equal(again[1], again[3])
    again[:] = 0  # the caller's own copy
    np.testing.assert_array_equal(await embedder.embed(TEXTS), first)


async def test_memory_is_bounded_and_forgets_the_oldest(tiny_bert: Path) -> None:
    minilm = MiniLM(tiny_bert, cache_size=2)
    await minilm.embed(["a", "the"])
    await minilm.embed(["a"])
    await minilm.embed(["cat"])
    encoded: list[str] = []
    encode = minilm._encode

    def counted(texts: list[str]) -> np.ndarray:
        encoded.extend(texts)
        return encode(texts)

    minilm._encode = counted  # type: ignore[method-assign]
    await minilm.embed(["a", "cat"])
    assert encoded == []
    await minilm.embed(["the"])
    assert encoded == ["the"]
    await minilm.aclose()


async def test_long_text_counts_up_to_256_tokens(embedder: MiniLM, tiny_bert: Path) -> None:
    long = "cat dog " * 400
    (vector,) = await embedder.embed([long])
    np.testing.assert_allclose(vector, reference(tiny_bert, long), atol=2e-5)
    assert np.abs(vector - reference(tiny_bert, long, limit=128)).max() > 1e-4
    huge = await embedder.embed(["cat " * 2_000_000])
    assert huge.shape == (1, 384)


async def test_odd_texts(embedder: MiniLM) -> None:
    assert (await embedder.embed([])).shape == (0, 384)
    vectors = await embedder.embed(["", "\ud800 lone", "\0", "日本語"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    with pytest.raises(InvalidRequest, match="list of strings"):
        await embedder.embed("one text")
    with pytest.raises(InvalidRequest, match="list of strings"):
        await embedder.embed([b"bytes"])  # type: ignore[list-item]


async def test_loop_stays_free_and_callers_share(embedder: MiniLM) -> None:
    await embedder.embed(["the"])
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    ticking = asyncio.create_task(tick())
    many = asyncio.create_task(embedder.embed([f"cat {'dog ' * i}" for i in range(60)]))
    await asyncio.sleep(0)
    await embedder.embed(["a dog on a mat"])
    assert not many.done()  # one batch waited for, not thirty
    assert (await many).shape == (60, 384)
    assert ticks > 30
    ticking.cancel()


async def test_cancelled_call_frees_the_worker(embedder: MiniLM, monkeypatch: pytest.MonkeyPatch) -> None:
    await embedder.embed(["the"])
    batches: list[int] = []
    encode = embedder._encode

    def counted(texts: list[str]) -> np.ndarray:
        batches.append(len(texts))
        return encode(texts)

    monkeypatch.setattr(embedder, "_encode", counted)
    many = asyncio.create_task(embedder.embed([f"cat {'dog ' * i}" for i in range(60)]))
    while not batches:
        await asyncio.sleep(0)
    many.cancel()
    with pytest.raises(asyncio.CancelledError):
        await many
    assert (await embedder.embed(["a dog"])).shape == (1, 384)
    assert len(batches) <= 4


async def test_closed(tiny_bert: Path) -> None:
    minilm = MiniLM(tiny_bert)
    await minilm.embed(["the"])
    await minilm.aclose()
    await minilm.aclose()
    with pytest.raises(InvalidRequest, match="closed"):
        await minilm.embed(["the"])


@pytest.mark.parametrize("sizes", [{"batch_size": 0}, {"cache_size": -1}])
def test_sizes_out_of_range(sizes: dict[str, int]) -> None:
    with pytest.raises(InvalidRequest, match="allowed"):
        MiniLM("minilm-l6", **sizes)


async def test_missing_and_damaged_models(tiny_bert: Path, tmp_path: Path) -> None:
    minilm = MiniLM(store=ModelStore(tmp_path / "empty", hub=Hub(cache_dir=tmp_path / "hub", offline=True)))
    with pytest.raises(ModelError, match="not on this machine") as caught:
        await minilm.embed(["the"])
    assert caught.value.hint == "type: agora models pull minilm-l6"
    await minilm.aclose()

    for change, told in (
        ({"num_hidden_layers": 3}, "its weights lack encoder"),
        ({"intermediate_size": 65}, "cannot be loaded"),
    ):
        broken = tmp_path / str(change)
        broken.mkdir()
        for file in tiny_bert.iterdir():
            (broken / file.name).write_bytes(file.read_bytes())
        config = BertConfig.from_pretrained(tiny_bert)
        config.update(change)
        config.save_pretrained(broken)
        minilm = MiniLM(broken)
        with pytest.raises(ModelError, match=told):
            await minilm.embed(["the"])
        await minilm.aclose()


@pytest.mark.model
async def test_real_model_knows_what_is_alike() -> None:
    minilm = MiniLM(pull=True)
    texts = [
        "How do I lower the latency of a 5G uplink?",
        "Ways to make mobile network uploads respond faster",
        "What is the recommended dose of ibuprofen for a child?",
        "The kitten sleeps on the carpet.",
    ]
    vectors = await minilm.embed(texts)
    alike = vectors @ vectors.T
    others = max(alike[0, 2], alike[0, 3], alike[1, 2], alike[1, 3], alike[2, 3])
    assert alike[0, 1] > others + 0.2
    folder = ModelStore().path("minilm-l6")
    for text, vector in zip(texts, vectors, strict=True):
        np.testing.assert_allclose(vector, reference(folder, text), atol=1e-5)
    # "This is an example sentence" begins so in the model's published card
    (card,) = await minilm.embed(["This is an example sentence"])
    np.testing.assert_allclose(card[:3], [0.0676, 0.0635, 0.0487], atol=1e-3)
    await minilm.aclose()
