from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from medvlm_harness.tracks.answer_words import status_of
from medvlm_harness.tracks.entity_answers import ListedFinding, Status, parse_entities

EFFUSION, MASS, EDEMA = (
    ListedFinding("pleural effusion", "absent"),
    ListedFinding("mass", "present"),
    ListedFinding("edema", "uncertain"),
)
ALL = (EFFUSION, MASS, EDEMA)
WORDS = st.text(alphabet="abcdefgh", min_size=3, max_size=8).filter(lambda w: w not in {"bad", "had"})
PHRASES = st.lists(WORDS, min_size=1, max_size=4).map(" ".join)
STATUSES: Any = st.sampled_from(["present", "absent", "uncertain"])
FINDINGS = st.lists(st.tuples(PHRASES, STATUSES), min_size=1, max_size=6)


# --- forms


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([{"finding": f.phrase, "status": f.status} for f in ALL]),
        json.dumps([{"entity": f.phrase, "presence": f.status} for f in ALL], indent=2),
        json.dumps({"findings": [{"name": f.phrase, "Status": f.status.upper()} for f in ALL]}),
        json.dumps({f.phrase: f.status for f in ALL}),
        json.dumps({f.phrase: {"status": f.status} for f in ALL}),
        json.dumps({"absent": ["pleural effusion"], "present": ["mass"], "uncertain": ["edema"]}),
        json.dumps({"absent_findings": "pleural effusion", "present": "mass", "Uncertain": "edema"}),
        json.dumps({"pleural effusion": False, "mass": True, "edema": -1}),
        json.dumps([{"finding": "pleural effusion", "present": False}, "mass", "possible edema"]),
        json.dumps(["no pleural effusion", "mass (present)", "edema: uncertain"]),
        json.dumps({"1": {"tokens": "pleural effusion", "label": "OBS-DA"}, "2": {"tokens": "mass", "label": "OBS-DP"},
                    "3": {"tokens": "edema", "label": "Observation::uncertain"}}),
        json.dumps([{"label": f.phrase, "value": {"absent": 0, "present": 1}.get(f.status, -1)} for f in ALL]),
        str([{"finding": f.phrase, "status": f.status} for f in ALL]),  # Python's own spelling
        "\n".join(json.dumps({"finding": f.phrase, "status": f.status}) for f in ALL),
        "Sure:\n```json\n" + json.dumps([{"finding": f.phrase, "status": f.status} for f in ALL]) + "\n```\nBye.",
        "".join(f"- {f.phrase}: {f.status}\n" for f in ALL),
        "".join(f"* **{f.phrase}** - {f.status}\n" for f in ALL),
        "".join(f"{k}. {f.phrase} ({f.status})\n" for k, f in enumerate(ALL, 1)),
        "".join(f"{k}) {f.phrase} [{f.status}]\n\n" for k, f in enumerate(ALL, 1)),
        "".join(f"• {f.phrase}, {f.status}.\n" for f in ALL),
        "".join(f"{f.phrase} = {f.status}\n" for f in ALL),
        "".join(f"{f.phrase} is {f.status}\n" for f in ALL),
        "".join(f"{k}. Finding: {f.phrase}\n   Status: {f.status}\n" for k, f in enumerate(ALL, 1)),
        "".join(f"{k}. {f.phrase}:\n   - status: {f.status}\n" for k, f in enumerate(ALL, 1)),
        "| Finding | Status |\n|---|:--|\n" + "".join(f"| {f.phrase} | {f.status} |\n" for f in ALL),
        "Findings:\nAbsent:\n- pleural effusion\nPresent findings:\n- mass\n## Uncertain\n- edema",
        "Absent: pleural effusion\nPresent: mass\nUncertain: edema",
        "no pleural effusion, mass, possible edema",
        "Findings: no pleural effusion; mass; edema cannot be excluded",
        "pleural effusion, absent, mass, present, edema, uncertain",
        "No pleural effusion. Mass. Likely edema.",
        "There is no pleural effusion.\nThere is a mass.\n?edema",
        "pleural effusion is not seen\nmass noted\nedema possible",
        "1. no pleural effusion 2. mass 3. possible edema",
        "- 1. No pleural effusion.\n- 2. Mass.\n- 3. Possible edema.",
        "- [ ] pleural effusion\n- [x] mass\n- possible edema",
    ],
)  # fmt: skip
def test_every_common_form_gives_the_same_findings(text: str) -> None:
    answer = parse_entities(text)
    assert tuple(ListedFinding(f.phrase.lower(), f.status) for f in answer.findings) == ALL
    assert answer.unparsed == 0
    assert answer.parsed


