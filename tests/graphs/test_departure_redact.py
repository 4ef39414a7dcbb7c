"""Personal data: found by rules, replaced before a text leaves, put back into what returns."""

from __future__ import annotations

import json
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agora.errors import InvalidRequest
from graphs.departure import KINDS, Redactor, Vault
from graphs.departure.numbers import IBAN_LENGTHS, iban_right, luhn

FOUND = [
    ("email", "write to anna.b+x@mail.example.org.", "anna.b+x@mail.example.org"),
    ("email", "MÜLLER@EXÄMPLE.DE!", "MÜLLER@EXÄMPLE.DE"),
    ("url", "see https://a.example/b?c=d#e, please", "https://a.example/b?c=d#e"),
    ("url", "(www.example.org/x)", "www.example.org/x"),
    ("iban", "to DE89 3704 0044 0532 0130 00 today", "DE89 3704 0044 0532 0130 00"),
    ("iban", "gb82west12345698765432", "gb82west12345698765432"),
    ("card", "card 4111 1111 1111 1111, please", "4111 1111 1111 1111"),
    ("card", "378282246310005", "378282246310005"),
    ("mac", "at 00:1B:44:11:3A:B7", "00:1B:44:11:3A:B7"),
    ("ip", "from 192.168.0.17.", "192.168.0.17"),
    ("ip", "from fe80::1ff:fe23:4567:890a, too", "fe80::1ff:fe23:4567:890a"),
    ("birth_date", "born in Paris on 3 May 1980.", "3 May 1980"),
    ("birth_date", "DOB: 1980-05-03", "1980-05-03"),
    ("birth_date", "Date of birth 03.05.1980", "03.05.1980"),
    ("birth_date", "born May 3rd, 1980", "May 3rd, 1980"),
    ("ssn", "SSN 078-05-1120", "078-05-1120"),
    ("location", "at 48.13743, 11.57549 now", "48.13743, 11.57549"),
    ("phone", "call +49 (0)30 1234-567!", "+49 (0)30 1234-567"),
    ("phone", "call 0171/1234567", "0171/1234567"),
    ("phone", "for 2 men: 12 +49 171 1234567 123456789", "+49 171 1234567"),
    ("phone", "no. 4711 0171 1234567", "0171 1234567"),
    ("card", "12 4111 1111 1111 1111 7", "4111 1111 1111 1111"),
    ("phone", "call (415) 555-2671.", "(415) 555-2671"),
    ("phone", "call 0049 171 1234567", "0049 171 1234567"),
    ("secret", "key sk-abcdefghijklmnop1234 here", "sk-abcdefghijklmnop1234"),
    ("secret", "AKIAABCDEFGHIJKLMNOP", "AKIAABCDEFGHIJKLMNOP"),
    ("name", "My name is Anna Schmidt.", "Anna Schmidt"),
    ("name", "ask Dr. José Ortega-Díaz about it", "José Ortega-Díaz"),
    # As word processors and web pages write them.
    ("phone", "call +49\u00a0170\u202f1234567", "+49\u00a0170\u202f1234567"),
    ("phone", "call \u202a+49 170\u20111234567\u202c", "+49 170\u20111234567"),
    (
        "phone",
        "call \uff10\uff13\uff10 \uff11\uff12\uff13\uff14\uff15\uff16\uff17",
        "\uff10\uff13\uff10 \uff11\uff12\uff13\uff14\uff15\uff16\uff17",
    ),
    (
        "phone",
        "call \u0660\u0661\u0667\u0661 \u0661\u0662\u0663\u0664\u0665\u0666\u0667",
        "\u0660\u0661\u0667\u0661 \u0661\u0662\u0663\u0664\u0665\u0666\u0667",
    ),
    ("card", "card 4111\u00a01111\u20111111\u20131111", "4111\u00a01111\u20111111\u20131111"),
    (
        "iban",
        "to DE89\u00a03704\u00a00044\u00a00532\u00a00130\u00a000",
        "DE89\u00a03704\u00a00044\u00a00532\u00a00130\u00a000",
    ),
    ("ssn", "078\u201105\u20111120", "078\u201105\u20111120"),
    ("name", "My name is Andre\u0301 Mu\u0308lle\u0301, as ever", "Andre\u0301 Mu\u0308lle\u0301"),
    ("email", "to anna\uff20b\uff0eco!", "anna\uff20b\uff0eco"),
    ("email", "to an\u00adna@\u200bb.co!", "an\u00adna@\u200bb.co"),
]

