from __future__ import annotations

from importlib.resources import files

import pytest
import yaml

from medvlm_harness.labelers import term_files
from medvlm_harness.labelers.term_files import load_terms, rules_version, strings

NAMES = sorted(path.name for path in files("medvlm_harness.labelers").joinpath("terms").iterdir())


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Term files of the test's own."""
    texts: dict[str, str] = {}
    monkeypatch.setattr(term_files, "_text", texts.__getitem__)
    return texts


@pytest.mark.parametrize("name", NAMES)
def test_each_file_has_a_version_and_no_word_that_yaml_took_for_a_truth_value(name: str) -> None:
    raw = yaml.safe_load(files("medvlm_harness.labelers").joinpath("terms", name).read_text(encoding="utf-8"))
    assert isinstance(raw["version"], int)

    def check(value: object) -> None:
        assert not isinstance(value, bool)
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            check(inner)
        if isinstance(value, dict):
            assert not any(isinstance(key, bool) for key in value)

    check({key: value for key, value in raw.items() if key != "version"})


def test_a_missing_or_unknown_key_is_an_error(written: dict[str, str]) -> None:
    written["a.yaml"] = "version: 1\nmention: [x]\n"
    with pytest.raises(ValueError, match="Did you mean mentions"):
        load_terms("a.yaml", {"mentions"})
    written["a.yaml"] = "version: 1\n"
    with pytest.raises(ValueError, match="Expected the keys"):
        load_terms("a.yaml", {"mentions"})
    written["a.yaml"] = "- 1\n"
    with pytest.raises(ValueError, match="Expected the keys"):
        load_terms("a.yaml", {"mentions"})


@pytest.mark.parametrize("values", [[False], "no", ["a", ""], ["a", 1], ["A b", "a  B"], None])
def test_a_list_of_phrases_holds_distinct_strings(values: object) -> None:
    with pytest.raises(ValueError, match="Expected"):
        strings("a.yaml", values)
    assert strings("a.yaml", ["A  b", "c"]) == ("a b", "c")


def test_the_version_changes_with_a_term_a_number_and_the_code_and_not_with_line_ends(
    written: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = {"reader": "x = 1\n"}
    monkeypatch.setattr(term_files, "_source", code.__getitem__)
    written["a.yaml"] = "version: 1\nwords: [a]\n"
    seen = [rules_version(["a.yaml"], ["reader"])]
    assert seen[0].startswith("1+")
    written["a.yaml"] = "version: 1\r\nwords: [a]\r\n"
    assert rules_version(["a.yaml"], ["reader"]) == seen[0]
    written["a.yaml"] = "version: 1\nwords: [b]\n"
    seen.append(rules_version(["a.yaml"], ["reader"]))
    code["reader"] = "x = 2\n"
    seen.append(rules_version(["a.yaml"], ["reader"]))
    written["a.yaml"] = "version: 2\nwords: [b]\n"
    seen.append(rules_version(["a.yaml"], ["reader"]))
    assert len(set(seen)) == 4
    assert seen[-1].startswith("2+")
