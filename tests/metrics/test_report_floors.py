from medvlm_harness.labelers.base import make_labeler
from medvlm_harness.metrics.report_floors import normal_report, normal_report_version


def test_the_template_is_a_report_of_a_normal_chest() -> None:
    text = normal_report()
    assert normal_report_version() >= 1
    assert text.endswith(".") and "\n" not in text
    labels = make_labeler("rules").label(text)
    assert [name for name, value in labels.items() if value in (1, -1)] == ["No Finding"]
    assert {labels["Pleural Effusion"], labels["Pneumothorax"], labels["Consolidation"]} == {0}