NOT_FOUND = [
    ("phone", "in 2024-01-01 or on 01.02.2024 there were 1234567 of 0.1234567"),
    ("card", "order 4111 1111 1111 1112"),
    ("iban", "DE88 3704 0044 0532 0130 00"),
    ("ip", "version 1.2.3 at 12:30:45, 300.1.2.3, std::dec"),
    ("birth_date", "She was born clever; the party is on 3 May 1980."),
    ("email", "@someone or a@b"),
    ("location", "2.5, 3.5 and 91.1234, 200.1234"),
    ("ssn", "000-12-3456"),
    ("name", "the doctor said my name"),
]


@pytest.mark.parametrize(("kind", "text", "value"), FOUND)
def test_what_is_found_is_replaced_as_a_whole_and_comes_back(kind: str, text: str, value: str) -> None:
    redacted = Redactor([kind]).redact(text, Vault())
    assert redacted.text == text.replace(value, f"<{kind.upper()}_1>")
    assert redacted.restore(redacted.text) == text
    assert redacted.told == f"1 {kind.replace('_', ' ')}"


@pytest.mark.parametrize(("kind", "text"), NOT_FOUND)
def test_what_only_looks_alike_stays(kind: str, text: str) -> None:
    assert Redactor([kind]).redact(text, Vault()).text == text


def test_only_the_kinds_that_are_wanted_are_replaced() -> None:
    text = "a@b.co at 192.168.0.1"
    assert Redactor(["ip"]).redact(text, Vault()).text == "a@b.co at <IP_1>"


def test_an_unknown_kind_is_refused_with_those_there_are() -> None:
    with pytest.raises(InvalidRequest, match="no kind of personal data 'face'; allowed: secret, url, email"):
        Redactor(["email", "face"])


def test_a_value_has_one_placeholder_throughout_a_run_and_another_run_starts_anew() -> None:
    redactor, vault = Redactor(), Vault()
    assert redactor.redact("a@b.co, c@d.co", vault).text == "<EMAIL_1>, <EMAIL_2>"
    assert redactor.redact("c@d.co, e@f.co", vault).text == "<EMAIL_2>, <EMAIL_3>"
    assert redactor.redact("c@d.co", Vault()).text == "<EMAIL_1>"


def test_a_name_that_was_told_once_is_replaced_wherever_it_stands_again() -> None:
    redactor, vault = Redactor(), Vault()
    first = redactor.redact("My name is Anna Schmidt. Schmidt is not a Schmidtchen.", vault)
    assert "Anna" not in first.text and re.search(r"\bSchmidt\b", first.text) is None
    assert "Schmidtchen" in first.text
    later = redactor.redact("What does Schmidt earn?", vault)
    assert later.text == "What does <NAME_3> earn?"
    assert later.restore("<NAME_3> earns it") == "Schmidt earns it"


@pytest.mark.parametrize(
    "written",
    [
        "<EMAIL_1>",
        "<email_1>",
        "[EMAIL_1]",
        "(Email_1)",
        "EMAIL_1",
        "`EMAIL_1`",
        "< EMAIL_1 >",
        "<EMAIL 1>",
        "&lt;EMAIL_1&gt;",
        r"\<EMAIL\_1\>",
        "<EMAIL-1>",
        "{EMAIL_1}",
        "**<EMAIL_1>**",
        "email_1",
    ],
)
def test_placeholders_are_known_however_a_model_writes_them(written: str) -> None:
    redacted = Redactor().redact("I am a@b.co", Vault())
    assert "a@b.co" in redacted.restore(f"Dear {written}, hello")
    assert "EMAIL" not in redacted.restore(f"Dear {written}, hello").upper()


def test_placeholders_of_two_words_too() -> None:
    redacted = Redactor().redact("born on 3 May 1980", Vault())
    for written in ("<BIRTH_DATE_1>", "<Birth date 1>", "[birth-date_1]", r"<BIRTH\_DATE\_1>", "BIRTHDATE_1"):
        assert redacted.restore(f"on {written}.") == "on 3 May 1980.", written


