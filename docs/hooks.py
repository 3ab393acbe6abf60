"""What `mkdocs.yml` has done to the site beyond its plugins.

Formulas become MathML while the site is built, so that readers' browsers need no script
for them. Pictures lead to their full size, for phones, and long names may break where
they have parts. No page may fetch anything from another host.
"""

import html
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL
)
LONG_NAME = re.compile(r"(?<=<code>)[^<\s]{28,}(?=</code>)")
PICTURE = re.compile(r'<p>(<img [^>]*src="([^"]+)"[^>]*>)</p>')
# Links that readers follow are free to go anywhere, and nobody fetches a canonical one.
FETCHED = re.compile(
    r"""<(?!a\s|link rel="canonical")[^>]*\s(?:src|srcset|href|poster|data)="""
    r"""["']?(?:https?:)?//[^>]*>|(?:@import|url\()\s*["']?(?:https?:)?//[^)]*"""
)


def on_page_content(content: str, **kwargs: Any) -> str:
    """Called by MkDocs with the HTML of each page."""
    del kwargs
    content = PICTURE.sub(r'<p><a href="\2">\1</a></p>', content)
    content = LONG_NAME.sub(_breakable, content)
    return FORMULA.sub(_mathml, content)


def on_post_build(config: Any) -> None:
    """Called by MkDocs when all files are written."""
    site = Path(config.site_dir)
    for path in (*site.rglob("*.html"), *site.rglob("*.css")):
        if found := FETCHED.search(path.read_text()):
            raise PluginError(f"{path} would fetch from another host: {found[0]}")


def _breakable(match: re.Match[str]) -> str:
    return re.sub(r"(?<=[_/.:])(?=\w)", "<wbr>", match[0])


def _mathml(match: re.Match[str]) -> str:
    tag, bracket, latex = match.groups()
    display = "block" if bracket == "[" else "inline"
    mathml = convert(html.unescape(latex).strip(), display=display).replace(r"\_", "_")
    if "\\" in mathml:  # what the converter does not know, it leaves as it is
        raise PluginError(f"This formula has an unknown command: {latex}")
    ET.fromstring(mathml)  # raises where it is not well-formed
    return f'<{tag} class="arithmatex">{mathml}</{tag}>'
