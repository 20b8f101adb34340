"""What `make test` leaves to `make test-thorough` is there."""

from pathlib import Path

import pytest
from conftest import SAMPLED


@pytest.mark.parametrize("case", SAMPLED)
def test_a_sampled_test_exists(case):
    file, name = case.split("::")
    text = (Path(__file__).with_name(file)).read_text(encoding="utf-8")
    assert f"def {name}(" in text
    assert SAMPLED[case] > 1
