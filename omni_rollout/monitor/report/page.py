"""The page: a part below the other, and in each part the runs beside each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from omni_rollout.errors import UserError
from omni_rollout.monitor.report import curves, pictures, provenance, side, summary
from omni_rollout.monitor.report.read import Run, read_run

MOST = 4  # runs: more are too narrow to be read
SECTIONS: tuple[tuple[str, Callable[[Run], str]], ...] = (
    ("What it came to", summary.section),
    ("Pictures", pictures.section),
    ("Reward against guards", curves.guards),
    ("Parity: engine against trainer", curves.parity),
    ("Learning", curves.health),
    ("Where the time went", curves.times),
    ("How to run it again", provenance.section),
)
STYLE = """
:root{color-scheme:light dark;--page:#fff;--ink:#1c1c1a;--soft:#5c5c57;--rule:#dcdcd6;--card:#f7f7f4;--good:#dff3e3;
--bad:#fbdedc;--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#b3589a;--c4:#a07800;--c5:#3b8fc4;--c6:#777;--c7:#8a3b12}
@media(prefers-color-scheme:dark){:root{--page:#161614;--ink:#eeeeea;--soft:#a8a8a0;--rule:#3a3a36;--card:#20201d;
--good:#1d3a26;--bad:#4c2322;--c0:#56a8e0;--c1:#f08a45;--c2:#3cc79b;--c3:#dc8fc4;--c4:#d9b13b;--c5:#8fd0f5;--c6:#aaa;
--c7:#d99a78}}*{box-sizing:border-box}body{font:15px/1.5 system-ui,sans-serif;margin:0 auto;max-width:1400px;padding:1rem;
color:var(--ink);background:var(--page);overflow-wrap:anywhere}h1{font-size:1.5rem;margin:.5rem 0}h2{font-size:1.2rem;
margin:2rem 0 .5rem;border-bottom:1px solid var(--rule)}h3{font-size:1rem;margin:1rem 0 .25rem}p{margin:.4rem 0}nav a{
margin-right:1rem;color:var(--c0)}.runs{display:grid;gap:1rem;grid-template-columns:repeat(var(--n),minmax(0,1fr))}.run{
min-width:0}.charts{display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr))}figure{
margin:0}.charts figure{background:var(--card);border-radius:6px;padding:.6rem}.charts figcaption{font-weight:600}
.charts svg{width:100%;height:auto;display:block}svg text{font:12px system-ui,sans-serif;fill:var(--soft)}.grid{
stroke:var(--rule)}.legend{display:flex;flex-wrap:wrap;gap:.1rem .9rem;font-size:.85rem}.key svg{display:inline-block;
width:10px;height:10px}polyline,svg line{fill:none;stroke-width:1.5}.strong{stroke-width:3}.scroll{overflow-x:auto;
max-width:100%}table{border-collapse:collapse;font-size:.9rem;margin:.5rem 0;font-variant-numeric:tabular-nums}td,th{
padding:.2rem .6rem .2rem 0;text-align:right;vertical-align:top;border-bottom:1px solid var(--rule)}td.text,th.text{
text-align:left;min-width:6rem}td:first-child,td:not(.text){overflow-wrap:break-word}
.verdict{padding:.6rem 1rem;border-radius:6px;font-weight:600}.good{background:var(--good)}
.bad{background:var(--bad)}.note p{color:var(--soft)}pre{white-space:pre-wrap;background:var(--card);padding:.6rem;
border-radius:6px;font-size:.85rem}.strip{margin:.5rem 0}.strip>p{color:var(--soft);margin:0}.frames{display:flex;gap:.5rem;
overflow-x:auto}.frames figure{flex:0 0 auto;width:128px;font-size:.8rem}.frames img{width:128px;height:auto;display:block;
image-rendering:pixelated}img.map{display:block;max-width:none;background:#fff}img.sheet{max-width:100%}summary{
cursor:pointer;margin:.4rem 0}@media(max-width:700px){.frames figure{width:22%}
.frames img{width:100%}.runs{grid-template-columns:minmax(0,1fr)}td.text,th.text{min-width:0}
}
""" + "".join(f".l{n}{{stroke:var(--c{n})}}.f{n}{{fill:var(--c{n})}}" for n in range(8))


def write_report(folders: Sequence[Path], out: Path) -> None:
    """One page of up to four runs.

    Raises:
        UserError: a folder that is no run's, or too many.
    """
    if len(folders) > MOST:
        raise UserError(f"{len(folders)} runs: expected at most {MOST} side by side")
    page = to_html([read_run(folder) for folder in folders])
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}); give another file with --out") from error


def to_html(runs: Sequence[Run]) -> str:
    names = side.labels(runs)
    sections = [(title, _cards(names, [part(run) for run in runs])) for title, part in SECTIONS]
    if len(runs) > 1:
        sections.insert(0, ("Side by side", side.section(runs)))
    title = escape(", ".join(names))
    links = "".join(f'<a href="#p{number}">{escape(heading)}</a>' for number, (heading, _) in enumerate(sections))
    body = "\n".join(
        f'<section id="p{number}"><h2>{escape(heading)}</h2>{inside}</section>'
        for number, (heading, inside) in enumerate(sections)
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1><nav>{links}</nav>\n{body}\n</body></html>\n"
    )


def _cards(names: Sequence[str], parts: Sequence[str]) -> str:
    heads = [f"<h3>{escape(name)}</h3>" if len(names) > 1 else "" for name in names]
    cards = "".join(f'<div class="run">{head}{part}</div>' for head, part in zip(heads, parts, strict=True))
    return f'<div class="runs" style="--n:{len(parts)}">{cards}</div>'
