"""How much may be lost against always asking the top tier, with a promise that holds on a finite sample."""

from agora.routing.risk.betting import betting_p_values
from agora.routing.risk.bounds import hoeffding_bentkus_p_values
from agora.routing.risk.certify import Certificate, certify, rows_needed

__all__ = ["Certificate", "betting_p_values", "certify", "hoeffding_bentkus_p_values", "rows_needed"]
