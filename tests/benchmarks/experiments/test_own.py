"""An optimizer and a model of one's own in the comparison: the rows of `train`, the same search."""

import copy
import csv
import json
import math
import re
from pathlib import Path

import pytest
import tiny_benchmarks
import torch

from benchmarks.__main__ import main
from benchmarks.experiments import own, plan
from benchmarks.experiments.plan import Plan
from benchmarks.report import readme as report
from benchmarks.report import tuned_rates
from benchmarks.training import cli
from benchmarks.training.config import RunConfig
from benchmarks.training.loop import train
from benchmarks.training.models import CausalLM, make_model
from benchmarks.training.own import create_own, load_class
from benchmarks.training.run import Run
from optimzoo import param_groups

SIGN = '''"""Sign descent with momentum, and what a constructor or an import may do wrong."""
import torch


class Sign(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, momentum=0.9, weight_decay=0.0, *, nesterov=False):
        if lr > 100:
            raise RuntimeError("the rate\\nis absurd")
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["buffer"] = torch.zeros_like(p)
                buffer = state["buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = buffer.lerp(p.grad, 0.5) if group["nesterov"] else buffer
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.sign(), alpha=-group["lr"])


class Reads(Sign):
    """One that reads a value of its weights at once, which has none on the meta device."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, lr)
        self.size = [float(p.detach().sum()) for g in self.param_groups for p in g["params"]]


class Nothing:
    pass
'''
PLAN = copy.deepcopy(tiny_benchmarks.PLAN)
PLAN["default"] = ["adamw"]
PLAN["methods"]["adamw"]["tuned"]["start"] |= {
    **dict.fromkeys(("lr", "embedding_lr", "head_lr"), 6.4e-2),
    "weight_decay": 0.0,
}
PLAN["methods"]["adamw"]["tuned"]["choices"]["weight_decay"] = [0.0, 0.1]
PLAN["methods"]["adamw"]["tuned"]["hyper"] = {"vector_lr": 2e-3}
PLAN["methods"]["scale"]["tuned"]["start"]["momentum"] = 0.9
PLAN["methods"]["scale"]["tuned"]["choices"]["momentum"] = [0.8, 0.9]
TUNED = {"lr": 1e-2, "embedding_lr": 2e-2, "head_lr": 2e-2, "clip": 1.0, "betas": [0.9, 0.95]}
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
LLAMA = {"model_type": "llama", "vocab_size": 320, "num_attention_heads": 2, **SHAPE}
GPT2 = {"model_type": "gpt2", "vocab_size": 320, "n_embd": 16, "n_layer": 2, "n_head": 2}
CONFIG = RunConfig("adamw", 1e-2, steps=6, batch_size=4, seq_len=16, eval_tokens=256)


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """A folder to be in, with a tiny plan that is tuned, and an optimizer of one's own."""
    tiny_benchmarks.write_text(tmp_path)
    tiny_benchmarks.write_plan(tmp_path, PLAN)
    (tmp_path / "results").mkdir()
    row = {"method": "adamw", "valid_loss": 1.0, "config": TUNED}
    rows = [{**row, "protocol": protocol} for protocol in ("tuned", "paper")]
    (tmp_path / "results" / "tiny-tune.json").write_text(json.dumps({"rows": rows}))
    (tmp_path / "mine.py").write_text(SIGN)
    return tiny_benchmarks.patched(monkeypatch, tmp_path)


def run(folder: Path, command: str, *options: object) -> int:
    return main([command, *map(str, options), *tiny_benchmarks.text_words(folder)])


def compare(folder: Path, *options: object) -> int:
    words = ["--plan=tiny", "--protocol=tuned", "--jobs=1", "--out=out", *options]
    return run(folder, "compare", *words)


def rows_of(path: Path) -> list[dict]:
    return json.loads(path.read_text())["rows"]


def trained(folder: Path, config: dict) -> dict:
    """The row of `train` with a row's configuration."""
    words = []
    for name, value in config.items():
        if value is None or value is False:
            continue
        text = json.dumps(value) if isinstance(value, dict) else value
        words.append(f"--{name.replace('_', '-')}={text}")
    assert run(folder, "train", *words, "--out=single") == 0
    return json.loads((folder / "single" / "row.json").read_text())