def test_json_that_comes_back_stays_json() -> None:
    key = "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADAN\n-----END PRIVATE KEY-----"
    redacted = Redactor().redact(f"{key} of a@b.co at https://x.example/a\\b", Vault())
    said = redacted.restore('{"key": "<SECRET_1>", "who": ["<EMAIL_1>"], "at": "<URL_1>"}')
    assert json.loads(said) == {"key": key, "who": ["a@b.co"], "at": "https://x.example/a\\b"}
    assert redacted.restore("[see <SECRET_1>]") == f"[see {key}]"


def test_placeholders_that_did_not_leave_are_not_filled_in() -> None:
    redactor, vault = Redactor(), Vault()
    redactor.redact("secret@b.co", vault)
    other = redactor.redact("I am a@b.co", vault)
    assert other.restore("<EMAIL_1> and <EMAIL_2> and <PHONE_1>") == "<EMAIL_1> and a@b.co and <PHONE_1>"


@pytest.mark.parametrize("text", ["<EMAIL_\u0661>", "<\u017fsn_1>", "[card \uff12]", "\u0131p_1", "<\u212aMAC_1>"])
def test_letters_and_digits_that_are_only_alike_make_no_placeholder(text: str) -> None:
    redacted = Redactor().redact(f"{text} a@b.co", Vault())
    assert redacted.text == f"{text} <EMAIL_1>"
    assert redacted.restore(text) == text


def test_the_longest_of_what_is_known_is_replaced_and_no_part_of_a_word() -> None:
    redactor, vault = Redactor(["email", "phone", "name"]), Vault()
    redactor.learn("My name is Anna Schmidt. +49 170 1234567 is mine, and a.b@c.de, and b@c.de", vault)
    later = redactor.redact("Anna Schmidt, Schmidt's, Schmidts and c.de", vault)
    assert later.text == "<NAME_1>, <NAME_3>'s, Schmidts and c.de"
    assert later.restore(later.text) == "Anna Schmidt, Schmidt's, Schmidts and c.de"


def test_a_line_of_a_key_is_known_by_itself() -> None:
    lines = ["MIIEvQIBADANBgkqhkiG9w0BAQEFAASC", "BKcwggSjAgEAAoIBAQC7VJTUt9Us8cKj"]
    key = "\n".join(["-----BEGIN PRIVATE KEY-----", *lines, "-----END PRIVATE KEY-----"])
    redactor, vault = Redactor(), Vault()
    redactor.learn(f"Here:\n{key}\n", vault)
    left = redactor.redact(f"[…] {lines[1]} […]", vault)
    assert left.text.startswith("[…] <SECRET_") and lines[1] not in left.text
    assert redactor.redact(key, vault).text == "<SECRET_1>"


def test_text_that_looks_like_a_placeholder_is_not_mistaken_for_one() -> None:
    redactor, vault = Redactor(), Vault()
    text = "def f(email_1, name_1): # <EMAIL_2> a@b.co"
    first = redactor.redact(text, vault)
    assert first.text == "def f(email_1, name_1): # <EMAIL_2> <EMAIL_3>"
    assert first.restore(first.text) == text
    # In use by now: it has to be told apart.
    second = redactor.redact("<EMAIL_3> is not a@b.co", vault)
    assert second.restore(second.text) == "<EMAIL_3> is not a@b.co"
    assert second.restore("<EMAIL_3>") == "a@b.co"


def test_places_that_overlap_leave_nothing_of_any_of_them() -> None:
    redacted = Redactor().redact("https://x.example/?m=a@b.co&p=+49301234567", Vault())
    assert redacted.text == "<URL_1>"
    without = Redactor(["email", "phone"]).redact("https://x.example/?m=a@b.co&p=+49301234567", Vault())
    assert "a@b.co" not in without.text


@pytest.mark.parametrize("text", ["", " ", "plain", "<>", "<EMAIL_>", "<EMAIL_0>", "\x01<TEXT_1>\n"])
def test_a_text_without_any_stays_as_it_is(text: str) -> None:
    redacted = Redactor().redact(text, Vault())
    assert (redacted.text, redacted.told, redacted.restore(text)) == (text, "nothing", text)


