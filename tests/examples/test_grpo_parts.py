"""The parts of the second example that can be called without a job. The job itself: tests/integration/test_grpo.py."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from examples.grpo import learning, problems
from examples.grpo.learning import Sample
from examples.grpo.model import Adder, answer_logs, chosen, sample
from examples.grpo.problems import ANSWER, END, LENGTH, QUESTION
from examples.grpo.settings import Settings

SETTINGS = Settings(layers=2, heads=2, width=16)
PAIRS = Settings(group=2, entropy=0.0)


@pytest.fixture
def model() -> Adder:
    torch.manual_seed(0)
    return Adder(SETTINGS)


def chance(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The task


def test_no_problem_is_on_both_sides_and_the_sides_are_the_same_everywhere() -> None:
    training, held_out = problems.questions(held_out=False), problems.questions(held_out=True)
    assert len(set(training)) == len(training) == 7695
    assert len(set(held_out)) == len(held_out) == 405
    assert not set(training) & set(held_out)
    assert held_out == problems.questions(held_out=True)


@pytest.mark.parametrize("text", ["17+25=42\n", "10+10=20\n", "99+99=198\n"])
def test_texts_become_symbols_and_come_back(text: str) -> None:
    tokens = problems.encode([text], LENGTH)
    assert tokens.shape == (1, LENGTH)
    assert problems.decode(tokens) == [text]
    assert problems.solved(text[:QUESTION]) == text


def test_a_text_ends_at_its_first_line_end_or_where_there_is_no_more_room() -> None:
    tokens = problems.encode(["17+25=4\n", "17+25=4=+1"], LENGTH)
    assert problems.decode(tokens) == ["17+25=4\n", "17+25=4=+1"]


@pytest.mark.parametrize(
    ("answer", "worth"),
    [
        ("42\n", 1),
        ("42", 0),
        ("4\n", 0),
        ("24\n", 0),
        ("042\n", 0),
        ("421\n", 0),
        ("\n", 0),
        ("+=42", 0),
    ],
)
def test_only_the_right_answer_is_rewarded(answer: str, worth: int) -> None:
    assert problems.reward("17+25=" + answer) == worth


def test_what_stands_behind_the_line_end_is_masked() -> None:
    masks = problems.answered(["17+25=42\n", "99+99=198\n", "17+25=\n", "17+25=1234"])
    assert masks.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 1]]


# The model


def test_a_symbol_is_guessed_from_those_before_it_only(model: Adder) -> None:
    tokens = torch.randint(10, (3, LENGTH))
    changed = tokens.clone()
    changed[:, 7:] = END
    assert torch.allclose(model(tokens)[:, :7], model(changed)[:, :7], atol=1e-5)
    assert not torch.allclose(model(tokens)[:, 7:], model(changed)[:, 7:], atol=1e-3)


def test_samples_come_with_the_chances_that_the_trainer_finds_for_them(model: Adder) -> None:
    questions = problems.encode(problems.questions(held_out=True)[:8], QUESTION)
    tokens, logs = sample(model, questions, 16, chance())
    assert tokens.shape == (128, LENGTH)
    assert torch.equal(tokens[:, :QUESTION], questions.repeat_interleave(16, dim=0))
    counts = problems.answered(problems.decode(tokens))
    assert torch.allclose(
        chosen(answer_logs(model, tokens), tokens) * counts, logs * counts, atol=1e-4
    )


def test_behind_a_line_end_come_only_line_ends(model: Adder) -> None:
    tokens, _ = sample(model, problems.encode(["17+25="], QUESTION), 500, chance())
    ended = (tokens[:, QUESTION:] == END).int()
    assert ended.sum() > 50
    assert torch.equal(ended, ended.cummax(dim=1).values)


def test_symbols_are_drawn_as_often_as_the_model_says(model: Adder) -> None:
    question = problems.encode(["17+25="], QUESTION)
    tokens, _ = sample(model, question, 20_000, chance())
    seen = F.one_hot(tokens[:, QUESTION], len(problems.SYMBOLS)).float().mean(dim=0)
    assert torch.allclose(seen, model(question)[0, -1].exp(), atol=0.02)


def test_samples_follow_from_the_seed(model: Adder) -> None:
    question = problems.encode(["17+25="], QUESTION)
    first, again, other = (sample(model, question, 50, chance(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# Learning


def test_a_sample_counts_by_how_much_better_than_its_group_it_is() -> None:
    found = learning.advantages(
        torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    )
    assert torch.allclose(found.sum(dim=1), torch.zeros(4), atol=1e-5)
    assert found[0, 0] == pytest.approx(1.5, abs=1e-3)
    assert found[1].tolist() == pytest.approx([0.866, 0.866, -0.866, -0.866], abs=1e-3)
    assert found[2:].abs().max() == 0


def samples_of(model: Adder, answers: list[str], rewards: list[float]) -> list[Sample]:
    """As the rollout makes them: with the chances of these weights."""
    texts = ["17+25=" + answer for answer in answers]
    with torch.no_grad():
        tokens = problems.encode(texts, LENGTH)
        logs = chosen(answer_logs(model, tokens), tokens)
    return [Sample(*parts) for parts in zip(texts, logs.tolist(), rewards, strict=True)]


def test_a_step_makes_the_better_answer_likelier_and_the_worse_less_likely(model: Adder) -> None:
    samples = samples_of(model, ["42\n", "5\n"], [1.0, 0.0])
    learning.policy_loss(model, samples, PAIRS).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.01 * parameter.grad
    good, bad = samples_of(model, ["42\n", "5\n"], [1.0, 0.0])
    assert sum(good.logs[:3]) > sum(samples[0].logs[:3])
    assert sum(bad.logs[:2]) < sum(samples[1].logs[:2])


def test_groups_that_are_all_right_or_all_wrong_change_nothing(model: Adder) -> None:
    telling = samples_of(model, ["42\n", "5\n"], [1.0, 0.0])
    silent = samples_of(model, ["1\n", "2\n", "42\n", "42\n"], [0.0, 0.0, 1.0, 1.0])
    alone = learning.policy_loss(model, telling, PAIRS)
    assert learning.policy_loss(model, telling + silent, PAIRS) == alone
    learning.policy_loss(model, silent, PAIRS).backward()
    assert all(not parameter.grad.any() for parameter in model.parameters())


def test_what_has_become_much_likelier_already_is_not_pushed_further(model: Adder) -> None:
    before = samples_of(model, ["42\n", "5\n"], [1.0, 0.0])
    far = [before[0]._replace(logs=[log - 1.0 for log in before[0].logs]), before[1]]
    far[1] = far[1]._replace(logs=[log + 1.0 for log in far[1].logs])
    learning.policy_loss(model, far, PAIRS).backward()
    assert all(not parameter.grad.any() for parameter in model.parameters())


def test_entropy_is_worth_something_where_answers_do_not_differ(model: Adder) -> None:
    samples = samples_of(model, ["42\n", "42\n"], [1.0, 1.0])
    with_entropy = replace(PAIRS, entropy=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(learning.policy_loss(model, samples, with_entropy))
        losses[-1].backward()
        optimizer.step()
    most = 0.5 * math.log(len(problems.SYMBOLS))
    assert -most < losses[-1].item() < losses[0].item() < 0


def test_what_stands_behind_the_line_end_is_not_learnt_from(model: Adder) -> None:
    samples = samples_of(model, ["42\n", "5\n"], [1.0, 0.0])
    changed = [sample._replace(logs=[*sample.logs[:3], -50.0]) for sample in samples]
    loss = learning.policy_loss(model, samples, PAIRS)
    assert learning.policy_loss(model, changed, PAIRS) == loss


def test_right_answers_are_learnt_by_heart(model: Adder) -> None:
    texts = [problems.solved(question) for question in problems.questions(held_out=False)[:4]]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        optimizer.zero_grad()
        loss = learning.supervised_loss(model, texts)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    tokens, _ = sample(
        model, problems.encode([text[:QUESTION] for text in texts], QUESTION), 25, chance()
    )
    rewards = [problems.reward(text) for text in problems.decode(tokens)]
    assert sum(rewards) > 80


def test_every_answer_has_room() -> None:
    longest = max(len(problems.solved(question)) for question in problems.questions(held_out=False))
    assert longest == QUESTION + ANSWER
