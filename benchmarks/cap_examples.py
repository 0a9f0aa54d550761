"""What caps mean for jobs of several sizes, by the planner alone: the tables and the picture of docs/choosing-a-cap.md.

    python -m benchmarks.cap_examples        fills in the page and draws docs/figures/cap_examples.png

Nothing is run. Times are those of the machine whose calibration docs/figures/plan_accuracy_softmax.json has.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import matplotlib as mpl

from benchmarks.bench_measure import MIB, ROOT
from benchmarks.page import fill, table
from slim_core.config import BUILTIN_MODELS, LoraConfig, ModelConfig, OptimizerConfig, TrainConfig
from slim_core.planning import Calibration, MemoryCapInfeasibleError, Plan, Workload, plan_job
from slim_core.planning.plan import MemoryBreakdown
from slim_core.weights.layout import model_config

mpl.use("Agg")
from matplotlib import pyplot as plt  # after the choice of the backend
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

PAGE = ROOT / "docs" / "choosing-a-cap.md"
FIGURE = ROOT / "docs" / "figures" / "cap_examples.png"
CALIBRATION = ROOT / "docs" / "figures" / "plan_accuracy_softmax.json"
NO_CAP = 1 << 50
NEARLY = 1.5
"""A cap worth naming is the smallest whose step takes at most this many times as long as the fastest. The fastest is
one chunk, which is visited once; all but the last of several are visited twice."""
TICKS = (800, 1_000, 1_500, 2_000, 3_000, 5_000, 8_000)
LONGEST = 16_777_216
"""The longest sequence that the API takes."""
LORA = LoraConfig(rank=8, alpha=16.0, targets=("query", "key_value"))
SMOLLM2 = {
    "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5, "rope_theta": 100000, "hidden_act": "silu", "max_position_embeddings": 8192,
}  # fmt: skip
LLAMA_1B = {
    "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 22, "num_attention_heads": 32,
    "num_key_value_heads": 4, "intermediate_size": 5632, "vocab_size": 32000, "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5, "rope_theta": 10000, "hidden_act": "silu", "max_position_embeddings": 8192,
}  # fmt: skip


@dataclass(frozen=True)
class Example:
    name: str
    workload: Workload


def workload(
    model: ModelConfig, length: int, *, lora: LoraConfig | None = None, optimizer: str = "adamw", batch: int = 1
) -> Workload:
    rule = OptimizerConfig(name=optimizer)  # type: ignore[arg-type]  # one of its names
    return Workload(model, TrainConfig(sequence_length=length, batch_size=batch, steps=100, lora=lora, optimizer=rule))


def examples() -> list[Example]:
    enwik8 = BUILTIN_MODELS["performer-enwik8"]
    smollm2, llama = model_config(SMOLLM2), model_config(LLAMA_1B)
    return [
        Example("performer-enwik8, T 16,384", workload(enwik8, 16_384)),
        Example("the same, Adafactor", workload(enwik8, 16_384, optimizer="adafactor")),
        Example("the same, LoRA", workload(enwik8, 16_384, lora=LORA)),
        Example("the same, LoRA, T 131,072", workload(enwik8, 131_072, lora=LORA)),
        Example("SmolLM2-135M, T 2,048", workload(smollm2, 2_048)),
        Example("the same, LoRA", workload(smollm2, 2_048, lora=LORA)),
        Example("the same, LoRA, T 8,192", workload(smollm2, 8_192, lora=LORA)),
        Example("Llama of 1.1 billion, LoRA, T 4,096", workload(llama, 4_096, lora=LORA)),
    ]


def calibration() -> Calibration:
    return Calibration.from_json(json.loads(CALIBRATION.read_text(encoding="utf-8"))["calibration"])


def caps_of(example: Example, machine: Calibration) -> tuple[Plan, Plan, Plan]:
    """The plans under the smallest cap, under the smallest whose step is nearly as fast as any, and without a cap."""
    free = plan_job(example.workload, NO_CAP, machine)
    least = plan_job(example.workload, free.minimum_cap_bytes, machine)
    fast = min(
        point.predicted_peak_bytes
        for point in free.frontier
        if point.predicted_step_seconds <= NEARLY * free.predicted_step_seconds
    )
    return least, plan_job(example.workload, fast, machine), free


def held_bytes(parts: MemoryBreakdown) -> int:
    """What is there whatever the chunks are."""
    return parts.runtime + parts.parameters + parts.gradients + parts.optimizer


def caps_table(found: list[Example], machine: Calibration) -> str:
    """For each job the three caps that matter, and how long a step takes under them."""
    rows = []
    for example in found:
        least, fast, free = caps_of(example, machine)
        rows.append(
            [
                example.name,
                _mib(held_bytes(least.breakdown)),
                _mib(least.predicted_peak_bytes),
                _mib(fast.predicted_peak_bytes),
                _mib(free.unchunked_peak_bytes),
                f"{least.predicted_step_seconds / free.predicted_step_seconds:.2g}",
            ]
        )
    head = ["job", "held throughout", "smallest cap", "1.5 times the time", "unchunked", "times slower at the smallest"]
    return table(head, rows)


def refusals_table(machine: Calibration) -> str:
    """What a job that does not fit is told, for one of them."""
    model = BUILTIN_MODELS["performer-enwik8"]
    cap = 600 * MIB
    rows = []
    for name, changed in (
        ("as it is", workload(model, 16_384)),
        ("Adafactor", workload(model, 16_384, optimizer="adafactor")),
        ("bfloat16", _bfloat16(workload(model, 16_384))),
        ("LoRA, rank 8", workload(model, 16_384, lora=LORA)),
        ("half the sequence", workload(model, 8_192)),
    ):
        try:
            plan = plan_job(changed, cap, machine)
            rows.append([name, _mib(plan.minimum_cap_bytes), "yes", f"{min(plan.max_sequence_length, LONGEST):,}"])
        except MemoryCapInfeasibleError as error:
            longest = f"{error.max_sequence_length:,}" if error.max_sequence_length else "none"
            rows.append([name, _mib(error.minimum_cap_bytes), "no", longest])
    return table(["change", "smallest cap", f"fits {cap // MIB} MiB", "longest sequence under it"], rows)


def draw(found: list[Example], machine: Calibration) -> None:
    """Time against the cap for some of them, and what the memory of one is made of."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(3, 2))
    for example in (found[0], found[5], found[6]):
        _, fast, free = caps_of(example, machine)
        points = sorted((p.predicted_peak_bytes / MIB, p.predicted_step_seconds) for p in free.frontier)
        line = left.step(
            [cap for cap, _ in points], [t / free.predicted_step_seconds for _, t in points], where="post",
            label=_titled(example, found),
        )[0]  # fmt: skip
        left.plot(fast.predicted_peak_bytes / MIB, fast.predicted_step_seconds / free.predicted_step_seconds, "o",
                  color=line.get_color())  # fmt: skip
    left.set(xscale="log", xlabel="memory_cap, MiB", ylabel="time of a step / fastest", ylim=(0.95, None))
    left.set_title("Each cap's fastest plan; dots: at most 1.5 times the fastest", fontsize=10)
    left.xaxis.set_minor_locator(NullLocator())
    left.set_xticks(TICKS, [f"{tick:,}" for tick in TICKS])
    left.legend(fontsize=8)
    _draw_parts(right, found[5], machine)
    figure.tight_layout()
    figure.savefig(FIGURE, dpi=150, metadata={"Software": None})


