"""One HTML page that loads nothing: its frame, tables, and pictures inside it. Light and dark, keyboard, phone.

Whatever a user's file holds is text here: only what is a Markup is taken as HTML, and the page's own policy
(Content-Security-Policy) lets no script run but the one that its frame was given, and nothing be fetched.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image as PILImage

from ..text import printable

STYLE = """
:root{color-scheme:light dark;--fg:#1c2024;--bg:#fff;--soft:#5a6570;--line:#d5dae0;--panel:#f5f7f9;--accent:#0b63b5;
--c0:#0b63b5;--c1:#b3530a;--c2:#0f7a43;--c3:#8a2be2;--c4:#a8123d;--c5:#5f6b00;--good:#0a7a2f;--bad:#b00020;
--unsure:#8a5a00}
@media(prefers-color-scheme:dark){:root{--fg:#e4e8ec;--bg:#14171a;--soft:#9aa6b2;--line:#3a424a;--panel:#1d2226;
--accent:#6cb6ff;--c0:#6cb6ff;--c1:#ffab6b;--c2:#6fd39a;--c3:#cba6ff;--c4:#ff8fa8;--c5:#d3d86b;--good:#6fd39a;
--bad:#ff8f8f;--unsure:#f0c060}}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;margin:0 auto;padding:1em max(1em,3vw) 3em;max-width:76em;color:var(--fg);
background:var(--bg);overflow-wrap:anywhere}
h1{font-size:1.5em;line-height:1.25;margin:.6em 0 .3em}
h2{font-size:1.2em;margin:2em 0 .3em}h3{font-size:1em;margin:1.4em 0 .3em}
p{max-width:62em;margin:.4em 0}.soft,figcaption,caption{color:var(--soft)}.soft{font-weight:400}a{color:var(--accent)}
a.skip{position:absolute;left:-99em}a.skip:focus{left:1em;top:.5em;background:var(--bg);padding:.3em .6em}
nav ul{list-style:none;display:flex;flex-wrap:wrap;gap:.2em 1.2em;padding:.5em 0;margin:.6em 0;
border-block:1px solid var(--line)}
:focus-visible{outline:3px solid var(--accent);outline-offset:2px}
.scroll{overflow-x:auto;max-width:100%;margin:.8em 0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
caption{text-align:left;padding:.2em 0}th{font-weight:600}
td,th{padding:.22em .7em;border-bottom:1px solid var(--line);text-align:right;vertical-align:baseline;
white-space:nowrap;overflow-wrap:normal}
td:first-child,th:first-child{text-align:left}tbody th{font-weight:400}
th.name{white-space:normal;overflow-wrap:break-word;max-width:24em;min-width:6em}th.name:has(br){min-width:15em}
td.tint{background:color-mix(in srgb,var(--accent) calc(var(--v)*60%),transparent)}
.bar{display:inline-block;height:.75em;background:var(--c0);min-width:1px}
td.bars{text-align:left;min-width:9em}td.why{text-align:left;white-space:normal;min-width:14em;
overflow-wrap:anywhere}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,28em),1fr));gap:0 2em}
progress{width:100%;max-width:46em;accent-color:var(--accent)}
figure{margin:1em 0}svg{display:block;width:100%;height:auto;max-width:46em;overflow:visible}
svg text{fill:var(--fg);font:12px system-ui,sans-serif}
svg .grid{stroke:var(--line);stroke-width:1}svg polyline{fill:none;stroke-width:2;stroke-linejoin:round}
.key{display:inline-flex;align-items:center;gap:.4em;margin-right:1.2em}.key svg{width:2.2em;flex:none}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,26em),1fr));gap:1em}
.pictures figure{margin:0}img{max-width:100%;height:auto;display:block;border-radius:3px}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24em),1fr));gap:.4em;margin:1em 0}
.pair img{width:100%}.pair figcaption{grid-column:1/-1}
details{border:1px solid var(--line);border-radius:5px;padding:.3em .8em;margin:.5em 0;background:var(--panel)}
summary{cursor:pointer;padding:.2em 0}.big{font-size:1.15em}
.good{color:var(--good)}.bad{color:var(--bad)}.unsure{color:var(--unsure)}
@media(max-width:600px){td,th{padding:.22em .5em}td.bars{min-width:5em}
svg text{font-size:19px}svg polyline{stroke-width:3}.key svg polyline{stroke-width:2}}
"""


class Markup(str):
    """A string that is HTML already."""


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        id: its address within the page.
        title: plain text.
        body: HTML.
    """

    id: str
    title: str
    body: Markup


