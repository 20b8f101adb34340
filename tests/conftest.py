"""Of tests with many cases `make test` takes a part, always the same; `-m thorough` the rest.

``--part 2/4`` takes the second quarter of the thorough ones: CI takes another with each commit.
"""

import gc
import inspect
import re
import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# One case of so many. Each case is a method, a dtype or an option with the same test.
SAMPLED = {
    "test_account.py::test_a_model_on_meta_counts_as_a_real_one": 3,
    "test_account.py::test_account_is_what_training_holds_to_the_byte": 6,
    "test_account.py::test_the_model_is_not_touched": 3,
    "test_adam_rule.py::test_the_fused_path_is_the_loop_from_the_first_step_on": 3,
    "test_adams.py::test_follows_the_transcription_in_float64": 8,
    "test_compile.py::test_twenty_scheduled_steps_are_one_graph_compiled_once": 4,
    "test_degenerate_weights.py::test_a_first_gradient_of_zero_does_not_hold_up_the_next": 6,
    "test_degenerate_weights.py::test_moves_at_its_usual_pace": 20,
    "test_docs.py::test_every_mark_is_expanded": 3,
    "test_half_precision.py::test_bfloat16_weights_take_the_same_steps_on_every_path": 6,
    "test_half_precision.py::test_float16_gradients_at_the_ends_of_their_range": 8,
    "test_half_precision.py::test_float16_weights_take_the_steps_of_float64": 8,
    "test_kernels.py::test_adam_is_the_rule": 3,
    "test_kernels_cuda.py::test_reduce_apply_and_center": 3,
    "test_kernels_cuda.py::test_reductions_of_many_parts": 2,
    "test_kernels_cuda.py::test_scale": 3,
    "test_llama.py::test_flops_are_three_times_the_counted_forward": 2,
    "test_lowrank_convert.py::test_optimizers_of_the_zoo_train_it": 3,
    "test_lowrank_harness.py::test_an_interrupted_run_goes_on_to_the_same_bits": 5,
    "test_lowrank_restarts.py::test_resumed_to_the_same_bits": 4,
    "test_memory_simulate.py::test_checkpointing_micro_batches_and_release": 4,
    "test_memory_simulate.py::test_the_simulated_peak_is_that_of_real_steps": 11,
    "test_natural_gradient.py::test_a_bfloat16_gradient_gives_the_inverse_of_its_own_history": 4,
    "test_release.py::test_scale_is_exact_under_clipping": 5,
    "test_release.py::test_the_same_bits_in_weights_and_state": 5,
    "test_reproduce.py::test_every_table_prints_whole_and_explains_what_differs": 2,
    "test_resume.py::test_a_deepcopy_in_the_middle_goes_on_by_itself": 6,
    "test_resume.py::test_a_state_mapped_to_the_cpu_goes_on_there": 5,
    "test_rounding.py::test_a_resumed_run_goes_on_to_the_bit": 3,
    "test_rounding.py::test_the_mean_over_seeds_is_the_unrounded_step": 3,
    "test_rounding.py::test_training_goes_on_where_rounding_to_nearest_stalls": 2,
    "test_scale.py::test_fifty_steps_follow_the_reference": 8,
    "test_sharded.py::test_a_look_at_the_state_changes_nothing": 4,
    "test_state_bits.py::test_resumes_and_copies_to_the_bit": 7,
    "test_state_bits.py::test_training_is_that_of_float32_moments": 2,
    "test_subspace.py::test_randomized_captures_the_energy_of_a_power_law": 4,
    "test_token_cache.py::test_kill": 4,
    "test_train.py::test_the_loss_falls": 4,
    "test_train_resume.py::test_an_interrupted_run_goes_on_to_the_same_bits": 5,
    "test_zoo_fidelity.py::test_follows_the_reference": 8,
    "test_zoo_precision.py::test_a_state_of_another_dtype_goes_on": 3,
    "test_zoo_robust.py::test_foreach_and_fused_and_the_loop_agree": 2,
    "test_zoo_robust.py::test_seeds_decide": 2,
    "test_zoo_robust.py::test_state_is_tensors_and_loads_with_weights_only": 2,
    "test_zoo_robust.py::test_the_loaded_learning_rate_counts_and_not_the_constructors": 2,
    "test_zoo_robust.py::test_trains": 3,
    "test_zoo_robust.py::test_zero_gradients_leave_numbers": 4,
}

