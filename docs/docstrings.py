"""Docstrings are reStructuredText in three places: here these become Markdown.

MkDocs renders Markdown, while `help` and editors show the docstrings as they are. This
extension of griffe, which `mkdocs.yml` names, rewrites formulas, links and the title
of examples before the API page is made.
"""

import re
import textwrap
from typing import Any

import griffe


class Markdown(griffe.Extension):
    """Rewrites each docstring once it is loaded."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called by griffe for every module, class, function and attribute."""
        del kwargs
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    r"""The same docstring with Markdown's formulas and links.

    Example:
      >>> print(markdown("By :math:`x^2` of `Monolith <https://arxiv.org>`_."))
      By \(x^2\) of [Monolith](https://arxiv.org).
    """
    text = re.sub(r"^\.\. math::\n\n((?:  .*\n|\n)+)", _display, text, flags=re.M)
    text = re.sub(r":math:`([^`]+)`", r"\\(\1\\)", text)
    text = re.sub(r"`([^`<>]+?)\s+<(https?://[^>]+)>`_", _link, text)
    # Google's other title is an admonition to griffe, whose `>>>` would be quotations.
    return re.sub(r"^Example:$", "Examples:", text, flags=re.M)


def _display(match: re.Match[str]) -> str:
    formula = textwrap.dedent(match[1]).strip()
    return f"\\[\n\\begin{{split}}\n{formula}\n\\end{{split}}\n\\]\n\n"


def _link(match: re.Match[str]) -> str:
    return f"[{' '.join(match[1].split())}]({match[2]})"
