"""The language of docstrings, comments, messages and documents: sentences that need not be read twice.

These are the rules that a machine can check; CONTRIBUTING.md states them all.
"""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest
from modules import MODULES, ROOT, name_of

TESTS = sorted(path for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__))
PAGES = sorted(
    [*(ROOT / "docs").glob("*.md"), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "model_card.md"))]
)
RIDDLES = r"(What|Which|How|Whether|Of|Who|Whom|Whose|Where|Whatever|Whichever|Why)\b"
PHRASES = {
    r"\b(is|are|was|were|be) no (?!longer|more\b|less\b|other\b|further\b)": "write 'not a ...' or 'has no ...'",
    r"\b(nobody|somebody|anybody|everybody)\b": "name who it is",
    r"\bmay mean\b": "say what is meant",
    r"\barms? of (a|the) (table|study)\b": "write 'variant' or 'ablation'",
    r"\bkin\b": "write 'related work'",
    r"\b(un)?told\b": "write 'given', 'reported' or 'known'",
    r"\b(code|function|method|model|processor|trainer|package|program|command|configuration|file|it|this) "
    r"(tells|says|knows|refuses|wants)\b": "code raises, returns, reports, validates",
    r"\b(is|are|was|were|be|been) refused\b": "write 'raises ...' or 'is rejected'",
}


def texts(path: Path) -> list[tuple[int, str]]:
    """Line and text of each docstring, comment and message of a module."""
    source = path.read_text()
    found = [
        (token.start[0], token.string)
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    ]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            found += [(node.lineno + number, line) for number, line in enumerate(node.value.splitlines())]
    return found


def faults_of_phrase(path: Path, lines: list[tuple[int, str]]) -> list[str]:
    return [
        f"{name_of(path)}:{number}: {match[0]!r}: {advice}"
        for number, line in lines
        for pattern, advice in PHRASES.items()
        if (match := re.search(pattern, line, re.IGNORECASE))
    ]


def faults_of_opening(path: Path) -> list[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [
        f"{name_of(path)}:{getattr(node, 'lineno', 1)}: opens with {match[1]!r}: write an imperative or a noun phrase"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, kinds) and (match := re.match(RIDDLES, ast.get_docstring(node) or ""))
    ]


@pytest.mark.parametrize("path", [*MODULES, *TESTS], ids=name_of)
def test_module(path):
    faults = faults_of_opening(path) + faults_of_phrase(path, texts(path))
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_page(path):
    prose = re.sub(r"^```.*?^```", lambda block: "\n" * block[0].count("\n"), path.read_text(), flags=re.M | re.S)
    faults = faults_of_phrase(path, list(enumerate(prose.splitlines(), 1)))
    assert not faults, "\n".join(faults)
