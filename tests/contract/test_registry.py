"""Optimizers by name: the list, the errors, whose learning rate is whose, training and resuming."""

import copy
import io
import json
import subprocess
import sys

import pytest
import torch
from optimizer_db import Tiny, train
from registered import NAMES, create
from torch.optim.optimizer import Optimizer

from optimzoo import (
    SCALE,
    GaLore,
    Muon,
    OptimInfo,
    create_optimizer,
    get_info,
    list_optimizers,
    param_groups,
    registry,
)
from optimzoo.roles import ROLES

LEAVING = [n for n in NAMES if getattr(get_info(n).make, "_matrix_roles", None) == ("hidden",)]


def rates(optimizer):
    return {group["role"]: group["lr"] for group in optimizer.param_groups}


def test_lists_are_sorted_and_filtered_by_shell_patterns():
    assert sorted(set(NAMES)) == NAMES
    assert {"scale", "muon", "adamw", "sgd"} <= set(NAMES)
    assert list_optimizers("*") == NAMES
    assert list_optimizers("ada*") == [name for name in NAMES if name.startswith("ada")]
    assert list_optimizers("s[cg]*") == ["scale", "sgd"]
    assert list_optimizers("nothing*") == []


def test_records_are_complete():
    for name in NAMES:
        info = get_info(name)
        assert isinstance(info, OptimInfo)
        assert info.name == name
        assert issubclass(info.make, Optimizer)
        assert info.description and info.source and info.state
        assert "\n" not in info.description
        assert set(getattr(info.make, "_matrix_roles", ROLES)) <= set(ROLES)
    assert get_info("scale").make is SCALE
    assert get_info("muon").make is Muon
    assert get_info("adamw").make is torch.optim.AdamW


def test_names_are_read_leniently():
    assert get_info("AdamW") is get_info("adamw")
    assert get_info("SCALE").name == "scale"


