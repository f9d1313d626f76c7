"""The table of docs/versions.md, generated from multicard.versions.

python tests/versions_table.py
"""

import pathlib

from multicard import versions

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "versions.md"
START, END = "<!-- versions -->\n", "<!-- end -->"


def table() -> str:
    rows = [f"| {t.name} | {t.promised or t.lowest} | {t.lowest} | {t.newest} |\n" for t in versions.TABLE]
    return "| | pyproject.toml asks for | lowest tested | newest tested |\n|---|---|---|---|\n" + "".join(rows)


def shown() -> str:
    return PAGE.read_text().partition(START)[2].partition(END)[0]


if __name__ == "__main__":
    PAGE.write_text(PAGE.read_text().replace(START + shown() + END, START + table() + END))
