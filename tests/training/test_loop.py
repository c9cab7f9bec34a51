from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from medvlm_harness.errors import UserError
from medvlm_harness.training.loop import Fitted, Trainable, batches, fit
from medvlm_harness.training.methods import Schedule


class Line(Trainable):
    """y = 2 x, with noise in training and an error of its own in validation."""

    def __init__(self, *, validation: Sequence[float] | None = None) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.module = torch.nn.Linear(1, 1, bias=False)
        self.lengths = list(range(10))
        self.validation = list(validation or [])
        self.seen: list[torch.Tensor] = []  # weights at each evaluation

    def loss(self, items: Sequence[int]) -> torch.Tensor:
        x = torch.tensor(items, dtype=torch.float32)[:, None] / 10
        return (self.module(x) - 2 * x + 0.01 * torch.randn_like(x)).square().mean()

    def validation_loss(self) -> float:
        self.seen.append(self.module.weight.detach().clone())
        if self.validation:
            return self.validation.pop(0)
        return float((self.module.weight - 2).square())


def run(folder: Path, trainable: Trainable, **schedule: float) -> Fitted:
    folder.mkdir(exist_ok=True)
    return fit(trainable, Schedule(batch_size=4, **schedule), folder, learning_rate=0.1)  # type: ignore[arg-type]


def test_each_epoch_holds_each_item_once_in_an_order_of_its_own() -> None:
    lengths = [n % 7 for n in range(103)]
    first = batches(lengths, 8, seed=1, epoch=0)
    assert sorted(item for batch in first for item in batch) == list(range(103))
    assert len(first) == math.ceil(103 / 8)
    assert first == batches(lengths, 8, seed=1, epoch=0)
    assert first != batches(lengths, 8, seed=1, epoch=1) != batches(lengths, 8, seed=2, epoch=1)
    spread = [max(lengths[k] for k in batch) - min(lengths[k] for k in batch) for batch in first]
    assert sum(spread) / len(spread) < 2  # of 6 where nothing is sorted


def test_epochs_are_steps_and_the_first_limit_ends_it(tmp_path: Path) -> None:
    by_epochs = run(tmp_path / "epochs", Line(), epochs=2, steps=100)
    assert (by_epochs.steps, by_epochs.epochs, by_epochs.stopped_by) == (6, 2.0, "epochs")
    by_steps = run(tmp_path / "steps", Line(), epochs=2, steps=4)
    assert (by_steps.steps, by_steps.stopped_by) == (4, "steps")
    by_time = run(tmp_path / "time", Line(), seconds=0.2, patience=10**6)
    assert by_time.stopped_by == "seconds"
    assert by_time.seconds >= 0.2


def test_the_best_weights_are_kept_and_patience_ends_it(tmp_path: Path) -> None:
    line = Line(validation=[5.0, 3.0, 4.0, 4.0, 1.0])
    fitted = run(tmp_path / "run", line, steps=50, eval_steps=1, patience=2)
    assert (fitted.steps, fitted.best_step, fitted.validation_loss, fitted.stopped_by) == (3, 1, 3.0, "patience")
    assert fitted.first_validation_loss == 5.0
    assert torch.equal(line.module.weight.detach(), line.seen[1])
    assert not torch.equal(line.seen[1], line.seen[3])


def test_random_numbers_of_others_are_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(tmp_path / "run", Line(), steps=5)
    assert torch.equal(torch.rand(3), expected)


class Deaf(Line):
    """A line that learns nothing from its n-th loss on, for either of the reasons there are."""

    def __init__(self, deaf_from: int, *, zero: bool) -> None:
        super().__init__()
        self.deaf_from, self.zero, self.losses = deaf_from, zero, 0

    def loss(self, items: Sequence[int]) -> torch.Tensor:
        self.losses += 1
        if self.losses < self.deaf_from:
            return super().loss(items)
        return (0 * self.module.weight).sum() if self.zero else super().loss(items).detach()


@pytest.mark.parametrize(("zero", "message"), [(False, "No gradient reaches 1 of 1"), (True, "gradients are 0")])
def test_a_fit_in_which_nothing_learns_is_ended(tmp_path: Path, zero: bool, message: str) -> None:
    with pytest.raises(UserError, match=f"{message}.* at step 1"):
        run(tmp_path / "first", Deaf(1, zero=zero), steps=5)
    with pytest.raises(UserError, match=f"{message}.* at step 3"):  # after the evaluation at step 2
        run(tmp_path / "later", Deaf(3, zero=zero), steps=5, eval_steps=2)


def test_full_batches_leave_the_rest_of_an_epoch_out() -> None:
    full = batches([1] * 10, 4, seed=0, epoch=0, full=True)
    assert [len(batch) for batch in full] == [4, 4]
    left_out = [
        set(range(10)) - {k for batch in batches([1] * 10, 4, seed=0, epoch=e, full=True) for k in batch}
        for e in (0, 1)
    ]
    assert left_out[0] != left_out[1]  # others in the next epoch


def test_a_loss_that_is_no_number_ends_it(tmp_path: Path) -> None:
    line = Line()
    line.module.weight.data.fill_(1e30)
    with pytest.raises(UserError, match="try a lower learning rate"):
        run(tmp_path / "run", line, steps=5)
    with pytest.raises(UserError, match="validation loss is nan at step 0"):
        run(tmp_path / "nan", Line(validation=[math.nan]), steps=5)


def test_the_log_is_a_line_for_each_step_and_evaluation(tmp_path: Path) -> None:
    run(tmp_path / "run", Line(), steps=4, eval_steps=2)
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [(e["step"], "validation_loss" in e) for e in entries] == [
        *((0, True), (1, False), (2, False), (2, True), (3, False), (4, False), (4, True)),
    ]
    rates = [entry["learning_rate"] for entry in entries if "learning_rate" in entry]
    assert all(0 < rate <= 0.1 for rate in rates)
    assert rates[-1] == min(rates[1:])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "one or more of --seconds, --epochs and --steps"),
        ({"steps": 0}, "steps to be more than 0"),
        ({"steps": 1, "patience": 0}, "patience to be more than 0"),
        ({"steps": 1, "seed": -1}, "seed to be 0 or more"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(values: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Schedule(**values)  # type: ignore[arg-type]
