"""Reports: one HTML file on one run or several, from the folders that training jobs and evaluations leave."""

from maple_trl.reports.embeddings import write_embeddings
from maple_trl.reports.folders import ReportError
from maple_trl.reports.report import write_report
from maple_trl.reports.watch import watch_report


__all__ = ["ReportError", "watch_report", "write_embeddings", "write_report"]
