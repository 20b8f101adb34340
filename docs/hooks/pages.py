"""Build-time content of the pages: parts of the README, lists, and a page for each method.

In a page's Markdown:

- ``<!-- readme: HEADING -->``: that section of the README (``intro``: what is before the first);
- ``<!-- file: NAME -->``: that file, less its title;
- ``<!-- results -->``, ``<!-- notebooks -->``, ``<!-- methods -->``: what there is, listed;
- a link to a method's file leads to its page.

Tables are in the pages already, from ``python -m benchmarks report``.

The pages of the methods are made from the registry and the docstrings.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch

import optimzoo
from benchmarks.common.tables import Table
from benchmarks.experiments.plan import Plan
from benchmarks.experiments.summary import HEADERS, cells, stored_records
from benchmarks.report import start_checks
from benchmarks.report.marks import source_link
from benchmarks.report.tuned_rates import table as starting_table
from optimzoo.memory import account
from optimzoo.models.llama import Llama, get_config

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SIZE = "60m"
DTYPES = {"adams": torch.float32}
NOT_FOUND = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>No such page - optimzoo</title>
<body style="font: 1.1em/1.6 sans-serif; max-width: 40em; margin: 4em auto; padding: 0 1em">
<h1>No such page</h1>
<p>This address has no page. <a href="index.html">The first page of optimzoo</a> leads to all.</p>
<script>
// Wherever the site lies: the one folder of pages in it is methods/.
const at = location.pathname.replace(/(methods\\/)?[^/]*$/, "");
document.querySelector("a").href = at + "index.html";
</script>
</html>
"""
PAGES = {"CONTRIBUTING.md": "adding.md", "CHANGELOG.md": "changes.md"}


def expand(text: str) -> str:
    """Return a page's Markdown with every mark replaced by its content."""
    text = re.sub(r"<!-- readme: (.+?) -->", lambda m: readme(m[1]), text)
    text = re.sub(r"<!-- file: (.+?) -->", lambda m: body(ROOT / m[1]), text)
    text = text.replace("<!-- results -->", results()).replace("<!-- notebooks -->", notebooks())
    text = text.replace("<!-- methods -->", methods())
    return re.sub(r"\[`(\w+)`\]\(\.\./optimzoo/[\w/]+\.py\)", r"[`\1`](methods/\1.md)", text)


def readme(heading: str) -> str:
    """Return a section of the README, with its links to the pages of the site.

    Raises:
        ValueError: the README has no such section.
    """
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    parts = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)
    sections = {"intro": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}
    if heading not in sections:
        raise ValueError(f"README.md has no section {heading!r}; it has {', '.join(sections)}")
    section = re.sub(r"^# .+\n", "", sections[heading])
    section = re.sub(r"\]\(docs/([\w/]+\.(?:md|svg))", r"](\1", section)
    return re.sub(r"\]\((\w+\.md)\)", lambda m: f"]({PAGES.get(m[1], m[1])})", section).strip()


def body(path: Path) -> str:
    """Return a Markdown file without its title."""
    return re.sub(r"\A# .+\n", "", path.read_text(encoding="utf-8")).strip()


