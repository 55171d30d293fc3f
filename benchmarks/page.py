"""``python -m benchmarks.page``: draw the tables and pictures of the pages from the stored results, and nothing else.

In benchmarks/README.md the block behind a line that begins with "Drawn from [results/NAME.json]" becomes the table of
that file, and each picture of such a name is drawn. In the front page the table of a few figures is replaced.
"""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.report import HEADINGS, headlines, plot, table
from benchmarks.results import read_json

HERE = Path(__file__).parent
PAGE, FRONT_PAGE = HERE / "README.md", HERE.parent / "README.md"
HEADLINES_OF = ("cpu", "storage_cpu")
_BLOCK = re.compile(r"(^Drawn from \[results/(\w+)\.json\].*?\n```\n).*?(?<=\n)(```\n)", re.DOTALL | re.MULTILINE)
_HEADLINES = re.compile(rf"{re.escape(HEADINGS)}\n(?:\|.*\n)*")


def redrawn(page: str) -> str:
    """The page with the tables of the stored results."""
    return _BLOCK.sub(lambda block: f"{block[1]}{table(read_json(stored(block[2])))}\n{block[3]}", page)


def redrawn_front(page: str) -> str:
    """The front page with its few figures."""
    figures = headlines(*(read_json(stored(name)) for name in HEADLINES_OF))
    return _HEADLINES.sub(lambda _: f"{figures}\n", page)


def stored(name: str) -> Path:
    """The file that holds results."""
    return HERE / f"results/{name}.json"


def main() -> None:
    """Draw everything anew."""
    PAGE.write_text(redrawn(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    FRONT_PAGE.write_text(redrawn_front(FRONT_PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    for picture in sorted(HERE.glob("results/*.svg")):
        plot(read_json(picture.with_suffix(".json")), picture)


if __name__ == "__main__":
    main()
