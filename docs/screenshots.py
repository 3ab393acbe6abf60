"""Takes the pictures in docs/screenshots: the README, and pages of the built site.

It needs Chromium, GitHub's style sheet, and the packages that are installed here:

  pip install -e ".[docs]" playwright pillow
  mkdocs build
  npm pack github-markdown-css --pack-destination build
  tar -xf build/github-markdown-css-*.tgz -C build
  python docs/screenshots.py /usr/bin/chromium build/package/github-markdown.css
"""

import argparse
import functools
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import markdown
from PIL import Image
from playwright.sync_api import Browser, sync_playwright

ROOT = Path(__file__).parent.parent
PAGES = {"home": "", "tutorial": "tutorial/", "optimizers": "optimizers/"}


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serves a folder on this machine and gives its URL."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("localhost", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}/"
        server.shutdown()


def readme(style: str) -> str:
    """The README as a page that looks like GitHub's."""
    body = markdown.markdown(
        (ROOT / "README.md").read_text(),
        extensions=["tables", "pymdownx.superfences", "pymdownx.highlight"],
        extension_configs={"pymdownx.highlight": {"noclasses": True}},
    )
    layout = ".markdown-body { max-width: 1012px; margin: auto; padding: 32px }"
    head = f'<meta charset="utf-8"><style>{style}{layout}</style>'
    return f'{head}<body class="markdown-body">{body}'


def take(browser: Browser, url: str, name: str, scheme: str, page: str = "") -> None:
    """Saves the first screen of a URL, or of a page's HTML as if it were there."""
    context = browser.new_context(
        viewport={"width": 1280, "height": 800}, color_scheme=scheme
    )
    tab = context.new_page()
    if page:
        tab.route(url, lambda route: route.fulfill(body=page, content_type="text/html"))
    tab.goto(url, wait_until="networkidle")
    image = Image.open(io.BytesIO(tab.screenshot()))
    path = ROOT / "docs" / "screenshots" / f"{name}-{scheme}.webp"
    image.save(path, lossless=True)
    context.close()


def main() -> None:
    """Takes all pictures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("chromium", help="path of the browser")
    parser.add_argument("css", type=Path, help="path of github-markdown.css")
    arguments = parser.parse_args()
    with served(ROOT) as root, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=arguments.chromium)
        page = readme(arguments.css.read_text())
        take(browser, f"{root}README.html", "readme", "light", page)
        for name, url in PAGES.items():
            for scheme in ("light", "dark"):
                take(browser, f"{root}build/site/{url}", name, scheme)
        browser.close()


if __name__ == "__main__":
    main()
