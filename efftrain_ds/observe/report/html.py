"""Pieces of HTML. Text from files goes through `esc` here and nowhere else becomes markup."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

_LARGE = 250_000
"""Bytes above which a picture is made smaller before it goes into the page."""

CSS = """
:root{--ink:#24303c;--soft:#5a6673;--grid:#d8dee4;--paper:#fff;--page:#f6f7f9;--c0:#0072b2;--c1:#d55e00;--c2:#009e73;
--c3:#b5589a;--c4:#b97f00;--c5:#2f8fc4;--plan:#b9c2cb;--mark:#fff3cf;--bad:#b3261e;color-scheme:light dark}
@media (prefers-color-scheme:dark){:root{--ink:#e6eaee;--soft:#a3adb8;--grid:#3a434d;--paper:#1b2026;--page:#12161a;
--c0:#5bb2ee;--c1:#ff9a4d;--c2:#35c99c;--c3:#e79cc9;--c4:#f0b83d;--c5:#8fd0f5;--plan:#5b6672;--mark:#4a3d12;--bad:#ff8a80}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,"Segoe UI",Roboto,Helvetica,Arial,sans-serif}
main{max-width:1120px;margin:0 auto;padding:24px 16px 64px}
h1{font-size:1.6rem;margin:0 0 2px}h2{font-size:1.15rem;margin:0 0 10px}h3{font-size:1rem;margin:18px 0 6px}
section{background:var(--paper);border:1px solid var(--grid);border-radius:8px;padding:16px 18px;margin:16px 0}
nav{display:flex;flex-wrap:wrap;gap:2px 14px;margin:8px 0 0;font-size:.9rem}a{color:var(--c0)}
p{margin:4px 0 8px}.soft{color:var(--soft);font-size:.9rem}.bad{color:var(--bad);font-weight:600}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:10px;margin:0 0 14px}
.card{border:1px solid var(--grid);border-radius:6px;padding:8px 12px}.card b{display:block;font-size:1.3rem}
.card span{color:var(--soft);font-size:.85rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:3px 18px;margin:0}dt{color:var(--soft)}
dd{margin:0;overflow-wrap:anywhere}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums;width:100%}
table.small{width:auto;min-width:50%;margin:4px 0}
th,td{text-align:right;padding:3px 10px 3px 0;border-bottom:1px solid var(--grid);vertical-align:top}
th{color:var(--soft);font-weight:600;vertical-align:bottom}th.l,td.l{text-align:left}td.w{min-width:320px}td.k{white-space:nowrap}
tr.sum td{font-weight:600;border-top:2px solid var(--grid)}tr.mark td{background:var(--mark)}tr.lost td{opacity:.65}
.bar{height:8px;border-radius:2px;margin:2px 0;print-color-adjust:exact;-webkit-print-color-adjust:exact}
.bar.p{background:var(--plan)}.bar.a{background:var(--c0)}td.bars{width:26%;min-width:120px;padding-top:6px}
.key{display:inline-block;width:18px;height:8px;border-radius:2px;margin:0 5px 0 0;print-color-adjust:exact;
-webkit-print-color-adjust:exact}
figure{margin:8px 0}figure svg{width:100%;height:auto;display:block}figcaption{color:var(--soft);font-size:.85rem}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(220px,1fr));gap:14px}
.maps{grid-template-columns:repeat(auto-fill,minmax(440px,1fr))}
.pictures img{width:100%;height:auto;border-radius:4px;image-rendering:pixelated;background:#fff}
pre{overflow-x:auto;background:var(--page);border:1px solid var(--grid);border-radius:6px;padding:10px 12px;
margin:6px 0;font:12.5px/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre.wrap{white-space:pre-wrap;overflow-wrap:anywhere}
details>summary{cursor:pointer;color:var(--c0)}details.run>summary{font-size:1.15rem;font-weight:600;margin:20px 0 0}
@media print{body{background:#fff;font-size:11pt}main{max-width:none;padding:0}nav{display:none}
section{border:0;padding:0;break-inside:auto}figure,tr,.card{break-inside:avoid}pre{white-space:pre-wrap}
details.run:not([open])::details-content{content-visibility:visible;display:block}}
"""


def esc(value: Any) -> str:
    """Text of a file as text of the page."""
    return escape(str(value), quote=True)


def section(title: str, *body: str, key: str = "") -> str:
    """A section with a heading; "" where the body is empty."""
    inner = "\n".join(part for part in body if part)
    anchor = f' id="{esc(key)}"' if key else ""
    return f"<section{anchor}><h2>{esc(title)}</h2>\n{inner}\n</section>" if inner else ""


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    left: Iterable[int] = (),
    classes: Sequence[str] = (),
    small: bool = False,
    markup: Iterable[int] = (),
) -> str:
    """A table.

    Args:
        head: names of the columns.
        rows: cells as plain text.
        left: columns aligned to the left.
        classes: of each row, "" for none.
        small: as wide as its content only.
        markup: columns whose cells are HTML already.
    """
    left, markup = set(left), set(markup)

    def cell(tag: str, i: int, text: str) -> str:
        name = ' class="l"' if i in left else ' class="bars"' if i in markup and tag == "td" else ""
        return f"<{tag}{name}>{text if i in markup and tag == 'td' else esc(text)}</{tag}>"

    lines = ["<tr>" + "".join(cell("th", i, c) for i, c in enumerate(head)) + "</tr>"]
    for number, row in enumerate(rows):
        name = classes[number] if number < len(classes) else ""
        opening = f'<tr class="{esc(name)}">' if name else "<tr>"
        lines.append(opening + "".join(cell("td", i, c) for i, c in enumerate(row)) + "</tr>")
    kind = ' class="small"' if small else ""
    body = "\n".join(lines[1:])
    return f'<div class="wide"><table{kind}><thead>{lines[0]}</thead><tbody>\n{body}\n</tbody></table></div>'


def definitions(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and values; pairs without a value are left out."""
    rows = [f"<dt>{esc(name)}</dt><dd>{esc(value)}</dd>" for name, value in pairs if value]
    return "<dl>" + "\n".join(rows) + "</dl>" if rows else ""


def cards(items: Iterable[tuple[str, str, str]]) -> str:
    """Large figures: (figure, what it is, remark)."""
    cells = [
        f'<div class="card"><b>{esc(value)}</b>{esc(name)}<br><span>{esc(remark)}</span></div>'
        for value, name, remark in items
    ]
    return f'<div class="cards">{"".join(cells)}</div>'


def folded(title: str, text: str) -> str:
    """Long text behind a line; "" where there is none."""
    return f"<details><summary>{esc(title)}</summary><pre>{esc(text)}</pre></details>" if text else ""


def paragraph(text: str, kind: str = "") -> str:
    """One paragraph; "" where there is no text."""
    name = f' class="{kind}"' if kind else ""
    return f"<p{name}>{esc(text)}</p>" if text else ""


def pre(text: str) -> str:
    """Text whose line breaks count, long lines wrapped; "" where there is none."""
    return f'<pre class="wrap">{esc(text)}</pre>' if text else ""


def figure(svg: str, caption: str = "") -> str:
    """A drawing with a line below it."""
    below = f"<figcaption>{esc(caption)}</figcaption>" if caption else ""
    return f"<figure>{svg}{below}</figure>" if svg else ""


def bars(planned: float | None, actual: float | None, longest: float) -> str:
    """Two bars, planned above actual, as shares of the longest of their table."""

    def bar(kind: str, value: float | None) -> str:
        width = 0.0 if value is None or longest <= 0 else max(0.0, min(100.0, 100 * value / longest))
        return f'<div class="bar {kind}" style="width:{width:.1f}%"></div>'

    return (bar("p", planned) if planned is not None else "") + bar("a", actual)


def picture(path: Path, alt: str, width: int = 720) -> str:
    """A picture as part of the page; a large one is made smaller. "" where it cannot be read."""
    from PIL import Image

    try:
        data, kind = path.read_bytes(), "png"
        with Image.open(io.BytesIO(data)) as image:
            size = image.size
            if len(data) > _LARGE:
                small = image.convert("RGB")
                small.thumbnail((width, 4 * width))
                buffer, kind, size = io.BytesIO(), "jpeg", small.size
                small.save(buffer, format="JPEG", quality=88)
                data = buffer.getvalue()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""
    coded = base64.b64encode(data).decode("ascii")
    return f'<img src="data:image/{kind};base64,{coded}" alt="{esc(alt)}" width="{size[0]}" height="{size[1]}">'


def page(title: str, body: str) -> str:
    """A whole document without anything from outside."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{esc(title)}</title>\n<style>{CSS}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )
