"""The pages: their figures come from the rows, their parts from their sources, their code runs."""

import copy
import json
import re
import types

import pytest
import torch

import optimzoo
from benchmarks.experiments import summary
from benchmarks.experiments.summary import cells
from benchmarks.report import choosing
from benchmarks.report.marks import source_link
from docs.hooks import pages
from optimzoo.cli import main
from optimzoo.lowrank import convert

DOCS = pages.ROOT / "docs"
TEXTS = {p.name: p.read_text(encoding="utf-8") for p in sorted(DOCS.glob("*.md"))}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", TEXTS)
def test_every_mark_is_expanded(name):
    text = pages.expand(TEXTS[name])
    assert "{{" not in text
    marks = re.findall(r"<!-- (\w+)", text)
    made = {"table", "steps", "gpu", "utilisation", "gradients", "beside", "rows", "headline"}
    made |= {"findings", "starting", "start", "checked", "forgetting", "choosing"}
    made |= {"other", "paper", "batches", "cast", "end"}
    assert set(marks) <= made
    assert 2 * marks.count("end") == len(marks)


def test_the_comparison_has_the_figures_of_the_readme():
    [table] = re.findall(r"<!-- table: nano -->.*?<!-- end -->", TEXTS["choosing.md"], re.S)
    readme = (pages.ROOT / "README.md").read_text(encoding="utf-8")
    [short] = re.findall(r"<!-- results: nano -->.*?<!-- end -->", readme, re.S)
    rows = [line.split(" | ") for line in short.splitlines() if re.match(r"\| [A-Z]", line)]
    tuned = [record for record in summary.stored_records("nano") if record["protocol"] == "tuned"]
    assert len(rows) == len(tuned) >= 5
    for label, megabytes, perplexity, *_ in rows:
        cells = f"{label} | tuned | ", f" | {perplexity} | ", f" | {megabytes} | "
        assert any(all(cell in line for cell in cells) for line in table.splitlines()), label


def test_a_figure_of_the_decision_table_follows_its_row(monkeypatch):
    def figure():
        [row] = [line for line in choosing.methods("nano").splitlines() if "scale.py) |" in line]
        return row.split(" | ")[4]

    before = figure()
    records = copy.deepcopy(summary.stored_records("nano"))
    perplexities = {r["method"]: r["perplexity"] for r in records if r["protocol"] == "tuned"}
    [scale] = [r for r in records if r["method"] == "scale" and r["protocol"] == "tuned"]
    scale["perplexity"] = 2 * perplexities["adamw"]
    monkeypatch.setattr(summary, "stored_records", lambda name: records)
    assert figure() == "+100\u00a0%" != before


def test_a_section_that_is_not_there():
    with pytest.raises(ValueError, match=r"README\.md has no section 'Nothing'; it has intro, "):
        pages.expand("<!-- readme: Nothing -->")


def test_a_method_is_linked_to_its_file_and_on_the_site_to_its_page():
    files = re.findall(r"\]\(\.\./(optimzoo/optimizers/\w+\.py)\)", "".join(TEXTS.values()))
    assert len(files) > 10 and all((pages.ROOT / file).exists() for file in files)
    link = "[`apollo_mini`](../optimzoo/optimizers/apollo.py)"
    assert pages.expand(link) == "[`apollo_mini`](methods/apollo_mini.md)"


def test_every_method_has_a_page_with_its_state_and_its_rows():
    names = pages.method_names()
    assert {"scale", "natural_galore", "adams", "muon"} <= set(names) and "adamw" not in names
    text = pages.method_page("scale")
    assert "::: optimzoo.optimizers.scale.SCALE" in text
    head = 32000 * 512 * 2
    assert f"| head | `exp_avg` | {head / 1e6:.1f} |" in text
    for record in summary.stored_records("nano"):
        row = "| " + " | ".join(cells(record)) + " |"
        assert (row in text) == (record["label"] in ("SCALE", "SCALE spectral", "AdamW"))
    assert 'starting_values("scale", model, adamw_lr=1e-3)' in text
    assert "| `scale`, `normalize='spectral'` |" in text and "| `muon` |" not in text
    for task in ("fine-tuning", "classifier"):
        assert f"| {task} | SCALE |" in text and f"| {task} | Muon |" not in text
    assert 'create_optimizer("adams", model, lr=...)' in pages.method_page("adams")
    assert "not yet in the [comparison]" in pages.method_page("adams")


def test_docstrings_become_markdown():
    griffe = pytest.importorskip("griffe", reason="the pages alone need it; pip install '.[docs]'")
    assert griffe
    from docs.hooks.docstrings import markdown

    assert markdown("text.\n\n::\n\n    step()\n") == "text.\n\n    step()\n"
    assert markdown("code::\n\n    optimizer.step()\n") == "code:\n\n    optimizer.step()\n"
    assert markdown("see :func:`optimzoo.x` and :class:`~a.B`") == "see `optimzoo.x` and `a.B`"


def test_a_name_of_the_reference_is_no_module_of_the_same_name():
    names = [name for text in TEXTS.values() for name in re.findall(r"^::: (\S+)", text, re.M)]
    assert len(names) > 20
    folder = pages.ROOT
    for name in names:
        path = folder / name.replace(".", "/")
        assert not path.with_suffix(".py").exists() and not path.is_dir(), name


@pytest.mark.parametrize("name", TEXTS)
def test_a_line_of_code_is_whole_on_a_laptop(name):
    for block in re.findall(r"```\w*\n(.*?)```", TEXTS[name], re.S):
        assert max(map(len, block.splitlines())) <= 90, block