HARD = [
    "a" * 100_000,
    "a." * 50_000,
    "1" * 100_000,
    "a@" * 50_000,
    "::" * 50_000,
    "a:" * 50_000 + "g",
    "Dr. " * 25_000,
    "born " * 20_000,
    "www." * 25_000,
    "<EMAIL_1>" * 10_000,
    "+1 " * 33_000,
    "-----BEGIN PRIVATE KEY-----" * 3_000,
    "DE89 " * 20_000,
    "1.123," * 15_000,
    "12-" * 30_000,
    "a1.b2@c3." * 10_000,
    "(" * 100_000,
    "+" * 100_000,
    " ".join(f"u.{n}@ex.com" for n in range(7_000)),
]


@pytest.mark.parametrize("text", HARD, ids=[t[:6] for t in HARD])
def test_no_text_takes_long(text: str) -> None:
    began = time.perf_counter()
    redacted = Redactor().redact(text, Vault())
    assert redacted.restore(redacted.text) == text
    # Half a second on an idle core; anything that grows with the square of the length takes minutes.
    assert time.perf_counter() - began < 20


def iban(country: str, inside: str) -> str:
    body = inside[: IBAN_LENGTHS[country] - 4].ljust(IBAN_LENGTHS[country] - 4, "0")
    return next(a for n in range(100) if iban_right(a := f"{country}{n:02}{body}"))


def card(digits: str) -> str:
    return next(c for n in range(10) if luhn(c := f"{digits}{n}"))


DIGITS = st.text("0123456789", min_size=15, max_size=30)
VALUES = st.one_of(
    st.tuples(
        st.just("email"), st.from_regex(r"[a-z][a-z0-9._+-]{0,10}[a-z0-9]@[a-z0-9-]{1,8}\.[a-z]{2,4}", fullmatch=True)
    ),
    st.tuples(st.just("iban"), st.builds(iban, st.sampled_from(sorted(IBAN_LENGTHS)), DIGITS)),
    st.tuples(st.just("card"), DIGITS.filter(lambda d: d[0] != "0").map(lambda d: card(d[:15]))),
    st.tuples(st.just("ip"), st.ip_addresses(v=4).map(str)),
    st.tuples(st.just("ip"), st.ip_addresses(v=6).map(str).filter(lambda a: len(a) > 4)),
    st.tuples(st.just("phone"), st.from_regex(r"\+[1-9]\d{1,2} \d{3} \d{5,8}", fullmatch=True).filter(str.isascii)),
    st.tuples(
        st.just("url"), st.from_regex(r"https://[a-z]{1,8}\.[a-z]{2,3}/[a-z0-9/_=&?-]{0,12}[a-z0-9]", fullmatch=True)
    ),
    st.tuples(st.just("ssn"), st.from_regex(r"[1-5]\d{2}-[1-9]\d-[1-9]\d{3}", fullmatch=True).filter(str.isascii)),
    st.tuples(st.just("mac"), st.from_regex(r"([0-9a-f]{2}:){5}[0-9a-f]{2}", fullmatch=True)),
    st.tuples(st.just("secret"), st.from_regex(r"sk-[A-Za-z0-9]{20,30}", fullmatch=True)),
)
WORDS = st.sampled_from(
    ["tell", "me", "of", "und", "was", "<EMAIL_1>", "ip_1", "[URL 2]", "?", "\n\n", "é", "…", "12", "a.b", "TEXT_1"]
)


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(st.one_of(WORDS.map(lambda w: ("", w)), VALUES), max_size=12), texts=st.integers(1, 3))
def test_no_value_leaves_and_everything_comes_back(parts: list[tuple[str, str]], texts: int) -> None:
    redactor, vault = Redactor(), Vault()
    for n in range(texts):
        some = parts[n:] + parts[:n]
        text = " ".join(value for _, value in some)
        redacted = redactor.redact(text, vault)
        for kind, value in some:
            if kind:
                assert value not in redacted.text, kind
        assert redacted.restore(redacted.text) == text


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=200))
def test_any_text_comes_back_as_it_was(text: str) -> None:
    redacted = Redactor().redact(text, Vault())
    assert redacted.restore(redacted.text) == text


def test_the_tables_say_what_they_should() -> None:
    assert iban_right("GB82WEST12345698765432") and not iban_right("GB83WEST12345698765432")
    assert luhn("79927398713") and not luhn("79927398710") and not luhn("0000")
    assert set(KINDS) >= {"email", "phone", "iban", "card", "ip", "url", "name", "birth_date"}
