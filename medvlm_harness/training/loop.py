"""The loop that every method trains by: seeded, within a budget, the best state kept, and killed at no loss.

What a step draws at random depends on the seed and the step's number alone, so a run that goes on from its last saved
state ends with the weights of one that was never killed. Under `seconds` the learning rate follows the clock, and only
then two runs differ.
"""

from __future__ import annotations

import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from medvlm_harness.errors import UserError
from medvlm_harness.files import replacing
from medvlm_harness.training.methods import Schedule

__all__ = ["LOG_FILE", "STATE_FILE", "Fitted", "Trainable", "batches", "fit"]

LOG_FILE, STATE_FILE = "log.jsonl", "state.pt"
WARMUP = 0.03  # share of the budget in which the learning rate rises
SAVE_SECONDS = 30.0
WINDOW = 16  # batches among whose items those of like length are put together
CLIP_NORM = 1.0


class Trainable(ABC):
    """What is trained: the module whose parameters learn, and its loss."""

    module: torch.nn.Module
    lengths: Sequence[int]  # one per training item; a batch holds items of like length
    full_batches: bool = False  # leave the last items of an epoch out where they are no whole batch

    def state(self) -> Mapping[str, torch.Tensor]:
        """What is kept, and gone on from: by default all of the module."""
        return self.module.state_dict()

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put back what `state` gave."""
        self.module.load_state_dict(state)

    def train_mode(self) -> None:
        """Before a step; `validation_loss` is in evaluation mode."""
        self.module.train()

    @abstractmethod
    def loss(self, items: Sequence[int]) -> torch.Tensor:
        """Mean loss of these training items."""

    @abstractmethod
    def validation_loss(self) -> float:
        """Mean loss over the validation split; called without gradients, in evaluation mode."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """How a fit went; the module holds the best state."""

    steps: int
    epochs: float
    seconds: float
    best_step: int
    validation_loss: float
    first_validation_loss: float
    stopped_by: str


@dataclass(slots=True)
class _Progress:
    """Where a fit is; plain numbers, saved with the state."""

    step: int = 0
    seconds: float = 0.0
    best_step: int = 0
    best_loss: float = math.inf
    first_loss: float = math.nan
    worse: int = 0  # evaluations since the best one
    log_bytes: int = 0


def fit(
    trainable: Trainable, schedule: Schedule, folder: Path, *, learning_rate: float, weight_decay: float = 0.01
) -> Fitted:
    """Train by AdamW with a cosine learning rate until the budget ends or validation gets no better.

    Args:
        trainable: on its device; its module ends with the best weights, by validation loss.
        schedule: budget, batches and seed.
        folder: state and log are kept there; a state that is there already is gone on from.
        learning_rate: after the warm-up.
        weight_decay: AdamW's.

    Raises:
        UserError: if the loss is no number.
    """
    return _Loop(trainable, schedule, folder, learning_rate, weight_decay).run()


def batches(lengths: Sequence[int], size: int, *, seed: int, epoch: int, full: bool = False) -> list[list[int]]:
    """One epoch's batches: each item once, in an order of this seed and epoch, like lengths together.

    With `full` all batches have `size` items, and the last items of the order are left out.
    """
    generator = torch.Generator().manual_seed(_mixed(seed, epoch))
    order: list[int] = torch.randperm(len(lengths), generator=generator).tolist()
    order = order[: len(order) // size * size] if full else order
    grouped: list[list[int]] = []
    for start in range(0, len(order), size * WINDOW):
        window = sorted(order[start : start + size * WINDOW], key=lambda item: lengths[item])
        grouped += [window[k : k + size] for k in range(0, len(window), size)]
    return [grouped[k] for k in torch.randperm(len(grouped), generator=generator).tolist()]


class _Loop:
    def __init__(
        self, trainable: Trainable, schedule: Schedule, folder: Path, learning_rate: float, weight_decay: float
    ) -> None:
        self.trainable, self.schedule, self.folder, self.learning_rate = trainable, schedule, folder, learning_rate
        self.module = trainable.module
        self.learning = {name: one for name, one in self.module.named_parameters() if one.requires_grad}
        self.optimizer = torch.optim.AdamW(self.learning.values(), lr=learning_rate, weight_decay=weight_decay)
        items, size = len(trainable.lengths), schedule.batch_size
        self.per_epoch = items // size if trainable.full_batches else math.ceil(items / size)
        if not self.per_epoch:
            raise UserError(f"A batch takes {size} items, but there are {items}: use a smaller --batch-size.")
        limits = {"steps": schedule.steps, "epochs": schedule.epochs and math.ceil(schedule.epochs * self.per_epoch)}
        self.limits = {name: limit for name, limit in limits.items() if limit is not None}
        self.eval_steps = schedule.eval_steps or self.per_epoch
        self.at = _Progress()
        self.best: dict[str, torch.Tensor] = {}
        self.unsure = True  # whether gradients reach what is to learn

    def run(self) -> Fitted:
        self.resume()
        if self.at.step == 0 and not self.best:
            self.evaluate()
        self.saved = time.monotonic()
        total = min(self.limits.values(), default=None)
        with tqdm(total=total, initial=self.at.step, desc="Training", unit="step", mininterval=1) as bar:
            while (stopped_by := self.ended()) is None:
                loss = self.step()
                bar.update()
                if self.at.step % self.eval_steps == 0:
                    self.evaluate()
                elif time.monotonic() - self.saved > SAVE_SECONDS:
                    self.save()
                bar.set_postfix(loss=f"{loss:.3f}", validation=f"{self.at.best_loss:.3f}", refresh=False)
        if self.at.step % self.eval_steps and stopped_by != "patience":
            self.evaluate()
        self.trainable.load_state(self.best)
        at = self.at
        return Fitted(
            steps=at.step,
            epochs=round(at.step / self.per_epoch, 3),
            seconds=round(at.seconds, 1),
            best_step=at.best_step,
            validation_loss=at.best_loss,
            first_validation_loss=at.first_loss,
            stopped_by=stopped_by,
        )

    def ended(self) -> str | None:
        """Which limit is reached."""
        reached = [name for name, limit in self.limits.items() if self.at.step >= limit]
        if self.schedule.seconds is not None and self.at.seconds >= self.schedule.seconds:
            reached.append("seconds")
        if self.at.worse >= self.schedule.patience:
            reached.append("patience")
        return next(iter(reached), None)

    def share(self) -> float:
        """Of the budget, how much is used; in [0, 1]."""
        shares = [self.at.step / limit for limit in self.limits.values()]
        if self.schedule.seconds is not None:
            shares.append(self.at.seconds / self.schedule.seconds)
        return min(1.0, max(shares))

    def step(self) -> float:
        """One batch."""
        start = time.monotonic()
        at = self.at
        epoch, place = divmod(at.step, self.per_epoch)
        if place == 0 or not hasattr(self, "order"):
            self.order = batches(
                self.trainable.lengths,
                self.schedule.batch_size,
                seed=self.schedule.seed,
                epoch=epoch,
                full=self.trainable.full_batches,
            )
        share = self.share()
        # The first step learns too: a rate of 0 would waste it.
        rate = self.learning_rate * min(1.0, (share + 1e-3) / WARMUP) * (1 + math.cos(math.pi * share)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with _drawing(self.schedule.seed, at.step):
            self.trainable.train_mode()
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.trainable.loss(self.order[place])
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        if self.unsure:
            self.check_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.learning.values(), CLIP_NORM)
        value = float(loss.detach())
        if not (math.isfinite(value) and bool(torch.isfinite(norm))):
            raise UserError(f"The loss is {value} at step {at.step + 1}: try a lower learning rate.")
        self.optimizer.step()
        at.step += 1
        at.seconds += time.monotonic() - start
        self.log(step=at.step, epoch=round(at.step / self.per_epoch, 3), loss=value, learning_rate=rate)
        return value

    def check_gradients(self) -> None:
        """Refuse to go on where nothing is learnt.

        After an evaluation too: on some CPUs bitsandbytes packs 4-bit layers anew in the first one, for a kernel that
        passes no gradient on, and says nothing.
        """
        found = {name: one.grad for name, one in self.learning.items()}
        if without := [name for name, gradient in found.items() if gradient is None]:
            raise UserError(
                f"No gradient reaches {len(without)} of {len(found)} parameters at step {self.at.step + 1} (such as "
                f"{without[0]}): they would not learn."
            )
        if not any(bool(gradient.any()) for gradient in found.values() if gradient is not None):
            raise UserError(f"All gradients are 0 at step {self.at.step + 1}: nothing would be learnt.")
        self.unsure = False

    def evaluate(self) -> None:
        """On the validation split; the best state so far is kept, and all of it saved."""
        start = time.monotonic()
        self.module.eval()
        with torch.inference_mode():
            loss = self.trainable.validation_loss()
        if not math.isfinite(loss):
            raise UserError(f"The validation loss is {loss} at step {self.at.step}: try a lower learning rate.")
        at = self.at
        if loss < at.best_loss:
            at.best_loss, at.best_step, at.worse = loss, at.step, 0
            self.best = {name: tensor.detach().cpu().clone() for name, tensor in self.trainable.state().items()}
        else:
            at.worse += 1
        if at.step == 0:
            at.first_loss = loss
        self.unsure = True
        at.seconds += time.monotonic() - start
        self.log(step=at.step, epoch=round(at.step / self.per_epoch, 3), validation_loss=loss)
        self.save()

    # --- what a killed run goes on from

    def log(self, **entry: Any) -> None:
        line = json.dumps({**entry, "seconds": round(self.at.seconds, 1)}) + "\n"
        with (self.folder / LOG_FILE).open("ab") as file:
            file.write(line.encode())
            self.at.log_bytes = file.tell()

    def save(self) -> None:
        progress = {name: getattr(self.at, name) for name in _Progress.__slots__}
        state = {
            "module": dict(self.trainable.state()),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "at": progress,
        }
        with replacing(self.folder / STATE_FILE) as partial:
            torch.save(state, partial)
        self.saved = time.monotonic()

    def resume(self) -> None:
        path = self.folder / STATE_FILE
        if not path.is_file():
            (self.folder / LOG_FILE).unlink(missing_ok=True)
            return
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.trainable.load_state(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best, self.at = state["best"], _Progress(**state["at"])
        os.truncate(self.folder / LOG_FILE, self.at.log_bytes)  # what came after the state is done again


@contextmanager
def _drawing(seed: int, step: int) -> Iterator[None]:
    """Random numbers of one step alone, whatever was drawn before; torch's own are put back."""
    with torch.random.fork_rng():
        torch.manual_seed(_mixed(seed, step))
        yield


def _mixed(seed: int, number: int) -> int:
    return (seed * 1_000_003 + number) % 2**63
