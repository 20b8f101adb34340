"""What `make test` leaves to `make test-thorough` is there."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import EACH_METHOD, SAMPLED, pytest_collection_modifyitems


@pytest.mark.parametrize("case", [*SAMPLED, *EACH_METHOD])
def test_a_sampled_test_exists(case):
    file, name = case.split("::")
    text = (Path(__file__).with_name(file)).read_text(encoding="utf-8")
    assert f"def {name}(" in text
    assert SAMPLED.get(case, 2) > 1
    assert (case in SAMPLED) != (case in EACH_METHOD)


@pytest.mark.parametrize("form", ["{test}[{method}-{dtype}]", "{test}_part_0_{method}_cpu_{dtype}"])
def test_each_method_is_seen_once(form):
    file, test = "test_torch_state.py", "test_round_trip_is_exact"
    assert f"{file}::{test}" in EACH_METHOD
    thorough = []

    def function():
        pass

    function.__name__ = test
    items = [
        SimpleNamespace(
            path=Path(file),
            name=form.format(test=test, method=method, dtype=dtype),
            function=function,
            add_marker=lambda mark, method=method: thorough.append((mark.name, method)),
        )
        for method in ("SCALE", "APOLLO", "APOLLOMini")
        for dtype in ("float32", "bfloat16", "float64")
    ]
    pytest_collection_modifyitems(items)
    assert sorted(thorough) == sorted(
        ("thorough", method) for method in ("SCALE", "APOLLO", "APOLLOMini") for _ in range(2)
    )
