"""Where calibrators are kept: a folder of JSON files, one for each version of each expert."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from agora.errors import ConfigError, InvalidRequest
from agora.routing.trust.calibrator import Calibrator
from agora.routing.trust.sealed import AGAIN, read_sealed, write_sealed
from agora.types.words import ID

FORMAT: Final = 1
"""Version of what stands in the files; others are refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """Which version of an expert a calibrator is for.

    Attributes:
        expert: Its name.
        adapter: The adapter it answers with, `name@vN`; None for none.
        base: Name of its base model.
        settings: Stands for how it is spoken to (its prompt, temperature, longest answer); empty for the usual way.

    Raises:
        InvalidRequest: If the expert's name is none.
    """

    expert: str
    adapter: str | None
    base: str
    settings: str = ""

    def __post_init__(self) -> None:
        if ID.fullmatch(self.expert) is None:
            raise InvalidRequest(f"expert name {self.expert!r} must match {ID.pattern}")

    @property
    def file(self) -> str:
        """Name of its file."""
        parts = [str(self.adapter), self.base, *([self.settings] if self.settings else [])]
        told = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
        return f"{self.expert}~{told}.json"

    @property
    def words(self) -> str:
        """For people."""
        told = f"{self.base} with {f'adapter {self.adapter}' if self.adapter else 'no adapter'}"
        return f"{told}, settings {self.settings}" if self.settings else told


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What asking for a calibrator came to.

    Attributes:
        calibrator: The valid one; None if there is none.
        reason: Why there is none; empty if there is.
    """

    calibrator: Calibrator | None
    reason: str = ""


class CalibratorStore:
    """Calibrators in a folder; blocking, a few small files.

    Args:
        folder: Where; made when the first is put.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def folder(self) -> Path:
        """Where they are."""
        return self._folder

    def put(self, version: Version, calibrator: Calibrator) -> None:
        """Keeps a calibrator in place of an earlier one for the same version.

        Raises:
            ConfigError: If it cannot be written.
        """
        body = {
            "format": FORMAT,
            "expert": version.expert,
            "adapter": version.adapter,
            "base": version.base,
            "settings": version.settings,
            "calibrator": calibrator.to_dict(),
        }
        write_sealed(self._folder / version.file, body)

    def get(self, version: Version) -> Found:
        """The calibrator for exactly this version.

        Raises:
            ConfigError: If its file is damaged.
        """
        own = self._folder / version.file
        if own.exists():
            kept, calibrator = self._read(own)
            if kept == version:
                return Found(calibrator=calibrator)
        others = []
        for path in sorted(self._folder.glob(f"{version.expert}~*.json")):
            # One of another version does not count: were damage to it an error, calibrating again would not mend it.
            with suppress(ConfigError):
                others.append(self._read(path)[0])
        if others:
            made_for = " and for ".join(v.words for v in others)
            why = f"{version.expert} was calibrated for {made_for}, and is now {version.words}: that no longer counts"
            return Found(calibrator=None, reason=why)
        return Found(calibrator=None, reason=f"{version.expert} has not been calibrated")

    def _read(self, path: Path) -> tuple[Version, Calibrator]:
        body: Any = read_sealed(path)
        try:
            if body["format"] != FORMAT:
                raise ConfigError(
                    f"{path}: has format {body['format']!r}; this agora reads format {FORMAT}", hint=AGAIN
                )
            version = Version(
                expert=str(body["expert"]),
                adapter=body["adapter"],
                base=str(body["base"]),
                settings=str(body["settings"]),
            )
            return version, Calibrator.from_dict(body["calibrator"])
        except (KeyError, TypeError, ValueError, InvalidRequest) as e:
            raise ConfigError(f"{path}: is not a calibrator: {type(e).__name__}: {e}", hint=AGAIN) from e
