"""MkDocs hook: the site has the repository's own tree, so that its links are those of GitHub.

MkDocs knows one folder of pages, and ours link to README.md, CONTRIBUTING.md and the figures under
examples/ beside it. So the pages of the navigation are taken where they are, with all that they
link to.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"\]\((?!\w+:)([^)#\s]+)")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Replace the pages of `docs_dir` by README.md and every file that it leads to."""
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    found, waiting = set(), [ROOT / "README.md", *(ROOT / str(css) for css in config.extra_css)]
    while waiting:
        path = waiting.pop()
        if path in found or not path.is_file() or not path.is_relative_to(ROOT):
            continue  # a link to nowhere: MkDocs says so
        found.add(path)
        name = path.relative_to(ROOT).as_posix()
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
        if path.suffix == ".md":
            links = _LINK.findall(path.read_text(encoding="utf-8"))
            waiting += [(path.parent / link).resolve() for link in links]
    return files
