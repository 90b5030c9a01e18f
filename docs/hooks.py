"""What MkDocs makes itself: the first page from the README, and the API page from the package's public names."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import tokenrec_hf

README = Path(__file__).parents[1] / "README.md"


def api_page() -> str:
    """One section for each module with public names, which mkdocstrings fills from the docstrings."""
    lines = ["# Python API", "", "All names are imported from `tokenrec_hf`."]
    for module, names in tokenrec_hf._NAMES.items():
        lines += ["", f"## `{module}`", *(f"\n::: tokenrec_hf.{module}.{name}" for name in names)]
    return "\n".join(lines) + "\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the two pages; the README's links are seen from its own folder."""
    files.append(
        File.generated(config, "index.md", content=README.read_text(encoding="utf-8").replace("](docs/", "]("))
    )
    files.append(File.generated(config, "api.md", content=api_page()))
    return files


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Shows a docstring's reference [`~module.name`], which is transformers' notation, as `name`."""
    return re.sub(r"\[<code>~?(?:[\w.]+\.)?(\w+)</code>\]", r"<code>\1</code>", html)
