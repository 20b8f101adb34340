"""Typesetting of the docstrings' rules: Unicode maths, readable in a terminal, to MathML.

The notation is that of the rules: ``W ← (1 − ηλ) W − η g / s``. A fraction is of the two factors
beside its stroke, a root of the factor after it; what stands between spaces is multiplied. What is
not maths (a word that is none of `NAMES`, brackets that do not close) is a `ValueError`, and stays
text.
"""

import re
import unicodedata
from html import escape

FUNCTIONS = ("max", "min", "mean", "std", "sign", "limit", "orth", "vec", "RMS")
NAMES = (*FUNCTIONS, "eps", "scale", "total_steps", "alpha")
RAISED = {"⁻": "−", "ᵗ": "t", "ᵀ": "⊤", "'": "′"} | dict(
    zip("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789", strict=True)
)
LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
ACCENTS = {"\u0302": "^", "\u0303": "~", "\u0304": "¯"}
CLOSING = {"(": ")", "[": "]", "‖": "‖", "|": "|"}
RELATIONS = "←→=<>≤≥≠+−·×,…"
SPELT = {">=": "≥", "<=": "≤", "->": "→", "-": "−", "*": "·"}
TOKEN = re.compile(
    rf"(?P<space>\s+)|(?P<number>\d+(?:\.\d+)?(?:e[-−]?\d+)?)|(?P<name>{'|'.join(NAMES)})(?![a-z])"
    rf"|(?P<letter>(?:[A-Za-z](?![A-Za-z])|[α-ωΑ-Ω])[{''.join(ACCENTS)}]?)"
    rf"|(?P<raised>[{''.join(RAISED)}]+)|(?P<lowered>[{''.join(LOWERED)}]+)"
    r"|_(?P<index>[a-zA-Z0-9:]{1,3})(?![A-Za-z0-9_])|(?P<spelt>>=|<=|->|-|\*)|(?P<sign>.)"
)


def mathml(text: str, *, large: bool = False) -> str:
    """Return a formula as MathML, with fractions as ``large`` as in a line of their own.

    Raises:
        ValueError: the text is no formula.
    """
    style = ' displaystyle="true"' if large else ""
    # In a span: Markdown takes a line that begins with <math> for a block of its own.
    return f'<span class="maths"><math{style}>{_Parser(text).formula()}</math></span>'


class _Parser:
    """One pass over a formula's tokens, with what is open on Python's stack."""

    def __init__(self, text: str) -> None:
        text = unicodedata.normalize("NFD", text.strip())
        self.tokens = [(m.lastgroup or "", m[m.lastgroup or 0]) for m in TOKEN.finditer(text)]
        self.at = 0

    def formula(self) -> str:
        """Return the whole text as a row."""
        row = self.row(None)
        if "<mi>" not in row and "<mn>" not in row:
            raise ValueError("no formula: it has neither a letter nor a number")
        if re.search("^<mo>[^−…]</mo>|<mo>[^,…]</mo>$", row):
            raise ValueError("no formula: a sign has nothing before it or after it")
        return f"<mrow>{row}</mrow>"

    def peek(self) -> tuple[str, str]:
        """Return the next token, its kind empty at the end."""
        return self.tokens[self.at] if self.at < len(self.tokens) else ("", "")

    def skip_space(self) -> bool:
        """Step over white space; return whether there was some."""
        start = self.at
        while self.peek()[0] == "space":
            self.at += 1
        return self.at > start

    def row(self, closing: str | None) -> str:
        """Return everything to the closing bracket, or to the end."""
        parts: list[str] = []
        operand = False  # whether the last part is one
        while True:
            spaced = self.skip_space()
            kind, value = self.peek()
            if value == closing or not kind:
                if closing and not kind:
                    raise ValueError(f"no formula: {closing} is missing")
                return "".join(parts)
            sign = SPELT.get(value, value)
            if sign == "/" and operand:
                self.at += 1
                self.skip_space()
                above, below = _bare(parts.pop()), _bare(self.factor())
                parts.append(f"<mfrac>{above}{below}</mfrac>")
            elif kind in ("sign", "spelt") and sign in RELATIONS:
                self.at += 1
                parts.append(f"<mo>{escape(sign)}</mo>")
                operand = False
            else:
                if spaced and operand:
                    parts.append('<mspace width="0.2em"/>')
                parts.append(self.factor())
                operand = True

    def factor(self) -> str:
        """Return the next symbol, root or bracket, with what is raised or lowered behind it."""
        kind, value = self.peek()
        self.at += 1
        if kind == "letter":
            sums = value == "Σ" and self.peek()[0] == "index"
            base = "<mo>∑</mo>" if sums else f"<mi>{value[0]}</mi>"
            if len(value) > 1:
                base = f'<mover accent="true">{base}<mo>{ACCENTS[value[1]]}</mo></mover>'
        elif kind == "number":
            base = _number(value)
        elif kind == "name":
            base = f"<mi>{value}</mi>"
        elif value == "√":
            return f"<msqrt>{_bare(self.factor())}</msqrt>"
        elif value in CLOSING:
            base = self.bracket(value)
        else:
            raise ValueError(f"no formula: {value!r}")
        base = self.scripts(base)
        if value in FUNCTIONS and self.peek()[1] in CLOSING:
            argument = self.factor()
            return f"<mrow>{base}{argument}</mrow>"
        return base

    def bracket(self, opening: str) -> str:
        """Return what is in brackets, with them."""
        inner = self.row(CLOSING[opening])
        self.at += 1
        high = "true" if "<mfrac>" in inner else "false"
        left = f'<mo form="prefix" stretchy="{high}">{opening}</mo>'
        right = f'<mo form="postfix" stretchy="{high}">{CLOSING[opening]}</mo>'
        return f"<mrow>{left}<mrow>{inner}</mrow>{right}</mrow>"

    def scripts(self, base: str) -> str:
        """Return a symbol with its index and its power, if there are any."""
        below = above = ""
        while True:
            kind, value = self.peek()
            if kind in ("index", "lowered") and not below:
                self.at += 1
                below = _script("".join(LOWERED.get(c, c) for c in value))
            elif kind == "raised" and not above:
                self.at += 1
                above = _script("".join(RAISED[c] for c in value))
            elif value == "^" and not above:
                self.at += 1
                above = _bare(self.factor())
            else:
                break
        if below and above:
            return f"<msubsup>{base}{below}{above}</msubsup>"
        if below or above:
            tag = "msub" if below else "msup"
            return f"<{tag}>{base}{below or above}</{tag}>"
        return base


