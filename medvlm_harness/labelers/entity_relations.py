"""Which entity modifies which, what lies where, and which diagnosis is offered for what: rules of adjacency.

There is no parser behind them: entities side by side form a phrase, and the words between two phrases say how they hang
together. What comes out is approximate, and files that hold it say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from medvlm_harness.labelers.entity_phrases import DEVICE_PARTS, NOUNS, Entity, Phrase, Relation, Relations

if TYPE_CHECKING:
    from spacy.tokens import Doc

__all__ = ["link"]

_STATES = frozenset({"position", "placement", "alignment", "in place"})  # of a device
_COMPARATIVES = frozenset({"greater", "worse", "larger", "more", "less"})
_SIDES = frozenset({"left", "right", "l", "r", "lt", "rt", "left-sided", "right-sided"})
_ARTICLES = frozenset({"the", "a", "an"})
_LEFT_OPEN = 6  # words after a diagnosis among which "cannot be excluded" is sought


def link(doc: Doc, entities: Sequence[Entity]) -> list[list[Relation]]:
    """For each entity, in order, its relations: `modify`, `located_at` or `suggestive_of`, and the target's position.

    Args:
        doc: the parsed tokens; relations never leave a sentence.
        entities: in order of place, without overlap.
    """
    relations = Relations(doc, entities)
    ends = [sentence.end for sentence in doc.sents]
    sentence, positions = 0, list[int]()
    for position, entity in enumerate(entities):
        while entity.start >= ends[sentence]:
            _Sentence(relations).link(positions)
            sentence, positions = sentence + 1, []
        positions.append(position)
    _Sentence(relations).link(positions)
    return [sorted(found, key=lambda relation: (relation[1], relation[0])) for found in relations.found]


class _Sentence:
    """One sentence, read from left to right.

    `subject` is the phrase that a predicate would be about, `main` the finding that later diagnoses are offered for.
    """

    def __init__(self, relations: Relations) -> None:
        self.r = relations
        self.first = 0
        self.subject = Phrase([])
        self.main: int | None = None
        self.offered = False  # the phrase before was a diagnosis: the next in the list is one too
        self.predicated = False  # the subject has been spoken of: "and the hila" begins anew

    def link(self, positions: Sequence[int]) -> None:
        """Add all relations among these entities."""
        compared = self._comparison(positions)
        phrases = self.r.phrases([p for p in positions if p not in compared])
        if not phrases:
            return
        self.first = positions[0]
        self.subject, self.main = phrases[0], phrases[0].head
        for previous, phrase in pairwise(phrases):
            between = self.r.gap(previous.members[-1], phrase.members[0])
            if phrase.head is None:
                self._place(phrase, previous, between)
            else:
                self._finding(phrase, phrase.head, previous, between)
        self._settle_comparison(compared, phrases)
        self._settle_heading(phrases)

    # --- a phrase with an observation

    def _finding(self, phrase: Phrase, head: int, previous: Phrase, between: Sequence[str]) -> None:
        """The first rule that fits links the phrase to what stands before it."""
        follows_on = (
            self._part_of_device(phrase, head)
            or self._more_adjectives(phrase, head, previous, between)
            or self._shared_places(phrase, previous, between)
            or self._state_of_device(head)
            or self._said_of(head, previous, between)
            or self._measure(head, previous, between)
            or self._diagnosis(phrase, head, between)
            or self._part_of_place(phrase, head, previous)
            or self._predicate(phrase, head, between)
            or self._further_predicate(phrase, head, previous, between)
            or self._afterthought(phrase, head, between)
        )
        if not follows_on:
            if {"versus", "vs"} & set(between) and not phrase.places:
                self.r.locate(head, previous.places)
            self._begin(phrase, head)

    def _begin(self, phrase: Phrase, head: int) -> None:
        """The phrase is what comes next is about."""
        self.subject = phrase
        self.offered = False
        if self.main is None or self.r.group(head) in NOUNS:
            self.main = head

    def _part_of_device(self, phrase: Phrase, head: int) -> bool:
        """`feeding tube with tip`: the part belongs to the device before it."""
        if self.r.word(head) not in DEVICE_PARTS or phrase.members != [head]:
            return False
        device = self._device_before(head)
        if device is not None:
            self.r.add("modify", head, device)
        self._begin(phrase, head)
        return True

    def _more_adjectives(self, phrase: Phrase, head: int, previous: Phrase, between: Sequence[str]) -> bool:
        """`small , loculated effusion`: adjectives alone belong to the finding that they lead to."""
        adjective = previous.head
        if adjective is None or previous.anatomy:
            return False
        if self.r.word(adjective) == "upper" and list(between[:1]) in (["limits"], ["limit"]):
            places = [at for kind, at in self.r.found[adjective] if kind == "located_at"]
            self.r.found[adjective] = [("modify", head)]  # "upper limits of normal"
            self.r.locate(head, places)
            return True
        if self.r.found[adjective]:
            return False
        if any(self.r.group(p) != "descriptors" for p in previous.members):
            return False
        if not (list(between) == ["if", "any"] or self._only(between, "joins")):
            return False
        if phrase.places and self.r.group(head) not in NOUNS:
            self.r.locate(adjective, phrase.places)  # "tortuous and calcified aorta"
        else:
            self.r.add("modify", adjective, head)
        self.main, self.subject = head, Phrase([*previous.members, head], head, phrase.places, phrase.anatomy)
        return True

    def _shared_places(self, phrase: Phrase, previous: Phrase, between: Sequence[str]) -> bool:
        """`pleural or pericardial effusion`, `heart and mediastinum normal`: the finding is at each place."""
        if previous.head is not None or not self._only(between, "joins") or not self.r.anatomical(phrase.members[0]):
            return False
        listed = self._listed(previous)
        if phrase.head is not None:
            self.r.locate(phrase.head, listed.places)
        self._share_part(phrase, listed)
        phrase.places = [*listed.places, *phrase.places]
        self.subject, self.predicated = phrase, True
        self.main = phrase.head if self.main is None else self.main
        return True

    def _state_of_device(self, head: int) -> bool:
        """`in satisfactory position`: of the device before."""
        device = self._device_before(head) if self.r.word(head) in _STATES else None
        if device is None:
            return False
        self.r.add("modify", head, device)
        return True

    def _said_of(self, head: int, previous: Phrase, between: Sequence[str]) -> bool:
        """`no change in X`, `placement of X`, `12 mm of X`: the first is said of the second."""
        first = previous.head
        if first is None or list(between[:1]) not in (["in"], ["of"]):
            return False
        word, of = self.r.word(first), between[0] == "of"
        measure = self.r.group(first) == "measures" and of
        if not (word in self.r.lists["changes"] or (word in _STATES and of) or measure):
            return False
        self.r.found[first] = [("modify", head)]
        self.main, self.subject = head, Phrase([head], head)
        return True

    def _measure(self, head: int, previous: Phrase, between: Sequence[str]) -> bool:
        """`nodule measuring 9 x 7 mm`."""
        if self.r.group(head) != "measures":
            return False
        target = previous.head if previous.head is not None else self.main
        if target is not None:
            self.r.add("modify", head, target)
        return True

    def _diagnosis(self, phrase: Phrase, head: int, between: Sequence[str]) -> bool:
        """`opacity , likely atelectasis or pneumonia`: what is offered for the finding before."""
        if self.main is None or self.r.group(head) not in NOUNS or "superimposed" in between:
            return False
        listed = self.offered and self._goes_on(between)
        if not (listed or self._contains(between, "offers") or self._left_open(phrase)):
            return False
        self.r.add("suggestive_of", self.main, head)
        self.offered = True
        return True

    def _part_of_place(self, phrase: Phrase, head: int, previous: Phrase) -> bool:
        """`Mediastinum : normal width`: the part belongs to the place that was named before."""
        if previous.head is not None or not phrase.anatomy or not self._parts_only(phrase):
            return False
        for position in phrase.anatomy:
            self.r.found[position] = [("modify", place) for place in previous.places[:1]]
        self.r.unlocate(head)
        self.r.locate(head, previous.places)
        self._begin(phrase, head)
        return True

    def _predicate(self, phrase: Phrase, head: int, between: Sequence[str]) -> bool:
        """`the lungs are clear`, `the effusion is larger`."""
        noun, about = self.r.group(head) in NOUNS, self.subject
        if not self._states(between) or (noun and about.head is not None):
            return False
        is_finding = about.head is not None and (not about.places or self.r.group(about.head) in NOUNS)
        if about.head is not None and is_finding and not phrase.places:
            self.r.add("modify", head, about.head)
            self.predicated, self.offered = True, False
            return True
        if not about.places:
            return False
        if phrase.anatomy and all(self.r.group(p) == "places" for p in phrase.anatomy):
            self.r.unlocate(head)  # "are clear bilaterally": the side belongs to the lungs
            for position in phrase.anatomy:
                self.r.found[position] = [("modify", about.places[0])]
        self.r.locate(head, about.places)
        self.subject = Phrase(phrase.members, head, about.places, about.anatomy)
        self.predicated, self.offered = True, False
        self.main = head if self.main is None else self.main
        return True

    def _further_predicate(self, phrase: Phrase, head: int, previous: Phrase, between: Sequence[str]) -> bool:
        """`the lungs are expanded and clear`: said of the same as the predicate before."""
        before = previous.head
        if before is None or phrase.anatomy or not self.predicated or not self._only(between, "joins"):
            return False
        if self.r.group(head) in NOUNS or self.r.group(before) in NOUNS:
            return False
        self.r.found[head] = list(self.r.found[before])
        return True

    def _afterthought(self, phrase: Phrase, head: int, between: Sequence[str]) -> bool:
        """`opacities , unchanged`."""
        about = self.subject.head
        if about is None or self.r.group(head) in NOUNS or phrase.anatomy or list(between[:1]) != [","]:
            return False
        self.r.add("modify", head, about)
        self.offered = False
        return True

    # --- a phrase of places alone

    def _place(self, phrase: Phrase, previous: Phrase, between: Sequence[str]) -> None:
        """The rest of another place, where something lies, or what is spoken of next."""
        follows_on = (
            self._whole_of(phrase, previous, between)
            or self._parts_of_subject(phrase, between)
            or self._next_place(phrase, previous, between)
            or self._landmark(phrase, previous)
            or self._location(phrase, previous, between)
        )
        if not follows_on:
            self.subject, self.predicated = phrase, False

    def _whole_of(self, phrase: Phrase, previous: Phrase, between: Sequence[str]) -> bool:
        """`apical segment of the left lower lobe`: one place, whose head is the latter's."""
        if not self._ends_in_place(previous) or list(between[:1]) != ["of"]:
            return False
        head, old = phrase.places[0], set(previous.places)
        for position in previous.anatomy:
            self.r.found[position] = [("modify", head)]
        for found in self.r.found[self.first :]:
            found[:] = [(kind, head if kind == "located_at" and at in old else at) for kind, at in found]
        previous.places[:] = [head]
        return True

    def _parts_of_subject(self, phrase: Phrase, between: Sequence[str]) -> bool:
        """`normal in size and contour`: of what is spoken of."""
        if not self._parts_only(phrase) or not self.subject.places:
            return False
        if list(between[-1:]) != ["in"] and not (self.predicated and self._only(between, "joins")):
            return False
        for position in phrase.anatomy:
            self.r.found[position] = [("modify", self.subject.places[0])]
        return True

    def _next_place(self, phrase: Phrase, previous: Phrase, between: Sequence[str]) -> bool:
        """`in the right lung and left base`, `heart size , mediastinum and hila`: a further place of the same."""
        anew = self.predicated and "the" in between
        if anew or not self._only(between, "joins") or not self._ends_in_place(previous):
            return False
        holder = self._holder(previous)
        listed = self._listed(previous)
        self._share_part(phrase, listed)
        if holder is not None:
            self.r.locate(holder, phrase.places)
        elif previous.head is None:
            places = [*listed.places, *(p for p in phrase.places if p not in listed.places)]
            self.subject = Phrase([*listed.members, *phrase.members], None, places, [*listed.anatomy, *phrase.anatomy])
        return True

    def _landmark(self, phrase: Phrase, previous: Phrase) -> bool:
        """`3 cm above the carina`: the distance modifies the landmark, and what ends there is at the landmark."""
        before = previous.members[-1]
        if self.r.group(before) != "prepositions":
            return False
        self.r.found[before] = [("modify", phrase.places[0])]
        previous.places[:] = phrase.places
        holder = self._holder(previous)
        if holder is not None:
            found = self.r.found[holder]
            found[:] = [relation for relation in found if self.r.group(relation[1]) != "prepositions"]
            self.r.locate(holder, phrase.places)
        return True

    def _location(self, phrase: Phrase, previous: Phrase, between: Sequence[str]) -> bool:
        """`opacity in the lingula`, `tip above ...`."""
        leads = any(word in self.r.lists["prepositions"] for word in between)
        holder = self._holder(previous)
        if holder is None or not (leads or not between or self.r.group(phrase.members[0]) == "prepositions"):
            return False
        self.r.locate(holder, phrase.places)
        return True

    # --- what the rules ask

    def _holder(self, previous: Phrase) -> int | None:
        """The finding that a place behind a phrase belongs to: of a predicate, what it is said of."""
        if previous.head is None:
            return self.subject.head
        for kind, target in self.r.found[previous.head]:
            if kind == "modify" and not self.r.anatomical(target) and self.r.word(previous.head) not in DEVICE_PARTS:
                return target
        return previous.head

    def _listed(self, previous: Phrase) -> Phrase:
        """The list of places that a phrase of places ends, or itself."""
        return self.subject if previous.members[0] in self.subject.members else previous

    def _share_part(self, phrase: Phrase, listed: Phrase) -> None:
        """`Cardiac and hilar contours`: the part belongs to both organs, unless the first has one of its own."""
        if any(self.r.group(p) == "parts" for p in listed.anatomy):
            return
        for position in phrase.anatomy:
            if self.r.group(position) == "parts" and self.r.modifies(position):
                for place in listed.places:
                    self.r.add("modify", position, place)

    def _device_before(self, position: int) -> int | None:
        """The last device of the sentence that is no part or kind of another."""
        devices = [p for p in range(self.first, position) if self.r.group(p) == "devices" and not self.r.modifies(p)]
        return devices[-1] if devices else None

    def _ends_in_place(self, phrase: Phrase) -> bool:
        return phrase.members[-1] in phrase.anatomy

    def _parts_only(self, phrase: Phrase) -> bool:
        return all(self.r.group(p) == "parts" for p in phrase.anatomy)

    def _only(self, between: Sequence[str], name: str) -> bool:
        words = self.r.lists[name]
        return any(word in words for word in between) and all(word in words or word in _ARTICLES for word in between)

    def _contains(self, between: Sequence[str], name: str) -> bool:
        text = f" {' '.join(between)} "
        return any(f" {phrase} " in text for phrase in self.r.lists[name])

    def _goes_on(self, between: Sequence[str]) -> bool:
        allowed = self.r.lists["joins"] | self.r.lists["fillers"] | {"less", "likely", "possibly", "even"}
        return all(word in allowed for word in between)

    def _left_open(self, phrase: Phrase) -> bool:
        """`pneumonia cannot be excluded`."""
        end = self.r.entities[phrase.members[-1]].end + 1
        following = []
        for token in self.r.doc[end : end + _LEFT_OPEN]:
            if token.is_sent_start:
                break
            following.append(token.lower_)
        return self._contains(following, "left_open")

    def _states(self, between: Sequence[str]) -> bool:
        """Whether a verb links what stands on both sides, or hardly anything is between."""
        if list(between[-1:]) in ([","], [";"], ["but"], ["with"]):
            return False
        linking = any(word in self.r.lists["copulas"] for word in between)
        return linking or list(between) in ([], ["not"], [":"], ["within"])

    # --- what spans the sentence

    def _settle_heading(self, phrases: Sequence[Phrase]) -> None:
        """`Bones : ...`: what is found nowhere else is found there."""
        heading = phrases[0]
        if heading.head is not None or len(phrases) < 2:
            return
        if self.r.gap(heading.members[-1], phrases[1].members[0])[:1] != [":"]:
            return
        for phrase in phrases[1:]:
            if phrase.head is not None and not (self.r.located(phrase.head) or self.r.modifies(phrase.head)):
                self.r.locate(phrase.head, heading.places)

    def _comparison(self, positions: Sequence[int]) -> tuple[int, ...]:
        """`right greater than left`: its three entities, if it is there."""
        for first, word, second in zip(positions, positions[1:], positions[2:], strict=False):
            sides = self.r.word(first) in _SIDES and self.r.word(second) in _SIDES
            than = not self.r.gap(first, word) and self.r.gap(word, second) == ["than"]
            if sides and than and self.r.word(word) in _COMPARATIVES:
                return first, word, second
        return ()

    def _settle_comparison(self, compared: Sequence[int], phrases: Sequence[Phrase]) -> None:
        """Both sides belong to the place of the finding before; the comparative to the finding, at the first side."""
        if not compared:
            return
        first, word, second = compared
        self.r.add("located_at", word, first)
        before = [p.head for p in phrases if p.head is not None and p.members[0] < first]
        after = [p.head for p in phrases if p.head is not None and p.members[0] > first]
        finding = next((head for head in reversed(before) if self.r.located(head)), None)
        if finding is None:
            finding = before[-1] if before else after[0] if after else None
        if finding is None:
            return
        self.r.add("modify", word, finding)
        places = [at for kind, at in self.r.found[finding] if kind == "located_at"]
        for side in (first, second):
            if places:
                self.r.add("modify", side, places[0])
            else:
                self.r.locate(finding, [side])