CLASSES = {
    "mine.py:Sign": {"momentum", "weight_decay"},
    "torch.optim:RAdam": {"betas", "weight_decay"},
    "pytorch_optimizer:Lion": {"betas", "weight_decay"},
}


@pytest.mark.parametrize("where", CLASSES)
def test_compare_gives_the_row_of_train(where, folder, capsys):
    if where.startswith("pytorch_optimizer"):
        pytest.importorskip("pytorch_optimizer", reason="pip install pytorch-optimizer")
    before = (folder / "results" / "tiny-tune.json").read_text()
    assert compare(folder, "--optimizer", where, "--tune") == 0
    assert compare(folder, "--optimizer", where) == 0
    name = where.split(":")[1]
    table = capsys.readouterr().out.splitlines()
    assert max(map(len, table[-20:])) <= 80
    adamw, mine = sorted(rows_of(folder / "out" / "results.json"), key=lambda r: "own" in r)
    assert "own" not in adamw and mine["own"] and mine["config"]["optimizer"] == where
    row = [name, "(own)", "tuned", f"{math.exp(mine['test_loss']):.2f}"]
    assert any(line.split()[:3] == row[:3] and row[3] in line.split() for line in table)
    # The search had all its rates and options in it, and the best of what was tried was chosen.
    tried = rows_of(folder / "out" / "tiny-tune.json")
    assert min(row["valid_loss"] for row in tried) == mine["valid_loss"]
    assert {row["method"] for row in tried} == {mine["method"]}
    for rate in ("lr", "embedding_lr", "head_lr"):
        assert len({plan.settings(row)[rate] for row in tried}) >= 3
    for option in ("clip", *CLASSES[where]):
        assert len({json.dumps(plan.settings(row)[option]) for row in tried}) == 2
    assert CLASSES[where] == plan.settings(mine).keys() & {"betas", "momentum", "weight_decay"}
    assert mine["config"]["hyper"]["vector_lr"] == 2e-3
    single = trained(folder, mine["config"])
    for key in ("config", "fingerprint", "curve", "valid_loss", "test_loss", "state_bytes", "own"):
        assert single[key] == mine[key], key
    # Nothing of it is in the repository.
    assert (folder / "results" / "tiny-tune.json").read_text() == before
    assert [path.name for path in (folder / "results").iterdir()] == ["tiny-tune.json"]


@pytest.mark.usefixtures("folder")
def test_a_class_of_torch_trains_as_the_registry_does(corpus):
    hyper = {"embedding_lr": 3e-2, "head_lr": 2e-2, "vector_lr": 5e-3, "weight_decay": 0.1}
    values = {**vars(CONFIG), "model": "tiny", "other_lr": 1e-2, "hyper": hyper}
    rows = [
        train(RunConfig(**{**values, "optimizer": name}), corpus)
        for name in ("adamw", "torch.optim:AdamW")
    ]
    for key in ("curve", "valid_loss", "test_loss", "state_bytes", "parameter_bytes"):
        assert rows[0][key] == rows[1][key]


@pytest.mark.usefixtures("folder")
def test_each_group_has_its_role_and_its_rate():
    groups = param_groups(make_model("tiny"))
    groups[0]["nesterov"] = True
    made = create_own("mine.py:Sign", groups, lr=0.1, head_lr=0.3, vector_lr=0.4, momentum=0.5)
    values = {g["role"]: (g["lr"], g["momentum"], g["nesterov"]) for g in made.param_groups}
    assert values == {
        "hidden": (0.1, 0.5, True),
        "embedding": (0.1, 0.5, False),
        "head": (0.3, 0.5, False),
        "vector": (0.4, 0.5, False),
    }
    assert made.param_groups[3]["weight_decay"] == 0.0


def record(folder: Path, where: str, **options: object) -> dict:
    tiny = Plan("tiny")
    name = own.add_own(tiny, where, folder / "out", **options)
    return tiny.methods[name]


