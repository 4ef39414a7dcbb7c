"""Rows are what the model will see when it is asked, and only the answers count."""

from pathlib import Path

import pytest

from agora.errors import InvalidRequest
from fed.data import Example
from fed.trainer.base import BaseModel
from fed.trainer.encode import Encoder

FREE = Example(prompt="one two", response="three four", system="from the beginning")
CHOICE = Example(prompt="a film is", response=" good", choices=(" bad", " good"))


@pytest.fixture(scope="module")
def base(llama: Path) -> BaseModel:
    return BaseModel.load(llama)


@pytest.fixture(scope="module")
def plain(plain_llama: Path) -> BaseModel:
    return BaseModel.load(plain_llama)


def encoder(base: BaseModel, *, max_tokens: int = 200, chat: bool | None = None) -> Encoder:
    return Encoder(base, max_tokens=max_tokens, chat=chat)


def test_a_chat_is_encoded_as_the_model_will_be_asked(base: BaseModel) -> None:
    (row,) = encoder(base).encode([FREE]).rows
    asked = base.tokenizer.apply_chat_template(
        [{"role": "system", "content": FREE.system}, {"role": "user", "content": FREE.prompt}],
        add_generation_prompt=True,
        tokenize=False,
    )
    assert base.tokenizer.decode(row.tokens[: row.start]) == asked
    assert base.tokenizer.decode(row.tokens[row.start :]) == "three four<|im_end|>"
    assert row.targets == len(row.tokens) - row.start and not row.choices


def test_without_a_template_the_answer_goes_on_from_the_prompt(plain: BaseModel) -> None:
    (row,) = encoder(plain).encode([Example(prompt="one two", response=" three")]).rows
    assert plain.tokenizer.decode(row.tokens[: row.start]) == "one two"
    assert plain.tokenizer.decode(row.tokens[row.start :]) == " three<|im_end|>"


def test_label_words_are_not_read_but_chosen_from(base: BaseModel) -> None:
    (row,) = encoder(base).encode([CHOICE]).rows
    assert base.tokenizer.decode(row.tokens) == "a film is"
    assert row.answer == 1 and row.targets == 1 and row.start == len(row.tokens)
    assert [base.tokenizer.decode([c]) for c in row.choices] != [base.tokenizer.decode([row.choices[0]])] * 2
    (chat,) = encoder(base, chat=True).encode([CHOICE]).rows
    assert base.tokenizer.decode(chat.tokens).endswith("a film is<|im_end|>\n<|im_start|>assistant\n")


def test_words_that_begin_alike_are_told_apart_by_the_first_token_that_differs(base: BaseModel) -> None:
    (row,) = encoder(base).encode([Example(prompt="it is", response=" zzA", choices=(" zzA", " zzB"))]).rows
    assert base.tokenizer.decode(row.tokens) == "it is zz"
    assert [base.tokenizer.decode([c]) for c in row.choices] == ["A", "B"]
    with pytest.raises(InvalidRequest, match="do not each begin with another token"):
        encoder(base).encode([Example(prompt="it is", response=" zzA", choices=(" zzA", " zzB", " q"))])


def test_long_responses_are_cut_and_long_prompts_left_out(base: BaseModel) -> None:
    long_prompt = Example(prompt="one two " * 50, response="three")
    long_answer = Example(prompt="one", response="two three " * 50)
    long_choice = Example(prompt="one two " * 50, response=" a", choices=(" a", " b"))
    encoded = encoder(base, max_tokens=60).encode([long_prompt, FREE, long_answer, long_choice, CHOICE])
    assert encoded.kept == (1, 2, 4)
    assert (encoded.cut, encoded.left_out) == (1, 2)
    assert len(encoded.rows[1].tokens) == 60 and encoded.rows[1].targets >= 1


def test_a_template_is_wanted_where_there_is_none(plain: BaseModel) -> None:
    with pytest.raises(InvalidRequest, match="no chat template"):
        encoder(plain, chat=True)
