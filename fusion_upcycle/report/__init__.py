"""Run records and the tables and figures made from them."""

from fusion_upcycle.report.record import Measured, write_run_record

__all__ = ["Measured", "write_run_record"]
