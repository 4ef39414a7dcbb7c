"""Loading a model folder with transformers: quietly, and with one clear error when it is damaged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agora.errors import ModelError


@contextmanager
def loading(folder: Path, repair: str = "") -> Iterator[None]:
    """Wraps the loading of a model folder.

    Whatever a library says of damaged files becomes one `ModelError`, and transformers' progress bars, which would
    break into other output, stay away.

    Args:
        folder: The folder being loaded.
        repair: What to do about a damaged model, one sentence.
    """
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    except ModelError:
        raise
    except MemoryError as error:
        raise ModelError(f"{folder} does not fit into memory", hint="use a smaller model") from error
    except Exception as error:  # the libraries raise plain Exception, ValueError, OSError, KeyError, RuntimeError ...
        first_line = (str(error).strip().splitlines() or [""])[0][:300]
        hint = repair or "its files may be damaged: fetch the model again"
        raise ModelError(f"{folder} cannot be loaded: {type(error).__name__}: {first_line}", hint=hint) from error
    finally:
        if shown:
            logging.enable_progress_bar()
