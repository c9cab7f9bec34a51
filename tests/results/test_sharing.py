"""What a run's data sets permit is the least that any of them does."""

import pytest

from medvlm_harness.results.sharing import sharing_of


@pytest.mark.parametrize(
    ("stated", "expected"),
    [(["full", "full"], "full"), (["full", "hashed"], "hashed"), (["hashed", None], "aggregate"), (["x"], "aggregate")],
)
def test_the_least_of_all_tasks_decides(stated: list[str | None], expected: str) -> None:
    assert sharing_of({str(k): {"dataset": {"sharing": one}} for k, one in enumerate(stated)}) == expected


@pytest.mark.parametrize(("name", "expected"), [("iu_cxr", "hashed"), ("radgraph", "aggregate"), ("mine", "full")])
def test_a_results_file_cannot_permit_more_than_the_shipped_task(name: str, expected: str) -> None:
    assert sharing_of({"t": {"dataset": {"name": name, "sharing": "full"}}}) == expected
