"""What was seen, beside what could be: limits of the machine, and the share of them that work reached."""

from octavo.observe.limits import MachineLimits, measure_limits
from octavo.observe.mfu import StepCost, Utilization, utilization

__all__ = ["MachineLimits", "StepCost", "Utilization", "measure_limits", "utilization"]
