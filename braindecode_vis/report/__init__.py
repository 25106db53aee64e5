"""The report of a run: figures, galleries and one self-contained page.

`page.write_report` takes a `page.ReportContent` of plain data and writes `report.html`; `gallery` picks and
composes images by rule; `figures` draws. Imports nothing of the pipeline.
"""

from braindecode_vis.report.gallery import GalleryContent, make_gallery_grid, select_items
from braindecode_vis.report.page import ExtraSection, RankContent, ReportContent, render_report, write_report

__all__ = [
    "ExtraSection",
    "GalleryContent",
    "RankContent",
    "ReportContent",
    "make_gallery_grid",
    "render_report",
    "select_items",
    "write_report",
]