def text(value: object) -> Markup:
    """Plain text as HTML; a Markup as it is."""
    return value if isinstance(value, Markup) else Markup(html.escape(printable(value)))


def join(parts: Sequence[object], separator: str = "\n") -> Markup:
    """Parts, of which plain text is escaped, as one."""
    return Markup(separator.join(map(text, parts)))


def paragraph(content: object, kind: str = "") -> Markup:
    """A paragraph; ``kind`` is a class of STYLE."""
    return Markup(f'<p class="{kind}">{text(content)}</p>' if kind else f"<p>{text(content)}</p>")


def page(title: str, opening: Sequence[object], sections: Sequence[Section], script: str = "") -> str:
    """A whole page.

    Args:
        title: plain text.
        opening: what stands above the table of contents.
        sections: the rest.
        script: JavaScript that may run; user's text never goes into it.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f"'sha256-{digest}'" if script else "'none'"
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}"
    links = "".join(f'<li><a href="#{s.id}">{text(s.title)}</a></li>' for s in sections)
    contents = f'<nav aria-label="Contents"><ul>{links}</ul></nav>' if len(sections) > 1 else ""
    bodies = "\n".join(
        f'<section id="{s.id}" aria-labelledby="{s.id}-title"><h2 id="{s.id}-title">{text(s.title)}</h2>\n'
        f"{s.body}</section>"
        for s in sections
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head>\n<body>"
        '<a class="skip" href="#content">Skip to the content</a>\n'
        f"<header><h1>{text(title)}</h1>\n{join(opening)}</header>\n{contents}\n"
        f'<main id="content">{bodies}</main>\n' + (f"<script>{script}</script>" if script else "") + "</body></html>\n"
    )


def table(columns: Sequence[object], rows: Sequence[Sequence[object]], caption: str = "") -> Markup:
    """A table whose first column names its rows. It scrolls by itself where the window is narrow, also by keyboard.

    A cell that is a Markup and begins with ``<td`` is taken whole, with its attributes.
    """

    def row(values: Sequence[object]) -> str:
        first, *others = values
        cells = [v if isinstance(v, Markup) and v.startswith("<td") else f"<td>{text(v)}</td>" for v in others]
        return f'<tr><th scope="row" class="name">{text(first)}</th>{"".join(cells)}</tr>'

    head = "".join(f'<th scope="col">{text(c)}</th>' for c in columns)
    label = f' aria-label="{text(caption)}"' if caption else ' aria-label="table"'
    return Markup(
        f'<div class="scroll" tabindex="0" role="region"{label}><table>'
        + (f"<caption>{text(caption)}</caption>" if caption else "")
        + f"<thead><tr>{head}</tr></thead><tbody>{''.join(map(row, rows))}</tbody></table></div>"
    )


def bar(share: float) -> Markup:
    """A cell with a bar as long as a share 0…1 of its column."""
    width = 100 * min(max(share, 0.0), 1.0)
    return Markup(f'<td class="bars"><span class="bar" style="width:{width:.1f}%"></span></td>')


def tinted(value: object, share: float) -> Markup:
    """A cell whose background is the stronger, the larger a share 0…1 is."""
    return Markup(f'<td class="tint" style="--v:{min(max(share, 0.0), 1.0):.3f}">{text(value)}</td>')


def picture(image: PILImage.Image, description: str, caption: object = "") -> Markup:
    """A picture inside the page.

    Args:
        description: what it shows, for those who do not see it; plain text.
        caption: what stands below it.
    """
    below = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    return Markup(f"<figure>{image_tag(image, description)}{below}</figure>")


def image_tag(image: PILImage.Image, description: str) -> Markup:
    """A picture without a caption."""
    size = f'width="{image.width}" height="{image.height}"'
    return Markup(f'<img src="{data_url(image)}" alt="{text(description)}" {size}>')


def data_url(image: PILImage.Image) -> str:
    """A picture as a JPEG inside the page."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
