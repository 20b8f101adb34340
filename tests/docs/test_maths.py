"""The docstrings' rules as MathML: what is a formula, how it is built, and what stays text."""

import inspect
import re
import xml.etree.ElementTree as ET

import pytest

import optimzoo
from docs.hooks import maths, pages


def tree(text):
    return ET.fromstring(maths.mathml(text)).find("math/mrow")


def shown(node):
    """A formula in brackets: fractions, roots and scripts by their tags."""
    parts = [shown(child) for child in node if child.tag != "mspace"]
    if node.tag in ("mfrac", "msqrt", "msub", "msup", "msubsup", "mover"):
        return f"{node.tag[1:]}({', '.join(parts)})"
    return "".join(parts) or (node.text or "")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("W ← (1 − ηλ) W − η g / s", "W←(1−ηλ)W−ηfrac(g, s)"),
        ("P (M / (√V + eps))", "P(frac(M, sqrt(V)+eps))"),
        ("η √(1 − β₂ᵗ)/(1 − β₁ᵗ)", "ηfrac(sqrt(1−subsup(β, 2, t)), 1−subsup(β, 1, t))"),
        (
            "s_j = max(√(mean_i g_ij²), eps)",
            "sub(s, j)=max(sqrt(sub(mean, i)subsup(g, ij, 2)),eps)",
        ),
        ("√n X_i: / ‖X_i:‖", "sqrt(n)frac(sub(X, i:), ‖sub(X, i:)‖)"),
        ("(Ĝ Ĝᵀ)^(−1/2) Ĝ", "sup((over(G, ^)sup(over(G, ^), T)), −frac(1, 2))over(G, ^)"),
        ("F⁻¹ g + Σ_j h_j h_jᵀ", "sup(F, −1)g+sub(∑, j)sub(h, j)subsup(h, j, T)"),
        ("μ̃ = (1 − α) μ + α λ sign(θ)", "over(μ, ~)=(1−α)μ+αλsign(θ)"),
        ("g_i / max|g| · ĉ", "frac(sub(g, i), max|g|)·over(c, ^)"),
        ("m >= n", "m≥n"),
        ("U Σ^alpha Vᵀ", "Usup(Σ, alpha)sup(V, T)"),
        ("‖R_j‖ + 1e-8", "‖sub(R, j)‖+sup(10, −8)"),
        ("t / total_steps < 2.5", "frac(t, total_steps)<2.5"),
    ],
)
def test_a_formula_is_built_as_it_is_read(text, wanted):
    assert shown(tree(text)) == wanted


@pytest.mark.parametrize(
    "text",
    [
        *("momentum_buffer", "torch.optim.Muon", "rank=1", "scale_type", "optimizer.step()"),
        *(
            "(a",
            "a)",
            "[a)",
            "",
            "→",
            "/ b",
            "|x",
            "Adam's moments",
            "x_long",
            "V ←",
            "· b",
            "a[0]; b",
            "√",
        ),
    ],
)
def test_what_is_no_formula_is_refused(text):
    with pytest.raises(ValueError, match="no formula"):
        maths.mathml(text)


def test_words_stay_words_and_code_stays_code():
    html = maths.prose("where |g_i| > ĉ by `a_b`, or 1 <each> row i of a long-run <to>")
    text = re.sub(r"<span.*?</span>", "⟦⟧", html)
    assert text == (
        "where ⟦⟧ by <code>a_b</code>, or 1 &lt;each&gt; row ⟦⟧ of a long-run &lt;to&gt;"
    )


def test_a_rule_is_rows_of_name_formula_and_remark():
    lines = ["head:      g ← m      (the only one)", "           W ← W − g", "vectors:   Adam"]
    html = ET.fromstring(maths.rule(lines))
    cells = [(cell.get("class"), "".join(cell.itertext())) for cell in html]
    assert cells == [
        *(("name", "head:"), ("what", "g←m"), ("remark", "(the only one)")),
        *(("name", ""), ("what alone", "W←W−g")),
        *(("name", "vectors:"), ("what alone", "Adam")),
    ]
    option = ET.fromstring(f"<p>{maths.prose('`nesterov`: g ← β m + (1 − β) g')}</p>")
    assert "".join(option.itertext()) == "nesterov: g←βm+(1−β)g" and len(option) == 2
    loop = maths.rule(["`steps` times:", "    x ← x / 2"])
    assert 'class="what alone deeper"><span' in loop and "<code>steps</code> times:" in loop
    assert maths.rule(["optimizer.step()", "    loss"]) is None
    assert maths.rule(["ρ · adamw_lr · (width / width of the other)^p"]) is None


def test_every_methods_rule_is_typeset_and_stays_as_it_is_in_the_terminal():
    pytest.importorskip("griffe", reason="the pages alone need it; pip install '.[docs]'")
    from docs.hooks.docstrings import markdown

    for name in pages.method_names():
        doc = inspect.getdoc(optimzoo.get_info(name).make)
        text = markdown(doc)
        rules = re.findall(r'^<div class="rule.*</div>$', text, re.M)
        assert len(rules) == doc.count("::\n"), name
        for rule in rules:
            assert rule.count("<math") >= 3, name
            text = re.sub(
                r'<span class="maths">.*?</span>|<code>.*?</code>|(?:mask|, V) ←', "", rule
            )
            assert not re.search("[←√‖ᵀᵗ₁₂²_]", text), name  # no formula is left as text
        assert "<div" not in doc and "<math" not in doc


def test_a_formula_at_the_start_of_a_line_stays_in_its_paragraph():
    markdown = pytest.importorskip("markdown", reason="the pages alone need it")
    pytest.importorskip("griffe", reason="the pages alone need it")
    from docs.hooks.docstrings import markdown as convert

    html = markdown.markdown(convert("State of it:\n``2 r max(m, n)``, and ``momentum_buffer``."))
    assert html.count("<p>") == 1 and "<code>momentum_buffer</code>" in html
    assert "<mi>max</mi>" in html and "&lt;" not in html
