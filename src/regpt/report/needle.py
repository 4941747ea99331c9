"""Heat maps of a needle in a haystack: a metric by depth and length."""

from typing import Any

from regpt.errors import UserError
from regpt.files import is_file
from regpt.report.markup import section_html, text
from regpt.report.read import Row, RunData, number, section
from regpt.structured import read_object

FILE = "evals/needle.json"  # what regpt eval RUN --tasks needle --json wrote
DARK = 0.55  # from here on light digits are read better
ABOUT = {
    "exact": "the number, written by greedy decoding",
    "rank": "share of other numbers that are less likely; 0.5 is guessing",
}


def needle_section(run: RunData) -> str:
    """A heat map for each metric: of RUN/evals/needle.json where it is, else of the last evaluation in training."""
    step, found = latest_cells(run)
    maps = "".join(heat_map(metric, cells) for metric, cells in found.items())
    after = "" if step is None else f" after step {step:,}"
    return section_html(f"Needle in a haystack{after}", f'<div class="sheets">{maps}</div>' if maps else "")


def latest_cells(run: RunData) -> tuple[int | None, dict[str, Row]]:
    rows = [row for row in run.evals if row.get("task") == "needle"]
    last = max((row["step"] for row in rows), default=None)
    found = {str(row.get("metric")): row for row in rows if row["step"] == last}
    path = run.folder / FILE
    if is_file(path):
        try:
            report = read_object(path, "write it again with regpt eval")
            metrics = section(section(section(report, "tasks"), "needle"), "metrics")
            step = number(report.get("step"))
            last, found = None if step is None else int(step), {name: section(metrics, name) for name in metrics}
        except UserError:
            pass  # a damaged file: the report has the rest
    return last, {name: row["cells"] for name, row in found.items() if well_formed(row.get("cells"))}


def well_formed(cells: Any) -> bool:
    if not isinstance(cells, dict):
        return False
    lengths, depths, values = (cells.get(key) for key in ("lengths", "depths", "values"))
    if not (isinstance(lengths, list) and isinstance(depths, list) and isinstance(values, list)):
        return False
    return len(values) == len(depths) and all(isinstance(row, list) and len(row) == len(lengths) for row in values)


def heat_map(metric: str, cells: Row) -> str:
    """A table whose columns are lengths and whose rows are depths, the beginning of the text at the top."""
    head = "".join(f'<th scope="col">{length_html(length)}</th>' for length in cells["lengths"])
    body = "".join(
        f'<tr><th scope="row">{text(depth)} %</th>{"".join(map(cell_html, row))}</tr>'
        for depth, row in zip(cells["depths"], cells["values"])
    )
    note = f"{ABOUT.get(metric, metric)}; by depth of the needle and tokens of the prompt"
    title = f'<h3>{text(metric)}</h3><p class="note">{text(note)}</p>'
    top = f'<thead><tr><th scope="col">depth</th>{head}</tr></thead>'
    return f'<div class="card sheet scroll">{title}<table class="heat">{top}<tbody>{body}</tbody></table></div>'


def length_html(length: Any) -> str:
    return f"{length:,}" if isinstance(length, int) else text(length)


def cell_html(value: Any) -> str:
    share = number(value)
    if share is None:
        return "<td>–</td>"
    share = min(1.0, max(0.0, share))
    return f'<td{" class=dark" if share >= DARK else ""} style="--v:{share:.3f}">{share:.2f}</td>'