def test_the_search_is_that_of_the_others(folder):
    adamw = PLAN["methods"]["adamw"]
    mine = record(folder, "torch.optim:AdamW")
    assert mine["tuned"]["start"] == adamw["tuned"]["start"]
    assert mine["tuned"]["choices"] == adamw["tuned"]["choices"]
    assert mine["paper"] == {"start": adamw["paper"]["start"], "hyper": {"weight_decay": 0.0}}
    sign = record(folder, "mine.py:Sign")["tuned"]
    choices = {"clip": [1.0, 0.0], "momentum": [0.8, 0.9], "weight_decay": [0.0, 0.1]}
    assert sign["choices"] == choices
    names = ["lr", "embedding_lr", "head_lr", "clip", "momentum", "weight_decay"]
    assert list(sign["start"]) == names
    # What is given is fixed; a start moves the search, and is in it.
    given = {"hyper": {"momentum": 0.7}, "start": {"lr": 0.5, "weight_decay": 0.05}}
    sign = record(folder, "mine.py:Sign", **given)
    assert sign["hyper"] == {"momentum": 0.7} and "momentum" not in sign["tuned"]["start"]
    assert sign["tuned"]["choices"] == {"clip": [1.0, 0.0], "weight_decay": [0.0, 0.05, 0.1]}
    assert sign["tuned"]["start"]["lr"] == sign["paper"]["start"]["lr"] == 0.5
    assert record(folder, "mine.py:Reads")["tuned"]["choices"] == {"clip": [1.0, 0.0]}


def test_other_options_and_another_source_are_another_method(folder, capsys):
    words = ["--optimizer", "mine.py:Sign", "--hyper", '{"nesterov": true}']
    two = [*words, "--optimizer", "mine.py:Sign", "--groups", '{"head": {"nesterov": true}}']
    assert compare(folder, *words, "--tune") == 0
    assert compare(folder, *words) == 0
    first = rows_of(folder / "out" / "results.json")[-1]
    assert first["config"]["hyper"]["nesterov"] is True
    capsys.readouterr()
    assert compare(folder, *two) == 2
    error = capsys.readouterr().err
    assert re.search(r"^error: Sign-\w{8} \(tuned\) has no tuning row; run compare --tune", error)
    assert compare(folder, *two, "--tune") == 0
    assert compare(folder, *two) == 0
    one, other = [row for row in rows_of(folder / "out" / "results.json") if "own" in row]
    assert one["curve"] == first["curve"] != other["curve"]
    assert other["config"]["groups"] == {"head": {"nesterov": True}}
    table = (folder / "out" / "table.md").read_text()
    assert "| Sign (own) | tuned |" in table and re.search(r"\| Sign-\w{8} \(own\) \| tuned", table)
    (folder / "mine.py").write_text(f"{SIGN}# changed\n")
    capsys.readouterr()
    assert compare(folder, *words) == 2
    assert "has no tuning row" in capsys.readouterr().err


def test_a_run_is_not_resumed_with_another_source(folder, capsys):
    sizes = ["--model=tiny", "--steps=6", "--batch-size=2", "--seq-len=16", "--eval-tokens=64"]
    words = ["--optimizer=mine.py:Sign", "--lr=0.01", *sizes, "--out=run", "--save-every=2"]
    train_step = Run.train_step

    def interrupted(self, log, **how):
        if self.step == 4:
            raise KeyboardInterrupt
        return train_step(self, log, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "train_step", interrupted)
        assert run(folder, "train", *words) == 130
    (folder / "mine.py").write_text(f"{SIGN}# changed\n")
    capsys.readouterr()
    assert run(folder, "train", *words) == 2
    assert "belongs to a run with source=" in capsys.readouterr().err
    (folder / "mine.py").write_text(SIGN)
    assert run(folder, "train", *words) == 0
    (folder / "mine.py").write_text(f"{SIGN}# changed\n")
    before = (folder / "run" / "row.json").read_text()
    assert run(folder, "train", *words) == 0  # a finished run of another source: trained again
    assert (
        json.loads((folder / "run" / "row.json").read_text())["fingerprint"]
        != (json.loads(before)["fingerprint"])
    )