@given(FINDINGS)
@settings(max_examples=80, deadline=None)
def test_what_is_asked_for_is_read_back_word_for_word(findings: list[tuple[str, Status]]) -> None:
    text = json.dumps([{"finding": phrase, "status": status} for phrase, status in findings])
    answer = parse_entities(text)
    assert answer == (tuple(ListedFinding(*one) for one in findings), 0, "json")
    lines = parse_entities("".join(f"- {phrase}: {status}\n" for phrase, status in findings))
    assert lines == (answer.findings, 0, "list")


@given(FINDINGS, st.data())
@settings(max_examples=80, deadline=None)
def test_cut_json_is_read_as_far_as_it_goes(findings: list[tuple[str, Status]], data: st.DataObject) -> None:
    rows = [{"finding": phrase, "status": status} for phrase, status in findings]
    text = json.dumps(rows)
    length = data.draw(st.integers(2, len(text)))
    answer = parse_entities(text[:length])
    whole = sum(len(json.dumps(rows[:k])) - 1 <= length for k in range(1, len(rows) + 1))
    # A finding whose status is whole counts though its bracket is missing; one without a status never does.
    assert answer.findings[:whole] == tuple(ListedFinding(*one) for one in findings[:whole])
    assert len(answer.findings) - whole in (0, 1)
    assert answer.findings == tuple(ListedFinding(*one) for one in findings[: len(answer.findings)])
    begun = text[:length].count('"finding"')
    assert answer.unparsed <= 1 and len(answer.findings) + answer.unparsed >= begun


# --- statuses


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[{"finding": "no mass", "status": "present"}]', ("mass", "absent")),  # "no mass" is what is present
        ('[{"finding": "possible mass", "status": "present"}]', ("mass", "uncertain")),
        ('[{"finding": "possible mass", "status": "absent"}]', ("mass", "absent")),
        ('[{"finding": "mass", "status": "present", "negated": true}]', ("mass", "absent")),
        ('[{"finding": "mass", "status": "present", "negated": false}]', ("mass", "present")),
        ('[{"finding": "mass", "absent": true}]', ("mass", "absent")),
        ('[{"finding": "mass", "absent": "no"}]', ("mass", "present")),
        ('[{"entity": "heart", "status": "enlarged"}]', ("heart enlarged", "present")),
        ('[{"entity": "heart", "finding": "enlarged"}]', ("heart enlarged", "present")),
        ('[{"finding": "mass", "location": "left apex", "status": "absent"}]', ("mass left apex", "absent")),
        ('[{"finding": "mass", "severity": "none", "status": "absent"}]', ("mass", "absent")),
        ('{"0": "mass"}', ("mass", "present")),  # a number, not CheXpert's 0
        ('{"0": {"finding": "mass", "status": "present"}}', ("mass", "present")),
        ('{"heart": "enlarged"}', ("heart enlarged", "present")),
        ('{"lungs": "no mass"}', ("lungs mass", "absent")),
        ("- lungs: no mass", ("lungs mass", "absent")),
        ("- Without evidence of a mass", ("mass", "absent")),
        ("mass -> absent", ("mass", "absent")),
        ("mass, status: absent", ("mass", "absent")),
        ("- mass (status: absent)", ("mass", "absent")),
        ("no mass seen", ("mass", "absent")),
        ("the absence of mass", ("mass", "absent")),
        ("- well-defined mass", ("well-defined mass", "present")),
        ("- 3.5 cm mass", ("3.5 cm mass", "present")),
    ],
)
def test_what_denies_hedges_or_describes_a_finding_is_heard(text: str, expected: tuple[str, str]) -> None:
    answer = parse_entities(text)
    assert [(f.phrase.lower(), f.status) for f in answer.findings] == [expected]


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("Present", "present"), ("yes", "present"), ("1", "present"), ("OBS-DP", "present"),
        ("definitely_absent", "absent"), ("Observation::definitely absent", "absent"), ("0", "absent"),
        ("**no**", "absent"), ("-1", "uncertain"), ("cannot be excluded", "uncertain"), ("?", "uncertain"),
        ("large", None), ("", None), ("not", None), ("present in the left lung", None), ("no" * 99, None),
    ],
)  # fmt: skip
def test_a_status_is_a_status_alone(text: str, status: str | None) -> None:
    assert status_of(text) == status


