"""Notebooks as pages: each `.ipynb` below `docs` becomes a Markdown page of the same name when the
site is built.

The text of its cells and what they print are shown as stored; nothing is run here. mkdocs calls
``on_files``.
"""

import json
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def markdown(notebook: dict[str, Any], name: str) -> str:
    """Return the page of a notebook, with a link to the file itself."""
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
            continue
        parts.append(f"```python\n{text}\n```")
        printed = ""
        for output in cell["outputs"]:
            printed += "".join(output.get("text", ""))
        if printed:
            parts.append(f"```text\n{printed.rstrip()}\n```")
    parts.append(f"[Download this notebook]({name})")
    return "\n\n".join(parts) + "\n"


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Add a page for each notebook."""
    # A copy, as the collection grows on the way.
    for file in list(files):
        source = Path(file.src_uri)
        if source.suffix != ".ipynb":
            continue
        page = markdown(json.loads(file.content_string), source.name)
        files.append(File.generated(config, str(source.with_suffix(".md")), content=page))
    return files