@pytest.mark.parametrize("fields", [LLAMA, GPT2], ids=lambda fields: fields["model_type"])
def test_a_hugging_face_model_trains(fields, folder, corpus):
    pytest.importorskip("transformers", reason="pip install '.[test]'")
    (folder / "config.json").write_text(json.dumps({**fields, "torch_dtype": "bfloat16"}))
    config = RunConfig(**{**vars(CONFIG), "model": "config.json", "steps": 20})
    state = torch.get_rng_state()
    row, again = train(config, corpus), train(config, corpus)
    assert torch.equal(torch.get_rng_state(), state)
    assert row["curve"] == again["curve"] and row["test_loss"] == again["test_loss"]  # no dropout
    assert row["curve"][0][1] == pytest.approx(5.77, abs=0.1)  # log 320
    assert row["test_loss"] < row["curve"][0][1] - 0.5
    assert row["corpus"]["vocab_size"] == 320 and row["precision"] == "fp32"
    # The loss is that of the next token: transformers' own, of the labels that it shifts itself.
    model = make_model("config.json", 320, seed=3)
    assert isinstance(model, CausalLM) and {p.dtype for p in model.parameters()} == {torch.float32}
    ids = torch.arange(17)[None] * 7 % 320
    theirs = model.model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(model(ids[:, :-1], ids[:, 1:]), theirs)
    (folder / "config.json").write_text(json.dumps({**fields, "initializer_range": 0.01}))
    assert train(config, corpus)["fingerprint"] != row["fingerprint"]


def test_our_llama_and_that_of_transformers_learn_alike(folder, corpus):
    """The same shape by another road: the first loss differs by the draw of the weights alone."""
    pytest.importorskip("transformers", reason="pip install '.[test]'")
    (folder / "config.json").write_text(json.dumps(LLAMA))
    ours, theirs = (
        Run(RunConfig(**{**vars(CONFIG), "model": m}), corpus) for m in ("tiny", "config.json")
    )
    theirs.model.model.load_state_dict(ours.model.state_dict())
    for _ in range(3):
        assert ours.train_step(False)[0] == pytest.approx(theirs.train_step(False)[0], rel=1e-5)


def test_a_model_of_ones_own_is_tuned_and_compared(folder, capsys):
    pytest.importorskip("transformers", reason="pip install '.[test]'")
    (folder / "config.json").write_text(json.dumps(LLAMA))
    words = ["--model", "config.json", "--optimizer", "mine.py:Sign"]
    before = (folder / "results" / "tiny-tune.json").read_text()
    assert compare(folder, *words) == 2
    assert "has no tuned values for AdamW; run compare --tune first" in capsys.readouterr().err
    assert compare(folder, *words, "--tune") == 0
    assert compare(folder, *words) == 0
    rows = rows_of(folder / "out" / "results.json")
    assert [row.get("own", False) for row in rows] == [False, True]
    assert {row["config"]["model"] for row in rows} == {"config.json"}
    (path,) = (folder / "out").glob("tiny-config-*-tune.json")
    assert {row["method"] for row in rows_of(path)} == {row["method"] for row in rows}
    single = trained(folder, rows[1]["config"])
    assert single["curve"] == rows[1]["curve"] and single["test_loss"] == rows[1]["test_loss"]
    assert (folder / "results" / "tiny-tune.json").read_text() == before
    (folder / "config.json").write_text(json.dumps({**LLAMA, "rms_norm_eps": 1e-5}))
    assert compare(folder, *words) == 2  # another model, which is not tuned
    assert "has no tuned values" in capsys.readouterr().err


