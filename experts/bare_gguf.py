"""GGUF files that were fetched for an engine that reads them as they are: without the conversion to safetensors."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Final

from agora.errors import ModelError
from experts.catalogue import ModelSpec
from experts.files import sha256_of
from experts.integrity import check_sizes, read_manifest, sync_folder, write_manifest
from experts.progress import ProgressCallback

FOLDER: Final = ".gguf"
"""Where they are in the cache; the leading dot keeps it apart from the aliases, which cannot begin with one."""


class BareGgufs:
    """The GGUF files of a cache that no model was made from yet.

    Args:
        cache_dir: Folder that models are kept in.
    """

    def __init__(self, cache_dir: Path) -> None:
        self._folder = cache_dir / FOLDER

    def find(self, spec: ModelSpec) -> Path | None:
        """A model's file, if it is whole at first sight and the one that the catalogue means."""
        folder = self._folder / spec.alias
        try:
            manifest = read_manifest(folder)
            check_sizes(folder, manifest)
        except ModelError:
            return None
        file = folder / spec.weights
        return file if manifest.recipe == spec.weights_sha256 and file.is_file() else None

    def keep(self, spec: ModelSpec, fresh: Path, *, source: str, progress: ProgressCallback) -> Path:
        """Takes over a folder that holds the file and nothing else, in one move; what was here before goes.

        Args:
            spec: Which model.
            fresh: The folder, on the same disk.
            source: Where the file came from, for people.
            progress: Told how far it is.
        """
        write_manifest(fresh, alias=spec.alias, source=source, recipe=spec.weights_sha256, progress=progress)
        final = self._folder / spec.alias
        final.parent.mkdir(exist_ok=True)
        shutil.rmtree(final, ignore_errors=True)
        fresh.replace(final)
        sync_folder(final.parent)
        return final / spec.weights

    def lend(self, spec: ModelSpec, target: Path) -> bool:
        """Puts the file at another place too, without a second copy of its bytes where the disk can do that.

        Returns:
            Whether there is one, undamaged.
        """
        file = self.find(spec)
        if file is None or sha256_of(file) != spec.weights_sha256:
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(file, target)
        except OSError:  # a file system without hard links
            shutil.copyfile(file, target)
        return True
