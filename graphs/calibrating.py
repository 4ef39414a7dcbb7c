"""What `agora calibrate` leaves in the policy folder, read for those who answer: calibrators, policy and guarantee."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import platformdirs
from numpy.typing import NDArray

from agora.config import Config
from agora.errors import ConfigError, ModelError
from agora.routing.cascade import saved
from agora.routing.cascade.fitted import Fitted
from agora.routing.cascade.policy import Policy
from agora.routing.risk import Certificate, certify
from agora.routing.trust import Calibrator, CalibratorStore, Version
from agora.routing.trust.sealed import AGAIN, read_sealed, write_sealed
from agora.square import Expert
from graphs.calibration_family import always_top, family_of, top_of
from graphs.calibration_folder import CALIBRATORS, FITTED, JOURNAL, POLICY, current, stamp
from graphs.calibration_version import asked_for, made_of

__all__ = [
    "CALIBRATORS",
    "FITTED",
    "JOURNAL",
    "POLICY",
    "Chosen",
    "Kept",
    "PolicyFolder",
    "Trust",
    "chosen_of",
    "load_trust",
    "policy_folder",
    "save_kept",
    "version_of",
]

FORMAT: Final = 1
"""Version of `fitted.json`; others are refused."""

READS: Final = 3
"""Times that a folder is read if something else counts each time before that is done: a calibration takes a minute or
more and reading some milliseconds, so that twice in a row does not happen."""

BY_EMBEDDING: Final = frozenset({"knn", "logistic"})
"""Priors of `agora.routing.cascade.priors` that look at embeddings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The policy to follow.

    Attributes:
        policy: Decides; its `models` are the experts' names, the cheapest first.
        kind: `routing`, `cascade`, `cascade_routing`, `stopping`, `single`, or `always_top`.
        why: Why this one, in words a person can check.
        certified: Whether `max_risk` was asked for and holds for it with the confidence asked for. Always asking the
            top tier loses nothing by definition: it is certified too.
        notes: What the reader should know, e.g. that nothing cheaper than the top tier was certified.
    """

    policy: Policy
    kind: str
    why: str
    certified: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A fitted policy with what belongs to it.

    Attributes:
        fitted: The policy.
        versions: Of its experts, the cheapest first.
        losses: Of its family on questions that it was not fitted to, shape (n, k); None if none were held back.
        prices: Of its experts per million tokens, in the same order; None where not known.
        signals: What was asked of their answers beyond what comes with them, as `asked_for` tells it.
    """

    fitted: Fitted
    versions: tuple[Version, ...]
    losses: NDArray[np.float64] | None = None
    prices: tuple[float | None, ...] = ()
    signals: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """Calibrators and policy of the experts that are here.

    Attributes:
        notes: What the reader should know: whose calibration is missing or no longer valid, and why.
        calibrators: The valid ones, by expert.
        kept: The policy; None if there is none, or it is for other versions of the experts.
        absent: Experts of the policy that are not here.
        blind: Whether the policy looks at questions' embeddings and there is no model for them.
        unlike: The signals that answers had when the policy was fitted, if others are asked for now; else None.
        departed: Whether it was learned from texts that left as they leave now, redacted or condensed.
    """

    notes: tuple[str, ...] = ()
    calibrators: Mapping[str, Calibrator] = field(default_factory=dict)
    kept: Kept | None = None
    absent: tuple[str, ...] = ()
    blind: bool = False
    unlike: tuple[str, ...] | None = None
    departed: bool = False

    @property
    def models(self) -> tuple[str, ...]:
        """The experts that the policy was fitted for, the cheapest first; empty if there is no valid policy."""
        return self.kept.fitted.models if self.kept is not None else ()

    def confidence(self, expert: str, signals: Mapping[str, float]) -> float | None:
        """Probability in [0, 1] that an answer with these signals (`signals_of`) is right.

        Signals may be missing, NaN or infinite: what is not told is as if it had never been measured.

        Returns:
            None where nothing valid is known of the expert.
        """
        calibrator = self.calibrators.get(expert)
        return None if calibrator is None else calibrator(signals)

    def policy(
        self, *, trade_off: float | None = None, max_risk: float | None = None, confidence: float = 0.95
    ) -> Chosen | None:
        """The policy to follow. With `max_risk` it takes some 0.1 s: ask once, not for every question.

        Args:
            trade_off: Money that an answer's being right is worth; None for what validation chose. Together with
                `max_risk` it chooses among the certified policies; None then for the cheapest.
            max_risk: Most accuracy that may be lost against always asking the top tier; None for no guarantee.
            confidence: Probability with which that must hold.

        Returns:
            None if no policy was fitted, or not for these experts as they are now (see `notes`).

        Raises:
            InvalidRequest: If a number is out of range.
        """
        if self.kept is None:
            return None
        fitted = self.kept.fitted
        if max_risk is None:
            report = fitted.report
            return Chosen(policy=fitted.policy(trade_off=trade_off), kind=str(report["picked"]), why=str(report["why"]))
        if self.kept.losses is None:
            return self._top("no questions were held back for a guarantee; set max_risk and calibrate again")
        if self.absent:
            return self._top(
                f"the guarantee is for all experts of the policy, and {', '.join(self.absent)} is not here"
            )
        if self.blind:
            return self._top("the guarantee is for a policy that sees embeddings, and there are none")
        if self.unlike is not None:
            return self._top(f"the guarantee is for answers judged with the signals {_listed(self.unlike)}")
        certificate = certify(self.kept.losses, max_risk=max_risk, confidence=confidence)
        if certificate.chosen is None:
            return self._top(certificate.why)
        return chosen_of(fitted, certificate, trade_off=trade_off)

    def _top(self, why: str) -> Chosen:
        assert self.kept is not None
        # Always asking the top tier loses nothing only where that is here.
        here = top_of(self.kept.fitted) not in self.absent
        return Chosen(policy=always_top(self.kept.fitted), kind="always_top", why=why, certified=here, notes=(why,))