def _number(text: str) -> str:
    number, _, power = text.partition("e")
    if not power:
        return f"<mn>{number}</mn>"
    raised = f"<msup><mn>10</mn>{_script(power.replace('-', '−'))}</msup>"
    return raised if number == "1" else f"<mrow><mn>{number}</mn><mo>·</mo>{raised}</mrow>"


def _script(text: str) -> str:
    if text in ("in", "out"):
        return f"<mi>{text}</mi>"
    if text == "⊤":
        return '<mi mathvariant="normal">T</mi>'
    parts = [
        f"<mi>{c}</mi>" if c.isalpha() else f"<mn>{c}</mn>" if c.isdigit() else f"<mo>{c}</mo>"
        for c in text
    ]
    return f"<mrow>{''.join(parts)}</mrow>"


def _bare(text: str) -> str:
    """Return what is in round brackets without them: a fraction or a root needs none."""
    round_brackets = r"<mrow><mo form[^>]*>\(</mo>(.*)<mo form[^>]*>\)</mo></mrow>"
    match = re.fullmatch(round_brackets, text)
    return match[1] if match else text


# Rules in a docstring.


def is_maths(text: str) -> bool:
    """Return whether the text is a formula."""
    try:
        mathml(text)
    except ValueError:
        return False
    return True


def rule(lines: list[str]) -> str | None:
    """Return an indented block of a docstring as HTML; None: there is no formula in it.

    A line is a formula, or text; more than one space divides it from a name before it, which ends
    with a colon, and from a remark after it.
    """
    rows = [_row(_parts(line)) for line in lines]
    if not any(is_maths(part) for line in lines for part in _parts(line)):
        return None
    named = any(name for name, _, _ in rows)
    indents = [len(line) - len(line.lstrip()) for line in lines]
    html = []
    for (name, body, remark), indent in zip(rows, indents, strict=True):
        classes = "what" + " alone" * (not remark)
        classes += " deeper" * (indent > min(indents) and not named)
        html.append(f'<div class="name">{name}</div>' * named)
        html.append(f'<div class="{classes}">{body}</div>')
        html.append(f'<div class="remark">{remark}</div>' * bool(remark))
    return f'<div class="rule{" named" * named}">{"".join(html)}</div>'


def _parts(line: str) -> list[str]:
    return re.split(r"\s{2,}", line.strip())


def _row(parts: list[str]) -> tuple[str, str, str]:
    """Return a line's name, what it says, and the remark on it, as HTML."""
    name = prose(parts.pop(0)) if len(parts) > 1 and parts[0].endswith(":") else ""
    last = len(parts)
    while last > 1 and not is_maths(parts[last - 1]):
        last -= 1
    body = " &emsp; ".join(map(prose, parts[:last]))
    return name, body, " ".join(map(prose, parts[last:]))


def prose(text: str) -> str:
    """Return text as HTML, with its formulas typeset and its code as code."""
    if is_maths(text):
        return mathml(text, large=True)
    done = [
        f"<code>{escape(piece)}</code>" if i % 2 else _mixed(piece)
        for i, piece in enumerate(text.split("`"))
    ]
    return "".join(done)


def _mixed(text: str) -> str:
    """Return words as HTML; runs of what is not a word, such as ``|g_i| > ĉ``, as formulas."""
    start = len(text) - len(text.lstrip(" :;,"))
    if is_maths(text[start:]):
        return escape(text[:start]) + _typeset(text[start:])
    pieces = re.split(r"((?<!\w)(?:\d+|[A-Za-z](?:[-–'\w]*[A-Za-z])+)(?![\w(|‖])|[();:,.])", text)
    return "".join(
        _typeset(piece) if i % 2 == 0 else escape(piece) for i, piece in enumerate(pieces)
    )


def _typeset(piece: str) -> str:
    bare = piece.strip()
    if bare in ("", "a", "A", "I") or not is_maths(bare):
        return escape(piece)
    start = len(piece) - len(piece.lstrip())
    return f"{piece[:start]}{mathml(bare)}{piece[start + len(bare) :]}"