# One case of each method, so that every method is seen.
EACH_METHOD = (
    "test_resume.py::test_a_resumed_run_is_the_uninterrupted_run",
    "test_torch_contract.py::test_absent_gradients_move_nothing_and_make_no_state",
    "test_torch_contract.py::test_every_shape_moves_and_stays_finite",
    "test_torch_contract.py::test_follows_a_default_dtype_of_float64",
    "test_torch_contract.py::test_foreach_equals_the_loop",
    "test_torch_contract.py::test_goes_in_the_right_direction",
    "test_torch_contract.py::test_grad_scaler_skips_a_step_with_infinities",
    "test_torch_contract.py::test_layout_in_memory_does_not_matter",
    "test_torch_contract.py::test_maximize_is_descent_on_the_negative",
    "test_torch_contract.py::test_one_group_may_mix_dtypes_and_devices",
    "test_torch_contract.py::test_tensor_lr_equals_float_lr",
    "test_torch_contract.py::test_zero_gradients_move_nothing",
    "test_torch_state.py::test_an_older_state_lacks_options",
    "test_torch_state.py::test_copies_and_pickles_are_complete_and_separate",
    "test_torch_state.py::test_named_and_unnamed_states_load",
    "test_torch_state.py::test_round_trip_is_exact",
)
# In the brackets of pytest, or where PyTorch's own machinery puts it: before the device.
METHOD = re.compile(r"(?<=\[)\w+|[A-Za-z]+_(?:cpu|cuda)(?=_)")


# At the head of a file none of whose tests `make test` takes.
WHOLLY = re.compile(r"^pytestmark = (\[\s*)?pytest\.mark\.(thorough|distributed)", re.MULTILINE)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not even import such a file for nothing: some import whole frameworks."""
    without = {"thorough", "distributed"} <= set(re.findall(r"not (\w+)", config.option.markexpr))
    if not (without and collection_path.suffix == ".py"):
        return None
    return bool(WHOLLY.search(collection_path.read_text(encoding="utf-8"))) or None


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option that shares the thorough tests out."""
    parser.addoption("--part", metavar="K/N", help="of the thorough tests the K-th of N parts")


def in_part(case: str, part: str | None) -> bool:
    """Whether a case belongs to the part `K/N`; one case always to the same."""
    if part is None:
        return True
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", part)
    if match is None or int(match[1]) > int(match[2]):
        raise pytest.UsageError(f"--part {part!r} is not K/N with K from 1 to N, as in 2/3")
    # Of the name turned round: which of a test's cases are thorough goes by the name's own.
    return zlib.crc32(case[::-1].encode()) % int(match[2]) == int(match[1]) - 1


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Before `-m` selects."""
    mark_thorough(items)
    part = config.getoption("part")
    kept, left = [], []
    for item in items:
        out = item.get_closest_marker("thorough") and not in_part(item.nodeid, part)
        (left if out else kept).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept


def mark_thorough(items: list[pytest.Item]) -> None:
    """What `make test` leaves out."""
    methods = defaultdict(list)
    for item in items:
        order = zlib.crc32(f"{item.path.name}::{item.name}".encode())
        function = getattr(item, "function", None)
        test = f"{item.path.name}::{inspect.unwrap(function).__name__ if function else item.name}"
        if test in EACH_METHOD:
            methods[test, METHOD.search(item.name)[0]].append((order, item))
        elif order % SAMPLED.get(test, 1):
            item.add_marker(pytest.mark.thorough)
    for cases in methods.values():
        for _, item in sorted(cases, key=lambda case: case[0])[1:]:
            item.add_marker(pytest.mark.thorough)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A text of some thousand tokens, for the model `tiny`."""
    import tiny_benchmarks

    return tiny_benchmarks.tiny_corpus(tmp_path_factory.mktemp("text"))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The benchmarks have the model `tiny`, and what they write lands in a folder of the test's."""
    import tiny_benchmarks

    monkeypatch.setitem(tiny_benchmarks.llama.CONFIGS, "tiny", tiny_benchmarks.TINY)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def few_objects() -> Iterator[None]:
    """Hide what is there already from the garbage collector, and from who asks it for all objects.

    A look at all that torch has imported takes half a second.
    """
    gc.freeze()
    yield
    gc.unfreeze()
