"""
Puts the table of containers that the code knows into docs/media.md.

    python scripts/container_table.py
"""

from pathlib import Path

from maple_trl.omni.media.formats import markdown_table


PAGE = Path(__file__).resolve().parents[1] / "docs" / "media.md"
BEGIN, END = "<!-- containers, written by scripts/container_table.py -->", "<!-- end of containers -->"


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n{markdown_table()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
