"""Templates take plain field names and nothing else; errors tell where and what, never the data."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agora.errors import InvalidRequest
from fed.data import Example, Template
from fed.data.template import Text


def test_fields_are_filled_and_doubled_braces_stay() -> None:
    text = Text("{title}: {{not a field}} {n}")
    assert text.fields == ("title", "n")
    assert text.fill({"title": "A", "n": 3, "more": None}, "here") == "A: {not a field} 3"


@given(st.text(), st.text())
def test_values_are_never_read_as_templates(title: str, body: str) -> None:
    assert Text("{title}|{body}").fill({"title": title, "body": body}, "here") == f"{title}|{body}"


@pytest.mark.parametrize(
    "template", ["{row.__class__}", "{row[0]}", "{}", "{0.x}", "{a!r}", "{a:>10}", "{a:{b}}", "{", "}", "{a", "{a[b}"]
)
def test_anything_but_a_plain_name_is_refused(template: str) -> None:
    with pytest.raises(InvalidRequest, match="template"):
        Text(template).fill({"row": "x", "a": "y", "b": "z"}, "here")


def test_a_missing_field_is_told_with_what_the_row_has() -> None:
    with pytest.raises(InvalidRequest, match=r"train, line 7: no field 'title'; the row has 'name', 'text'") as e:
        Text("{title}").fill({"name": "SECRET", "text": "SECRET"}, "train, line 7")
    assert "SECRET" not in str(e.value)


@pytest.mark.parametrize(("value", "told"), [(None, "null"), (["a"], "list"), ({}, "dict")])
def test_a_field_that_is_no_text_is_refused(value: object, told: str) -> None:
    with pytest.raises(InvalidRequest, match=f"line 1: field 'a' holds {told}"):
        Text("{a}").fill({"a": value}, "line 1")


def test_classification_rows_get_their_label_words() -> None:
    reader = Template(prompt="{t} is", response="{y}", group="g", choices={"0": " bad", "1": " good"}).reader()
    example = reader.read({"t": "tea", "y": 1}, "here")
    assert (example.prompt, example.response, example.label, example.group) == ("tea is", " good", "1", "g")
    assert example.choices == (" bad", " good")


def test_an_unknown_label_is_refused_without_telling_it() -> None:
    reader = Template(prompt="{t}", response="{y}", choices={"0": " bad", "1": " good"}).reader()
    with pytest.raises(InvalidRequest, match=r"line 3: \{y\} comes to none of the labels; allowed: '0', '1'") as e:
        reader.read({"t": "x", "y": "SECRET"}, "line 3")
    assert "SECRET" not in str(e.value)


@pytest.mark.parametrize("choices", [{}, {"0": " a"}, {"0": " a", "1": " a"}])
def test_label_words_must_differ(choices: dict[str, str]) -> None:
    with pytest.raises(InvalidRequest, match="at least two"):
        Template(prompt="{t}", response="{y}", choices=choices).reader()


def test_an_empty_text_is_refused() -> None:
    reader = Template(prompt="{t}", response="{y}").reader()
    with pytest.raises(InvalidRequest, match="line 1: the response is empty"):
        reader.read({"t": "x", "y": " "}, "line 1")
    with pytest.raises(InvalidRequest, match="line 1: the prompt is empty"):
        reader.read({"t": "", "y": "x"}, "line 1")


def test_printing_an_example_shows_no_data() -> None:
    example = Example(prompt="SECRET", response=" SECRET", system="SECRET", label="1", choices=(" SECRET", " b"))
    assert "SECRET" not in repr(example).replace("choices=(' SECRET', ' b')", "")
    with pytest.raises(InvalidRequest) as e:
        Example(prompt="p", response="SECRET", choices=(" a", " b"))
    assert "SECRET" not in str(e.value)