def test_the_rows_as_csv_and_in_the_report(folder, monkeypatch, capsys):
    words = ["--optimizer", "mine.py:Reads", "--seeds", 2]
    assert compare(folder, *words[:2], "--tune") == 0
    assert compare(folder, *words, "--csv", "csv/rows.csv") == 0
    assert list((folder / "csv").iterdir()) == [folder / "csv" / "rows.csv"]
    rows = rows_of(folder / "out" / "results.json")
    with (folder / "csv" / "rows.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(rows) == 4
    for row, line in zip(rows, lines, strict=True):
        config = row["config"]
        mine = "own" in row
        assert (line["method"], line["own"]) == (
            ("Reads (own)", "True") if mine else ("AdamW", "False")
        )
        assert (line["protocol"], int(line["seed"])) == (row["protocol"], config["seed"])
        assert float(line["lr"]) == config["lr"]
        assert float(line["head_lr"]) == config["hyper"]["head_lr"]
        assert line["betas"] == ("" if mine else "[0.9, 0.95]")
        assert json.loads(line["hyper"]) == {
            k: v for k, v in config["hyper"].items() if k not in plan.TUNED
        }
        assert int(line["tokens"]) == row["tokens"] and int(line["batch_tokens"]) == 32
        assert float(line["test_loss"]) == row["test_loss"]
        assert int(line["state_bytes"]) == row["state_bytes"]
        assert line["corpus_sha256"] == row["corpus"]["sha256"]
    # It reads its weights as it is made: what it holds at 60M cannot be had from shapes.
    table = (folder / "out" / "table.md").read_text()
    (line,) = (line for line in table.splitlines() if line.startswith("| Reads (own)"))
    assert line.split(" | ")[5] == "-"
    monkeypatch.setattr(tuned_rates, "PATH", folder / "rates.json")
    monkeypatch.setattr(tuned_rates, "PLANS", ())
    (folder / "README.md").write_text("# zoo\n")
    monkeypatch.setattr(report, "README", folder / "README.md")
    monkeypatch.setattr(report, "DOCS", folder / "docs")
    monkeypatch.setattr(report.Plan, "stored", classmethod(lambda cls: []))
    capsys.readouterr()
    assert main(["report", "--own", "out", "--out", "page", "--csv", "all.csv"]) == 0
    page = (folder / "page" / "index.html").read_text()
    assert page.index("Reads (own)") < page.index("</table>") and "AdamW" in page
    assert (folder / "page" / "own" / "table.md").read_text().count("Reads (own)") == 1
    assert (folder / "all.csv").read_text() == (folder / "csv" / "rows.csv").read_text()
    assert (folder / "README.md").read_text() == "# zoo\n"
    assert main(["report", "--own", "page"]) == 2
    assert capsys.readouterr().err.startswith("error: page has no results.json of compare (")


REFUSED = [
    (
        "--optimizer scale",
        "--optimizer scale is no class, as package.module:Class or FILE.py:Class",
    ),
    (
        "--optimizer nowhere:Sign",
        "optimizer nowhere:Sign cannot be imported (ModuleNotFoundError: ",
    ),
    ("--optimizer no.py:Sign", "optimizer no.py:Sign cannot be imported (FileNotFoundError: "),
    ("--optimizer bad.py:Sign", "optimizer bad.py:Sign cannot be imported (SyntaxError: "),
    ("--optimizer mine.py:Sing", "optimizer mine.py:Sing cannot be imported (AttributeError: "),
    ("--optimizer :Sign", "optimizer :Sign cannot be imported (ImportError: "),
    (
        "--optimizer mine.py:Nothing",
        "optimizer mine.py:Nothing is Nothing, not a subclass of torch.optim.Optimizer",
    ),
    ("--optimizer torch:zeros", "optimizer torch:zeros is a builtin_function_or_method, not a "),
    (
        '--optimizer mine.py:Sign --hyper {"a":1}',
        "optimizer mine.py:Sign refuses lr 0.064 and hyper",
    ),
    (
        '--optimizer mine.py:Sign --start {"lr":200}',
        "optimizer mine.py:Sign refuses lr 200 and hyper",
    ),
    ("--optimizer mine.py:Sign --hyper [1]", "--hyper [1] is no JSON object, as {...}"),
    ("--optimizer mine.py:Sign --groups 1", "--groups 1 is no JSON object, as {...}"),
    ('--optimizer mine.py:Sign --groups {"x":{}}', "groups has the role 'x'; there are hidden"),
    (
        '--optimizer mine.py:Sign --start {"lt":1}',
        "--start has 'lt'; did you mean lr or clip? it takes lr,",
    ),
    (
        '--optimizer mine.py:Sign --start {"lr":"a"}',
        "--start has lr 'a'; it must be a number above 0",
    ),
    (
        "--optimizer mine.py:Sign --store",
        "--store: what is stored is of the plan's methods and model",
    ),
    ("--model tiny --store", "--store: what is stored is of the plan's methods and model"),
    ("--model tini", "unknown model 'tini': did you mean tiny?"),
    ("--model no.json", "no.json is not a Hugging Face config: No such file"),
    (
        "--optimizer mine.py:Sign --tune --csv a",
        "--csv a: --tune compares nothing; leave --csv out",
    ),
]


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=str)
def test_what_cannot_be_is_refused_in_one_line_before_any_work(words, message, folder, capsys):
    (folder / "bad.py").write_text("class Sign(:\n")
    before = sorted(folder.iterdir())
    tune = [] if "--store" in words else ["--tune"]
    assert compare(folder, *tune, *words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
    assert [p for p in sorted(folder.iterdir()) if p.name != "__pycache__"] == before


@pytest.mark.usefixtures("folder")
def test_options_of_no_optimizer_and_text_that_is_not_json_are_usage_errors(capsys):
    for words, message in {
        "--hyper {}": "--hyper is of the --optimizer before it; there is none",
        "--optimizer mine.py:Sign --start {lr": "argument --start: '{lr' is not JSON (",
    }.items():
        with pytest.raises(SystemExit) as caught:
            main(["compare", "--plan=tiny", *words.split()])
        assert caught.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--optimizer mine.py:Sign --lr 200",
            "optimizer mine.py:Sign refuses lr 200 and hyper {}: ",
        ),
        ("--optimizer mine.py:Nothing --lr 1", "optimizer mine.py:Nothing is Nothing, not a sub"),
        ("--optimizer sgd --lr 1 --model t5.json", "t5.json makes no causal language model: "),
        ("--optimizer sgd --lr 1 --model list.json", "list.json is not a Hugging Face config: "),
    ],
)
def test_train_refuses_them_too(words, message, folder, monkeypatch, capsys):
    pytest.importorskip("transformers", reason="pip install '.[test]'")
    (folder / "t5.json").write_text(json.dumps({"model_type": "t5", "vocab_size": 320}))
    (folder / "list.json").write_text("[]")
    monkeypatch.setattr(cli, "corpus_from", None)
    assert main(["train", *words.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


def test_a_config_needs_transformers(folder, monkeypatch, capsys):
    (folder / "config.json").write_text(json.dumps(LLAMA))
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    assert main(["train", "--optimizer=sgd", "--lr=1", "--model=config.json"]) == 2
    assert capsys.readouterr().err == (
        "error: config.json is a Hugging Face config, which needs transformers: "
        "pip install transformers\n"
    )


def test_an_encoder_and_a_long_sequence_are_refused(folder, corpus):
    pytest.importorskip("transformers", reason="pip install '.[test]'")
    bert = {"model_type": "bert", "vocab_size": 320, "num_attention_heads": 2, **SHAPE}
    (folder / "bert.json").write_text(json.dumps(bert))
    with pytest.raises(ValueError, match=r"model bert.json is not causal: its tokens see those"):
        Run(RunConfig(**{**vars(CONFIG), "model": "bert.json"}), corpus)
    (folder / "short.json").write_text(json.dumps({**GPT2, "n_positions": 12}))
    with pytest.raises(ValueError, match="16 tokens exceed max_position_embeddings=12: shorten"):
        train(RunConfig(**{**vars(CONFIG), "model": "short.json"}), corpus)


@pytest.mark.usefixtures("folder")
def test_other_plans_say_what_they_lack(monkeypatch):
    monkeypatch.undo()
    for name, message in {
        "nano-bf16": "plan nano-bf16 is tuned by plan nano, for its own methods; take that",
        "60m-full": "plan 60m-full has no search to take over; take --plan nano",
    }.items():
        with pytest.raises(ValueError, match=message):
            own.add_own(Plan(name), "torch.optim:RAdam", Path("out"))
    larger = Plan("nano-1k")
    name = own.add_own(larger, "torch.optim:RAdam", Path("out"))
    search, adamw = (larger.search(m, "tuned") for m in (name, "adamw"))
    assert {axis[0] for axis in search.axes} == {axis[0] for axis in adamw.axes}
    assert search.choices == adamw.choices
    assert larger.tune_path_of(name) == Path("out/nano-1k-tune.json")
    assert larger.base.tune_path_of(name) == Path("out/nano-tune.json")


def test_a_class_is_found_in_a_module_or_a_file(folder):
    assert load_class("torch.optim:AdamW") is torch.optim.AdamW
    first, again = (load_class("mine.py:Sign") for _ in range(2))
    assert first is not again and first.__name__ == "Sign"  # read anew
    assert load_class(f"{folder}/mine.py:Sign").__module__ == first.__module__
