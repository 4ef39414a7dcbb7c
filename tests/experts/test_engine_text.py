from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from agora.errors import InvalidRequest
from agora.protocols import Message
from experts.engine.text import UNFINISHED_TOKENS, Codec, Detokenizer, StopFilter


@pytest.fixture(scope="module")
def byte_level(tiny_model: Path) -> Codec:
    return Codec(AutoTokenizer.from_pretrained(tiny_model), vocabulary=405)


def sentencepiece_like() -> Any:
    """As Llama 2's: words start with ▁, unknown characters fall apart into bytes, a start token comes first."""
    words = ["▁", "a", "b", "c", "▁a", "▁b", "ab", "▁ab", "cab", "▁c", "▁ca"]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{n:02X}>": 3 + n for n in range(256)}
    vocabulary |= {w: 259 + n for n, w in enumerate(words)}
    merges = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁a", "b"), ("c", "ab"), ("▁", "c"), ("▁c", "a")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def pieces() -> Codec:
    return Codec(sentencepiece_like(), vocabulary=400)


def stream(codec: Codec, prompt: list[int], made: list[int]) -> list[str]:
    detokenizer = Detokenizer(codec, prompt)
    return [*(detokenizer.push(t) for t in made), detokenizer.flush()]


texts = st.text(st.sampled_from("ab c 🦜é日\u200d👩‍👩‍👧\n"), min_size=1, max_size=30)


@pytest.mark.parametrize("kind", ["byte_level", "pieces"])
@settings(deadline=None)
@given(before=texts, after=texts)
def test_streamed_text_is_the_text(kind: str, request: pytest.FixtureRequest, before: str, after: str) -> None:
    """Joined, the pieces are what decoding everything at once gives, whatever was read before; each is whole text."""
    codec: Codec = request.getfixturevalue(kind)
    prompt = codec._ids(before, special=True)
    whole = codec._ids(before + after, special=True)
    if whole[: len(prompt)] != prompt:
        return
    parts = stream(codec, prompt, whole[len(prompt) :])
    assert "".join(parts) == after
    assert not any("�" in p for p in parts)


def test_an_emoji_of_four_tokens_comes_in_one_piece(byte_level: Codec) -> None:
    made = byte_level._ids("a 🦜!")
    assert len(made) >= 6
    parts = stream(byte_level, byte_level._ids("once"), made)
    assert [p for p in parts if p] == ["a", " ", "🦜", "!"]


def test_the_first_word_keeps_its_space(pieces: Codec) -> None:
    """Decoded alone, its tokens would lose it."""
    made = pieces._ids("ab")  # '▁ab'
    assert pieces.decode(made) == "ab"
    assert "".join(stream(pieces, pieces._ids("c", special=True), made)) == " ab"


def test_a_cut_character_is_shown_as_such_at_the_end(byte_level: Codec) -> None:
    made = byte_level._ids("a 🦜")[:-1]
    parts = stream(byte_level, [], made)
    assert "".join(parts[:-1]) == "a "
    assert parts[-1] == "�"


def test_bytes_that_never_become_a_character_are_not_held_for_ever(byte_level: Codec) -> None:
    first_byte = byte_level._ids("🦜")[0]
    parts = stream(byte_level, [], [first_byte] * 50)
    assert all(parts[n] for n in range(UNFINISHED_TOKENS - 1, 50, UNFINISHED_TOKENS))
    assert set("".join(parts)) == {"�"}


def test_special_tokens_have_a_name_but_no_text(byte_level: Codec) -> None:
    assert byte_level.decode([2]) == ""
    assert byte_level.name(2) == "<|im_end|>"


def test_names_keep_the_leading_space(byte_level: Codec, pieces: Codec) -> None:
    for codec in (byte_level, pieces):
        for text in (" a", " b c"):
            ids = codec._ids("c" + text)
            assert "".join(codec.name(t) for t in ids).lstrip(" ") == "c" + text


# -- Prompts


def test_a_chat_is_rendered_for_its_answer(byte_level: Codec) -> None:
    messages = (Message(role="system", content="Be kind."), Message(role="user", content="Hi"))
    text = byte_level.render(messages)
    assert text == "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids = byte_level.encode(messages, None)
    assert ids.count(1) == 3  # the special tokens are single tokens
    assert ids.count(2) == 2


