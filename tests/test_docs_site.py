"""The documentation's site: built without a warning, whole in itself, and looked at in Chromium."""

import functools
import http.server
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from browsers import chromium, needs_chromium


ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path.relative_to(ROOT / "docs").with_suffix(".html").as_posix() for path in (ROOT / "docs").rglob("*.md")
)
PAGES += ["index.html", "contributing.html", "security.html", "changelog.html"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site's folder, built as `make docs` does."""
    pytest.importorskip("mkdocs", reason='no mkdocs: pip install "maple-trl[docs]"')
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {"NO_MKDOCS_2_WARNING": "1", "PATH": str(Path(sys.executable).parent)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    return folder


class Links(HTMLParser):
    """What a page leads to, what it loads, and the places within it."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.leads, self.loads = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        told = dict(attrs)
        self.ids |= {told[name] for name in ("id", "name") if told.get(name)}
        if tag == "a" and told.get("href"):
            self.leads.append(told["href"])
        if told.get("src"):
            self.loads.append(told["src"])
        if tag == "link" and told.get("href") and told.get("rel") not in ("prev", "next", "canonical"):
            self.loads.append(told["href"])


def broken(folder):
    """Links of a folder's pages that lead nowhere, and what they load from elsewhere."""
    pages = {path: Links(path.read_text(encoding="utf-8")) for path in folder.rglob("*.html")}
    found = []
    for page, links in pages.items():
        found += [f"{page.name} loads {url}" for url in links.loads if urlsplit(url).scheme not in ("", "data")]
        for url in [*links.leads, *links.loads]:
            parts = urlsplit(url)
            if parts.scheme or url.startswith("//"):
                continue
            # 404.html is shown at any address, so that its links begin at the top.
            start = (
                folder / parts.path.lstrip("/") if parts.path.startswith("/") else page.parent / unquote(parts.path)
            )
            target = page if not parts.path else start.resolve()
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                found.append(f"{page.name}: {url}")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids | {"__top"}:
                found.append(f"{page.name}: {url} has no such place")
    return found


def test_what_is_broken_is_found(tmp_path):
    (tmp_path / "a.html").write_text('<p id="here"><a href="#here">1</a><a href="b.html">2</a><a href="#there">3</a>')
    (tmp_path / "c.html").write_text('<script src="https://elsewhere/x.js"></script><a href="a.html#here">4</a>')
    assert sorted(broken(tmp_path)) == [
        "a.html: #there has no such place",
        "a.html: b.html",
        "c.html loads https://elsewhere/x.js",
    ]


def test_the_site_is_whole_in_itself(site):
    assert all((site / page).is_file() for page in PAGES)
    assert broken(site) == []


@pytest.fixture(scope="module")
def served(site):
    """The site's address."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(site))
    handler.log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@needs_chromium
@pytest.mark.slow
@pytest.mark.long
def test_the_site_in_a_browser(served, tmp_path):
    """No word in the console, nothing asked of another host, no page wider than its window; and search finds."""
    said = []
    with chromium(tmp_path) as browser:
        for width, scheme, pages in (
            (390, "light", PAGES),
            (390, "dark", PAGES[:3]),
            (1400, "dark", PAGES[-4:]),
            (1400, "light", PAGES[:3]),
        ):
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page.on("console", lambda word: said.append(word.text) if word.type in ("error", "warning") else None)
            page.on("pageerror", lambda error: said.append(str(error)))
            page.on(
                "request",
                lambda asked: None if asked.url.startswith((served, "data:", "blob:")) else said.append(asked.url),
            )
            for name in pages:
                page.goto(f"{served}/{name}")
                wide = page.evaluate("document.documentElement.scrollWidth")
                assert wide <= width, f"{name} is {wide} wide in a window of {width}"
                assert page.evaluate("document.body.dataset.mdColorScheme") == (
                    "slate" if scheme == "dark" else "default"
                )
            page.close()
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.goto(f"{served}/index.html")
        page.click("label[for=__search]") if not page.is_visible("input.md-search__input") else page.click(
            "input.md-search__input"
        )
        page.keyboard.type("replayed_generations")
        page.wait_for_selector(".md-search-result__item a", timeout=20_000)
        assert "avatar.html" in " ".join(
            page.eval_on_selector_all(".md-search-result__item a", "all => all.map(one => one.href)")
        )
    assert said == []
