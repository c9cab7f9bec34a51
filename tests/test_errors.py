import pytest

from medvlm_harness.errors import UserError, near_matches

NAMES = ["iu_cxr_zeroshot", "iu_cxr_view", "iu_cxr_retrieval", "demo_cxr_view"]


def test_a_slip_gets_the_name_that_was_meant_first() -> None:
    assert near_matches("iu_cxr_zeroshoot", NAMES) == " Did you mean iu_cxr_zeroshot?"
    assert near_matches("iu_cxr_veiw", NAMES).startswith(" Did you mean iu_cxr_view,")


def test_at_most_three_are_named() -> None:
    assert near_matches("label", [f"label{i}" for i in range(9)]).count("label") == 3


def test_a_name_like_none_gets_the_whole_list_if_it_is_short() -> None:
    assert near_matches("zzz", ["b", "a", "b"]) == " Known: a, b."
    assert near_matches("zzz", [f"name_{i}" for i in range(40)]).startswith(" Known: name_0, ")
    assert near_matches("zzz", [f"name_{i}" for i in range(41)]) == ""


@pytest.mark.parametrize("known", [[], (), {}, set()])
def test_nothing_known_says_nothing(known: list[str]) -> None:
    assert near_matches("x", known) == ""


def test_it_does_not_depend_on_the_order_given() -> None:
    assert near_matches("iu_cxr", NAMES) == near_matches("iu_cxr", reversed(NAMES))


def test_it_follows_a_sentence_without_more_ado() -> None:
    for suffix in (near_matches("iu_cxr_veiw", NAMES), near_matches("zzz", NAMES)):
        assert suffix[0] == " "
        assert suffix[-1] in "?."
        assert "\n" not in suffix


def test_a_user_error_is_a_value_error_and_prints_as_its_message() -> None:
    with pytest.raises(ValueError, match=r"^Expected a, but got b\.$"):
        raise UserError("Expected a, but got b.")
