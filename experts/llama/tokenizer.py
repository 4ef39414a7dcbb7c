"""The tokenizer and the chat template in a GGUF file, as `experts.engine.text.Codec` wants them."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agora.errors import InvalidRequest, ModelError
from experts.llama.library import Library, last_words


class GgufTokenizer:
    """Text and tokens by the vocabulary of a GGUF file. It loads that alone, and may outlive the model.

    Its methods may be called on any thread.

    Attributes:
        size: Tokens in the vocabulary.
        chat_template: The model's own, or None.

    Args:
        library: llama.cpp.
        path: The GGUF file.

    Raises:
        ModelError: If the file has no vocabulary or a chat template that is none.
    """

    def __init__(self, library: Library, path: Path) -> None:
        self._api = api = library.api
        options = api.llama_model_default_params()
        options.vocab_only = True
        options.n_gpu_layers = 0
        with library.listening() as lines:
            self._model = api.llama_model_load_from_file(str(path).encode(), options)
        if not self._model:
            raise ModelError(f"{path} cannot be loaded: {last_words(lines)}", hint="its file may be damaged or too new")
        # Not at the end of the process: a thread may still be using it then.
        weakref.finalize(self, api.llama_model_free, self._model).atexit = False
        self.vocabulary: Any = api.llama_model_get_vocab(self._model)
        self.size: int = api.llama_vocab_n_tokens(self.vocabulary)
        if self.size < 1:
            raise ModelError(f"{path} holds no vocabulary", hint="choose a file with a model that generates text")
        self._pieces: dict[tuple[int, bool], bytes] = {}
        template = api.llama_model_chat_template(self._model, None)
        self.chat_template: str | None = template.decode(errors="replace") if template else None
        self._check_template(path)

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end a generation."""
        is_end = self._api.llama_vocab_is_eog
        return frozenset(t for t in range(self.size) if is_end(self.vocabulary, t))

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool = False) -> dict[str, list[int]]:
        """Tokens of a text, under the key `input_ids`; names of special tokens in it mean those tokens.

        Raises:
            InvalidRequest: If the text is not valid Unicode.
        """
        try:
            data = text.encode()
        except UnicodeEncodeError as e:
            raise InvalidRequest(f"the text is not valid Unicode: lone surrogate at character {e.start}") from None
        room = len(data) + 8  # a token has at least one byte, and few are added
        while True:
            tokens = (ctypes.c_int32 * room)()
            count = self._api.llama_tokenize(self.vocabulary, data, len(data), tokens, room, add_special_tokens, True)
            if count >= 0:
                return {"input_ids": tokens[:count]}
            room = -count

    def decode(
        self, tokens: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool = False
    ) -> str:
        """Text of tokens; bytes that make no character, or none yet, become U+FFFD."""
        return b"".join(self._piece(t, not skip_special_tokens) for t in tokens).decode(errors="replace")

    def apply_chat_template(
        self, turns: Sequence[dict[str, str]], *, tokenize: bool = False, add_generation_prompt: bool = True
    ) -> str:
        """The text of a chat, rendered in the sandbox that transformers uses.

        Raises:
            jinja2.TemplateError: If the template refuses the turns.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        (text,), _ = render_jinja_template(
            conversations=[list(turns)],
            chat_template=self.chat_template,
            add_generation_prompt=add_generation_prompt,
            bos_token=self._special(self._api.llama_vocab_bos),
            eos_token=self._special(self._api.llama_vocab_eos),
        )
        return str(text)

    def _special(self, which: Any) -> str:
        token = which(self.vocabulary)
        return "" if token < 0 else self._piece(token, True).decode(errors="replace")

    def _piece(self, token: int, special: bool) -> bytes:
        piece = self._pieces.get((token, special))
        if piece is None:
            size = 64
            while True:
                buffer = ctypes.create_string_buffer(size)
                count = self._api.llama_token_to_piece(self.vocabulary, token, buffer, size, 0, special)
                if count >= 0:
                    break
                size = -count
            piece = self._pieces[(token, special)] = buffer.raw[:count]
        return piece

    def _check_template(self, path: Path) -> None:
        from jinja2 import TemplateError, TemplateSyntaxError

        if self.chat_template is None:
            return
        try:
            self.apply_chat_template([{"role": "user", "content": "Hello"}])
        except TemplateSyntaxError as e:
            raise ModelError(f"the chat template in {path} is none: {e}") from None
        except TemplateError:
            # It may want other turns than these.
            return
