"""
Gives the documentation's site what lies outside `docs/`: a hook of mkdocs (mkdocs.yml names it).

- README.md, CONTRIBUTING.md, SECURITY.md and CHANGELOG.md are pages of the site.
- A file that a page links to is shown on a page of its own, a folder as a list; results of runs (JSON) are copied.

So every link that works in a checkout works on the site, which needs no host of the sources.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, Files


ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
CODE = re.compile(r"^( *)(```|~~~).*?^\1\2 *$|`[^`\n]+`", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(\]\(|\bsrc=\")([^()\s\"#]+)(?=[)#\"])")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".cff": "yaml", ".sbatch": "bash", ".toml": "toml", ".cfg": "ini"}
HIDDEN = "---\nsearch:\n  exclude: true\n---\n\n"


def on_files(files: Files, config) -> Files:
    """Add pages for what stands at the top of the repository, and for what any page links to."""
    texts = {f"docs/{page.src_uri}": page.content_string for page in files.documentation_pages()}
    for source, page in PAGES.items():
        texts[source] = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=_moved(texts[source], source, page)))
    linked = {
        _target(found[2], source) for source, text in texts.items() for found in LINK.finditer(CODE.sub("", text))
    }
    for target in sorted(target for target in linked if target and target not in PAGES):
        if not target.startswith("docs/"):
            files.append(_shown(target, config))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Lead links out of `docs/` to the pages made for them."""
    uri = page.file.src_uri
    return markdown if uri in PAGES.values() or uri.startswith("source/") else _moved(markdown, f"docs/{uri}", uri)


def _target(link: str, source: str) -> str | None:
    """Return the file or folder of the repository that a link of a source leads to, or `None`."""
    if ":" in link or link.startswith(("#", "/")):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    return path if not path.startswith("..") and (ROOT / path).exists() else None


def _place(target: str) -> str:
    """Return where something of the repository stands among the site's sources."""
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    return PAGES.get(target) or (f"source/{target}" if target.endswith(".json") else f"source/{target}.md")


def _moved(text: str, source: str, page: str) -> str:
    """Return a source's text with the links that a page at another place has."""

    def lead(found: re.Match[str]) -> str:
        target = _target(found[2], source)
        if target is None:
            return found[0]
        return found[1] + posixpath.relpath(_place(target), posixpath.dirname(page) or ".")

    made, end = [], 0
    for code in CODE.finditer(text):  # in which nothing is a link
        made += [LINK.sub(lead, text[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*made, LINK.sub(lead, text[end:])])


def _shown(target: str, config) -> File:
    path = ROOT / target
    if path.suffix == ".json":
        return File.generated(config, _place(target), abs_src_path=str(path))
    if path.is_dir():
        names = sorted(name + "/" * (path / name).is_dir() for name in os.listdir(path) if name[0] not in "._")
        body = "\n".join(f"- `{name}`" for name in names)
    else:
        body = f"~~~~{LANGUAGES.get(path.suffix, 'text')}\n{path.read_text(encoding='utf-8')}\n~~~~"
    return File.generated(config, _place(target), content=f"{HIDDEN}# {target}\n\n{body}\n")
