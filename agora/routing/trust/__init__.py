"""How far an answer can be trusted: signals become the probability that it is right."""

from agora.routing.trust.calibrator import Calibrator, CannotCalibrate, Report, check_labels, fit_calibrator
from agora.routing.trust.metrics import aurc, auroc, ece
from agora.routing.trust.store import CalibratorStore, Found, Version

__all__ = [
    "Calibrator",
    "CalibratorStore",
    "CannotCalibrate",
    "Found",
    "Report",
    "Version",
    "aurc",
    "auroc",
    "check_labels",
    "ece",
    "fit_calibrator",
]