def test_aliases_lead_to_the_record(monkeypatch):
    taken = list(registry.RECORDS)
    for alias, name in registry._ALIASES.items():
        assert alias not in taken
        assert get_info(alias).name == name
    monkeypatch.setitem(registry._ALIASES, "column_sgd", "scale")
    assert get_info("Column-SGD") is get_info("scale")
    assert isinstance(create_optimizer("column-sgd", Tiny()), SCALE)
    with pytest.raises(ValueError, match="unknown optimizer 'colum_sgd'; did you mean column_sgd"):
        get_info("colum_sgd")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adanw", r"unknown optimizer 'adanw'; did you mean .*\badamw\b.*\?"),
        ("scal", r"did you mean scale"),
        ("muonn", r"did you mean muon"),
        ("zzzzzz", r"unknown optimizer 'zzzzzz'; see list_optimizers\(\)"),
        ("", r"unknown optimizer ''; see list_optimizers\(\)"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(name, message):
    for function in (get_info, lambda n: create_optimizer(n, Tiny())):
        with pytest.raises(ValueError, match=message) as caught:
            function(name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_unknown_hyperparameters_are_answered_with_the_known(name):
    with pytest.raises(ValueError, match=f"{name} has no hyperparameter 'warmup'; ") as caught:
        create_optimizer(name, Tiny(), warmup=3)
    known = str(caught.value).split("it takes ")[1].split(", ")
    assert "lr" in known
    assert "params" not in known
    assert "\n" not in str(caught.value)


def test_hyperparameters_reach_the_optimizer():
    optimizer = create_optimizer("adamw", Tiny(), lr=0.5, betas=(0.5, 0.25), weight_decay=0.125)
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["betas"] == (0.5, 0.25)
    decays = {g["role"]: g["weight_decay"] for g in optimizer.param_groups}
    assert decays == {"hidden": 0.125, "embedding": 0.125, "head": 0.125, "vector": 0.0}
    with pytest.raises(ValueError, match="-1"):
        create_optimizer("sgd", Tiny(), lr=-1.0)


def test_takes_a_model_groups_or_parameters():
    model = Tiny()
    for name in NAMES:
        for params in (model, param_groups(model), model.parameters(), model.named_parameters()):
            optimizer = create(name, params)
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            assert set(trained) == set(model.parameters())
            assert len(trained) == len(list(model.parameters()))
    by_role = {g["role"]: g["param_names"] for g in create_optimizer("sgd", model).param_groups}
    assert by_role["head"] == ["lm_head.weight"]


def test_lr_alone_is_everyones_but_for_the_rest_of_muon_and_rmnp():
    for name in NAMES:
        found = rates(create(name, Tiny(), lr=0.5))
        rest = {{"muon": 3e-4, "rmnp": 1e-3}.get(name, 0.5)}
        assert {found[role] for role in ROLES if role == "hidden"} == {0.5}, name
        assert {found[role] for role in ROLES if role != "hidden"} == rest, name


BY_ROLE = {"embedding_lr": 0.25, "head_lr": 0.125, "vector_lr": 0.0625}


def test_each_role_has_a_rate_of_its_own():
    for name in NAMES:
        assert rates(create(name, Tiny(), lr=0.5, **BY_ROLE)) == {
            "hidden": 0.5, "embedding": 0.25, "head": 0.125, "vector": 0.0625,
        }, name  # fmt: skip
        assert rates(create(name, Tiny(), lr=0.5, head_lr=0.125))["head"] == 0.125, name


def test_other_lr_is_that_of_the_roles_the_rule_leaves():
    found = create_optimizer("scale", Tiny(), lr=0.5, other_lr=0.25)
    assert rates(found) == {"hidden": 0.5, "embedding": 0.5, "head": 0.5, "vector": 0.25}
    for name in LEAVING:
        assert rates(create(name, Tiny(), lr=0.5, other_lr=0.25)) == {
            "hidden": 0.5, "embedding": 0.25, "head": 0.25, "vector": 0.25,
        }, name  # fmt: skip
        found = rates(create(name, Tiny(), lr=0.5, other_lr=0.25, head_lr=0.125))
        assert found["head"] == 0.125 and found["vector"] == 0.25, name


def test_a_roles_rate_moves_its_weights_and_no_others():
    for name in ("scale", "muon", "adamw", "sgd"):
        for role in ("embedding", "head", "vector"):
            runs = {}
            for rate in (0.0, 2**-4):
                model, zero = Tiny(), dict.fromkeys(BY_ROLE, 0.0)
                rule = {**zero, f"{role}_lr": rate}
                train(model, create_optimizer(name, model, lr=0.0, **rule), 1)
                runs[rate] = {n: p.detach().clone() for n, p in model.named_parameters()}
            for group in param_groups(Tiny()):
                for param in group["param_names"]:
                    moved = not torch.equal(runs[0.0][param], runs[2**-4][param])
                    assert moved == (group["role"] == role), (name, param)


def test_the_others_rule_is_theirs_alone():
    rule = {"other_betas": (0.5, 0.25), "other_eps": 0.125, "other_weight_decay": 0.0625}
    for name in LEAVING:
        groups = param_groups(Tiny(), {"bias": {"weight_decay": 0.5}})
        optimizer = create(name, groups, **rule)
        for group in optimizer.param_groups:
            values = group["betas"], group["eps"], group["weight_decay"]
            other = group["role"] != "hidden"
            assert (values[:2] == ((0.5, 0.25), 0.125)) == (other or name in ("muon", "rmnp")), name
            assert (values[2] == 0.0625) == (group["role"] in ("embedding", "head")), name


def test_a_groups_own_lr_wins():
    for name in NAMES:
        groups = param_groups(Tiny(), {"lm_head": {"lr": 0.5}, "bias": {"lr": 0.75}})
        given = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in groups])
        found = rates(create(name, groups, lr=1.0, **BY_ROLE))
        assert found == {"hidden": 1.0, "embedding": 0.25, "head": 0.5, "vector": 0.75}, name
        assert [{k: v for k, v in g.items() if k != "params"} for g in groups] == given


