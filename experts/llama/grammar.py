"""JSON schemas, held to token by token with llama.cpp's grammars."""

from __future__ import annotations

import ctypes
import json
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import accumulate
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from agora.errors import BadReply, InvalidRequest
from experts.engine.sampling import Choice, Wish, choose
from experts.llama.library import Library, last_words
from experts.llama.tokenizer import GgufTokenizer

MAX_SCHEMA_CHARS: Final = 50_000
"""Characters of a JSON schema. Turning it into a grammar takes about a second for so many."""

NOT_HELD: Final = frozenset(
    {
        "not",
        "if",
        "then",
        "else",
        "contains",
        "dependentRequired",
        "dependentSchemas",
        "exclusiveMaximum",
        "exclusiveMinimum",
        "maximum",
        "maxProperties",
        "minimum",
        "minProperties",
        "multipleOf",
        "pattern",
        "patternProperties",
        "propertyNames",
        "unevaluatedItems",
        "unevaluatedProperties",
        "uniqueItems",
    }
)
"""Keywords of JSON Schema that llama-cpp-python's converter passes over, so that what they forbid would be generated;
with `pattern`, text that is no JSON (a quote that `.` matches)."""

COUNTS: Final = frozenset({"maxItems", "maxLength", "minItems", "minLength"})
"""Keywords that repeat a part of the grammar."""

MAX_COUNT: Final = 1000
"""Largest value of one of `COUNTS`. Each repetition is nested in the one before, and llama.cpp follows them by
recursion: millions overrun the stack, which ends the process (tried); from some thousand on it refuses by itself."""

MAX_DEPTH: Final = 2 * MAX_COUNT
"""Parentheses open at once in a grammar, for the same reason."""

MAX_GRAMMAR_CHARS: Final = 500_000
"""Characters of a grammar: ten times its schema."""

ANY_CHAR: Final = r'[^"\\] |'
"""The converter's rule for a character of a string. It lets control characters through, which JSON forbids."""

JSON_CHAR: Final = r'[^"\\\x7F\x00-\x1F] |'
"""The rule of llama.cpp's own converter."""

MAPS: Final = frozenset({"properties", "$defs", "definitions"})
"""Keywords whose value names schemas by words of the user's own."""

VALUES: Final = frozenset({"const", "enum", "default", "examples"})
"""Keywords whose value is data, not a schema."""

CANDIDATE: Final = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
"""`llama_token_data`."""


def schema_grammar(schema: Mapping[str, Any]) -> str:
    """The grammar of a JSON schema, in llama.cpp's notation (GBNF).

    Raises:
        InvalidRequest: If the schema is too large, is none, or asks for what no grammar can hold to.
    """
    try:
        text = json.dumps(schema, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as e:
        raise InvalidRequest(f"the JSON schema is not JSON: {e}") from None
    if len(text) > MAX_SCHEMA_CHARS:
        raise InvalidRequest(f"the JSON schema has {len(text):,} characters; at most {MAX_SCHEMA_CHARS:,} are allowed")
    if unheld := sorted(NOT_HELD.intersection(_keywords(schema))):
        raise InvalidRequest(
            f"the JSON schema uses {', '.join(unheld)}, which llama.cpp cannot hold a text to",
            hint="leave it out and check the answer yourself, or ask another expert",
        )
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    try:
        grammar = str(json_schema_to_gbnf(text)).replace(ANY_CHAR, JSON_CHAR)
    except (AssertionError, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as e:
        told = str(e)[:200] or type(e).__name__
        raise InvalidRequest(f"the JSON schema cannot be turned into a grammar: {told}") from None
    if len(grammar) > MAX_GRAMMAR_CHARS or _depth(grammar) > MAX_DEPTH:
        raise InvalidRequest("the JSON schema is too large for a grammar", hint="lower its counts, or nest it less")
    return grammar


def _depth(grammar: str) -> int:
    """Most parentheses open at once, those in its strings included: more than there are does no harm."""
    return max(accumulate((c == "(") - (c == ")") for c in grammar if c in "()"), default=0)


def _keywords(schema: Any) -> Iterator[str]:
    if isinstance(schema, list):
        for item in schema:
            yield from _keywords(item)
    if not isinstance(schema, Mapping):
        return
    for key, value in schema.items():
        yield key
        if key in COUNTS and isinstance(value, int) and value > MAX_COUNT:
            raise InvalidRequest(f"the JSON schema has {key} = {value:,}; at most {MAX_COUNT:,} is allowed")
        if key in MAPS and isinstance(value, Mapping):
            for named in value.values():
                yield from _keywords(named)
        elif key not in VALUES:
            yield from _keywords(value)


class Grammar:
    """What may come next in a text of a grammar. Belongs to one generation.

    Args:
        library: llama.cpp.
        tokenizer: Of the model.
        grammar: In GBNF.

    Raises:
        InvalidRequest: If llama.cpp refuses it.
    """

    def __init__(self, library: Library, tokenizer: GgufTokenizer, grammar: str) -> None:
        self._api = library.api
        # The grammar reads the tokenizer's vocabulary as long as it is used.
        self._tokenizer = tokenizer
        with library.listening() as lines:
            self._sampler = self._api.llama_sampler_init_grammar(tokenizer.vocabulary, grammar.encode(), b"root")
        if not self._sampler:
            raise InvalidRequest(f"llama.cpp refuses the grammar of the JSON schema: {last_words(lines)}")
        weakref.finalize(self, self._api.llama_sampler_free, self._sampler).atexit = False

    def hold(self, choice: Choice, logits: Tensor, wish: Wish, *, name: str) -> Choice:
        """The next token: the one chosen if the grammar allows it, else one chosen among those it allows.

        Sampling first and restricting only what is not allowed gives the same distribution as restricting always,
        P(t) + P(not allowed)·P(t | allowed) = P(t | allowed), and looks at one token in place of the whole vocabulary.

        Args:
            choice: What was chosen freely.
            logits: Shape (vocabulary,).
            wish: How the row wants its tokens.
            name: The backend's, for errors.

        Returns:
            The token, with its log-probability under the model itself.

        Raises:
            BadReply: If the grammar allows no token.
        """
        if not torch.isfinite(self._allowed(np.array([choice.token]), np.zeros(1, np.float32))).all():
            allowed = self._allowed(np.arange(len(logits)), logits.numpy())
            again = choose(allowed[None], [replace(wish, logprobs=None)])[0]
            if again.token < 0:
                raise BadReply("no token of the model goes on with the JSON schema", backend=name)
            logprob = float(torch.log_softmax(logits, -1)[again.token])
            choice = Choice(again.token, logprob, choice.top)
        self._api.llama_sampler_accept(self._sampler, choice.token)
        return choice

    def _allowed(self, tokens: Any, logits: Any) -> Tensor:
        """The logits, -inf for what is not allowed."""
        candidates = np.zeros(len(tokens), dtype=CANDIDATE)
        candidates["id"], candidates["logit"] = tokens, logits
        array = self._api.llama_token_data_array(
            data=candidates.ctypes.data_as(self._api.llama_token_data_p),
            size=len(candidates),
            selected=-1,
            sorted=False,
        )
        self._api.llama_sampler_apply(self._sampler, ctypes.byref(array))
        return torch.from_numpy(candidates["logit"].copy())
