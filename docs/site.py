"""What mkdocs cannot do by itself: a page of every setting, and the files outside docs/ that its pages link to.

mkdocs.yml names this file under `hooks`. docs/index.md and the others stay readable as plain files.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from odtk.cli import COMMANDS, default_of
from odtk.settings import SWITCH, Option, Settings, flag, options

TOP = Path(__file__).parent.parent
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")


def on_files(files: Files, config: Any) -> Files:
    """Adds the page of settings, pages of the repository's top folder, and the examples that pages link to."""
    files.append(File.generated(config, "all-settings.md", content=settings_page()))
    for name in PAGES:
        files.append(File.generated(config, name, content=(TOP / name).read_text()))
    for path in sorted((TOP / "examples").rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            files.append(File.generated(config, str(path.relative_to(TOP)), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turns links between the repository's folders into links of the site, whose pages lie in one folder."""
    markdown = re.sub(r"\]\(\.\./", "](", markdown)
    return re.sub(r"\]\(docs/", "](", markdown) if page.file.src_uri in PAGES else markdown


def settings_page() -> str:
    """Every command with its settings, from odtk/settings/."""
    parts = ["# Every setting\n\nFrom `odtk/settings/`, as `odtk COMMAND --help` prints them."]
    parts += [f"How they are given, and what follows from what: [Settings](settings.md). {contents()}"]
    for name, (cls, _, says) in COMMANDS.items():
        parts.append(f"## odtk {name}\n\n{says[0].upper()}{says[1:]}.")
        if name == "plan":
            parts.append("Takes the settings of `train`, and `--output`, a file for `--settings`.")
            continue
        parts.append("\n".join(table(cls)))
    return "\n\n".join(parts) + "\n"


def contents() -> str:
    return "Commands: " + ", ".join(f"[{name}](#odtk-{name})" for name in COMMANDS) + "."


def table(cls: type[Settings]) -> list[str]:
    rows = ["| setting | values | means | default |", "|---|---|---|---|"]
    for name, one in options(cls).items():
        given = name.upper() if one.positional else " ".join([flag(name), *one.flags])
        rows.append(f"| `{given}` | {cell(values(one))} | {cell(one.help)} | {cell(default_of(cls, name, one))} |")
    return rows


def values(one: Option) -> str:
    if one.check is SWITCH:
        return "a switch"
    if one.choices is not None:
        return ", ".join(map(str, one.choices))
    return one.check.words if one.count is None else f"each {one.check.words}"


def cell(text: str) -> str:
    """Text inside a table, without markup of its own."""
    return re.sub(r"([|*_<>\[\]\\])", r"\\\1", text)
