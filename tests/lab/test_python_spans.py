"""Spans of Python source are where the syntax says, and files do not leak from one split into another."""

import ast

import pytest

from danlu.lab.python_spans import KINDS, Statement, python_spans, statements_of


def texts(statement):
    return {(KINDS[kind], " ".join(statement.tokens[first : last + 1])) for kind, first, last in statement.spans}


def test_spans_of_a_known_statement():
    (found,) = statements_of(b"def f():\n    x = self.a[i + 1](g(2), [3, 'four'], (k < 5))  # a remark\n")
    assert found.tokens[:4] == ("x", "=", "self", ".")
    assert texts(found) == {
        ("Call", "self . a [ i + <number> ] ( g ( <number> ) , [ <number> , <string> ] , ( k < <number> ) )"),
        ("Subscript", "self . a [ i + <number> ]"),
        ("Attribute", "self . a"),
        ("BinOp", "i + <number>"),
        ("Call", "g ( <number> )"),
        ("Collection", "[ <number> , <string> ]"),
        ("Compare", "k < <number>"),
    }


def test_statements_over_several_lines_and_nested_ones():
    source = b"""
class A:
    def g(self):
        if self.x == 3:
            return {
                'a': h(1,
                       2),  # remark
            }
        y = 1
"""
    (found,) = statements_of(source)
    assert found.tokens[:3] == ("return", "{", "<string>")
    assert texts(found) == {
        ("Collection", "{ <string> : h ( <number> , <number> ) , }"),
        ("Call", "h ( <number> , <number> )"),
    }


@pytest.mark.parametrize(
    "source", [b"x = f('\xc3\xa9', 1, 2, 3)\n", b"def f(:\n", b"x = 1\n", b"x = [" + b"1, " * 40 + b"]\n", b""]
)
def test_what_is_left_out(source):
    """Not ASCII, not Python, too short, too long, empty."""
    assert list(statements_of(source)) == []


def test_formatted_strings_are_one_unit_in_every_version():
    (found,) = statements_of(b"x = g(f'{h(1)}', a, b, c)\n")
    assert {kind for kind, _ in texts(found)} == {"Call"}
    assert len(found.spans) == 1


def test_the_data_set():
    data = python_spans(train=200, validation=100, test=100)
    assert (len(data.train), len(data.validation), len(data.test)) == (200, 100, 100)
    assert data.sha256 == python_spans(train=200, validation=100, test=100).sha256
    assert data.sha256 != python_spans(train=201, validation=100, test=100).sha256
    nested, spans = 0, 0
    for one in (*data.train, *data.validation, *data.test):
        assert isinstance(one, Statement)
        assert 6 <= len(one.tokens) <= 64
        assert all(0 <= first <= last < len(one.tokens) for _, first, last in one.spans)
        assert len(set(one.spans)) == len(one.spans)
        spans += len(one.spans)
        nested += any(a != b and a[1] <= b[1] and b[2] <= a[2] for a in one.spans for b in one.spans)
        # No two spans cross: it is a tree.
        assert not any(a[1] < b[1] <= a[2] < b[2] for a in one.spans for b in one.spans)
    assert nested > 0.6 * 400
    assert 2 < spans / 400 < 3.5


def test_spans_parse_as_what_they_are():
    """The tokens of a span are an expression of its kind again, which no position was needed for."""
    kinds = {"Call": ast.Call, "Subscript": ast.Subscript, "Attribute": ast.Attribute, "Compare": ast.Compare}
    kinds |= {"BinOp": ast.BinOp, "Collection": (ast.List, ast.Tuple, ast.Dict)}
    checked = 0
    for one in python_spans(train=200, validation=100, test=100).train:
        words = [{"<number>": "1", "<string>": "'s'"}.get(word, word) for word in one.tokens]
        for kind, first, last in one.spans:
            parsed = ast.parse("(" + " ".join(words[first : last + 1]) + ")", mode="eval").body
            assert isinstance(parsed, kinds[KINDS[kind]])
            checked += 1
    assert checked > 400