@pytest.mark.parametrize("said", ["", "Hello", "Hello, the", "Hi\nthere.", "day in the wo"])
def test_an_answer_that_goes_on_stands_where_it_was_written(byte_level: Codec, said: str) -> None:
    asked = Message(role="user", content="Hi")
    head = byte_level.encode((asked,), None)
    ids = byte_level.encode((asked, Message(role="assistant", content=said)), None, goes_on=True)
    assert ids[: len(head)] == head
    assert byte_level.decode(ids[len(head) :]) == said
    assert 2 not in ids[len(head) :], "its turn is not over"


def test_a_template_may_refuse(byte_level: Codec) -> None:
    with pytest.raises(InvalidRequest, match="chat template refuses these messages: no such turn"):
        byte_level.encode((Message(role="user", content="refuse me"),), None)


def test_a_raw_prompt_gets_the_start_token_and_a_chat_does_not(pieces: Codec) -> None:
    assert pieces.encode((), "ab")[0] == 1
    assert not pieces.chat


def test_tokens_the_model_does_not_know_are_refused(tiny_model: Path) -> None:
    codec = Codec(AutoTokenizer.from_pretrained(tiny_model), vocabulary=10)
    with pytest.raises(InvalidRequest, match="the model knows only 10 tokens"):
        codec.encode((), "once upon a time")


# -- Continuations


def test_a_continuation_is_what_follows_the_prompt(byte_level: Codec) -> None:
    head, tails = byte_level.encode_continuations((), "once upon", (" a time", " the dog"))
    assert head == byte_level.encode((), "once upon")
    for tail, text in zip(tails, (" a time", " the dog"), strict=True):
        assert head + tail == byte_level.encode((), "once upon" + text)


def test_no_space_creeps_in_before_a_continuation(pieces: Codec) -> None:
    """Tokenised alone, 'cab' would start with the ▁ that Llama-2-like tokenizers put before every text."""
    head, (tail,) = pieces.encode_continuations((), "b", ("cab",))
    assert pieces.decode(head + tail) == "bcab"
    assert tail == [259 + 8]


def test_where_prompt_and_continuation_would_merge_the_prompt_stays(byte_level: Codec) -> None:
    """'r'+'obot' is one token in one text; the score is of what generation would have to say after 'r'."""
    assert len(byte_level._ids("robot")) < len(byte_level._ids("r")) + len(byte_level._ids("obot"))
    head, (tail,) = byte_level.encode_continuations((), "r", ("obot",))
    assert head == byte_level.encode((), "r")
    assert byte_level.decode(head + tail) == "robot"


def test_special_tokens_do_not_come_between(pieces: Codec) -> None:
    head, tails = pieces.encode_continuations((), "ab", (" ab", " ca"))
    assert head.count(1) == 1
    assert all(1 not in t and 2 not in t for t in tails)


def test_scoring_is_bounded(byte_level: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experts.engine.text.MAX_SCORE_CHARS", 100)
    with pytest.raises(InvalidRequest, match="10 continuations of a prompt of 9 characters are 110 characters"):
        byte_level.encode_continuations((), "once upon", (" a",) * 10)


# -- Stop strings


def reference_stop(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """Character by character, straight from the definition."""
    for end in range(1, len(text) + 1):
        ending = [s for s in stops if text[:end].endswith(s)]
        if ending:
            return text[: end - max(len(s) for s in ending)], True
    return text, False


@given(
    parts=st.lists(st.text("abc", max_size=5), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3).map(tuple),
)
def test_stop_strings_end_the_text_however_it_is_cut(parts: list[str], stops: tuple[str, ...]) -> None:
    expected, stopped_expected = reference_stop("".join(parts), stops)
    matcher = StopFilter(stops)
    told, stopped = "", False
    for part in parts:
        text, stopped = matcher.push(part)
        told += text
        assert expected.startswith(told), "a part of the stop string got out"
        if stopped:
            break
    if not stopped:
        told += matcher.flush()
    assert (told, stopped) == (expected, stopped_expected)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    matcher = StopFilter(("END", "\n\n"))
    assert matcher.push("one\n") == ("one", False)
    assert matcher.push("two E") == ("\ntwo ", False)
    assert matcher.push("N") == ("", False)
    assert matcher.push("E") == ("EN", False)
    assert matcher.flush() == "E"


def test_without_stop_strings_nothing_is_held_back() -> None:
    assert StopFilter(()).push("abc") == ("abc", False)