def _draw_parts(axes: Axes, example: Example, machine: Calibration) -> None:
    bottoms = [0.0] * 3
    plans = caps_of(example, machine)
    groups = (
        ("runtime", ("runtime",)),
        ("weights", ("parameters",)),
        ("gradients, optimiser", ("gradients", "optimizer")),
        ("states", ("states",)),
        ("activations, logits, workspace", ("activations", "logits", "workspace")),
        ("safety", ("safety", "learned")),
    )
    names = [f"{title}\n{plan.num_chunks} chunk{'s' if plan.num_chunks > 1 else ''}"
             for title, plan in zip(("smallest", "1.5 times\nthe time", "no cap"), plans, strict=True)]  # fmt: skip
    for label, parts in groups:
        heights = [sum(getattr(plan.breakdown, part) for part in parts) / MIB for plan in plans]
        axes.bar(names, heights, bottom=bottoms, label=label, width=0.6)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.set(ylabel="predicted peak, MiB")
    axes.set_title("SmolLM2-135M, LoRA, T 2,048: by cause", fontsize=10)
    axes.legend(fontsize=7)


def _titled(example: Example, found: list[Example]) -> str:
    head = next(each.name for each in reversed(found[: found.index(example) + 1]) if "the same" not in each.name)
    rest = example.name.partition("the same")[2]
    return head if not rest else head.partition(", T")[0] + rest + ("" if ", T" in rest else ", T 2,048")


def _bfloat16(found: Workload) -> Workload:
    return replace(found, train=replace(found.train, precision="bfloat16"))


def _mib(count: int) -> str:
    return f"{count / MIB:,.0f} MiB"


def blocks() -> dict[str, str]:
    """What the page has between its markers."""
    machine = calibration()
    return {"caps": caps_table(examples(), machine), "refusals": refusals_table(machine)}


def main() -> None:
    draw(examples(), calibration())
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), blocks()), encoding="utf-8")


if __name__ == "__main__":
    main()
