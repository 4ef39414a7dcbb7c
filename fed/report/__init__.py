"""What a run did: read from its folder while it goes on, when it has ended, or after it was killed."""

from fed.report.read import Report, read_report
from fed.report.summary import Summary, summarise

__all__ = ["Report", "Summary", "read_report", "summarise"]
