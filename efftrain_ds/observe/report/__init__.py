"""The report of a run: one HTML file that needs no network, and a picture, made from the run's folder."""

from .page import write_report
from .run import RunData, read_run

__all__ = ["RunData", "read_run", "write_report"]
