"""Two runs against each other as one page: what is better and by how much, over the curves of both."""

from pathlib import Path

from regpt.report.charts import charts, with_difference
from regpt.report.compare import Comparison
from regpt.report.comparison import commands, differences_sections, header_of_several, swatch, verdicts
from regpt.report.markup import grid, section_html, text
from regpt.report.page import document, write_page
from regpt.report.verdict import HEAD, SEEDS_HEAD, code_lines, headline, measure_cells, seeds_rows


def write_diff(found: Comparison, out: Path) -> Path:
    """Write the page of a comparison to `out`; return where it is."""
    return write_page(render_diff(found), out)


def render_diff(found: Comparison) -> str:
    runs = [found.a, found.b]
    head = header_of_several(runs, "regpt · B against A", headline(found))
    data = with_difference(charts(runs), found.bits)
    return document(f"{found.a.name} · {found.b.name}", head, measures_section(found), below(found), data)


def measures_section(found: Comparison) -> str:
    named = [swatch("AB".find(name)) + text(name) for name in HEAD]
    rows = [[text(cell) for cell in measure_cells(one)] for one in found.measures]
    seeds = [[text(cell) for cell in row] for row in seeds_rows(found)]
    return section_html("Final numbers", grid(named, rows) if rows else "") + section_html(
        "Against the noise between seeds", grid([text(name) for name in SEEDS_HEAD], seeds) if seeds else ""
    )


def below(found: Comparison) -> str:
    runs = [found.a, found.b]
    lines = "".join(f"<li>{text(line)}</li>" for line in code_lines(found))
    changes = section_html("Changes of the source", f'<ul class="card story">{lines}</ul>' if lines else "")
    return verdicts(runs) + differences_sections(runs) + changes + commands(runs)
