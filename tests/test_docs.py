"""README and docs as plain files: links lead somewhere, named files exist, the site lists all."""

import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + DOCS
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
#: [text](target) and ![text](target), the target without a title.
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)[^)]*\)")


@cache
def prose(page: Path) -> str:
    """The text of a page without its code blocks."""
    text = page.read_text(encoding="utf-8")
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


@cache
def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE):
        words = LINK.sub(lambda link: link[0][1:].partition("]")[0], heading).lower()
        found.add(re.sub(r"[^\w\- ]", "", words).replace(" ", "-"))
    return found


@pages
def test_links_lead_to_a_file_and_a_heading(page: Path) -> None:
    for target in LINK.findall(prose(page)):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.is_file() and file.is_relative_to(ROOT), f"{target}: there is no such file"
        assert not anchor or anchor in anchors(file), f"{target}: there is no such heading"


@pages
def test_files_and_folders_that_a_page_names_exist(page: Path) -> None:
    top = "docs|examples|tests|config|fusion_upcycle|hydra_plugins"
    for path in re.findall(rf"`((?:{top})/[\w./-]*)`", prose(page)):
        assert (ROOT / path).exists(), path


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150


def pages_of(nav: Any) -> Iterator[str]:
    """Of a section of the navigation, and of those in it."""
    if isinstance(nav, str):
        yield nav
    else:
        for entry in nav.values() if isinstance(nav, dict) else nav:
            yield from pages_of(entry)


def test_the_site_lists_every_page_once() -> None:
    # The base loader makes plain text of everything, our mkdocs.yml has Python names in it.
    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), yaml.BaseLoader)
    listed = list(pages_of(config["nav"]))
    assert sorted(listed) == sorted(page.relative_to(ROOT).as_posix() for page in PAGES)


def test_a_reader_of_plain_files_finds_every_page() -> None:
    """From the index of the folder that a page is in, and that one from the index above."""
    for page in DOCS:
        index = page.parent / "index.md"
        if page == index:
            index = page.parents[1] / "index.md"
        if page.parent != ROOT / "docs" or page.name != "index.md":
            assert page.relative_to(index.parent).as_posix() in LINK.findall(prose(index)), page


def test_the_tree_of_the_architecture_is_the_package() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text.partition("\n| in `fusion_upcycle/` |")[2].partition("\n\n")[0]
    named = re.findall(r"`([\w/.]+)`", "".join(row.split("|")[1] for row in table.splitlines()[2:]))
    package = {
        f"{path.name}/" if path.is_dir() else path.name
        for path in (ROOT / "fusion_upcycle").iterdir()
        if not path.name.startswith(("_", "."))
    }
    assert sorted(named) == sorted(package)


def test_the_import_order_of_the_architecture_is_that_of_the_contract() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (order,) = re.findall(r"^```\n(errors <.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = contracts["tool"]["importlinter"]["contracts"][0]["layers"]
    held = [set(re.findall(r"\w+", layer)) for layer in reversed(layers)]
    assert [set(re.findall(r"\w+", layer)) for layer in order.split("<")] == held
