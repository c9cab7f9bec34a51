"""The fixed report that report generation is read beside; most reports are of normal chests, and it scores well."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import yaml

__all__ = ["normal_report", "normal_report_version"]


def normal_report() -> str:
    """The text of normal_report.yaml."""
    return str(_template()["text"])


def normal_report_version() -> int:
    """Version of normal_report.yaml, to stand beside every score."""
    return int(_template()["version"])


@cache
def _template() -> dict[str, str]:
    raw: dict[str, str] = yaml.safe_load(
        files("medvlm_harness.metrics").joinpath("normal_report.yaml").read_text(encoding="utf-8")
    )
    return raw
