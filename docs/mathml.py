r"""A Markdown extension: `$...$` and `$$...$$` become MathML while the site is built.

Browsers draw MathML by themselves, so the pages need no script, no fonts and no network. Inside code a dollar sign is
a dollar sign; elsewhere `\$` is one. A display formula may break where its source has `\qquad`.
"""

import html
import re
from collections.abc import Iterator
from xml.etree.ElementTree import Element, SubElement

from latex2mathml.converter import convert_to_element
from markdown import Markdown
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor
from markdown.util import AtomicString

__all__ = ["MathML", "makeExtension", "to_mathml"]


def to_mathml(latex: str, display: str) -> Element:
    """The `math` element of a formula.

    Args:
        latex: the formula without its dollar signs.
        display: "inline" or "block".

    Raises:
        ValueError: the converter does not know a command of it.
    """
    source = " ".join(latex.split()).replace("{aligned}", "{align*}")
    root = convert_to_element(source, display=display)
    for node in root.iter():
        # The converter writes symbols as entities; and nothing in a formula is Markdown.
        node.text = AtomicString(html.unescape(node.text)) if node.text else None
        node.tail = AtomicString(html.unescape(node.tail)) if node.tail else None
        if node.text and "\\" in node.text:
            raise ValueError(f"cannot convert the formula {latex!r}: {node.text!r} is not known")
    return root


def _pieces(latex: str) -> Iterator[str]:
    r"""The parts of a formula between those `\qquad` that stand in no group and no environment."""
    start = depth = 0
    for token in re.finditer(r"\\begin\b|\\end\b|\\qquad\b|\\.|[{}]", latex):
        depth += {"{": 1, "}": -1, r"\begin": 1, r"\end": -1}.get(token[0], 0)
        if token[0] == r"\qquad" and depth == 0:
            yield latex[start : token.start()]
            start = token.end()
    yield latex[start:]


class _Inline(InlineProcessor):
    def handleMatch(self, m, data):  # noqa: N802 - the name is Markdown's
        """The element, and the span of text that it replaces."""
        return to_mathml(m[1], "inline"), m.start(0), m.end(0)


class _Display(InlineProcessor):
    def handleMatch(self, m, data):  # noqa: N802 - the name is Markdown's
        """The element, and the span of text that it replaces."""
        line = Element("span", {"class": "formula"})
        for piece in _pieces(m[1]):
            SubElement(line, "span").append(to_mathml(piece, "block"))
        return line, m.start(0), m.end(0)


class MathML(Extension):
    """The extension; it has no options."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802 - the name is Markdown's
        """Register after code (190) and before backslash escapes (180)."""
        md.inlinePatterns.register(_Display(r"(?<!\\)\$\$(.+?)\$\$", md), "mathml-display", 186)
        md.inlinePatterns.register(_Inline(r"(?<![\\$\w])\$(?=\S)([^$]+?)(?<=\S)\$(?![$\w])", md), "mathml", 185)
        md.ESCAPED_CHARS.append("$")


def makeExtension(**kwargs: object) -> MathML:  # noqa: N802 - the name is Markdown's
    """What Markdown calls."""
    return MathML(**kwargs)
