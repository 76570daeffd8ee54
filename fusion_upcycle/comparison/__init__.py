"""Tables, figures and a page from run records: `python -m fusion_upcycle report`."""

from fusion_upcycle.comparison.report import write_report

__all__ = ["write_report"]
