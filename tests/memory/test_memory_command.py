"""``optimzoo memory``: its page, JSON, picture, what fits, sources of models, bad input."""

import json
import os
import sys
from itertools import pairwise

import pytest
import torch

from optimzoo import lowrank, sparsity
from optimzoo.cli import main
from optimzoo.memory import account, report, simulate
from optimzoo.memory.options import parse_size
from optimzoo.memory.plan import CHANGES, Planner
from optimzoo.models import CONFIGS
from optimzoo.models.llama import Llama, LlamaConfig

TINY = LlamaConfig(509, 48, 132, 2, 3)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(CONFIGS, "tiny", TINY)


def run(*arguments: str) -> int:
    return main(["memory", *arguments])


def on_meta() -> Llama:
    with torch.device("meta"):
        return Llama(TINY)


def test_the_page_has_every_method_and_80_columns(capsys, tmp_path):
    file = tmp_path / "out.json"
    assert run("--model", "llama-tiny", "--account", "--json", str(file)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("adams") and "bfloat16" in line for line in lines)
    methods = {m["method"]: m for m in json.loads(file.read_text())["methods"]}
    assert next(iter(methods)) == "adadelta" and "scale" in methods
    counted = account(on_meta(), "scale", dtype=torch.bfloat16)
    assert methods["scale"]["held"] == counted.total
    assert methods["scale"]["state"]["head"] == {"exp_avg": counted.state["head", "exp_avg"]}


