"""What the planner is asked and what it answers. Pure data, free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from slim_core.config import ModelConfig, TrainConfig, _Json
from slim_core.planning.costs import Costs, Overheads, Update

StatePolicy = Literal["keep", "reverse", "stride", "prefix"]


@dataclass(frozen=True, slots=True)
class Calibration(_Json):
    """What one machine can do, measured when a worker starts (`slim_core.calibrate`)."""

    source: str
    """Where the numbers come from: `measured ...` or `default` (no worker has reported yet)."""
    device: str
    """`cpu` or `cuda`."""
    threads: int
    """Threads that the trainer computes with."""
    runtime_bytes: int
    """Private memory of a trainer that has imported everything and run a warm-up step on a minimal model."""
    float32: Costs
    bfloat16: Costs
    """The same in bfloat16, which only some processors are faster at."""
    overheads: Overheads
    adamw: Update
    adafactor: Update
    sgd: Update
    time_factor: float = 1.0
    """By how much steps of this model took longer than the numbers above say, in jobs that have finished."""
    peak_excess_bytes: int = 0
    """What jobs of this model held beyond the memory model."""
    machine: str = ""
    """What was measured: the machine since its last start, its software and threads; empty where nobody has said."""
    version: int = 0
    """Where it is stored, among those of the device; 0 for one that is not."""


@dataclass(frozen=True, slots=True)
class Workload:
    """A job as the planner sees it: everything that memory and time may depend on, but the machine."""

    model: ModelConfig
    train: TrainConfig


@dataclass(frozen=True, slots=True)
class Chunking(_Json):
    """A user's own choice in place of the planner's."""

    chunk_length: int
    state_policy: StatePolicy | None = None
    """None for what goes with the model's attention: `keep`, or `prefix` of softmax attention."""


@dataclass(frozen=True, slots=True)
class MemoryBreakdown(_Json):
    """Bytes of the trainer process at its peak, by cause; they add up to the predicted peak."""

    runtime: int
    parameters: int
    gradients: int
    optimizer: int
    states: int
    activations: int
    logits: int
    workspace: int
    safety: int
    learned: int = 0
    """What earlier jobs of this model held beyond their plans (`Calibration.peak_excess_bytes`)."""

    @property
    def total(self) -> int:
        return (
            self.runtime
            + self.parameters
            + self.gradients
            + self.optimizer
            + self.states
            + self.activations
            + self.logits
            + self.workspace
            + self.safety
            + self.learned
        )


@dataclass(frozen=True, slots=True)
class FrontierPoint(_Json):
    """One plan that no other beats in both memory and time."""

    chunk_length: int
    state_policy: StatePolicy
    micro_batch_size: int
    predicted_peak_bytes: int
    predicted_step_seconds: float


@dataclass(frozen=True, slots=True)
class Plan(_Json):
    """How a job will run, and what else would have been possible."""

    chunk_length: int
    """C, tokens."""
    num_chunks: int
    """N = ceil(T / C)."""
    state_policy: StatePolicy
    micro_batch_size: int
    accumulation_steps: int
    predicted_peak_bytes: int
    breakdown: MemoryBreakdown
    predicted_step_seconds: float
    predicted_total_seconds: float
    unchunked_peak_bytes: int
    """Predicted peak of the ordinary step: the whole batch at once, C = T."""
    minimum_cap_bytes: int
    """The smallest cap for which this workload has a plan."""
    max_sequence_length: int
    """The longest sequence that this cap can train, other things equal."""
    check_chunk_length: int | None
    """Another chunk length that fits, if possible the whole sequence; a finished job's gradient is compared with it."""
    reason: str
    """In words, why this plan won."""
    calibration_source: str
    time_factor: float
    """Of the calibration (`Calibration.time_factor`), and so in the predicted times."""
    frontier: tuple[FrontierPoint, ...]
    calibration_version: int = 0
    """Of the calibration (`Calibration.version`)."""


class MemoryCapInfeasibleError(ValueError):
    """No plan fits under the cap. Carries what a client can act on."""

    def __init__(
        self,
        message: str,
        *,
        memory_cap_bytes: int,
        minimum_cap_bytes: int,
        max_sequence_length: int,
        suggestions: tuple[str, ...],
    ) -> None:
        super().__init__(message)
        self.memory_cap_bytes = memory_cap_bytes
        self.minimum_cap_bytes = minimum_cap_bytes
        """The smallest cap for which this workload has a plan."""
        self.max_sequence_length = max_sequence_length
        """The longest sequence that this cap can train, other things equal; 0 if none."""
        self.suggestions = suggestions
        """Changes that would make it fit, in words, with numbers."""