def test_a_source_is_a_link():
    muon, scale = (source_link(optimzoo.get_info(name).source) for name in ("muon", "scale"))
    assert muon == "[kellerjordan.github.io/posts/muon](https://kellerjordan.github.io/posts/muon)"
    assert scale == "[arXiv 2506.16659](https://arxiv.org/abs/2506.16659)"


def test_the_page_of_starting_values_shows_what_its_command_prints(capsys):
    pytest.importorskip("transformers", reason="pip install '.[test]'")
    [command] = re.findall(r"^optimzoo (start .*?)\n```", TEXTS["starting_values.md"], re.S | re.M)
    assert main(command.replace("\\\n", " ").split()) == 0
    place = r"<!-- start: muon -->\n```python\n(.*?)\n```"
    [shown] = re.findall(place, TEXTS["starting_values.md"], re.S)
    assert capsys.readouterr().out.endswith(f"\n\n{shown}\n")


def test_the_page_for_a_wrong_address_needs_no_root():
    assert not re.search(r"(href|src)=.?/", pages.NOT_FOUND)
    assert pages.on_post_template("x", template_name="404.html", config=None) == pages.NOT_FOUND
    assert pages.on_post_template("x", template_name="sitemap.xml", config=None) == "x"


def blocks(name):
    return re.findall(r"```python\n(.*?)```", TEXTS[name], re.S)


def test_the_code_of_the_training_tools_runs(tmp_path):
    pytest.importorskip("accelerate", reason="pip install '.[test]'")
    lightning = pytest.importorskip("lightning", reason="pip install '.[test]'")
    from tiny_llama import batch, rows, tiny_llama
    from transformers import TrainingArguments

    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    scope = {"torch": torch, "optimzoo": optimzoo, "lightning": lightning, "data": rows(4)}
    scope["args"] = TrainingArguments(str(tmp_path), max_steps=1, **quiet)
    scope["loader"] = torch.utils.data.DataLoader(rows(4), batch_size=2, collate_fn=batch)
    classes = []
    code = blocks("integrations.md")
    for block in code[:-1]:
        scope["model"] = tiny_llama()
        scope.pop("optimizer", None)
        exec(block, scope)
        if "trainer =" in block:
            scope["trainer"].train()
            classes.append(type(scope["trainer"].optimizer.optimizer))
        elif "Module" in block:
            made = scope["Module"].configure_optimizers(types.SimpleNamespace(**scope))
            classes.append(type(made["optimizer"]))
        else:
            classes.append(type(getattr(scope["optimizer"], "optimizer", scope["optimizer"])))
    zoo = optimzoo
    assert classes == [
        zoo.SCALE,
        zoo.NaturalGaLore,
        zoo.SCALE,
        zoo.Fira,
        *[zoo.SCALE] * 2,
        zoo.Muon,
        zoo.SCALE,
    ]
    exec(code[-1], scope)
    first = [
        group["lr"] / peak
        for group, peak in zip(scope["optimizer"].param_groups, scope["peaks"], strict=True)
    ]
    assert len(first) > 1 and first == pytest.approx([1 / 25] * len(first))


def test_the_code_of_from_adamw_and_of_fine_tuning_runs(capsys):
    pytest.importorskip("transformers", reason="pip install '.[test]'")
    from tiny_llama import batch, rows, tiny_llama

    def trained(block, model):
        scope = {"torch": torch, "optimzoo": optimzoo, "model": model}
        exec(block, scope)
        before = model.lm_head.weight.detach().clone()
        model(**batch(rows(2))).loss.backward()
        scope["optimizer"].step()
        return scope["optimizer"], not torch.equal(before, model.lm_head.weight)

    [switched] = blocks("from_adamw.md")
    optimizer, moved = trained(switched, tiny_llama())
    assert type(optimizer) is optimzoo.SCALE and moved
    assert "embedding" in capsys.readouterr().out
    full, adapters = blocks("fine_tuning.md")
    model = tiny_llama().bfloat16()
    optimizer, moved = trained(full, model)
    assert optimizer.defaults["rounding"] == "stochastic" and moved
    model = tiny_llama()
    convert(model, rank=2, kind="lora")
    optimizer, _ = trained(adapters, model)
    trainable = {p for p in model.parameters() if p.requires_grad}
    assert set(optimizer.param_groups[0]["params"]) == trainable
    assert all(optimizer.state[p]["step"] == 1 for p in trainable)


def test_each_section_of_the_training_tools_is_short():
    for section in TEXTS["integrations.md"].split("\n## ")[1:]:
        code = sum(len(b.splitlines()) for b in re.findall(r"```python\n(.*?)```", section, re.S))
        assert code <= 10, section.splitlines()[0]


def test_the_reference_names_what_there_is():
    named = [n for text in TEXTS.values() for n in re.findall(r"^::: ([\w.]+)", text, re.M)]
    assert len(named) > 12
    for name in named:
        module, _, attribute = name.rpartition(".")
        found = __import__(module, fromlist=[attribute])
        assert getattr(found, attribute).__doc__, name


def test_the_notebooks_are_committed_without_outputs():
    paths = sorted((pages.ROOT / "notebooks").glob("*.ipynb"))
    assert len(paths) == 7
    for path in paths:
        text = path.read_text(encoding="utf-8")
        cells = json.loads(text)["cells"]
        assert cells[0]["source"][0].startswith("# "), path.name
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
        assert f"notebooks/{path.name}" in pages.expand(TEXTS["notebooks.md"])
