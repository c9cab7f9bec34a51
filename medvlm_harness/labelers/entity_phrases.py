"""Entities that stand side by side as one phrase: the observation it is about, and the places it names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from medvlm_harness.labelers.lexicon import Kind, lexicon

if TYPE_CHECKING:
    from spacy.tokens import Doc

__all__ = ["DEVICE_PARTS", "NOUNS", "Entity", "Phrase", "Relation", "Relations"]

Relation = tuple[str, int]  # type, position of the target in the list of entities
NOUNS = frozenset({"findings", "devices"})
DEVICE_PARTS = frozenset({"tip", "port", "lead", "sidehole", "side-hole", "sideport", "side-port"})


class Entity(Protocol):
    """What is looked at of an entity; tokens [start, end]."""

    start: int
    end: int
    kind: Kind
    group: str
    word: str


@dataclass(slots=True)
class Phrase:
    """Entities without a word between them; all numbers are positions in the list of entities."""

    members: list[int]
    head: int | None = None  # the observation that the phrase is about; None where it names places alone
    places: list[int] = field(default_factory=list)  # heads of its anatomy
    anatomy: list[int] = field(default_factory=list)


class Relations:
    """The relations found so far, and how a phrase is made."""

    def __init__(self, doc: Doc, entities: Sequence[Entity]) -> None:
        self.doc, self.entities = doc, entities
        self.lists = lexicon().lists
        self.found: list[list[Relation]] = [[] for _ in entities]

    def add(self, kind: str, source: int, target: int) -> None:
        """One relation, unless it is there or would point at itself."""
        if source != target and (kind, target) not in self.found[source]:
            self.found[source].append((kind, target))

    def locate(self, source: int, places: Iterable[int]) -> None:
        """An observation at each of some places."""
        for place in places:
            self.add("located_at", source, place)

    def unlocate(self, source: int) -> None:
        """Take back where an observation is."""
        self.found[source] = [relation for relation in self.found[source] if relation[0] != "located_at"]

    def modifies(self, source: int) -> bool:
        """Whether it modifies something already."""
        return any(kind == "modify" for kind, _ in self.found[source])

    def located(self, source: int) -> bool:
        """Whether it lies somewhere already."""
        return any(kind == "located_at" for kind, _ in self.found[source])

    def word(self, position: int) -> str:
        """As the lexicon spells it."""
        return self.entities[position].word

    def group(self, position: int) -> str:
        """The list of the lexicon that it stands in."""
        return self.entities[position].group

    def anatomical(self, position: int) -> bool:
        """Whether it is a place."""
        return self.entities[position].kind == "Anatomy"

    def gap(self, left: int, right: int) -> list[str]:
        """The words between two entities, in lower case; a word taken out for privacy (XXXX) is none."""
        between = self.doc[self.entities[left].end + 1 : self.entities[right].start]
        return [token.lower_ for token in between if set(token.lower_) != {"x"}]

    def phrases(self, positions: Sequence[int]) -> list[Phrase]:
        """The phrases of a sentence, with the links inside each."""
        runs: list[list[int]] = []
        for position in positions:
            apart = runs and (self.gap(runs[-1][-1], position) or self._landmark_begins(runs[-1][-1], position))
            if runs and not apart:
                runs[-1].append(position)
            else:
                runs.append([position])
        return [self._phrase(run) for run in runs]

    def _landmark_begins(self, before: int, position: int) -> bool:
        return self.group(position) == "prepositions" and not self.anatomical(before)

    def _phrase(self, members: list[int]) -> Phrase:
        """Anatomy to its organ, observations to the one they describe, and that one to the places."""
        phrase = Phrase(members, anatomy=[p for p in members if self.anatomical(p)])
        phrase.places = [self._link_anatomy(stretch) for stretch in self._stretches(members)]
        observed = [p for p in members if not self.anatomical(p)]
        if not observed:
            return phrase
        head = self._head(observed)
        for k, position in enumerate(observed):
            following = observed[k + 1] if k + 1 < len(observed) else head
            grades = self._is_adverb(position) and not self.gap(position, following)
            self.add("modify", position, following if grades and position != head else head)
        self.locate(head, phrase.places)
        # "ET tube tip": the tip is where the tube ends, and what is said next is said of it.
        parts = [p for p in observed if self.word(p) in DEVICE_PARTS and p != head]
        phrase.head = parts[-1] if parts and self.group(head) == "devices" else head
        return phrase

    def _is_adverb(self, position: int) -> bool:
        """It grades the next word, not the noun."""
        entity = self.entities[position]
        text: str = self.doc[entity.start].lower_
        return text.endswith("ly") and text != entity.word

    def _head(self, observed: Sequence[int]) -> int:
        last = observed[-1]
        if len(observed) > 1:
            described = observed[-2]
            of_change = self.word(last) in self.lists["nouns_of_change"] and self.group(described) == "descriptors"
            if of_change and self.word(described) not in self.lists["degrees_of_change"]:
                return described  # "degenerative changes", but not "little change"
            if self.word(last) in DEVICE_PARTS and self.group(described) == "devices":
                return described
        nouns = [p for p in observed if self.group(p) in NOUNS]
        return nouns[-1] if nouns else last  # "opacities decreased"

    def _stretches(self, members: Sequence[int]) -> Iterable[list[int]]:
        """Anatomy side by side; a place word behind an organ begins anew where another organ follows."""
        stretch: list[int] = []
        for k, position in enumerate(members):
            if not self.anatomical(position):
                if stretch:
                    yield stretch
                stretch = []
                continue
            organ_follows = any(self.group(p) == "organs" for p in members[k + 1 :])
            organ_before = any(self.group(p) == "organs" for p in stretch)
            if organ_before and organ_follows and self.group(position) == "places":
                yield stretch
                stretch = []
            stretch.append(position)
        if stretch:
            yield stretch

    def _link_anatomy(self, stretch: Sequence[int]) -> int:
        """Everything modifies the last organ; without one, the last part; without that, the last word."""
        organs = [p for p in stretch if self.group(p) in ("organs", "abbreviations")]
        parts = [p for p in stretch if self.group(p) == "parts"]
        head = (organs or parts or list(stretch))[-1]
        for position in stretch:
            self.add("modify", position, head)
        return head
