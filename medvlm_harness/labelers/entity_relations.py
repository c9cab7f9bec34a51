"""Which entity modifies which, what lies where, and which diagnosis is offered for what: rules of adjacency.

There is no parser behind them: entities that stand side by side form a phrase, and the words between two phrases say
how they hang together. What comes out is approximate, and files that hold it say so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from medvlm_harness.labelers.lexicon import Kind, lexicon

if TYPE_CHECKING:
    from spacy.tokens import Doc

__all__ = ["link"]

Relation = tuple[str, int]
_NOUNS = frozenset({"findings", "devices"})
_DEVICE_PARTS = frozenset({"tip", "port", "lead", "sidehole", "side-hole", "sideport", "side-port"})
_STATES = frozenset({"position", "placement", "alignment", "in place"})  # of a device, rather than findings
_COMPARATIVES = frozenset({"greater", "worse", "larger", "more", "less"})
_SIDES = frozenset({"left", "right", "l", "r", "lt", "rt", "left-sided", "right-sided"})
_ARTICLES = frozenset({"the", "a", "an"})


class Entity(Protocol):
    """What is looked at of an entity; tokens [start, end]."""

    start: int
    end: int
    kind: Kind
    group: str
    word: str


@dataclass(slots=True)
class _Phrase:
    """Entities without a word between them."""

    members: list[int]
    head: int | None = None  # the observation that the phrase is about
    places: list[int] = field(default_factory=list)  # heads of its anatomy
    anatomy: list[int] = field(default_factory=list)


def link(doc: Doc, entities: Sequence[Entity]) -> list[list[Relation]]:
    """For each entity, in order, its relations: `modify`, `located_at` or `suggestive_of`, and the target's position.

    Args:
        doc: the parsed tokens; relations never leave a sentence.
        entities: in order of place, without overlap.
    """
    linker = _Linker(doc, entities)
    bounds = [sentence.end for sentence in doc.sents]
    current: list[int] = []
    sentence = 0
    for position, entity in enumerate(entities):
        while entity.start >= bounds[sentence]:
            linker.sentence(current)
            current = []
            sentence += 1
        current.append(position)
    linker.sentence(current)
    return [sorted(relations, key=lambda r: (r[1], r[0])) for relations in linker.relations]


class _Linker:
    def __init__(self, doc: Doc, entities: Sequence[Entity]) -> None:
        self.doc, self.entities = doc, entities
        self.lists = lexicon().lists
        self.relations: list[list[Relation]] = [[] for _ in entities]

    # --- small steps

    def add(self, kind: str, source: int, target: int) -> None:
        if source != target and (kind, target) not in self.relations[source]:
            self.relations[source].append((kind, target))

    def modifies(self, source: int) -> bool:
        return any(kind == "modify" for kind, _ in self.relations[source])

    def located(self, source: int) -> bool:
        return any(kind == "located_at" for kind, _ in self.relations[source])

    def word(self, position: int) -> str:
        return self.entities[position].word

    def group(self, position: int) -> str:
        return self.entities[position].group

    def anatomical(self, position: int) -> bool:
        return self.entities[position].kind == "Anatomy"

    def gap(self, left: int, right: int) -> list[str]:
        """The words between two entities, in lower case."""
        return [token.lower_ for token in self.doc[self.entities[left].end + 1 : self.entities[right].start]]

    # --- one sentence

    def sentence(self, positions: list[int]) -> None:
        if not positions:
            return
        compared = self.comparison(positions)
        phrases = [self.phrase(members) for members in self.runs([p for p in positions if p not in compared])]
        if not phrases:
            return
        self.heading = self.find_heading(phrases)
        self.main: int | None = None  # the finding that later diagnoses are offered for
        self.offered = False
        self.predicated = False  # the subject has been spoken of: "and the hila" begins anew
        subject: _Phrase | None = None
        for number, phrase in enumerate(phrases):
            previous = phrases[number - 1] if number else None
            subject = self.attach(phrase, previous, subject)
        self.settle_comparison(compared, phrases)
        if self.heading is not None:
            for phrase in phrases[1:]:
                if phrase.head is not None and not (self.located(phrase.head) or self.modifies(phrase.head)):
                    self.locate([phrase.head], self.heading.places)

    def runs(self, positions: Sequence[int]) -> Iterable[list[int]]:
        run: list[int] = []
        for position in positions:
            starts_place = run and self.group(position) == "prepositions" and not self.anatomical(run[-1])
            if run and (self.gap(run[-1], position) or starts_place):
                yield run
                run = []
            run.append(position)
        if run:
            yield run

    def phrase(self, members: list[int]) -> _Phrase:
        """Links inside a phrase: anatomy to its organ, observations to the last of them, that one to the places."""
        phrase = _Phrase(members, anatomy=[p for p in members if self.anatomical(p)])
        observed = [p for p in members if not self.anatomical(p)]
        for stretch in self.anatomy_stretches(members):
            phrase.places.append(self.link_anatomy(stretch))
        if not observed:
            return phrase
        head = self.observation_head(observed)
        phrase.head = head
        for k, position in enumerate(observed):
            if position == head:
                continue
            following = observed[k + 1] if k + 1 < len(observed) else head
            grades = self.grades(position) and following != position and not self.gap(position, following)
            self.add("modify", position, following if grades and following > position else head)
        located = head
        parts = [p for p in observed if self.word(p) in _DEVICE_PARTS and p != head]
        self.locate([located], phrase.places)
        phrase.head = parts[-1] if parts and self.group(head) == "devices" else head
        return phrase

    def grades(self, position: int) -> bool:
        """An adverb: it grades the next word, not the noun."""
        entity = self.entities[position]
        text = self.doc[entity.start].lower_
        return text.endswith("ly") and text != entity.word

    def observation_head(self, observed: Sequence[int]) -> int:
        last = observed[-1]
        if self.word(last) in self.lists["nouns_of_change"] and len(observed) > 1:
            described = observed[-2]
            if self.group(described) == "descriptors" and self.word(described) not in ("little", "minimal", "new"):
                return described
        if self.word(last) in _DEVICE_PARTS and len(observed) > 1 and self.group(observed[-2]) == "devices":
            return observed[-2]
        return last

    def anatomy_stretches(self, members: Sequence[int]) -> Iterable[list[int]]:
        """Anatomy side by side; a place word behind an organ begins anew where another organ follows."""
        stretch: list[int] = []
        for k, position in enumerate(members):
            if not self.anatomical(position):
                if stretch:
                    yield stretch
                stretch = []
                continue
            rest = [p for p in members[k + 1 :] if self.anatomical(p)]
            again = self.group(position) == "places" and any(self.group(p) == "organs" for p in rest)
            if stretch and again and any(self.group(p) == "organs" for p in stretch):
                yield stretch
                stretch = []
            stretch.append(position)
        if stretch:
            yield stretch

    def link_anatomy(self, stretch: Sequence[int]) -> int:
        organs = [p for p in stretch if self.group(p) in ("organs", "abbreviations")]
        parts = [p for p in stretch if self.group(p) == "parts"]
        head = (organs or parts or list(stretch))[-1]
        for position in stretch:
            self.add("modify", position, head)
        return head

    # --- between phrases

    def attach(self, phrase: _Phrase, previous: _Phrase | None, subject: _Phrase | None) -> _Phrase | None:
        """Link a phrase to what stands before it; gives back the subject of what comes next."""
        if previous is None:
            self.main = phrase.head
            return phrase
        between = self.gap(previous.members[-1], phrase.members[0])
        begins = self.entities[phrase.members[0]]
        offer = self.offers(between)
        if phrase.head is None:
            return self.attach_place(phrase, previous, subject, between)
        if self.word(phrase.head) in _DEVICE_PARTS and phrase.members == [phrase.head]:
            self.to_device(phrase.head, phrase)
            return phrase
        if self.describing(previous) and (between == ["if", "any"] or self.only(between, "joins")):
            self.add("modify", previous.head, phrase.head)  # "small , loculated effusion"
            self.main = phrase.head
            return phrase
        # "pleural or pericardial effusion", "heart and mediastinum normal": the places belong together.
        if previous.head is None and self.only(between, "joins") and self.anatomical(phrase.members[0]):
            self.share(previous, phrase)
            return phrase
        if self.word(phrase.head) in _STATES and self.in_state(phrase, previous, between):
            return subject
        if previous.head is not None and self.of_change(previous.head, phrase.head, between):
            return phrase
        if self.group(phrase.head) == "measures":
            self.measure(phrase.head, previous)
            return subject
        if previous.head is not None and self.group(previous.head) == "measures" and between[:1] == ["of"]:
            self.relations[previous.head] = [("modify", phrase.head)]
            self.main = phrase.head
            return phrase
        noun = self.group(phrase.head) in _NOUNS
        if self.main is not None and noun and (offer or (self.offered and self.goes_on(between))):
            self.add("suggestive_of", self.main, phrase.head)
            self.offered = True
            return subject
        self.offered = False
        if {"versus", "vs"} & set(between) and not phrase.places:
            self.locate([phrase.head], previous.places)
        parts_only = phrase.anatomy and all(self.group(p) == "parts" for p in phrase.anatomy)
        if parts_only and previous.head is None:
            self.reheaded(phrase, previous)
            self.main = phrase.head if self.main is None else self.main
            return phrase
        stated = self.states(between)
        if stated and subject is not None and not (noun and subject.head is not None):
            if subject.head is not None and not noun:
                if subject.places == [] or self.group(subject.head) in _NOUNS:
                    self.describe(phrase, subject.head)
                    self.predicated = True
                    return subject
            if subject.places:
                self.predicated = True
                self.sided(phrase, subject)
                self.locate([phrase.head], [p for p in subject.places if not self.modifies(p)] or subject.places)
                self.main = phrase.head if self.main is None else self.main
                return _Phrase(phrase.members, phrase.head, subject.places, subject.anatomy)
        if not noun and between[:1] == [","] and subject is not None and not phrase.anatomy and begins is not None:
            target = subject.head if subject.head is not None else None
            if target is not None:
                self.describe(phrase, target)
                return subject
        if noun or self.main is None:
            self.main = phrase.head
        return phrase

    def attach_place(
        self, phrase: _Phrase, previous: _Phrase, subject: _Phrase | None, between: Sequence[str]
    ) -> _Phrase | None:
        """A phrase of anatomy alone: the rest of another place, where something lies, or what is spoken of next."""
        if previous.anatomy and previous.members[-1] in previous.anatomy and between[:1] == ["of"]:
            self.merge(previous, phrase)
            return subject
        anew = self.predicated and "the" in between
        joined = self.only(between, "joins") and not anew
        if joined and previous.anatomy and previous.members[-1] in previous.anatomy:
            holder = self.holder(previous, subject)
            self.share_parts(previous, phrase)
            if holder is not None:
                self.locate([holder], phrase.places)
            if previous.head is None:
                places = [*previous.places, *(p for p in phrase.places if p not in previous.places)]
                return _Phrase([*previous.members, *phrase.members], None, places, [*previous.anatomy, *phrase.anatomy])
            return subject
        if self.group(previous.members[-1]) == "prepositions":
            previous.places = list(phrase.places)
            for position in previous.members:
                if self.group(position) == "prepositions":
                    self.relations[position] = [("modify", phrase.places[0])]
            holder = self.holder(previous, subject)
            if holder is not None:
                self.relations[holder] = [r for r in self.relations[holder] if self.group(r[1]) != "prepositions"]
                self.locate([holder], phrase.places)
            return subject
        inner = [p for p in phrase.anatomy if self.group(p) == "parts"]
        leads = next((word for word in reversed(between) if word in self.lists["prepositions"]), None)
        if leads == "in" and inner == phrase.anatomy and subject is not None and subject.places:
            for position in phrase.anatomy:
                self.add("modify", position, subject.places[0])
            return subject
        holder = self.holder(previous, subject)
        if leads is not None or self.group(phrase.members[0]) == "prepositions":
            if holder is not None:
                self.locate([holder], phrase.places)
                return subject
            return phrase
        if holder is not None and not between:
            self.locate([holder], phrase.places)
            return subject
        self.predicated = False
        return phrase

    def to_device(self, part: int, phrase: _Phrase) -> None:
        """`feeding tube with tip`: the part belongs to the device before it."""
        devices = [p for p in range(part) if self.group(p) == "devices" and self.same_sentence(p, phrase)]
        if heads := [p for p in devices if not self.modifies(p)]:
            self.add("modify", part, heads[-1])

    def describing(self, phrase: _Phrase) -> bool:
        """Adjectives alone, which nothing carries yet."""
        head = phrase.head
        if head is None or phrase.anatomy or self.relations[head]:
            return False
        return all(self.group(p) == "descriptors" for p in phrase.members)

    def sided(self, phrase: _Phrase, subject: _Phrase) -> None:
        """`the lungs are clear bilaterally`: a side in the predicate belongs to what is spoken of."""
        if phrase.head is None or not phrase.anatomy or any(self.group(p) != "places" for p in phrase.anatomy):
            return
        self.relations[phrase.head] = [r for r in self.relations[phrase.head] if r[0] != "located_at"]
        for position in phrase.anatomy:
            self.relations[position] = [("modify", subject.places[0])]

    def holder(self, previous: _Phrase, subject: _Phrase | None) -> int | None:
        """The finding that a place behind it belongs to."""
        if previous.head is not None:
            head = previous.head
            for kind, target in self.relations[head]:
                if kind == "modify" and not self.anatomical(target) and self.word(head) not in _DEVICE_PARTS:
                    return target
            return head
        return subject.head if subject is not None else None

    def locate(self, sources: Iterable[int], places: Iterable[int]) -> None:
        targets = list(places)
        for source in sources:
            for place in targets:
                self.add("located_at", source, place)

    def merge(self, first: _Phrase, second: _Phrase) -> None:
        """`apical segment of the left lower lobe`: one place, whose head is the latter's."""
        head = second.places[0]
        old = set(first.places)
        for position in first.anatomy:
            self.relations[position] = [("modify", head)]
        for relations in self.relations:
            relations[:] = [(k, head) if k == "located_at" and t in old else (k, t) for k, t in relations]
        first.places = [head]

    def share(self, first: _Phrase, second: _Phrase) -> None:
        """Two places before one finding."""
        if second.head is not None:
            self.locate([second.head], first.places)
        self.share_parts(first, second)
        second.places = [*first.places, *second.places]

    def share_parts(self, first: _Phrase, second: _Phrase) -> None:
        """`Cardiac and hilar contours`: the part belongs to both organs."""
        named = any(self.group(p) == "parts" for p in first.anatomy)
        for position in second.anatomy:
            if self.group(position) == "parts" and self.modifies(position) and not named:
                for place in first.places:
                    self.add("modify", position, place)

    def reheaded(self, phrase: _Phrase, place: _Phrase) -> None:
        """`Mediastinum : normal width`: the part belongs to the place that was named before."""
        if phrase.head is None:
            return
        self.relations[phrase.head] = [r for r in self.relations[phrase.head] if r[0] != "located_at"]
        for position in phrase.anatomy:
            self.relations[position] = [("modify", target) for target in place.places[:1]]
        self.locate([phrase.head], place.places)

    def in_state(self, phrase: _Phrase, previous: _Phrase, between: Sequence[str]) -> bool:
        """`in satisfactory position`, `placement of`: about the device before; whether there is one."""
        devices = [p for p in range(phrase.members[0]) if self.group(p) == "devices" and self.same_sentence(p, phrase)]
        heads = [p for p in devices if not self.modifies(p)]
        if not heads or phrase.head is None:
            return False
        self.add("modify", phrase.head, heads[-1])
        return True

    def same_sentence(self, position: int, phrase: _Phrase) -> bool:
        first, last = self.entities[position].start, self.entities[phrase.members[0]].start
        return not any(token.is_sent_start for token in self.doc[first + 1 : last + 1])

    def of_change(self, first: int, second: int, between: Sequence[str]) -> bool:
        """`no change in X`, `placement of X`: the first is said of the second."""
        leads = between[:1]
        change = self.word(first) in (*self.lists["denied_changes"], *self.lists["nouns_of_change"])
        increase = self.word(first) in ("increase", "decrease", "improvement", "worsening", "progression")
        if ((change or increase) and leads in (["in"], ["of"])) or (self.word(first) in _STATES and leads == ["of"]):
            self.relations[first] = [("modify", second)]
            self.main = second
            return True
        return False

    def measure(self, position: int, previous: _Phrase) -> None:
        target = previous.head if previous.head is not None else self.main
        if target is not None:
            self.add("modify", position, target)

    def describe(self, phrase: _Phrase, target: int) -> None:
        """A predicate about a finding; what it located in its own phrase stays."""
        if phrase.head is not None:
            self.add("modify", phrase.head, target)

    def offers(self, between: Sequence[str]) -> bool:
        text = f" {' '.join(between)} "
        return any(f" {offer} " in text for offer in self.lists["offers"])

    def goes_on(self, between: Sequence[str]) -> bool:
        allowed = self.lists["joins"] | self.lists["fillers"] | {"less", "likely", "possibly", "even", "early"}
        return all(word in allowed for word in between)

    def states(self, between: Sequence[str]) -> bool:
        """Whether a verb links what stands on both sides, or nothing but fillers does."""
        if any(word in (",", ";", "but", "with") for word in between[-1:]):
            return False
        copulas = self.lists["copulas"]
        return any(word in copulas for word in between) or not between or between in (["not"], [":"], ["within"])

    def only(self, between: Sequence[str], name: str) -> bool:
        words = self.lists[name]
        return any(word in words for word in between) and all(word in words or word in _ARTICLES for word in between)

    def find_heading(self, phrases: Sequence[_Phrase]) -> _Phrase | None:
        """`Bones : ...`: anatomy before a colon is where the rest of the sentence is."""
        first = phrases[0]
        if first.head is None and len(phrases) > 1:
            between = self.gap(first.members[-1], phrases[1].members[0])
            if between[:1] == [":"]:
                return first
        return None

    # --- "right greater than left"

    def comparison(self, positions: Sequence[int]) -> tuple[int, ...]:
        for first, word, second in zip(positions, positions[1:], positions[2:], strict=False):
            if (
                self.word(first) in _SIDES
                and self.word(second) in _SIDES
                and self.word(word) in _COMPARATIVES
                and not self.gap(first, word)
                and self.gap(word, second) == ["than"]
            ):
                return first, word, second
        return ()

    def settle_comparison(self, compared: Sequence[int], phrases: Sequence[_Phrase]) -> None:
        if not compared:
            return
        first, word, second = compared
        heads = [p.head for p in phrases if p.head is not None and p.members[0] < first]
        finding = next((h for h in reversed(heads) if self.located(h)), heads[-1] if heads else None)
        self.add("located_at", word, first)
        if finding is None:
            return
        self.add("modify", word, finding)
        for kind, place in list(self.relations[finding]):
            if kind == "located_at":
                self.add("modify", first, place)
                self.add("modify", second, place)
                return
        self.locate([finding], [first, second])
