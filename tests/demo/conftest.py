from pathlib import Path

import pytest

from medvlm_harness.data.records import Dataset, read_dataset
from medvlm_harness.demo.generate import prepare_demo


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The demo set as users get it."""
    folder: Path = tmp_path_factory.mktemp("demo") / "demo_cxr"
    return read_dataset(prepare_demo(folder))