def chosen_of(fitted: Fitted, certificate: Certificate, *, trade_off: float | None = None) -> Chosen:
    """Which of the certified policies to follow; there must be one."""
    members = family_of(fitted)
    # All certified ones keep the promise at once, so that any rule may choose among them.
    best = certificate.certified[0]
    if trade_off is not None:
        best = max(certificate.certified, key=lambda i: members[i].quality * trade_off - members[i].cost)
    member = members[best]
    saved_share = 1 - member.cost / fitted.top.cost if fitted.top.cost > 0 else 0.0
    which = "cheapest" if trade_off is None else "best"
    why = (
        f"the {which} of {len(certificate.certified)} certified policies: in validation it cost {saved_share:.0%} less"
        f" than always the top tier; {certificate.why}"
    )
    return Chosen(policy=member.policy(fitted), kind=member.kind, why=why, certified=True)


def policy_folder(config: Config) -> Path:
    """Where `agora calibrate` writes: `[vertical] policy`, or `vertical` in the user's data folder."""
    return config.vertical.policy or platformdirs.user_data_path("agora") / "vertical"


def version_of(expert: Expert, config: Config | None = None) -> Version:
    """Which version of an expert this is; see `graphs.calibration_version.made_of`.

    Args:
        expert: The expert.
        config: Tells which model its node runs, and what is done to a text before it leaves.
    """
    made = made_of(expert, config)
    return Version(expert=expert.name, adapter=made.adapter, base=made.base, settings=made.settings)


def save_kept(folder: Path, kept: Kept) -> None:
    """Writes a policy with what belongs to it.

    Raises:
        ModelError: If the policy cannot be written.
        ConfigError: If the rest cannot.
    """
    saved.save(kept.fitted, folder / POLICY)
    body = {
        "format": FORMAT,
        "policy": _digest(folder),
        "versions": [asdict(v) for v in kept.versions],
        "prices": list(kept.prices),
        "signals": list(kept.signals),
        "losses": None if kept.losses is None else kept.losses.tolist(),
    }
    write_sealed(folder / FITTED, body)


def load_trust(
    folder: Path, experts: Sequence[Expert], *, config: Config | None = None, embeds: bool | None = None
) -> Trust:
    """Reads a policy folder for the experts that are here.

    A folder that does not exist is no error: it gives a `Trust` that knows nothing and says so in its notes. Blocking
    (reads a few files): call it while opening, not on the event loop in the middle of a request.

    Args:
        folder: Where `agora calibrate` wrote.
        experts: Who is here now: a calibrator counts only for the same adapter version and base model.
        config: Tells which model each expert's node runs; give it wherever there is one, as `agora calibrate` does.
        embeds: Whether questions' embeddings can be had; None if that is as the configured router has it.

    Raises:
        ConfigError: If a file in it is damaged.
        ModelError: If the policy is damaged.
    """
    for _ in range(READS - 1):
        before = stamp(folder)
        try:
            return _loaded(folder, experts, config, embeds)
        except (ConfigError, ModelError):
            # What was being read may have been given up for something newer in the meantime.
            if stamp(folder) == before:
                raise
    return _loaded(folder, experts, config, embeds)


