"""The iterative lookup: whom to ask next for the peers nearest to some keys, and when that is enough.

Kademlia's (Maymounkov and Mazières, IPTPS 2002, §2.3), over d disjoint paths as in S/Kademlia (Baumgart and
Mies, ICPADS 2007, §4.4): no peer is asked on two paths, so that liars capture the paths they are on and no
other; where a read finds nothing, as many paths again begin from peers that were passed over for nearer ones.
Several keys are looked up at once, and one query to a peer carries every key it is wanted for. Where there
are others, peers of one network prefix count only up to a bound among the nearest, which is what ids ground
to lie next to a key run into. Who is told of at different addresses is tried at each, so that naming an
honest peer at a wrong one does not hide it.

A query has two deadlines. Past the soft one another peer is asked in its place, but its answer still counts;
past the hard one, the caller's, it has failed. So a dead peer costs one soft wait, not a full timeout.

Pure: contacts, answers and times in, queries out.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from petalite.dht.contacts import Contact, Scope
from petalite.dht.keys import DhtKey

MAX_KEYS_PER_QUERY = 16
# A path settles once this part of k has answered, be it the only one: the rest is asked all at once.
_MIN_SPLIT = 4
_UNION = -1  # the number of what all paths found together
_MAX_ELSEWHERE = 3  # further addresses of one peer that are tried


@dataclass(frozen=True, slots=True)
class LookupSettings:
    """How wide and how long a lookup searches."""

    k: int = 20  # the nearest peers that are to answer
    alpha: int = 3  # unanswered queries within their soft deadline, per path
    paths: int = 4  # disjoint paths
    again: bool = False  # where they find no records, over as many more, from peers not asked until then
    holders: int | None = None  # stop each path after this many peers with records; None: hear all k nearest
    per_prefix: int | None = 2  # peers of one public prefix among the nearest, if there are others; None: any
    max_queries: int = 160  # per key: an endless row of ever nearer peers is a lie
    max_in_flight: int = 40  # over all keys


class State(Enum):
    NEW = 0
    ASKED = 1
    SLOW = 2  # asked, and past its soft deadline
    ANSWERED = 3
    FAILED = 4


@dataclass(slots=True, eq=False)
class Candidate:
    """One peer, as one key's search sees it."""

    contact: Contact
    distance: int
    prefix: bytes | None  # its network's, where that counts for diversity
    state: State = State.NEW
    path: int | None = None  # the path that asked it
    holds: bool = False  # it answered with records
    elsewhere: list[Contact] = field(default_factory=list)  # where others say it is

    def __lt__(self, other: Candidate) -> bool:
        return self.distance < other.distance