def test_one_method_with_its_peak_and_a_picture(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    picture, file = tmp_path / "bars.png", tmp_path / "out.json"
    options = ("--hyper", "rank=8", "--batch", "2", "--seq", "33", "--json", str(file))
    more = ("--optimizer", "galore", "--picture", str(picture))
    assert run("--model", "tiny", *more, *options) == 0
    assert "the peak, in the " in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    [record] = json.loads(file.read_text())["methods"]
    settings = {"batch": 2, "seq": 33, "dtype": torch.bfloat16, "rank": 8}
    assert record["peak"]["bytes"] == simulate(on_meta(), "galore", **settings).peak.bytes


@pytest.mark.thorough
@pytest.mark.parametrize("name", ("adamw", "scale"))
def test_shared_simulations_give_what_each_alone_gives(name):
    planner = Planner(on_meta(), dtype=torch.bfloat16, seq=33)
    method = planner.method(name)
    for checkpointing, release in CHANGES:
        settings = {"checkpointing": checkpointing, "release": release}
        planned = planner.peak(method, 2, **settings)
        alone = simulate(on_meta(), name, dtype=torch.bfloat16, batch=2, seq=33, **settings).peak
        if release:  # a bound, but for the scalar of a loss
            assert alone.bytes - 8 <= planned.bytes <= 1.3 * alone.bytes
        else:
            assert planned == alone


@pytest.mark.thorough
def test_what_fits_is_sorted_by_the_change_it_takes(capsys, tmp_path):
    planner = Planner(on_meta(), dtype=torch.bfloat16, seq=64)
    method = planner.method("scale")
    limit = planner.peak(method, 4).bytes
    fits = list(planner.fits(method, limit))
    assert (fits[0].checkpointing, fits[0].release, fits[0].batch) == (False, False, 4)
    assert all(a.batch < b.batch for a, b in pairwise(fits))
    assert all(fit.peak.bytes <= limit for fit in fits)
    file = tmp_path / "fits.json"
    options = ("--optimizer", "scale", "--seq", "64", "--json", str(file))
    assert run("--model", "tiny", "--fits", f"{limit}B", *options) == 0
    assert json.loads(file.read_text())["fits"][0]["batch"] == 4
    assert run("--model", "tiny", "--fits", "1KB", "--optimizer", "scale") == 1
    assert "nothing fits in 1KB" in capsys.readouterr().out


def test_what_fits_on_several_numbers_of_gpus(capsys, tmp_path):
    """Each as by itself, fewer GPUs first; what a method refuses on some is said."""
    sizes = {}
    for shards in (1, 2):
        planner = Planner(on_meta(), dtype=torch.bfloat16, seq=8, shards=shards)
        sizes[shards] = planner.peak(planner.method("adafactor" if shards == 1 else "adamw"), 1)
    limit = max(peak.bytes for peak in sizes.values())
    file = tmp_path / "fits.json"
    options = ("--fits", f"{limit}B", "--batch", "1", "--seq", "8", "--json", str(file))
    assert run("--model", "tiny", "--optimizer", "adafactor", "--shards", "2", "1", *options) == 0
    found = json.loads(file.read_text())
    assert [(fit["shards"], fit["peak"]["bytes"]) for fit in found["fits"]] == [(1, sizes[1].bytes)]
    assert "does not step sharded weights" in found["refused"]["adafactor"]
    assert run("--model", "tiny", "--optimizer", "adamw", "--shards", "1", "2", *options) == 0
    found = {fit["shards"]: fit["peak"]["bytes"] for fit in json.loads(file.read_text())["fits"]}
    assert found[2] == sizes[2].bytes
    assert "on each of 1 or 2 GPUs" in capsys.readouterr().out


@pytest.mark.parametrize("conversion", ("low_rank=4", "lora=2", "cast=2:4"))
def test_conversions_are_those_of_the_library(capsys, tmp_path, conversion):
    model = on_meta()
    if conversion.startswith("cast"):
        sparsity.prepare(model, 2, 4)
    else:
        kind, rank = conversion.split("=")
        lowrank.convert(model, int(rank), kind)
    counted = account(model, "scale", dtype=torch.bfloat16)
    file = tmp_path / "out.json"
    options = ("--optimizer", "scale", "--account", "--json", str(file))
    assert run("--model", "tiny", "--convert", conversion, *options) == 0
    out = json.loads(file.read_text())
    assert out["methods"][0]["held"] == counted.total
    assert out["notes"][0].startswith("14 layers to ")
    assert counted.total != account(on_meta(), "scale", dtype=torch.bfloat16).total


def test_shards_divide_what_every_process_holds():
    whole, one = account(on_meta(), "adamw"), account(on_meta(), "adamw", shards=4)
    rows = {p: -(-p.shape[0] // 4) * p[:1].numel() for p in on_meta().parameters()}
    assert one.params == one.grads == 4 * sum(rows.values()) < whole.params
    steps = 4 * len(rows)
    assert one.state_total == 2 * one.params + steps
    scale = account(on_meta(), "scale", shards=4)
    assert scale.state["head", "exp_avg"] == 4 * -(-509 // 4) * 48
    with pytest.raises(ValueError, match="Invalid shards: 0; it must be at least 1"):
        account(on_meta(), "adamw", shards=0)


def test_a_hugging_face_config_and_a_module_of_ones_own(capsys, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 101}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert run("--model", str(path), "--optimizer", "scale", "--seq", "16") == 0
    own = tmp_path / "own.py"
    own.write_text(
        "import torch\n"
        "def make():\n"
        "    model = torch.nn.Linear(64, 3)\n"
        "    return model, lambda m: m(torch.ones(5, 64)).sum()\n"
        "def number(): return 3\n"
    )
    assert run("--module", f"{own}:make", "--optimizer", "adamw") == 0
    capsys.readouterr()
    for where, message in (
        (f"{own}:number", "returns a int, not a torch.nn.Module"),
        (f"{own}:nothing", "has no function 'nothing'"),
        ("nowhere.py:make", "is not that of a file"),
        (str(own), "takes FILE.py:FUNCTION"),
    ):
        assert run("--module", where, "--optimizer", "scale") == 2
        assert message in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert run("--model", str(path)) == 2
    assert "needs transformers: pip install transformers" in capsys.readouterr().err
    assert run("--model", "gpt2") == 2
    assert capsys.readouterr().err.startswith("error: gpt2 is a Hugging Face model, which needs tr")


def test_a_script_with_its_arguments(capsys, tmp_path):
    script = tmp_path / "train.py"
    script.write_text("import sys, torch\nx = torch.ones(int(sys.argv[2]))\n1 / 0\n")
    assert run("--script", str(script), "--size", "1000000") == 1
    out = capsys.readouterr().out
    assert "resident peak" in out and "it failed after" in out
    assert out.rstrip().endswith("ZeroDivisionError: division by zero")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "llama-60n"), "unknown model 'llama-60n': did you mean llama-60m"),
        (("--model", "meta-llama/Llama-3.1-9B"), "'meta-llama/Llama-3.1-9B': did you mean Llama-3"),
        (("--model", "xyz"), "'xyz': `optimzoo models` lists the names; or give the path of"),
        (("--model", "tiny", "--shards", "1", "2"), "--shards 1 2: several are compared by --fits"),
        (("--model", "tiny", "--convert", "low=2"), "--convert low=2: it takes low_rank=128, sl"),
        (("--model", "tiny", "--convert", "lora=x"), "--convert lora=x: it takes low_rank=128, "),
        (("--model", "tiny", "--convert", "lora=99"), "--convert lora=99: model.layers.0.self_att"),
        (("--model", "tiny", "--fits", "24"), "--fits 24: a size needs its unit; write 24GB"),
        (("--model", "tiny", "--fits", "0GB"), "--fits 0GB: nothing fits in no bytes; write 24GB"),
        (("--model", "tiny", "--hyper", "rnk=2"), "has a hyperparameter 'rnk'; did you mean rank?"),
        (("--model", "tiny", "--hyper", "rank=1", "rank=2"), "rank=2: rank is 1 already"),
        (("--model", "tiny", "--optimizer", "galore", "--hyper", "rank=x"), "takes no such value"),
        (("--model", "tiny", "--picture", "a.xyz"), "--picture a.xyz: its name must end in one of"),
        (("--model", "tiny", "--picture", "a.png", "--json", "./a.png"), "--json writes that file"),
        (("--model", "tiny", "--json", "."), "--json .: it is a folder; name a file in it"),
        (("--model", "tiny", "--optimizer", "scal"), "unknown optimizer 'scal'; did you mean"),
        (("--model", "tiny", "--fits", "much"), "'much' is not a size; write 24GB or 24GiB"),
        (("--model", "tiny", "--optimizer", "scale", "--hyper", "rank=2"), "no hyperparameter"),
        (("--model", "tiny", "--hyper", "rank"), "--hyper takes NAME=VALUE, not 'rank'"),
        (("--model", "tiny", "--batch", "0"), "--batch is 0; it must be at least 1"),
        (("--model", "tiny", "--shards", "0"), "--shards is 0; it must be at least 1"),
        (("--model", "tiny", "--json", "nowhere/a.json"), "--json nowhere/a.json: its folder"),
        (("--model", "tiny", "--snapshot", "a.pickle"), "--snapshot is of a script on CUDA"),
        (("--model", "nothing.json"), "is not a Hugging Face config"),
        (("--script", "nothing.py"), "there is no script 'nothing.py'"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, message):
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch", "two"), "argument --batch: invalid int value: 'two'; see optimzoo memory -"),
        (("--batch", "2", "--batch", "4"), "--batch is given twice, as 2 and 4; give it once"),
        (("--bacth", "2"), "unrecognized arguments: --bacth 2"),
    ],
)
def test_what_the_parser_refuses_is_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as left:
        run("--model", "tiny", *arguments)
    error = capsys.readouterr().err
    assert left.value.code == 2 and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1", "is not a Hugging Face config: Expecting ',' delimiter"),
        ("[1]", "is not a Hugging Face config: it has no 'model_type'"),
        ('{"model_type": "nothing"}', "makes no causal language model: ValueError: Unrecognized"),
        ('{"model_type": "gpt2", "n_embd": "x"}', "makes no causal language model"),
        ('{"model_type": "vit"}', "makes no causal language model"),
    ],
)
def test_a_damaged_config_is_one_line(capsys, tmp_path, text, message):
    pytest.importorskip("transformers")
    path = tmp_path / "config.json"
    path.write_text(text)
    assert run("--model", str(path)) == 2
    error = capsys.readouterr().err
    assert message in error and str(path) in error and error.count("\n") == 1
    assert len(error) < len(str(path)) + 300


