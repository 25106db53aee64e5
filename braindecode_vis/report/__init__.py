"""The report of a run: figures, galleries and one self-contained page.

`page.write_report` takes a `page.ReportContent` of plain data and writes `report.html`; `gallery` holds images and
what is known of them and chooses by rule, `grid` composes and exports; `figures` draws. Imports nothing of the
pipeline.
"""

from braindecode_vis.report.gallery import GalleryContent, arrange_rows, order_rows, select_items
from braindecode_vis.report.grid import export_gallery, make_gallery_grid
from braindecode_vis.report.page import (
    ExtraSection,
    RankContent,
    ReportContent,
    SectionFigure,
    render_report,
    write_report,
)

__all__ = [
    "ExtraSection",
    "GalleryContent",
    "RankContent",
    "ReportContent",
    "SectionFigure",
    "arrange_rows",
    "export_gallery",
    "make_gallery_grid",
    "order_rows",
    "render_report",
    "select_items",
    "write_report",
]
