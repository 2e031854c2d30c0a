"""The parts of the main example that can be called without a job. The job itself: tests/integration/test_sft.py."""

from __future__ import annotations

import pytest
import torch

from examples.sft import data, train
from examples.sft.evaluate import printable
from examples.sft.model import GPT, fingerprint, nats_per_byte, write
from examples.sft.settings import FAST, Settings

TINY = Settings(**{**FAST, "steps": 10, "warmup": 2})  # type: ignore[arg-type]


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(TINY)


def test_the_text_is_split_by_file_and_no_file_is_on_both_sides() -> None:
    names = [f"package/module_{n}.py" for n in range(2000)]
    held_out = [name for name in names if data.is_held_out(name)]
    assert 0.03 < len(held_out) / len(names) < 0.07
    assert held_out == [name for name in names if data.is_held_out(name)]


def test_every_machine_has_enough_text_on_both_sides() -> None:
    training, held_out = data.load_text(held_out=False), data.load_text(held_out=True)
    assert training.dtype == torch.uint8
    assert len(training) > 3_000_000
    assert len(held_out) > 50_000
    assert b"import" in bytes(held_out[:20_000].tolist())


def test_a_batch_follows_from_seed_step_and_rank_alone() -> None:
    text = torch.arange(1000) % 251
    inputs, targets = data.random_rows(text, 4, 16, 1, 2, 3)
    again, _ = data.random_rows(text, 4, 16, 1, 2, 3)
    assert torch.equal(inputs, again)
    assert inputs.shape == targets.shape == (4, 16)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    others = [(0, 2, 3), (1, 0, 3), (1, 2, 0)]
    assert not any(torch.equal(inputs, data.random_rows(text, 4, 16, *key)[0]) for key in others)


def test_batches_reach_both_ends_of_the_text() -> None:
    text = torch.arange(18)
    inputs, targets = data.random_rows(text, 200, 16, 0)
    assert (inputs.min(), targets.max()) == (0, 17)


def test_at_first_every_byte_is_about_as_likely_as_any_other(model: GPT) -> None:
    inputs, targets = data.random_rows(data.load_text(held_out=True), 8, 32, 0)
    assert nats_per_byte(model(inputs), targets).item() == pytest.approx(5.55, abs=0.15)


def test_a_byte_is_guessed_from_those_before_it_only(model: GPT) -> None:
    text = torch.randint(256, (1, 16))
    changed = text.clone()
    changed[0, 10:] = 0
    assert torch.allclose(model(text)[:, :10], model(changed)[:, :10], atol=1e-5)
    assert not torch.allclose(model(text)[:, 10:], model(changed)[:, 10:], atol=1e-5)


def test_the_model_learns_a_text_by_heart(model: GPT) -> None:
    inputs, targets = data.random_rows(torch.tensor(list(b"abcdefgh" * 20)), 8, 32, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = nats_per_byte(model(inputs), targets)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3
    assert write(model, b"abcd", 8, seed=0) == b"abcdefghabcd"


def test_what_is_written_follows_from_the_seed(model: GPT) -> None:
    assert write(model, b"x", 50, seed=1) == write(model, b"x", 50, seed=1)
    assert write(model, b"x", 50, seed=1) != write(model, b"x", 50, seed=2)


def test_the_fingerprint_tells_one_changed_bit(model: GPT) -> None:
    before = fingerprint(model)
    assert fingerprint(model) == before
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nextafter(model.head.weight[0, 0], torch.tensor(9.0))
    assert fingerprint(model) != before


def test_the_learning_rate_rises_and_then_falls_to_a_tenth() -> None:
    settings = Settings(steps=100, warmup=10)
    paces = [train.pace(step, settings) for step in range(101)]
    assert paces[0] == pytest.approx(0.1)
    assert max(paces) == pytest.approx(1.0, abs=0.03)
    assert paces[100] == pytest.approx(0.1)
    assert sorted(paces[10:], reverse=True) == paces[10:]


# What one sees


def test_a_sample_cannot_play_with_the_terminal() -> None:
    assert (
        printable(b"def f():\n\treturn \x1b[2J\xff")
        == "def f():\n\N{MIDDLE DOT}return \N{MIDDLE DOT}[2J\ufffd"
    )