def test_what_is_wrong_in_a_module_of_ones_own_is_one_line(capsys, tmp_path):
    own = tmp_path / "own.py"
    own.write_text(
        "import torch\n"
        "def bad():\n    return nothing\n"
        "def pair():\n    return torch.nn.Linear(2, 2), 3\n"
        "def bare():\n    return torch.nn.Linear(2, 2)\n"
    )
    for name, message in (
        ("bad", f"{own}:3 failed: NameError: name 'nothing' is not defined"),
        ("pair", "the second must be a function from the module to its loss"),
        ("bare", "let the function return the module and a function from it to its loss"),
    ):
        assert run("--module", f"{own}:{name}", "--optimizer", "scale") == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_a_step_of_ones_own_is_named_and_decides_its_batch(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(
        "import torch\ndef make():\n"
        "    return torch.nn.Linear(64, 3), lambda m: m(torch.ones(5, 64)).sum()\n"
    )
    assert run("--module", "own.py:make", "--optimizer", "scale") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["Linear (own.py:make): 195 parameters, bfloat16", "peak of its own step"]
    assert run("--module", "own.py:make", "--optimizer", "scale", "--fits", "1MB") == 0
    out = capsys.readouterr().out
    assert "what fits in 1MB at its own step" in out and "its own" in out.splitlines()[-1]
    assert run("--module", "own.py:make", "--seq", "9") == 2
    assert "--seq 9: own.py:make returns a step of its own" in capsys.readouterr().err


def test_who_does_not_take_a_hyperparameter_is_said(capsys, tmp_path):
    file = tmp_path / "a.json"
    names = ("--optimizer", "sgd", "galore", "fira")
    assert (
        run("--model", "tiny", "--account", *names, "--hyper", "rank=8", "--json", str(file)) == 0
    )
    note = "rank=8 is taken by galore, fira alone; the other methods here have no rank."
    assert note in capsys.readouterr().out
    assert json.loads(file.read_text())["notes"] == [note]


def test_a_named_model_takes_any_length(capsys):
    assert run("--model", "tiny", "--optimizer", "sgd", "--seq", "1500") == 0
    assert "a step of 1 x 1500 tokens" in capsys.readouterr().out


def test_methods_that_cannot_are_said_with_what_fits(capsys):
    assert (
        run("--model", "tiny", "--fits", "1GB", "--batch", "2", "--optimizer", "adams", "sgd") == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("adams          parameter 0 is torch.bfloat16") for line in lines)
    assert max(map(len, lines)) <= 80


def test_json_goes_into_a_pipe_or_a_link_and_leaves_them_there(tmp_path):
    pipe, link, file = tmp_path / "pipe", tmp_path / "link", tmp_path / "file"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    arguments = ("--model", "tiny", "--account", "--optimizer", "sgd", "--json")
    assert run(*arguments, str(pipe)) == 0
    assert json.loads(os.read(reader, 65536))["methods"][0]["method"] == "sgd"
    os.close(reader)
    assert pipe.is_fifo()
    file.write_text("old")
    link.symlink_to(file)
    assert run(*arguments, str(link)) == 0
    assert link.is_symlink() and json.loads(file.read_text())["methods"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link", "pipe"]


def test_no_text_of_a_picture_is_cut():
    pytest.importorskip("matplotlib")
    many = [
        (f"natural_galore, checkpointing + release, batch {i}", {"parameters": i * 10**9})
        for i in range(1, 23)
    ]
    title = "\n".join(["a title that is as long as that of a model from a path " * 3] * 2)
    for bars, limit in (
        (many, None),
        (many[-1:], None),
        (many[:3], 10**12),
        ([("", {"other": 5})], 9),
    ):
        figure = report.draw(title, bars, limit)
        figure.canvas.draw()
        [axes] = figure.axes
        texts = [*axes.texts, *axes.get_yticklabels(), axes.xaxis.label, figure._suptitle]
        texts += figure.legends[0].get_texts()
        assert len(texts) >= 2 * len(bars) + 3
        for text in texts:
            box = text.get_window_extent()
            assert box.x0 >= 0 and box.y0 >= 0, text
            assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text


def test_a_machine_without_cuda_asked_for_cuda(capsys, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    script = tmp_path / "train.py"
    script.write_text("")
    assert run("--device", "cuda", "--script", str(script)) == 2
    assert "torch finds no CUDA device" in capsys.readouterr().err


def test_sizes():
    assert parse_size("24GB") == parse_size("24 gb") == parse_size("24G") == 24 * 10**9
    assert parse_size("1.5GiB") == parse_size(" 1.5 gib") == 3 * 2**29
    for text in ("24", "24000000000", "1e9GB", "-1GB", "1,5GB", "GB", ".", "1.2.3GB", "infGB", ""):
        with pytest.raises(ValueError, match="write"):
            parse_size(text)
