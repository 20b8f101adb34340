"""What `make test` leaves to `make test-thorough` is there."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import in_part, mark_thorough


@pytest.mark.parametrize("form", ["{test}[{method}-{dtype}]", "{test}_part_0_{method}_cpu_{dtype}"])
def test_each_method_is_seen_once(form):
    file, test = "test_torch_state.py", "test_round_trip_is_exact"
    thorough = []

    def function():
        pass

    function.__name__ = test
    items = [
        SimpleNamespace(
            path=Path(file),
            name=form.format(test=test, method=method, dtype=dtype),
            function=function,
            get_closest_marker=lambda name: name == "each_method",
            add_marker=lambda mark, method=method: thorough.append((mark.name, method)),
        )
        for method in ("SCALE", "APOLLO", "APOLLOMini")
        for dtype in ("float32", "bfloat16", "float64")
    ]
    mark_thorough(items)
    assert sorted(thorough) == sorted(
        ("thorough", method) for method in ("SCALE", "APOLLO", "APOLLOMini") for _ in range(2)
    )


def test_parts_are_all_cases_once():
    cases = [f"tests/test_a.py::test_b[{i}]" for i in range(60)]
    parts = [{c for c in cases if in_part(c, f"{k}/3")} for k in (1, 2, 3)]
    assert set.union(*parts) == set(cases) and sum(map(len, parts)) == len(cases)
    assert all(10 < len(part) < 30 for part in parts)
    assert all(in_part(c, None) for c in cases)


@pytest.mark.parametrize("part", ["0/3", "4/3", "1", "a/b", "1/0"])
def test_a_part_that_is_none_is_refused(part):
    with pytest.raises(pytest.UsageError, match=f"--part '{part}' is not K/N"):
        in_part("a case", part)
