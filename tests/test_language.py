"""Plain English: phrases that a native technical writer would not write.

In documents, docstrings, comments and messages. `REPLACEMENTS` says what to write
instead; what follows a phrase in parentheses is only where it is looked for.
"""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
SOURCES = [
    path
    for folder in ("monolith_optax", "examples", "benchmarks")
    for path in sorted(ROOT.glob(f"{folder}/**/*.py"))
]
REPLACEMENTS = {
    r"(?<!some )(?<!each )(?<!all )(?<!none )(?<!\d )\bof (which|whom)\b": "whose",
    r"\b(that|those) of\b[^.:;]*\b(that|those) of\b": "the nouns themselves",
    r"(?<!there )\b(is|are|was|were) no (?!(longer|more|less|fewer|other)\b)": "not a",
    r"\balone\b": "only, or by itself",
    r"\b(outside|inside|off) of\b": "without 'of'",
    r"\b(go|goes|going|went) on\b": "continue",
    r"^For people (who|whose)\b": "what the page gives",
    r"\bstrangers?\b": "untrusted",
    r"\btakes? no notice\b": "ignores",
    r"\bcan(not)? be told\b|\btold apart\b": "identified, or detected",
    r"\bthe whole of\b": "the whole, or a complete example",
    r"\bbuys? (it|them|that) off\b": "removes that cost",
    r"\banother end\b": "does not end as it should",
    r"\b1 of 1 nodes\b": "1 of 1",
    r"\bStep on (it|them) densely\b": "Use a dense gradient",
    r"\bhas [\d.]+ learning rates\b": "is so many learning rates long",
    r"\bLook whether\b": "Check whether",
}


def prose_of_page(path):
    """The text of a page, paragraph by paragraph, without code."""
    text = re.sub(r"(?ms)^ *(```|~~~).*?^ *\1 *$", "", path.read_text())
    text = re.sub(r"<!--.*?-->|`[^`\n]*`|\]\([^)]*\)", "", text, flags=re.DOTALL)
    return re.split(r"\n\s*\n|\n(?= *[-|\d#])", text)


def prose_of_source(path):
    """Docstrings, messages and comments; what follows >>> in a docstring is code."""
    text = path.read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.JoinedStr):
            parts = (x.value for x in node.values if isinstance(x, ast.Constant))
            yield "x".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            code = r"(?m)^ *(>>>|\.\.\.).*$|`[^`\n]*`"
            yield from re.split(r"\n\s*\n", re.sub(code, "", node.value))
    comment = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comment.append(token.string.lstrip("#! "))
        elif token.type not in (tokenize.NL, tokenize.NEWLINE) and comment:
            yield " ".join(comment)
            comment = []


def findings(paragraphs):
    for paragraph in paragraphs:
        words = " ".join(paragraph.split())
        for phrase, better in REPLACEMENTS.items():
            for match in re.finditer(phrase, words, re.IGNORECASE):
                around = words[max(0, match.start() - 30) : match.end() + 30]
                yield f"...{around}...: write {better}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_pages(path):
    if path.name != "CHANGELOG.md":  # what is released stays as it was written
        assert not [*findings(prose_of_page(path))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sources(path):
    assert not [*findings(prose_of_source(path))]


@pytest.mark.parametrize(
    "text",
    [
        "Rows of tables, of which each is float32.",
        "The cost is that of the batch, and the value is those of JAX.",
        "This is no table.",
        "One device alone has it.",
        "It takes no notice of it.",
    ],
)
def test_phrases_are_found(text):
    assert len([*findings([text])]) == 1


@pytest.mark.parametrize(
    "text",
    ["There is no file.", "It is no longer there.", "That is not a table of those."],
)
def test_other_phrases_are_not(text):
    assert not [*findings([text])]