def test_or_carries_a_denial_on_and_a_comma_alone_does_not() -> None:
    shared = parse_entities("no edema, mass, or effusion")
    assert [f.status for f in shared.findings] == ["absent"] * 3
    alone = parse_entities("no edema, mass, effusion")
    assert [f.status for f in alone.findings] == ["absent", "present", "present"]


# --- nothing, and what is not read


@pytest.mark.parametrize("text", ["[]", "{}", '{"findings": []}', "None", "No findings.", "- none", '["none"]'])
def test_an_empty_list_is_a_list(text: str) -> None:
    answer = parse_entities(text)
    assert answer.parsed and answer.findings == () and answer.unparsed == 0


@pytest.mark.parametrize(
    ("text", "unparsed"),
    [
        ("", 0),
        ("\n \n---\n", 0),
        ("[", 0),
        ('[{"finding": "ma', 1),
        ("The lungs are clear and the heart is of normal size and shape in these two views of the chest", 1),
        ("[[" + "[" * 50, 1),
        ("!!!", 1),
        ('{"a": null}', 1),
        ('[{"status": "absent"}]', 1),
        ("Status: absent", 1),
        ("1. Chest x-ray:\n2. Biopsy:\n", 2),
        ("Here is the list:\n", 0),
    ],
)
def test_what_is_no_list_is_none_and_counted(text: str, unparsed: int) -> None:
    answer = parse_entities(text)
    assert answer == ((), unparsed, "none")
    assert not answer.parsed


def test_what_cannot_be_read_leaves_the_rest() -> None:
    answer = parse_entities('[{"finding": "mass", "status": "present"}, null, 17, {"finding": "x", "status": [1]}]')
    assert (answer.findings, answer.unparsed) == ((MASS,), 3)
    prose = "the patient was seen in the clinic and then went home with his wife and his two children"
    groups = parse_entities("1. Lungs:\n   - mass\n2. Heart:\n   - no edema\n3. Bones:")
    assert ([f.phrase for f in groups.findings], groups.unparsed) == (["mass", "edema"], 1)
    lines = parse_entities(f"- mass: present\n{prose}\n- edema: uncertain")
    assert (lines.findings, lines.unparsed) == ((MASS, EDEMA), 1)


# --- any text


@example("A ;:;")  # nothing is left of a word
@given(st.text(max_size=80) | st.text(alphabet='[]{}":, -*1.()|\n#ano?=', max_size=80))
@settings(max_examples=300, deadline=None)
def test_nothing_makes_it_raise(text: str) -> None:
    answer = parse_entities(text)
    assert answer.unparsed >= 0
    assert answer.parsed or not answer.findings
    for phrase, status in answer.findings:
        assert any(map(str.isalpha, phrase)) and phrase == phrase.strip()
        assert status in ("present", "absent", "uncertain")


@pytest.mark.parametrize(
    "pattern",
    ["no ", "no,", "a: ", "- ", "- a\n", "a, b ", "or a, ", "(", "a (", "1. ", "there is ", "|", "| a ", "* [ ] a\n",
     "?", '{"a": ', '[{"finding": "a", ', "no no, or ", "status: ", "finding: a\n", "a - ", "\n", "a is not present "],
)  # fmt: skip
def test_time_grows_with_the_length_and_no_faster(pattern: str) -> None:
    def seconds(times: int) -> float:
        text, best = pattern * times, 1e9
        for _ in range(2):
            start = time.process_time()
            parse_entities(text)
            best = min(best, time.process_time() - start)
        return best

    # Eight times the text: 8 in linear time, 64 in quadratic.
    assert seconds(8_000) < 30 * max(seconds(1_000), 1e-3)
