"""Hook of mkdocs: pages that are made when the site is built.

The front page is README.md, and CHANGELOG.md and CONTRIBUTING.md are pages as well; the notebook
becomes a page of text and code (it has no outputs, so that no kernel or converter is needed); what
is under ``reference/`` is made by ``reference.py``. Links are written for the repository, and are
moved here to where the pages are in the site.
"""

import json
import re
from pathlib import Path
from typing import Any

import reference
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# Page of the site -> file at the root of the repository.
ROOT_PAGES = {
    "index.md": "README.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
}
COPIED = ("LICENSE", "CITATION.cff")  # README.md may link to them
NOTEBOOK = "tour.ipynb"


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Add the pages that are no files under ``docs/``."""
    for name, content in pages().items():
        files.append(File.generated(config, name, content=content))
    return files


def pages() -> dict[str, str]:
    """Path of each made page -> its Markdown."""
    made = {page: (ROOT / name).read_text() for page, name in ROOT_PAGES.items()}
    made |= {name: (ROOT / name).read_text() for name in COPIED}
    made["tour.md"] = notebook((ROOT / "docs" / NOTEBOOK).read_text())
    return made | reference.pages()


def notebook(text: str) -> str:
    """A notebook's cells as Markdown."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    title, *rest = parts
    return "\n\n".join([title, f"This page is a notebook: [{NOTEBOOK}]({NOTEBOOK}).", *rest]) + "\n"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links between files of the repository as links between pages.

    Code in a cell of a table has a bare bar in the site, where files have an escaped one. A line
    that is a comment marks what is rendered; in the site it would divide a list.
    """
    markdown = re.sub(r"^<!--.*-->\n", "", markdown, flags=re.MULTILINE)
    for name, file in ROOT_PAGES.items():
        markdown = markdown.replace(f"](../{file}", f"]({name}")
    if page.file.src_uri in ROOT_PAGES:
        markdown = markdown.replace("](docs/", "](")
    if page.file.src_uri != "tour.md":
        markdown = markdown.replace(f"]({NOTEBOOK})", "](tour.md)")
    return re.sub(r"`[^`\n]*`", lambda code: code[0].replace("\\|", "|"), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Options in inline code in elements of their own: browsers would break them after a dash."""
    return re.sub(r"(?<!</span>)<code>[^<]*</code>", options_of, html)


def options_of(code: re.Match[str]) -> str:
    """Inline code with each word that begins with a dash in an element."""
    return re.sub(r"(?<=[> ])-[^ <]+", r'<span class="option">\g<0></span>', code[0])
