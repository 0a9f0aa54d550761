"""The card of a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from slim_core.config import OptimizerConfig
from slim_core.optim import make_optimizer
from slim_core.weights.card import Card, CardData, CardLoss, CardPlan, render
from slim_core.weights.checkpoint import save_checkpoint, verify_checkpoint
from tests.unit.core_support import a_model, small_config

CARD = Card(
    model="mdl_1",
    parameters=134_515_008,
    step=40,
    steps=40,
    data=CardData("notes.jsonl", documents=79, tokens=466_196, tokenizer="SmolLM2"),
    plan=CardPlan(2**30, 900 << 20, 2_048, 4, 256, "prefix", lora_rank=8, matching=(500, 512)),
    base_model="SmolLM2-135M",
    license="apache-2.0",
    losses=[CardLoss(0, validation=2.62), CardLoss(40, 2.1, 2.2)],
    loads_in_transformers=True,
)


def test_a_card_says_what_is_known() -> None:
    text = render(CARD)
    assert text.startswith('---\nlibrary_name: transformers\nbase_model: "SmolLM2-135M"\nlicense: "apache-2.0"\n---\n')
    for line in (
        "| documents | 79 |",
        "| trained | adapters of rank 8 (LoRA), merged |",
        "| planned peak | 900 MiB (943,718,400 bytes) |",
        "| matching | 500 updates of 512 tokens to give what softmax attention gave |",
        "| 0 |  | 2.6200 |",
        "| 40 | 2.1000 | 2.2000 |",
        'model = AutoModelForCausalLM.from_pretrained(".")',
    ):
        assert line in text.splitlines()
    assert "`adapter/`" in text
    assert "The licence of SmolLM2-135M (apache-2.0) applies" in text


def test_what_is_not_known_is_left_out() -> None:
    plan = replace(CARD.plan, lora_rank=None, matching=None)
    data = CardData("notes.jsonl")
    bare = replace(CARD, plan=plan, data=data, base_model=None, license=None, losses=[])
    text = render(replace(bare, loads_in_transformers=False))
    for word in ("None", "## Loss", "matching", "adapter", "transformers", "documents"):
        assert word not in text
    assert 'model = load_model(".")' in text.splitlines()


def test_a_long_curve_keeps_its_ends() -> None:
    losses = [CardLoss(step, 1 / (step + 1)) for step in range(1_000)]
    rows = [line for line in render(replace(CARD, losses=losses)).splitlines() if line[2:3].isdigit()]
    assert (len(rows), rows[0].split()[1], rows[-1].split()[1]) == (20, "0", "999")


def test_names_from_outside_stay_names() -> None:
    name = 'a|b"\nlicense: mit\n# <script>`x`'
    text = render(replace(CARD, model=name, base_model=name, data=replace(CARD.data, name=name)))
    assert "\nlicense: mit" not in text
    assert "<script>" not in text
    assert "| dataset | a b  license: mit #  script  x  |" in text.splitlines()


def test_it_is_in_the_checkpoint_and_its_manifest(tmp_path: Path) -> None:
    model = a_model(small_config())
    files = save_checkpoint(tmp_path, 3, model, make_optimizer(model, OptimizerConfig()), {}, card=render(CARD))
    assert "README.md" in [file.name for file in files]
    assert (tmp_path / "step-00000003" / "README.md").read_text() == render(CARD)
    verify_checkpoint(tmp_path / "step-00000003")
