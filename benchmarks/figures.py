"""Write the pictures of docs/guides/draw_figures.md, by running the code of that page in
docs/figures.

    python benchmarks/figures.py

The same code gives the same files: no dates, no random names.
"""

import contextlib
import re
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "guides" / "draw_figures.md"
PICTURES = DOCS / "figures"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)


def run_page(page: str) -> None:
    """Run its Python in the current directory, where it leaves its pictures."""
    namespace = {"__name__": "page"}
    for code in BLOCK.findall(page):
        exec(compile(code, "example.py", "exec"), namespace)


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    with contextlib.chdir(PICTURES):
        run_page(PAGE.read_text(encoding="utf-8"))
        Path("side_by_side.svg").unlink()  # the page does not show it
    for picture in sorted(PICTURES.iterdir()):
        print(f"{picture.name:24}{picture.stat().st_size / 1024:6.0f} KiB")


if __name__ == "__main__":
    main()
