"""What the end tier does with a text before it leaves: pull out what matters, condense, redact."""

from graphs.departure.condense import Condenser
from graphs.departure.departing import Departure, Prepared
from graphs.departure.extract import Extractor
from graphs.departure.kinds import KINDS
from graphs.departure.redact import Redactor, Vault
from graphs.departure.shortened import Shortened, Shortener

__all__ = ["KINDS", "Condenser", "Departure", "Extractor", "Prepared", "Redactor", "Shortened", "Shortener", "Vault"]