def results() -> str:
    """Return a table of every committed results file: its rows, and where they were made."""
    lines = ["| file | rows | made on | commits |", "|---|--:|---|---|"]
    for path in sorted(RESULTS.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        rows = next(v for v in (record.get(k) for k in ("rows", "layers", *record)) if v)
        made = [r["provenance"] for r in rows if isinstance(r, dict) and "provenance" in r]
        made = made or [record["provenance"]]
        devices = dict.fromkeys(f"{m['device']}, torch {m['torch']}" for m in made)
        commits = dict.fromkeys(f"`{m['commit']}`" for m in made)
        count = len(rows) if isinstance(rows, list) else 1
        lines.append(
            f"| `{path.name}` | {count} | {'; '.join(devices)} | {' '.join(list(commits))} |"
        )
    return "\n".join(lines)


def notebooks() -> str:
    """Return a list of every notebook: its file, its title and its first sentence."""
    lines = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        first = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
        title, _, text = first.partition("\n")
        lines.append(f"- **{title.lstrip('# ')}** (`notebooks/{path.name}`). {text.strip()}")
    return "\n".join(lines)


def methods() -> str:
    """Return a table of the methods that have a page."""
    lines = ["| method | | source | state |", "|---|---|---|---|"]
    for name in method_names():
        i = optimzoo.get_info(name)
        lines.append(
            f"| [`{name}`]({name}.md) | {i.description} | {source_link(i.source)} | {i.state} |"
        )
    return "\n".join(lines)


def method_names() -> list[str]:
    """Return the names of the registry's methods that are classes of this package."""
    names = optimzoo.list_optimizers()
    return [n for n in names if optimzoo.get_info(n).make.__module__.startswith("optimzoo.")]


def method_page(name: str) -> str:
    """Return a method's page: where to start, its docstring, its state, its results."""
    info = optimzoo.get_info(name)
    text = f"{info.description[0].upper()}{info.description[1:]} ({source_link(info.source)})."
    head = f"# {name}\n\n{text}"
    doc = f"::: {info.make.__module__}.{info.make.__name__}"
    return f"{head}\n\n{start(name)}\n\n{doc}\n\n{state_table(name)}\n\n{result_table(name)}\n"


def start(name: str) -> str:
    """Return the code that makes a method's optimizer, and its rates as multiples of AdamW's."""
    every = starting_table()
    rows = [row for row in every.rows if row[0].split(",")[0] == f"`{name}`"]
    if not rows:
        return f'```python\noptimzoo.create_optimizer("{name}", model, lr=...)\n```'
    code = (
        f'start = optimzoo.starting_values("{name}", model, adamw_lr=1e-3)\n'
        f'optimizer = optimzoo.create_optimizer("{name}", model, **start.options)'
    )
    text = (
        "[Starting rates](../starting_values.md), as multiples of the rate that you have for "
        "AdamW, as they were tuned beside it at a width of 128:"
    )
    parts = [f"```python\n{code}\n```", text, Table(every.headers, rows).markdown()]
    if checked := start_checks.of_method(name):
        parts += [
            "On [tasks that they were not fitted to](../starting_values.md#checked-elsewhere), "
            "beside the best of a grid around them (far: not within 2 % of it):",
            checked.markdown(),
        ]
    return "\n\n".join(parts)


def state_table(name: str) -> str:
    """Return a table of the state on the 60M Llama, in MB by role and tensor."""
    with torch.device("meta"):
        model = Llama(get_config(SIZE))
    dtype = DTYPES.get(name, torch.bfloat16)
    counted = account(model, name, dtype=dtype, **optimzoo.get_info(name).required)
    lines = [
        "| role | state | MB |",
        "|---|---|--:|",
        f"| | parameters | {counted.params / 1e6:.1f} |",
    ]
    for (role, key), size in sorted(counted.state.items()):
        lines.append(f"| {role} | `{key}` | {size / 1e6:.1f} |")
    total = (counted.params + counted.state_total) / 1e6
    lines.append(f"| | **together** | **{total:.1f}** |")
    kind = str(dtype).removeprefix("torch.")
    text = f"The 60M Llama in {kind}, default options, 1e6 bytes, by `optimzoo.memory.account`."
    return f"## State\n\n{text}\n\n" + "\n".join(lines)


def result_table(name: str) -> str:
    """Return the method's rows of the nano comparison, or that it has none."""
    plan = Plan("nano")
    methods = [m for m, r in plan.methods.items() if r.get("optimizer", m) == name]
    records = stored_records(plan.name)
    mine = [r for r in records if r["method"] in methods]
    if not mine:
        return "## Results\n\nThis method is not yet in the [comparison](../choosing.md)."
    adamw = [r for r in records if r["method"] == "adamw" and name != "adamw"]
    table = Table(HEADERS, [cells(record) for record in [*mine, *adamw]], left=3)
    text = "Its rows of the [comparison](../choosing.md#the-comparison), and AdamW's."
    return f"## Results\n\n{text}\n\n{table.markdown()}"


# What mkdocs calls.


def on_config(config: Any) -> Any:
    """List the methods' pages under the overview of them."""
    pages = [{name: f"methods/{name}.md"} for name in method_names()]
    config["nav"] = [
        {"Methods": [item["Methods"], *pages]} if "Methods" in item else item
        for item in config["nav"]
    ]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the methods' pages to the site's files."""
    from mkdocs.structure.files import File

    for name in method_names():
        path = f"methods/{name}.md"
        files.append(File.generated(config, path, content=method_page(name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Expand one page; the methods' pages are whole already."""
    return markdown if page.file.generated_by else expand(markdown)


def on_post_template(output_content: str, *, template_name: str, config: Any) -> str:
    """Replace the theme's page for a wrong address, whose links fit the root of a server alone."""
    return NOT_FOUND if template_name == "404.html" else output_content


def on_post_build(config: Any) -> None:
    """Refuse a site that fetches a script, a style or a font from elsewhere."""
    fetched = re.compile(r"<(?:script|link|img)[^>]+(?:src|href)=\"?https?://[^>]+>")
    for path in Path(config["site_dir"]).rglob("*.html"):
        tags = [
            t for t in fetched.findall(path.read_text(encoding="utf-8")) if "canonical" not in t
        ]
        if tags:
            raise ValueError(f"{path.name} fetches {tags[0]}")
