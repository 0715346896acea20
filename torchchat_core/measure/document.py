"""Pages of measurements: one HTML file without requests to anywhere.

Names come from strangers: every text is escaped, and the page's own policy lets no script run but the one below.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

PAGES = Path(__file__).resolve().parent.parent / "data" / "pages"
Cells = Sequence[tuple[str, float | str]]  # of one row: as people read them, and as they sort


def document(title: str, body: str) -> str:
    """A whole page, with the one table in `body` sortable. `title` is text, `body` HTML."""
    style = (PAGES / "comparison.css").read_text(encoding="utf-8")
    script = (PAGES / "comparison.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{body}
<script>{script}</script>
</body>
</html>
"""


def paragraphs(lines: Iterable[str]) -> str:
    """Lines of text that stand back."""
    return '<p class="faint">' + "<br>\n".join(map(escape, lines)) + "</p>"


def listed(heading: str, lines: Iterable[str]) -> str:
    """A heading and a list; nothing where there are no lines."""
    items = "\n".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<h2>{escape(heading)}</h2>\n<ul>\n{items}\n</ul>" if items else ""


def sortable_table(columns: Iterable[str], rows: Iterable[tuple[Cells, bool]]) -> str:
    """Rows of cells; with each, whether it stands out."""
    heads = "".join(f'<th scope="col"><button type="button">{escape(name)}</button></th>' for name in columns)
    lines = []
    for cells, best in rows:
        kind = ' class="best"' if best else ""
        found = "".join(f'<td data-value="{escape(str(value))}">{escape(text)}</td>' for text, value in cells)
        lines.append(f"<tr{kind}>{found}</tr>")
    return '<div class="wide">\n<table>\n<caption>A click on a heading sorts.</caption>\n<thead><tr>' \
           f"{heads}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody>\n</table>\n</div>"
