"""Empty clients are left out and told; what nobody could learn from is refused."""

import pytest

from agora.errors import InvalidRequest
from fed.data import Example, check_clients

WORDS = (" no", " yes")
NO, YES = (Example(prompt="p", response=w, choices=WORDS) for w in WORDS)


def test_empty_clients_are_left_out_and_told() -> None:
    checked = check_clients({"a": [NO, YES], "b": [], "c": [YES]})
    assert list(checked.clients) == ["a", "c"]
    assert checked.left_out == {"b": "it has no rows"}
    assert checked.notes == {"c": "all its rows of the task no/yes have one label"}


def test_clients_of_one_class_each_make_two_together() -> None:
    assert set(check_clients({"a": [NO], "b": [YES]}).notes) == {"a", "b"}


def test_nothing_to_learn_from_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="label words no/yes have the same label"):
        check_clients({"a": [NO], "b": [NO, NO]})
    with pytest.raises(InvalidRequest, match="none of 2 clients has rows"):
        check_clients({"a": [], "b": []})
    with pytest.raises(InvalidRequest, match="there are no clients"):
        check_clients({})


def test_free_text_has_no_classes() -> None:
    free = Example(prompt="p", response="r", label="physics")
    assert check_clients({"a": [free]}).notes == {}
