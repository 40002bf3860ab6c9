"""What the site needs beside its pages: formulas as MathML, and comments of fields as their description.

Formulas are made when the site is built, so that reading it needs neither a script nor a network.
"""

import ast
import html
import re
from typing import Any

import griffe
from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """MkDocs calls this with the HTML of each page."""

    def formula(match: re.Match[str]) -> str:
        tag, kind, tex = match.groups()
        display = "inline" if kind == "(" else "block"
        return f'<{tag} class="formula">{convert(html.unescape(tex), display=display)}</{tag}>'

    return FORMULA.sub(formula, content)


class Comments(griffe.Extension):
    """A field is described by the comments above and beside it, as in `k: Tensor  # step in plan`."""

    def on_attribute_instance(
        self, *, node: ast.AST | griffe.ObjectNode, attr: griffe.Attribute, **_: Any
    ) -> None:
        if attr.docstring is not None or attr.lineno is None or not attr.parent or not attr.parent.is_class:
            return
        lines = attr.lines_collection[attr.filepath]
        words = [comment(lines[(attr.endlineno or attr.lineno) - 1])]
        above = attr.lineno - 2
        while lines[above].lstrip().startswith("#"):
            words.insert(0, comment(lines[above]))
            above -= 1
        if text := " ".join(f"{word[0].upper()}{word[1:].rstrip('.')}." for word in words if word):
            attr.docstring = griffe.Docstring(text, lineno=attr.lineno, parent=attr)


def comment(line: str) -> str:
    """The comment that ends a line of code, or is the line."""
    found = re.search(r"(?:^|\s)#\s+(.*)$", line)
    return found[1] if found else ""