def _loaded(folder: Path, experts: Sequence[Expert], config: Config | None, embeds: bool | None) -> Trust:
    if not folder.is_dir():
        return Trust(
            notes=(f"nothing is calibrated: there is no folder {str(folder)!r} (agora calibrate --data FILE)",)
        )
    versions = {e.name: version_of(e, config) for e in experts}
    learned = current(folder)
    store = CalibratorStore(learned / CALIBRATORS)
    found = {name: store.get(version) for name, version in versions.items()}
    notes = [f.reason for f in found.values() if f.calibrator is None]
    kept, absent, note = _kept(learned, versions, {e.name: e.card.price_per_mtok for e in experts})
    if embeds is None:
        embeds = config is None or config.graph.router == "embedding"
    blind = not embeds and kept is not None and _looks(kept.fitted)
    if blind:
        notes.append('the policy was fitted with embeddings: without router = "embedding" it decides less well')
    unlike = None
    table = None if config is None else config.vertical
    wanted = () if table is None else asked_for(table.signals, table.samples)
    if table is not None and kept is not None and set(kept.signals) != set(wanted):
        unlike = kept.signals
        notes.append(
            f"the policy was fitted with the signals {_listed(unlike)}, and [vertical] asks for"
            f" {_listed(wanted)}: it decides less well"
        )
    return Trust(
        blind=blind,
        unlike=unlike,
        notes=(*notes, note) if note else tuple(notes),
        calibrators={name: f.calibrator for name, f in found.items() if f.calibrator is not None},
        kept=kept,
        absent=absent,
        departed=table is not None and bool(table.departure),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyFolder:
    """A policy folder that is looked at again: give it to `graphs.vertical` as `trust`.

    Attributes:
        folder: Where `agora calibrate` writes.
        config: See `load_trust`.
        embeds: See `load_trust`.
    """

    folder: Path
    config: Config | None = None
    embeds: bool | None = None

    def __call__(self, experts: Sequence[Expert]) -> Trust:
        """What is known of these experts; see `load_trust`."""
        return load_trust(self.folder, experts, config=self.config, embeds=self.embeds)

    def stamp(self) -> Hashable:
        """Changes whenever `agora calibrate` has put something else there; blocking, one look at one file."""
        return stamp(self.folder)


def _listed(signals: Sequence[str]) -> str:
    return ", ".join(signals) or "(none)"


def _kept(
    folder: Path, versions: Mapping[str, Version], prices: Mapping[str, float]
) -> tuple[Kept | None, tuple[str, ...], str]:
    """The policy, who of it is not here, and a note."""
    path = folder / FITTED
    if not path.exists():
        return None, (), f"no policy has been fitted in {str(folder)!r}"
    body: Any = read_sealed(path)
    try:
        if body["format"] != FORMAT:
            raise ConfigError(f"{path}: has format {body['format']!r}; this agora reads format {FORMAT}", hint=AGAIN)
        made_for = tuple(Version(**v) for v in body["versions"])
        losses = None if body["losses"] is None else np.asarray(body["losses"], dtype=np.float64)
        digest = str(body["policy"])
        paid = tuple(None if p is None else float(p) for p in body["prices"])
        signals = tuple(map(str, body["signals"]))
    except (KeyError, TypeError, ValueError) as e:
        raise ConfigError(f"{path}: tells nothing of a policy: {type(e).__name__}: {e}", hint=AGAIN) from e
    changed = [v for v in made_for if v.expert in versions and versions[v.expert] != v]
    if changed:
        was = "; ".join(f"{v.expert} was {v.words} and is {versions[v.expert].words}" for v in changed)
        return None, (), f"the policy no longer counts: {was}"
    # What an answer costs is among what the policy goes by.
    now = [(v.expert, p, prices[v.expert]) for v, p in zip(made_for, paid, strict=False) if v.expert in prices]
    if dearer := [
        f"{name} cost {was:g} per million tokens and costs {is_:g}" for name, was, is_ in now if was not in (None, is_)
    ]:
        again = "agora calibrate again: what was answered is not asked anew"
        return None, (), f"the policy no longer counts: {'; '.join(dearer)} ({again})"
    if _digest(folder) != digest:
        return None, (), f"the policy in {str(folder)!r} is not the one that its {FITTED} is about ({AGAIN})"
    fitted = saved.load(folder / POLICY)
    if fitted.models != tuple(v.expert for v in made_for):
        raise ConfigError(
            f"{path}: is about {[v.expert for v in made_for]}, the policy about {fitted.models}", hint=AGAIN
        )
    if losses is not None and (losses.ndim != 2 or losses.shape[1] != len(family_of(fitted))):
        raise ConfigError(f"{path}: its losses do not fit the policy", hint=AGAIN)
    absent = tuple(v.expert for v in made_for if v.expert not in versions)
    note = f"the policy was fitted with {', '.join(absent)}, not here now" if absent else ""
    kept = Kept(fitted=fitted, versions=made_for, losses=losses, prices=paid, signals=signals)
    return kept, absent, note


def _looks(fitted: Fitted) -> bool:
    """Whether a policy looks at questions' embeddings."""
    return not BY_EMBEDDING.isdisjoint(fitted.mind.priors)


def _digest(folder: Path) -> str:
    """Stands for the policy that is saved; its own file tells the checksums of all others."""
    try:
        return hashlib.sha256((folder / POLICY / saved.FILE).read_bytes()).hexdigest()
    except OSError:
        return ""
