"""
Puts the tables that the code knows into README.md.

    python scripts/update_readme.py
"""

from pathlib import Path

from maple_trl.omni.media.formats import markdown_table


README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- containers, written by scripts/update_readme.py -->", "<!-- end of containers -->"


def main() -> None:
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    README.write_text(f"{before}{BEGIN}\n{markdown_table()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
