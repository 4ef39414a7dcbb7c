"""Models on a hub, and in the hub's own cache on this machine.

What comes from a hub stays in the hub library's cache, where every other tool finds it too.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

from huggingface_hub import constants  # the rest of it is imported where it is used: it takes a second

from agora.errors import ModelError
from experts.files import check_free_disk, disk_errors, sha256_of
from experts.integrity import check_model_folder
from experts.progress import ProgressCallback, PullProgress, silent
from experts.unpack import MODEL_FILES

HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
"""OWNER/NAME as hubs spell it."""

PROBE_TIMEOUT_S: Final = 3.0
"""Seconds the hub has to answer before agora looks elsewhere; hubs answer in tenths of a second."""


def _bar_class(progress: ProgressCallback, total: int) -> type[Any]:
    """A bar for the hub library that shows nothing and passes the bytes on.

    The library keeps several bars (bytes received, bytes written, files); the furthest of those in bytes counts.
    """

    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._in_bytes = kwargs.get("unit") == "B"
            self._seen = 0
            kwargs["disable"] = True
            super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            if self._in_bytes:
                self._seen += int(n or 0)
                done = min(self._seen, total)
                progress(PullProgress(phase="downloading from the hub", done=done, total=total))
            super().update(n)

    return Bar


class Hub:
    """The model hub that the environment names (`HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN`, `HF_HUB_OFFLINE`).

    Args:
        endpoint: Root URL of the hub; the environment's if not given.
        cache_dir: The hub library's cache; the environment's if not given.
        offline: Never use the network; what the environment says if not given.
    """

    def __init__(
        self, *, endpoint: str | None = None, cache_dir: Path | None = None, offline: bool | None = None
    ) -> None:
        self._endpoint = endpoint or constants.ENDPOINT
        self._cache_dir = Path(cache_dir or constants.HF_HUB_CACHE)
        self._offline = bool(constants.HF_HUB_OFFLINE) if offline is None else offline

    @property
    def offline(self) -> bool:
        """Whether the network may not be used."""
        return self._offline

    def reachable(self) -> bool:
        """Whether the hub answers within `PROBE_TIMEOUT_S`; False at once when offline."""
        if self._offline:
            return False
        import httpx

        try:
            httpx.head(self._endpoint, timeout=PROBE_TIMEOUT_S)
        except (httpx.HTTPError, httpx.InvalidURL, OSError):
            return False
        return True

    def cached(self, repo_id: str) -> Path | None:
        """The folder of a whole model in the hub's cache, or None; no network."""
        repo = self._cache_dir / f"models--{repo_id.replace('/', '--')}"
        try:
            commit = (repo / "refs" / "main").read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return None
        folder = repo / "snapshots" / commit
        if not re.fullmatch(r"[0-9a-f]{40}", commit) or not folder.is_dir():
            return None
        try:
            # an interrupted download leaves a folder that lacks files
            check_model_folder(folder)
        except ModelError:
            return None
        return folder

    def verify(self, folder: Path) -> None:
        """Re-hashes the large files of a cached snapshot, which the cache names by their sha256.

        Raises:
            ModelError: If one is damaged.
        """
        damaged = self._damaged(folder)
        if damaged:
            raise ModelError(f"{damaged[0]} is damaged: its sha256 is not {damaged[0].resolve().name}")

    @staticmethod
    def _damaged(folder: Path) -> list[Path]:
        named = [p for p in sorted(folder.iterdir()) if re.fullmatch(r"[0-9a-f]{64}", p.resolve().name)]
        return [p for p in named if sha256_of(p) != p.resolve().name]

    def pull(self, repo_id: str, *, progress: ProgressCallback = silent) -> Path:
        """The folder of a whole model: the cached one once it is checked, or a download that replaces what is damaged.

        Raises:
            ModelError: As `verify` if the cached model is damaged and the hub cannot be reached, else as `download`.
        """
        cached = self.cached(repo_id)
        if cached is not None:
            damaged = self._damaged(cached)
            if not damaged:
                return cached
            if not self.reachable():
                self.verify(cached)
            for path in damaged:
                path.resolve().unlink()
        return self.download(repo_id, progress=progress)

    def download(self, repo_id: str, *, progress: ProgressCallback = silent) -> Path:
        """Downloads a model's safetensors, tokenizer and configuration; continues an interrupted download.

        Raises:
            ModelError: If the hub does not have it, refuses it, the connection fails, the disk is too small, or
                what arrived is no usable model.
        """
        from huggingface_hub import snapshot_download

        if self._offline:
            raise ModelError(
                f"{repo_id} is not on this machine, and HF_HUB_OFFLINE forbids fetching it",
                hint="unset HF_HUB_OFFLINE",
            )
        options: dict[str, Any] = {
            "cache_dir": self._cache_dir,
            "endpoint": self._endpoint,
            "allow_patterns": list(MODEL_FILES),
            "ignore_patterns": ["*/*"],
        }
        try:
            with disk_errors(self._cache_dir):
                files = snapshot_download(repo_id, dry_run=True, **options)
                missing = [f for f in files if f.will_download]
                self._check_space(sum(f.file_size for f in missing))
                total = sum(f.file_size for f in files)
                folder = Path(snapshot_download(repo_id, tqdm_class=_bar_class(progress, total), **options))
        except ModelError:
            raise
        except Exception as error:  # its HTTP library, and so the errors, changed between its versions
            raise self._explained(repo_id, error) from error
        check_model_folder(folder)
        return folder

    def _explained(self, repo_id: str, error: BaseException) -> ModelError:
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        seen: BaseException | None = error
        while seen is not None:  # a dry run wraps what the hub said
            if isinstance(seen, GatedRepoError):
                hint = "accept its licence on the hub's page and set HF_TOKEN"
                return ModelError(f"{repo_id} is a gated model", hint=hint)
            if isinstance(seen, RepositoryNotFoundError):
                hint = "check the spelling; a private model needs HF_TOKEN"
                return ModelError(f"the hub at {self._endpoint} has no model {repo_id!r}", hint=hint)
            seen = seen.__cause__
        first_line = (str(error).strip().splitlines() or [""])[0][:300]
        return ModelError(
            f"{repo_id} could not be fetched from {self._endpoint}: {type(error).__name__}: {first_line}",
            hint="check the network and run the same command again; it continues where it stopped",
        )

    def _check_space(self, needed: int) -> None:
        self._cache_dir.mkdir(parents=True, exist_ok=True)
        check_free_disk(self._cache_dir, needed, setting="HF_HOME")
