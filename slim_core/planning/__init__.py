"""The planner: from a memory cap to a schedule. Pure Python, so that the API can answer without torch."""

from slim_core.planning.choose import check_chunking, default_calibration, plan_job, plan_with_lessons
from slim_core.planning.plan import (
    Calibration,
    Chunking,
    FrontierPoint,
    MemoryBreakdown,
    MemoryCapInfeasibleError,
    Plan,
    StatePolicy,
    Workload,
)

__all__ = [
    "Calibration",
    "Chunking",
    "FrontierPoint",
    "MemoryBreakdown",
    "MemoryCapInfeasibleError",
    "Plan",
    "StatePolicy",
    "Workload",
    "check_chunking",
    "default_calibration",
    "plan_job",
    "plan_with_lessons",
]
