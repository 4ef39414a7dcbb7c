"""Sentence embeddings with all-MiniLM-L6-v2.

Source: Reimers and Gurevych, "Sentence-BERT" (2019), section 3: a sentence's vector is the mean of its token vectors;
here scaled to length 1, as the model was trained, so that dot products are cosines.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from threadpoolctl import threadpool_limits

from agora.errors import InvalidRequest
from experts.loading import loading
from experts.models import ModelStore

if TYPE_CHECKING:
    from numpy.typing import NDArray

DEFAULT_MODEL: Final = "minilm-l6"
"""Alias of the model in the catalogue."""

DIMENSION: Final = 384
"""Length of the vectors; the hidden size of MiniLM-L6-H384."""

MAX_TOKENS: Final = 256
"""Tokens of a text that count; `max_seq_length` in the model's own sentence-transformers configuration."""

MAX_CHARACTERS: Final = 32_768
"""Characters of a text that are tokenized: more than 256 of the tokenizer's longest words (100 characters) take."""

BATCH_SIZE: Final = 32
"""Texts in one forward pass; the default of sentence-transformers."""

THREADS: Final = 1
"""Threads of one forward pass; see where it is used."""

CACHE_SIZE: Final = 16_384
"""Vectors remembered, least recently used forgotten first: 1.6 kB each, so about 26 MB."""


class MiniLM:
    """Turns texts into unit vectors of 384 numbers whose dot product says how alike they are.

    Satisfies `agora.protocols.Embedder`. The model is loaded at the first use; it runs in a thread of its own, one
    batch at a time, so the event loop stays free and many callers share it fairly.

    Args:
        model: What `ModelStore.resolve` understands: an alias, a folder, or a hub id of a MiniLM-like encoder.
        store: Where models are kept; the user's default store if not given.
        pull: Whether to fetch a model that is not on this machine.
        batch_size: Texts in one forward pass.
        cache_size: Vectors remembered; 0 for none.

    Raises:
        InvalidRequest: If a size is out of range.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = DEFAULT_MODEL,
        *,
        store: ModelStore | None = None,
        pull: bool = False,
        batch_size: int = BATCH_SIZE,
        cache_size: int = CACHE_SIZE,
    ) -> None:
        if batch_size < 1 or cache_size < 0:
            raise InvalidRequest(
                f"batch_size is {batch_size} and cache_size {cache_size}; allowed: at least 1, and at least 0"
            )
        self._source = model
        self._store = store
        self._pull = pull
        self._batch_size = batch_size
        self._cache_size = cache_size
        self._cache: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="minilm")
        self._loaded: tuple[Any, Any] | None = None
        self._closed = False

    @property
    def dim(self) -> int:
        """Length of the vectors."""
        return DIMENSION

    async def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embeds texts; those seen lately come from memory.

        Cancelling frees the worker after the batch in hand.

        Args:
            texts: Any number of texts; of each, the first 256 tokens count.

        Returns:
            Shape (len(texts), 384), float32, rows of length 1.

        Raises:
            InvalidRequest: If `texts` is a single string, holds something that is no string, or after `aclose`.
            ModelError: If the model is not on this machine, or damaged.
        """
        if self._closed:
            raise InvalidRequest("this embedder was closed")
        if isinstance(texts, str) or not all(isinstance(t, str) for t in texts):
            raise InvalidRequest("embed takes a list of strings")
        keys = [hashlib.sha256(t.encode("utf-8", "surrogatepass")).digest() for t in texts]
        found = {key: self._cache[key] for key in keys if key in self._cache}
        # texts of like length together, so that little is padded
        missing = sorted(
            {k: t for k, t in zip(keys, texts, strict=True) if k not in found}.items(), key=lambda kt: len(kt[1])
        )
        loop = asyncio.get_running_loop()
        for start in range(0, len(missing), self._batch_size):
            batch = missing[start : start + self._batch_size]
            vectors = await loop.run_in_executor(self._worker, partial(self._encode, [t for _, t in batch]))
            found.update(zip((k for k, _ in batch), vectors, strict=True))
        self._remember(keys, found)
        return np.stack([found[k] for k in keys]) if keys else np.empty((0, DIMENSION), dtype=np.float32)

    async def aclose(self) -> None:
        """Ends the worker thread and lets go of the model; safe to call twice."""
        self._closed = True
        self._worker.shutdown(wait=False, cancel_futures=True)
        self._loaded = None

    def _remember(self, keys: Sequence[bytes], found: dict[bytes, NDArray[np.float32]]) -> None:
        for key in keys:
            self._cache[key] = found[key]
            self._cache.move_to_end(key)
        while len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)

    def _model(self) -> tuple[Any, Any]:
        """Tokenizer and model; in the worker thread only, which loads them once."""
        if self._loaded is None:
            from transformers import AutoModel, AutoTokenizer

            store = ModelStore() if self._store is None else self._store
            folder = store.resolve(self._source, pull=self._pull)
            repair = f"type: agora models pull {self._source}"
            with loading(folder, repair):
                tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
                model, info = AutoModel.from_pretrained(
                    folder, local_files_only=True, use_safetensors=True, output_loading_info=True
                )
                if info["missing_keys"]:
                    # transformers would go on with random numbers in their place
                    raise ValueError(f"its weights lack {sorted(info['missing_keys'])[0]}")
                if model.config.hidden_size != DIMENSION:
                    raise ValueError(f"its vectors have {model.config.hidden_size} numbers, not {DIMENSION}")
            self._loaded = tokenizer, model.eval()
            # This thread's share of the cores. One text is milliseconds of work, which a second core hardly shortens;
            # but two threads that spin for each other beside a decoding model took 300 ms and more on a busy machine,
            # where one takes 20. Not torch.set_num_threads: that would bind every thread started later, too.
            threadpool_limits(THREADS, user_api="openmp")
        return self._loaded

    def _encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Mean of the token vectors, scaled to length 1; shape (len(texts), 384)."""
        import torch

        tokenizer, model = self._model()
        inputs = tokenizer(
            [t[:MAX_CHARACTERS].encode("utf-8", "replace").decode("utf-8") for t in texts],
            padding=True,
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        )
        with torch.inference_mode():
            tokens = model(**inputs).last_hidden_state
            mask = inputs["attention_mask"].unsqueeze(-1).to(tokens.dtype)
            means = (tokens * mask).sum(1) / mask.sum(1)
            unit = torch.nn.functional.normalize(means, dim=1)
        result: NDArray[np.float32] = unit.to(torch.float32).numpy()
        return result
