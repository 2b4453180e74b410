"""Nested spans of real text with exact labels: expressions within the statements of Python source."""

import ast
import hashlib
import io
import keyword
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from danlu.lab.data import python_source

__all__ = ["KINDS", "PythonSpans", "Statement", "python_spans", "statements_of"]

KINDS = ("Call", "Subscript", "Attribute", "Compare", "BinOp", "Collection")
_KIND_OF: dict[type[ast.AST], int] = {
    ast.Call: 0,
    ast.Subscript: 1,
    ast.Attribute: 2,
    ast.Compare: 3,
    ast.BinOp: 4,
    ast.List: 5,
    ast.Tuple: 5,
    ast.Dict: 5,
}
_SIMPLE = (
    ast.AnnAssign,
    ast.Assert,
    ast.Assign,
    ast.AugAssign,
    ast.Delete,
    ast.Expr,
    ast.Raise,
    ast.Return,
)
_SILENT = {
    tokenize.COMMENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
    tokenize.INDENT,
    tokenize.NEWLINE,
    tokenize.NL,
}
_SHORTEST, _LONGEST = 6, 64
# Statements of one file resemble each other: no more than these, evenly spread over it.
_PER_FILE = 25


@dataclass(frozen=True)
class Statement:
    """Tokens of one statement, and its spans as (kind, first token, last token), inclusive."""

    tokens: tuple[str, ...]
    spans: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class PythonSpans:
    """Statements, split by file; kinds are numbered as in `KINDS`.

    Args:
        train: statements to learn from.
        validation: statements to choose by.
        test: statements to judge by.
        name: of the data set.
        sha256: hash over all statements and spans.
        license: terms of the content.
        split_rule: how the split is made.
    """

    train: tuple[Statement, ...]
    validation: tuple[Statement, ...]
    test: tuple[Statement, ...]
    name: str
    sha256: str
    license: str
    split_rule: str


@lru_cache(maxsize=4)
def python_spans(*, train: int = 2000, validation: int = 400, test: int = 600) -> PythonSpans:
    """Statements of the standard library's ASCII files with their calls, subscripts, attributes and so on.

    Simple statements of 6 to 64 tokens, at most 25 of a file. Numbers and strings are tokens `<number>` and
    `<string>`. The content changes with every release of Python, so numbers are comparable only within one hash.

    Args:
        train: statements to learn from, at most.
        validation: statements to choose by, at most.
        test: statements to judge by, at most.
    """
    corpus = python_source()
    found = {
        "train": _first(corpus.train, train),
        "validation": _first(corpus.validation, validation),
        "test": _first(corpus.test, test),
    }
    total = hashlib.sha256()
    for split, statements in found.items():
        for one in statements:
            total.update(repr((split, one.tokens, one.spans)).encode())
    return PythonSpans(
        found["train"],
        found["validation"],
        found["test"],
        name=f"nested expressions of the {corpus.name}",
        sha256=total.hexdigest(),
        license=corpus.license,
        split_rule=corpus.split_rule,
    )


def _first(files: Iterable[bytes], count: int) -> tuple[Statement, ...]:
    found: list[Statement] = []
    # Not in the order of the names, in which packages follow each other.
    for content in sorted(files, key=lambda one: hashlib.sha256(one).digest()):
        if len(found) >= count:
            break
        statements = list(statements_of(content))
        step = max(1, -(-len(statements) // _PER_FILE))
        found += statements[::step]
    return tuple(found[:count])


def statements_of(content: bytes) -> Iterator[Statement]:
    """The simple statements of a file with 6 to 64 tokens; none if it is not ASCII, for the sake of columns."""
    if not content.isascii():
        return
    text = content.decode("ascii")
    try:
        tree = ast.parse(text)
        tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type not in _SILENT]
    except (SyntaxError, tokenize.TokenError):
        return
    starts = {token.start: i for i, token in enumerate(tokens)}
    ends = {token.end: i for i, token in enumerate(tokens)}
    for node in ast.walk(tree):
        if not isinstance(node, _SIMPLE):
            continue
        place = _place(node, starts, ends)
        if place is None or not _SHORTEST <= place[1] - place[0] + 1 <= _LONGEST:
            continue
        first, last = place
        spans = {
            (kind, inner[0] - first, inner[1] - first)
            for kind, expression in _expressions(node)
            if (inner := _place(expression, starts, ends)) is not None
        }
        yield Statement(tuple(_word(token) for token in tokens[first : last + 1]), tuple(sorted(spans)))


def _place(
    node: ast.stmt | ast.expr, starts: dict[tuple[int, int], int], ends: dict[tuple[int, int], int]
) -> tuple[int, int] | None:
    first = starts.get((node.lineno, node.col_offset))
    last = ends.get((node.end_lineno or 0, node.end_col_offset or 0))
    return None if first is None or last is None else (first, last)


def _expressions(node: ast.AST) -> Iterator[tuple[int, ast.expr]]:
    for child in ast.iter_child_nodes(node):
        # Whether the inside of a formatted string consists of tokens depends on the version of Python.
        if isinstance(child, ast.JoinedStr):
            continue
        kind = _KIND_OF.get(type(child))
        if kind is not None and isinstance(child, ast.expr):
            yield kind, child
        yield from _expressions(child)


def _word(token: tokenize.TokenInfo) -> Literal["<number>", "<string>"] | str:
    if token.type == tokenize.NUMBER:
        return "<number>"
    if token.type == tokenize.NAME or keyword.iskeyword(token.string) or token.type == tokenize.OP:
        return token.string
    return "<string>"
