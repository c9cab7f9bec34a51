"""Fixtures of the labeler tests."""

from __future__ import annotations

import pytest

from medvlm_harness.labelers.rules import RulesLabeler


@pytest.fixture(scope="session")
def rules() -> RulesLabeler:
    """The labeler with its defaults; it keeps no state."""
    return RulesLabeler()
