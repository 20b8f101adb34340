"""Public models by name: their shapes against the published numbers of parameters."""

import re

import pytest

from optimzoo.cli import main
from optimzoo.models import find_public, from_config, public_models, read_config

MODELS = public_models()


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_the_parameters_are_the_published_ones(model):
    pytest.importorskip("transformers")
    built = from_config(model.repository, "meta")
    assert sum(p.numel() for p in built.parameters()) == model.parameters


def test_names_with_or_without_organisation_in_any_case():
    for name in ("Llama-3.1-8B", "meta-llama/Llama-3.1-8B", "LLAMA-3.1-8b-instruct"):
        assert find_public(name).repository == "meta-llama/Llama-3.1-8B"
    assert find_public("gpt2").parameters == 124_439_808
    assert find_public("google/gemma-3-4b").repository == "google/gemma-3-4b-pt"
    for name in ("openai/Llama-3.1-8B", "Llama-3.1", "", "meta-llama/"):
        assert find_public(name) is None


def test_no_two_models_share_a_name_and_each_has_its_facts():
    names = [name.lower() for model in MODELS for name in model.names]
    assert len(names) == len(set(names)) and len(MODELS) > 40
    for model in MODELS:
        assert re.fullmatch(r"[\w-]+/[\w.-]+", model.repository)
        assert re.fullmatch(r"20\d\d-(0[1-9]|1[0-2])", model.released)
        assert isinstance(model.config["model_type"], str)


def test_a_config_that_is_read_is_a_copy():
    read_config("gpt2")["n_layer"] = 1
    assert read_config("gpt2")["n_layer"] == 12


def test_a_file_comes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2", "n_layer": 3}')
    assert read_config("gpt2")["n_layer"] == 3


def test_the_list(capsys):
    assert main(["models", "qwen3-4b*"]) == 0
    assert capsys.readouterr().out.split() == [
        "Qwen3-4B",
        "4,022,468,096",
        "2025-04",
        "Qwen/Qwen3-4B",
    ]
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    assert "llama-60m" in out and out.count("\n") > len(MODELS)
    assert main(["models", "nothing*"]) == 2
    assert capsys.readouterr().err == "error: no model matches 'nothing*'; see `optimzoo models`\n"


def test_start_takes_them(capsys):
    pytest.importorskip("transformers")
    assert main(["start", "SmolLM2-135M"]) == 0
    assert "create_optimizer" in capsys.readouterr().out
