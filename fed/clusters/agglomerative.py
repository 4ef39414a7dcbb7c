"""Clusters by what clients' updates change.

All begin with one model. When enough clients have introduced themselves by updates of it
(`fed.clusters.introductions`), they are separated by average linkage (`fed.clusters.separate`), and every cluster goes
on with a model of its own. Who joins later trains the one model first, and goes to the nearest cluster after its first
update. Who comes to disagree with its cluster (`fed.clusters.drift`) introduces itself again; if it then fits no
cluster well, it waits for others like it, and all are separated anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np

from agora.errors import ConfigError
from fed.adapter import Adapter, Vector
from fed.aggregate.rule import State, positive, share, whole
from fed.clusters.base import Base, Options, needed
from fed.clusters.drift import JUMP, PATIENCE, TOWARDS, Watch
from fed.clusters.introductions import Introductions
from fed.clusters.separate import MOST, SIGNIFICANT, comparable, separate
from fed.clusters.similarity import Change, Matrix, distances, gram
from fed.simulator.words import Published
from fed.words import Job

UPDATES: Final = 6
"""Updates of the one model by which a client introduces itself. The low-rank task of `benchmarks.clusters`, ten seeds,
found its groups with an ARI of 0.82 after 3 updates, and of 1.0 after 6."""

AGAIN: Final = 3
"""Updates by which it does so again: it is then compared with clusters, whose means have less noise than a client's."""

ENOUGH: Final = 0.8
"""Share of the clients that must have introduced themselves: a fifth may be slow or dead."""

RANKS: Final = 4
"""Columns of a client's factors, in multiples of the adapter's rank: an update takes two, so two fit exactly."""

FITS: Final = 0.5
"""A client fits a cluster if its mean cosine with the members is at least so many times theirs with each other: half,
between a member, who has 1, and one of another kind, who has 0 or less."""

