"""The report of runs: one self-contained HTML page, as a file or served while they go on."""

from pretrain.metrics.report.layout import chart_columns, step_range
from pretrain.metrics.report.page import fragments, render_page
from pretrain.metrics.report.run import Run

__all__ = ["Run", "chart_columns", "fragments", "render_page", "step_range"]
