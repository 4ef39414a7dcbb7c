"""Going on with a broken stream: no word too many, none too few."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agora.errors import BadReply, InvalidRequest
from agora.network.resume import Emitted, Joint, Skipper, can_continue, can_repeat, continued
from agora.protocols import Capabilities, Chunk, GenerateRequest, Message, TokenLogprob


def emitted(*texts: str) -> Emitted:
    e = Emitted()
    for text in texts:
        e.add(Chunk(text=text))
    return e


def chat(**options: object) -> GenerateRequest:
    return GenerateRequest(messages=(Message(role="user", content="Tell me."),), **options)  # type: ignore[arg-type]


pieces = st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=12)


@given(text=st.text(min_size=1, max_size=60), data=st.data())
def test_a_repeated_answer_is_joined_exactly_however_it_is_cut(text: str, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(text)))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))) | {0, len(text)})
    e = emitted(text[:at])
    skip = Skipper(e, backend="b")
    rest = "".join(skip.pass_on(Chunk(text=text[a:b])).text for a, b in pairwise(cuts))
    rest += skip.pass_on(Chunk(finish_reason="stop")).text
    assert e.text + rest == text


def test_an_answer_that_differs_is_an_error_and_never_shown() -> None:
    skip = Skipper(emitted("one two three"), backend="b")
    assert skip.pass_on(Chunk(text="one ")).text == ""
    with pytest.raises(BadReply, match=r"broke off after 13 characters.*differs from it after 4"):
        skip.pass_on(Chunk(text="too many"))


def test_a_shorter_answer_is_an_error_too() -> None:
    skip = Skipper(emitted("one two three"), backend="b")
    skip.pass_on(Chunk(text="one two"))
    with pytest.raises(BadReply, match="differs"):
        skip.pass_on(Chunk(finish_reason="stop"))


def test_log_probabilities_are_not_doubled() -> None:
    tokens = [TokenLogprob(token=t, logprob=-0.1) for t in ("one", " two", " three")]
    e = Emitted()
    e.add(Chunk(text="one", logprobs=(tokens[0],)))
    e.add(Chunk(text=" two", logprobs=(tokens[1],)))
    assert e.tokens == 2
    skip = Skipper(e, backend="b")
    new = skip.pass_on(Chunk(text="one two three", logprobs=tuple(tokens)))
    assert (new.text, new.logprobs) == (" three", (tokens[2],))


@given(said=st.text(max_size=20), rest=st.text(max_size=20))
def test_a_continued_chat_loses_no_word_and_doubles_no_white_space(said: str, rest: str) -> None:
    # The backend is given the text without the white space at its end, and so begins with that.
    joint = Joint(emitted(said), chat=True)
    lost = said[len(said.rstrip()) :]
    got = "".join(joint.pass_on(Chunk(text=c)).text for c in lost + rest)
    assert said + got == said + rest


def test_a_continued_prompt_takes_the_rest_as_it_comes() -> None:
    joint = Joint(emitted("a  "), chat=False)
    assert joint.pass_on(Chunk(text="  b")).text == "  b"


def test_the_request_for_the_rest_has_fewer_tokens_and_the_text_so_far() -> None:
    rest = continued(GenerateRequest(prompt="Once ", max_tokens=10), emitted("upon", " a"))
    assert rest is not None
    assert (rest.prompt, rest.max_tokens) == ("Once upon a", 8)
    rest = continued(chat(max_tokens=10), emitted("upon", " a "))
    assert rest is not None
    assert rest.goes_on
    assert [(m.role, m.content) for m in rest.messages] == [("user", "Tell me."), ("assistant", "upon a")]
    again = continued(rest, emitted(" time"))
    assert again is not None
    assert [m.content for m in again.messages] == ["Tell me.", "upon a time"]
    assert again.max_tokens == 7
    assert continued(chat(max_tokens=2), emitted("upon", " a")) is None


def test_who_can_go_on() -> None:
    goes_on = Capabilities(continues=True)
    assert can_continue(GenerateRequest(prompt="x"), Capabilities(completion=True))
    assert can_continue(chat(temperature=1.0), goes_on)
    assert not can_continue(chat(), Capabilities())
    assert not can_continue(chat(json_schema={}), goes_on), "the rest would be held to the schema from its beginning"
    assert can_repeat(chat())
    assert can_repeat(chat(temperature=1.0, seed=1))
    assert not can_repeat(chat(temperature=1.0))


def test_a_request_can_only_go_on_with_the_assistants_words() -> None:
    with pytest.raises(InvalidRequest, match="goes_on"):
        chat(goes_on=True)