LONELY: Final = 20
"""Versions that a client which fits no cluster waits for others like it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgglomerativeOptions(Options):
    """Of the grouping `agglomerative`.

    Attributes:
        updates: Updates by which a client introduces itself at first.
        again: Updates by which it does so again.
        enough: Share of the clients that must have, before they are first separated.
        wait: Versions after which they are separated without the rest.
        lonely: Versions that a client which fits no cluster waits for others like it; then it goes to the nearest.
        least: Fewest members of a cluster, as far as the number asked for allows.
        most: Most clusters, where their number is found out.
        significant: Level of the test for one cluster.
        memory: Share that is kept of the mean of a client's updates when the next comes.
        keep: Most clients whose updates are kept; the others stay where they are.
        margin: How much larger a client's mean cosine must be with the members of another cluster, for it to be moved
            without having disagreed.
        jump: An update so many times as long as usual disagrees (`fed.clusters.drift`).
        towards: So does one with such a cosine with the way to another cluster's model.
        patience: Updates in a row that must disagree, before the client introduces itself again; None for never.
    """

    updates: int = UPDATES
    again: int = AGAIN
    enough: float = ENOUGH
    wait: int = 100
    lonely: int = LONELY
    least: int = 2
    most: int = MOST
    significant: float = SIGNIFICANT
    memory: float = 0.9
    keep: int = 1024
    margin: float = 0.1
    jump: float = JUMP
    towards: float = TOWARDS
    patience: int | None = PATIENCE

    def __post_init__(self) -> None:
        super(AgglomerativeOptions, self).__post_init__()
        for name in ("updates", "again", "wait", "lonely", "least", "keep"):
            whole(name, getattr(self, name), least=1)
        whole("most", self.most, least=2)
        if self.patience is not None:
            whole("patience", self.patience, least=1)
        positive("enough", self.enough)
        share("enough", self.enough, whole_too=True)
        positive("significant", self.significant)
        share("significant", self.significant)
        share("memory", self.memory)
        share("margin", self.margin, whole_too=True)
        share("towards", self.towards, whole_too=True)
        if not self.jump > 1:
            raise ConfigError(f"jump is {self.jump!r}; it must be a number above 1")


class Agglomerative(Base):
    """See the module. Takes what `fed.clusters.base.Base` takes, with one first version."""

    name = "agglomerative"
    options_type: ClassVar[type[Options]] = AgglomerativeOptions

    def __init__(self, initial: Adapter | Mapping[str, Adapter], **others: Any) -> None:
        super().__init__(initial, **others)
        self.options: AgglomerativeOptions
        if len(self.newest) > 1:
            raise ConfigError(
                f"grouping {self.name!r} begins with one model, not {len(self.newest)}",
                hint="give one first version; clusters' models are made of it",
            )
        o, spec = self.options, next(iter(self.newest.values())).spec
        self.introduced = Introductions(memory=o.memory, rank=RANKS * max(spec.rank, 1), most=o.keep)
        self.watch = Watch(o.jump, o.towards, o.patience or PATIENCE)
        self.grouped = False
        self.away: dict[str, tuple[str | None, int]] = {}
        """Clients that introduce themselves: the cluster they come from, if any, and since which version."""
        self._strays: dict[str, int] = {}
        """Clients that fit no cluster, and since which version that is known."""
        self._due = 0
        self._tries = 0
        self._disagree: list[str] = []

    # What updates tell.

    def _see(self, job: Job, start: Adapter, delta: Vector) -> None:
        client, own = job.client, self.members[job.client]
        if job.model != own:
            # Of a model that it has left meanwhile.
            return
        if own == self.home:
            self.introduced.add(client, Change.of(start, delta))
        elif self.options.patience is not None:
            change = Change.of(start, delta)
            length, pull = self._measure(own, change)
            if self.watch.see(client, length, pull):
                self._disagree.append(client)

    def _measure(self, own: str, change: Change) -> tuple[float, float]:
        """Length of an update, and its largest cosine with the way to another cluster's model."""
        here = self.newest[own]
        ways = [Change.between(here, a) for name, a in self.newest.items() if name not in (own, self.home)]
        products = gram([change, *ways])
        sizes = np.sqrt(np.maximum(np.diag(products), 0.0))
        pulls = [products[0, n] / (sizes[0] * sizes[n]) for n in range(1, len(sizes)) if sizes[0] * sizes[n] > 0]
        return float(sizes[0]), float(max(pulls, default=0.0))

    # What is decided.

    def _decide(self, published: Published) -> tuple[dict[str, str], dict[str, Adapter]]:
        o = self.options
        if not self.grouped:
            return self._first()
        models: dict[str, str] = {}
        for client in self._disagree:
            if self.members[client] != self.home:
                models |= self._sent_away(client)
        self._disagree.clear()
        if o.every is not None and self.versions - self._due >= o.every:
            self._due = self.versions
            for client in sorted(self.members):
                if self.members[client] != self.home and client not in models:
                    models |= self._sent_away(client)
        placed, starts = self._back()
        return models | placed, starts

    def _first(self) -> tuple[dict[str, str], dict[str, Adapter]]:
        o = self.options
        ready = [c for c in self.introduced.known() if self.introduced.updates(c) >= o.updates]
        enough = needed(o.enough, self.clients)
        late = self.versions >= o.wait and len(ready) >= max(2, o.clusters or 2)
        if self.versions < self._due or not (len(ready) >= enough or late) or len(ready) < (o.clusters or 2):
            return {}, {}
        found = separate(
            self.introduced.products(ready),
            clusters=o.clusters,
            least=o.least,
            most=o.most,
            significant=o.significant,
            seed=o.seed,
        )
        self._tries += 1
        # Each try may take one cluster for several, so they become rarer.
        self._due = self.versions + max(1, o.every or 1) * 2**self._tries
        if found.count < 2:
            return {}, {}
        self.grouped, self._due = True, self.versions
        groups = [[c for c, label in zip(ready, found.labels, strict=True) if label == n] for n in range(found.count)]
        models, starts = self._named(groups, {})
        for client in models:
            self.watch.enters(client)
        self.away = {c: (None, self.versions) for c in sorted(self.members) if c not in models}
        return models, starts

    def _sent_away(self, client: str) -> dict[str, str]:
        self.away[client] = (self.members[client], self.versions)
        self.watch.leaves(client)
        self.introduced.again(client)
        return {client: self.home}

    def _back(self) -> tuple[dict[str, str], dict[str, Adapter]]:
        """Places clients that have introduced themselves."""
        for client, model in self.members.items():
            # Who joined since.
            if model == self.home and client not in self.away:
                self.away[client] = (None, self.versions)
        known = set(self.introduced.known())
        ready = [c for c in sorted(self.away) if c in known and self.introduced.updates(c) >= self._wanted(c)]
        if not ready:
            return {}, {}
        settled = {c: self._cluster(c) for c in sorted(known) if self._cluster(c) is not None and c not in ready}
        before = {c: m for c, m in settled.items() if m is not None}
        if len(set(before.values())) < 2:
            # Too many are away for anything to be compared with.
            return self._anew(sorted(known), all_new=True) if self._enough_back() else ({}, {})
        placed, strays = self._nearest(ready, before)
        self._strays = {c: self._strays.get(c, self.versions) for c in strays}
        if len(strays) >= self.options.least and self._all_back(strays):
            anew = self._anew(sorted(known))
            if anew[0]:
                return anew
        placed |= {c: name for c, name in strays.items() if self.versions - self._strays[c] >= self.options.lonely}
        return self._entered(placed), {}

    def _wanted(self, client: str) -> int:
        """Updates before a client is placed: newcomers are after one, and looked at again if they disagree."""
        return 1 if self.away[client][0] is None else self.options.again

    def _cluster(self, client: str) -> str | None:
        """Where a client belongs by what is known: also one that is away, until it has begun anew."""
        if client in self.away:
            return self.away[client][0] if self.introduced.updates(client) == 0 else None
        return self.members.get(client)

    def _enough_back(self) -> bool:
        back = sum(1 for c in self.away if self.introduced.updates(c) >= self._wanted(c))
        return back >= needed(self.options.enough, len(self.away))

    def _all_back(self, strays: Mapping[str, str]) -> bool:
        """Whether no other client is just introducing itself that might be like those, or they waited long enough."""
        waiting = any(was is not None and c not in strays for c, (was, _) in self.away.items())
        longest = max(self.versions - self._strays[c] for c in strays)
        return not waiting or longest >= self.options.lonely

    def _nearest(self, ready: Sequence[str], settled: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
        """The nearest cluster of each, apart for those that fit it and those that do not."""
        clients = [*settled, *ready]
        names = sorted(set(settled.values()))
        apart = distances(comparable(self.introduced.products(clients)))
        n = len(settled)
        labels = np.array([names.index(m) for m in settled.values()], np.intp)
        inside = np.eye(len(names))[labels]
        sizes = inside.sum(0)
        means = 1.0 - (apart[n:, :n] @ inside) / sizes
        # Cosines of members with each other, by cluster.
        own = np.einsum("ik,ij,jk->k", inside, 1.0 - apart[:n, :n], inside) - sizes
        usual = own / np.maximum(sizes * (sizes - 1), 1)
        placed: dict[str, str] = {}
        strays: dict[str, str] = {}
        for client, row in zip(ready, means, strict=True):
            best = int(np.argmax(row))
            newcomer = self.away[client][0] is None
            fits = newcomer or row[best] >= FITS * max(float(usual[best]), 0.0)
            (placed if fits else strays)[client] = names[best]
        return placed, strays

    def _anew(self, clients: Sequence[str], *, all_new: bool = False) -> tuple[dict[str, str], dict[str, Adapter]]:
        """Separates all that are known; those that had not disagreed are moved only if it is plain.

        Args:
            clients: Those that are known.
            all_new: Whether all introduced themselves anew: only then may clusters become one.
        """
        o = self.options
        products = self.introduced.products(clients)
        found = separate(
            products, clusters=o.clusters, least=o.least, most=o.most, significant=o.significant, seed=o.seed
        )
        if found.count < 2 and not all_new:
            return {}, {}
        before = {c: was for c in clients if (was := self._was(c)) is not None}
        groups = [[c for c, i in zip(clients, found.labels, strict=True) if i == n] for n in range(found.count)]
        models, starts = self._named(groups, before)
        self._hold_back(models, clients, products)
        starts = {name: a for name, a in starts.items() if name in models.values()}
        return self._entered({c: m for c, m in models.items() if c in self.away or m != self.members[c]}), starts

    def _was(self, client: str) -> str | None:
        if client in self.away:
            return self.away[client][0]
        return self.members[client] if self.members[client] != self.home else None

    def _hold_back(self, models: dict[str, str], clients: Sequence[str], products: Matrix) -> None:
        """Hysteresis: whoever had not disagreed stays, unless another cluster is nearer by the margin."""
        apart = distances(comparable(products))
        proposed = dict(models)
        for n, client in enumerate(clients):
            old = self._was(client)
            if client in self.away or old is None or old == proposed[client] or old not in proposed.values():
                continue
            means = {}
            for name in (old, proposed[client]):
                others = [i for i, c in enumerate(clients) if proposed[c] == name and i != n]
                means[name] = apart[n, others].mean() if others else 1.0
            if means[old] - means[proposed[client]] < self.options.margin:
                models[client] = old

    def _entered(self, placed: dict[str, str]) -> dict[str, str]:
        for client, model in placed.items():
            was, _ = self.away.pop(client, (None, 0))
            self._strays.pop(client, None)
            self.watch.enters(client, back=was == model)
        return placed

    def _kept(self) -> set[str]:
        return {was for was, _ in self.away.values() if was is not None}

    def _save(self, state: State) -> None:
        state.put("introduced", self.introduced.save())
        state.facts.update(
            watch=self.watch.save(),
            grouped=self.grouped,
            away={c: list(told) for c, told in self.away.items()},
            strays=dict(self._strays),
            due=self._due,
            tries=self._tries,
            disagree=list(self._disagree),
        )

    def _load(self, state: State) -> None:
        facts = state.facts
        self.introduced.load(state.within("introduced"))
        self.watch.load(facts["watch"])
        self.grouped = bool(facts["grouped"])
        self.away = {c: (was, int(since)) for c, (was, since) in facts["away"].items()}
        self._strays = {c: int(since) for c, since in facts["strays"].items()}
        self._due, self._tries = int(facts["due"]), int(facts["tries"])
        self._disagree = list(facts["disagree"])