@pytest.mark.parametrize("name", NAMES)
def test_rates_by_role_need_roles(name):
    for params in (Tiny().parameters(), [{"params": list(Tiny().parameters())}]):
        with pytest.raises(ValueError, match=r"head_lr needs .*roles; pass") as caught:
            create(name, params, head_lr=0.25)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("scale", {"vector_betas": (0.5, 0.5)}, r"vector_betas is other_betas now; write other_be"),
        ("scale", {"vector_eps": 1e-6}, "vector_eps is other_eps now; write other_eps=1e-06"),
        ("adamw", {"other_lr": 0.1}, "other_lr=0.1: the rule of adamw trains every role; give emb"),
        (
            "stable_spam",
            {"other_lr": 0.1},
            "other_lr=0.1: the rule of StableSPAM trains every",
        ),
        ("galore", {"head_lr": -1.0}, "Invalid head_lr: -1.0"),
        ("galore", {"other_lrs": 0.1}, "galore has no hyperparameter 'other_lrs'; it takes lr, "),
        ("galore", {"other_betas": (0.9, 1.0)}, "beta parameter at index 1: 1.0"),
        ("galore", {"other_eps": -1.0}, "Invalid other_eps value: -1.0"),
        ("sgd", {"head_lr": -1.0}, "Invalid head_lr: -1.0"),
    ],
)
def test_role_options_that_do_not_fit_are_one_line(name, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        create(name, Tiny(), **options)
    assert "\n" not in str(caught.value)


def test_an_unknown_option_is_one_of_python():
    with pytest.raises(TypeError, match="GaLore has no option 'warmup'; beside its own: emb"):
        GaLore(param_groups(Tiny()), warmup=3)


def test_a_checkpoint_with_the_names_of_before_loads():
    model = Tiny()
    optimizer = create_optimizer("scale", model, other_betas=(0.5, 0.25), other_eps=0.125)
    train(model, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        group["vector_betas"], group["vector_eps"] = (
            group.pop("other_betas"),
            group.pop("other_eps"),
        )
        del group["fused"]
    again = create_optimizer("scale", model)
    again.load_state_dict(saved)
    for group in again.param_groups:
        assert (group["other_betas"], group["other_eps"]) == ((0.5, 0.25), 0.125)
        assert "vector_betas" not in group and group["fused"] is None


@pytest.mark.parametrize("name", ["muon", "rmnp"])
def test_muon_and_rmnp_split_bare_parameters_by_shape(name):
    optimizer = create_optimizer(name, Tiny().parameters(), lr=0.5, other_lr=0.25)
    assert rates(optimizer) == {"hidden": 0.5, "vector": 0.25}


@pytest.mark.parametrize("name", NAMES)
def test_trains_and_resumes_to_the_bit(name):
    lr = {"lr": 2**-6} if name not in ("adadelta", "rprop") else {}
    model = Tiny()
    optimizer = create(name, model, **lr)
    losses = train(model, optimizer, 3)
    assert losses[2] < losses[0]
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)

    resumed = Tiny(seed=1)
    resumed.ids, resumed.labels = model.ids, model.labels
    resumed.load_state_dict(saved["model"])
    again = create(name, resumed, **lr)
    again.load_state_dict(saved["optimizer"])
    exact = {"atol": 0, "rtol": 0}
    states = (o.state_dict()["state"] for o in (again, optimizer))
    torch.testing.assert_close(*states, **exact)
    assert train(resumed, again, 3) == train(model, optimizer, 3)
    torch.testing.assert_close(resumed.state_dict(), model.state_dict(), **exact)


def test_importing_is_light_and_leaves_no_trace(tmp_path):
    program = """
import json, sys, torch
before = set(sys.modules)
import optimzoo
new = {name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
heavy = [n for n in set(sys.modules) - before if n.startswith(("torch._dynamo", "torch._inductor"))]
print(json.dumps([sorted(new - {"torch"}), heavy, len(optimzoo.list_optimizers())]))
"""
    result = subprocess.run(
        [sys.executable, "-B", "-c", program],
        cwd=tmp_path,
        env={"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(result.stdout) == [["optimzoo"], [], len(NAMES)]
    assert result.stderr == ""
    assert list(tmp_path.rglob("*")) == []


def test_what_has_no_default_is_asked_for():
    with pytest.raises(ValueError, match="adams has no default for total_steps; give it"):
        create_optimizer("adams", Tiny(), lr=1e-3, l1=1e-4)