@dataclass(frozen=True, slots=True, eq=False)
class Query:
    """Ask `contact` for these keys."""

    contact: Contact
    keys: tuple[DhtKey, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a peer said about one key."""

    contacts: Sequence[Contact]  # the nearest it knows, at most k; already cleaned of what it may not tell
    holds: bool = False  # it gave records that stood every check


@dataclass(slots=True)
class _Path:
    """One disjoint path: the peers it has heard of, nearest first."""

    number: int
    width: int  # how many of its nearest are to answer
    alpha: int  # queries it may have waiting within their soft deadline
    candidates: list[Candidate] = field(default_factory=list)
    heard_of: set[DhtKey] = field(default_factory=set)
    n_asked: int = 0  # of its own queries, how many wait within their soft deadline
    n_slow: int = 0  # and how many beyond it
    n_holders: int = 0  # and how many brought records


@dataclass(frozen=True, slots=True)
class _Survey:
    """Where a path stands."""

    frontier: list[Candidate]  # its nearest peers that may still answer
    settled: bool


class Search:
    """The lookup of one key: d paths, each until it has settled;
    then what they found together, as one more."""

    def __init__(
        self, key: DhtKey, own_id: DhtKey, seeds: Iterable[Contact], settings: LookupSettings
    ) -> None:
        self.key = key
        self.n_queries = 0
        self._n_answered = 0
        self._own_id = own_id
        self._settings = settings
        self._known: dict[DhtKey, Candidate] = {}
        self._again = settings.again
        self._paths: list[_Path] = []
        self._union = _Path(_UNION, settings.k, settings.k)  # what is left to ask is asked at once (§2.3)
        # By path; made anew after every answer, failure or soft deadline.
        self._surveys: dict[int, _Survey] = {}
        self._open_paths(sorted(seeds, key=lambda seed: seed.node_id ^ key))

    # -- what the coordinator asks -------------------------------------------------------------------

    @property
    def done(self) -> bool:
        if self.n_queries >= self._settings.max_queries:
            return not any(c.state is State.ASKED for c in self._known.values())
        return all(self._survey(path).settled for path in self._active())

    def next_candidate(self) -> Candidate | None:
        """The nearest peer that a path with a query to spare wants asked."""
        for path in self._active():
            survey = self._survey(path)
            if path.n_asked < path.alpha and not survey.settled:
                for candidate in survey.frontier:
                    if candidate.state is State.NEW:
                        return self._claim(candidate, path)
        return None

    def claim(self, contact: Contact) -> bool:
        """Whether some path wants this peer asked too, now that it is asked, there, for another key."""
        candidate = self._known.get(contact.node_id)
        if candidate is None or candidate.state is not State.NEW or candidate.contact != contact:
            return False
        candidate.contact = contact
        for path in self._active():
            survey = self._survey(path)
            if not survey.settled and candidate in survey.frontier:
                return self._claim(candidate, path) is not None
        return False

    def answered(self, contact: Contact, answer: Answer) -> None:
        """The peer answered. `contact` says where it was reached."""
        candidate = self._known[contact.node_id]
        if candidate.state is State.ANSWERED:
            return  # it was asked at two addresses, and has answered at both
        if candidate.path is None:  # given up here, and not yet asked elsewhere: whoever heard of it gains
            hearing = (path.number for path in self._paths if contact.node_id in path.heard_of)
            candidate.path = next(hearing, _UNION)
        path = self._become(candidate, State.ANSWERED)
        candidate.contact, candidate.prefix, candidate.holds = contact, _prefix(contact), answer.holds
        path.n_holders += answer.holds
        self._n_answered += 1
        for told in answer.contacts[: self._settings.k]:
            self._learn(told, path)

    def failed(self, contact: Contact) -> None:
        """The peer did not answer there."""
        self._give_up(contact, State.FAILED)

    def slow(self, contact: Contact) -> None:
        """Its soft deadline passed: another takes its place, and its answer is still welcome."""
        self._give_up(contact, State.SLOW)

    # -- the outcome ---------------------------------------------------------------------------------

    @property
    def nearest(self) -> list[Contact]:
        """The peers that answered, nearest first, at most k."""
        answered = [c for c in self._survey(self._union).frontier if c.state is State.ANSWERED]
        return [candidate.contact for candidate in sorted(answered)]

    @property
    def holders(self) -> list[Contact]:
        """The peers that gave records, nearest first."""
        return [candidate.contact for candidate in self._union.candidates if candidate.holds]

    @property
    def absent(self) -> bool:
        """Whether most paths that lead anywhere were heard, and none had a record. A record proves itself,
        wherever it comes from; that there is none is believed only of a majority, as one path may be in the
        hands of liars."""
        if not self._known:
            return True  # nobody else is there
        leading = heard = 0
        for path in self._paths:
            own = [
                c for c in path.candidates if c.path in (None, path.number) and c.state is not State.FAILED
            ]
            leading += bool(own)
            heard += any(c.state is State.ANSWERED for c in own)
        return 2 * heard > leading and not self.holders

    # -- inside --------------------------------------------------------------------------------------

    def _open_paths(self, contacts: Sequence[Contact]) -> None:
        """d more, with the contacts dealt out among them."""
        settings, first = self._settings, len(self._paths)
        width = -(-settings.k // max(settings.paths, _MIN_SPLIT))
        self._paths += [_Path(first + number, width, settings.alpha) for number in range(settings.paths)]
        for number, contact in enumerate(contacts):
            self._learn(contact, self._paths[first + number % settings.paths])

    def _learn(self, contact: Contact, path: _Path) -> None:
        node_id = contact.node_id
        candidate = self._known.get(node_id)
        if candidate is None:
            if node_id == self._own_id:
                return
            candidate = self._known[node_id] = Candidate(contact, node_id ^ self.key, _prefix(contact))
            insort(self._union.candidates, candidate)
        elif candidate.contact is not contact:
            self._learn_elsewhere(candidate, contact)
        if node_id not in path.heard_of:
            path.heard_of.add(node_id)
            if path is not self._union:
                insort(path.candidates, candidate)

    def _learn_elsewhere(self, candidate: Candidate, contact: Contact) -> None:
        known = (candidate.contact, *candidate.elsewhere)
        if candidate.state is not State.ANSWERED and len(known) <= _MAX_ELSEWHERE and contact not in known:
            candidate.elsewhere.append(contact)
            if candidate.state in (State.FAILED, State.SLOW):
                self._give_up(candidate.contact, candidate.state)

    def _give_up(self, contact: Contact, state: State) -> None:
        """On this address: there may be another."""
        candidate = self._known[contact.node_id]
        if candidate.contact is not contact or candidate.state is State.ANSWERED:
            return  # it has been asked elsewhere since
        if candidate.elsewhere:
            self._become(candidate, State.NEW)
            candidate.contact, candidate.path = candidate.elsewhere.pop(0), None
            candidate.prefix = _prefix(candidate.contact)
        else:
            self._become(candidate, state)

    def _claim(self, candidate: Candidate, path: _Path) -> Candidate | None:
        if self.n_queries >= self._settings.max_queries:
            return None
        candidate.path = path.number
        self._become(candidate, State.ASKED)
        self.n_queries += 1
        return candidate

    def _become(self, candidate: Candidate, state: State) -> _Path:
        """Keeps the counts of the path that asked; returns it."""
        assert candidate.path is not None, "a peer that nobody asked"
        path = self._union if candidate.path == _UNION else self._paths[candidate.path]
        path.n_asked += (state is State.ASKED) - (candidate.state is State.ASKED)
        path.n_slow += (state is State.SLOW) - (candidate.state is State.SLOW)
        candidate.state = state
        if state is not State.ASKED:
            self._surveys.clear()  # while asking, what was seen before will do: an answer is sure to follow
        return path

    def _active(self) -> list[_Path]:
        """The paths; once they have settled, what they found together, unless what they hold is enough."""
        if not all(self._survey(path).settled for path in self._paths):
            return self._paths
        if self._settings.holders is not None and self.holders:
            return []
        if self._again and not self.holders and self._survey(self._union).settled:
            # Liars may have taken every path before it came near the key; honest peers that were passed over
            # for those they named are known, and where there is nothing, they say so too.
            self._again = False
            self._open_paths([c.contact for c in self._union.candidates if c.state is State.NEW])
            return self._paths
        return [self._union]

    def _survey(self, path: _Path) -> _Survey:
        survey = self._surveys.get(path.number)
        if survey is None:
            survey = self._surveys[path.number] = self._look(path)
        return survey

    def _look(self, path: _Path) -> _Survey:
        alone = path is not self._union  # the union of all paths looks at what any of them asked
        per_prefix = self._settings.per_prefix
        prefixes: dict[bytes, int] = {}
        frontier: list[Candidate] = []
        crowded: list[Candidate] = []
        for candidate in path.candidates:
            if len(frontier) == path.width:
                break
            state = candidate.state
            if state is State.FAILED or state is State.SLOW:
                continue
            if alone and candidate.path is not None and candidate.path != path.number:
                continue
            if candidate.prefix is not None and per_prefix is not None:
                count = prefixes.get(candidate.prefix, 0)
                if count >= per_prefix:
                    crowded.append(candidate)
                    continue
                prefixes[candidate.prefix] = count + 1
            frontier.append(candidate)
        frontier += crowded[: path.width - len(frontier)]  # where there is nobody else, as on one campus
        pending = any(candidate.state is not State.ANSWERED for candidate in frontier)
        full = len(frontier) == path.width
        # Where fewer are left, the slow ones can be done without if most peers are not slow.
        settled = not pending and (full or self._n_slow(path) <= self._n_answered)
        if alone and self._settings.holders is not None:
            settled = settled or path.n_holders >= self._settings.holders
        return _Survey(frontier, settled)

    def _n_slow(self, path: _Path) -> int:
        paths = [*self._paths, path] if path is self._union else [path]
        return sum(one.n_slow for one in paths)


def _prefix(contact: Contact) -> bytes | None:
    place = contact.place
    return place.prefix if place is not None and place.scope is Scope.GLOBAL else None


class Lookup:
    """Several keys looked up together. `soft_timeout_s` says how
    long to wait for a peer before asking another as well."""

    def __init__(
        self,
        seeds: Mapping[DhtKey, Iterable[Contact]],
        own_id: DhtKey,
        settings: LookupSettings,
        soft_timeout_s: Callable[[Contact], float],
    ) -> None:
        self.searches = {key: Search(key, own_id, near, settings) for key, near in seeds.items()}
        self._settings = settings
        self._soft_timeout_s = soft_timeout_s
        self._fresh: dict[Query, float] = {}  # unanswered queries, and their soft deadlines ahead
        self._turn = 0

    @property
    def done(self) -> bool:
        return all(search.done for search in self.searches.values())

    @property
    def wakeup_s(self) -> float | None:
        """When the next soft deadline passes."""
        return min(self._fresh.values(), default=None)

    def next_query(self, now_s: float) -> Query | None:
        """The next query to send now; None until an answer, a failure or `wakeup_s` changes something."""
        for query in [query for query, deadline_s in self._fresh.items() if deadline_s <= now_s]:
            del self._fresh[query]
            for key in query.keys:
                self.searches[key].slow(query.contact)
        if len(self._fresh) >= self._settings.max_in_flight:
            return None
        searches = list(self.searches.values())
        for offset in range(len(searches)):
            search = searches[(self._turn + offset) % len(searches)]
            candidate = None if search.done else search.next_candidate()
            if candidate is not None:
                self._turn += offset + 1  # so that no key waits for another to finish
                return self._query(search, candidate.contact, now_s)
        return None

    def answered(self, query: Query, contact: Contact, answers: Mapping[DhtKey, Answer]) -> None:
        """A peer answered. `contact` says where it was reached; a key without an answer failed."""
        self._fresh.pop(query, None)
        for key in query.keys:
            answer = answers.get(key)
            if answer is None:
                self.searches[key].failed(query.contact)
            else:
                self.searches[key].answered(contact, answer)

    def failed(self, query: Query) -> None:
        """The hard deadline passed, the link broke, or the peer broke a rule."""
        self._fresh.pop(query, None)
        for key in query.keys:
            self.searches[key].failed(query.contact)

    def _query(self, search: Search, contact: Contact, now_s: float) -> Query:
        keys = [search.key]
        for other in self.searches.values():
            if len(keys) < MAX_KEYS_PER_QUERY and other is not search and other.claim(contact):
                keys.append(other.key)
        query = Query(contact, tuple(keys))
        self._fresh[query] = now_s + self._soft_timeout_s(contact)
        return query
