"""A method's run from prepared data to a folder with a card, all of it or nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.cards import CARD_FILE
from medvlm_harness.training.data import TrainingData
from medvlm_harness.training.loop import STATE_FILE
from medvlm_harness.training.methods import Method, Trained

__all__ = ["card_of", "finetune"]

SETTINGS_FILE, LOCK_FILE = "settings.json", ".lock"


def finetune(method: Method, data: TrainingData, output: Path) -> Trained:
    """Train into `output`, which appears once all of it is written.

    Until then everything lies in `output` + ".partial"; the same call goes on from there if it was killed.

    Raises:
        UserError: if `output` exists, or the partial folder is another process's or of other settings.
    """
    if output.exists():
        raise UserError(f"{output} exists already: name another --output, or remove it.")
    work = output.with_name(output.name + ".partial")
    work.mkdir(parents=True, exist_ok=True)
    with _alone(work):
        _same_settings(work, {"method": method.NAME, **asdict(method), "data": data.sha256})
        trained = method.train(data, work)
        text = yaml.safe_dump(card_of(method, data, trained, output.name), sort_keys=False, allow_unicode=True)
        (work / CARD_FILE).write_text(text, encoding="utf-8")
        for name in (STATE_FILE, SETTINGS_FILE):
            (work / name).unlink(missing_ok=True)
    (work / LOCK_FILE).unlink(missing_ok=True)
    work.replace(output)
    return trained


def card_of(method: Method, data: TrainingData, trained: Trained, name: str) -> dict[str, Any]:
    """What `medvlm_card.yaml` says: a later run on the splits that were learnt from is refused by it."""
    known = [entry for base in trained.base_models.values() for entry in base.trained_on or ()]
    return {
        "name": name,
        "summary": f"{method.NAME} trained on {data.name}",
        "licence": f"derived from data under: {data.licence}; base models: "
        + (
            "; ".join(f"{base.name}: {base.licence or 'not stated'}" for base in trained.base_models.values()) or "none"
        ),
        "trained_on": _distinct([data.trained_on(), *known]),
        "training": {
            "method": method.NAME,
            "options": _options(method),
            "data": {
                "name": data.name,
                "sha256": data.sha256,
                "split_scheme": data.split_scheme,
                "learnt_from": "train",
                "selected_by": "validation",
                "licence": data.licence,
            },
            "base_models": {
                part: {
                    "name": base.name,
                    "weights_sha256": dict(base.weights),
                    "licence": base.licence,
                    "trained_on": None if base.trained_on is None else list(base.trained_on),
                    "precision": base.precision,
                    "quantization": None if base.quantization is None else dict(base.quantization),
                }
                for part, base in trained.base_models.items()
            },
            "validation": {name: estimate.to_dict() for name, estimate in trained.validation.items()},
            **{key: value for key, value in asdict(trained).items() if key not in {"base_models", "validation"}},
        },
    }


def _options(method: Method) -> dict[str, Any]:
    """What was asked for; no path, as results carry the card."""
    options = {**asdict(method), **asdict(method.schedule)}
    return {key: value for key, value in options.items() if key not in {"schedule", "model_args", *method.PATHS}}


def _distinct(entries: list[Any]) -> list[Any]:
    return [entry for place, entry in enumerate(entries) if entry not in entries[:place]]


@contextmanager
def _alone(work: Path) -> Iterator[None]:
    lock = FileLock(work / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"Another process is training into {work}: wait for it, or name another --output.") from error
    try:
        yield
    finally:
        lock.release()


def _same_settings(work: Path, settings: dict[str, Any]) -> None:
    """A state is gone on from by the very settings that it came from."""
    path = work / SETTINGS_FILE
    text = json.dumps(settings, sort_keys=True, default=str)
    if not (path.is_file() and (work / STATE_FILE).is_file()):  # nothing was learnt yet
        path.write_text(text, encoding="utf-8")
        return
    begun, asked = json.loads(path.read_text(encoding="utf-8")), json.loads(text)
    differing = sorted(key for key in begun.keys() | asked.keys() if begun.get(key) != asked.get(key))
    if differing:
        raise UserError(
            f"{work} was begun with another {' and '.join(differing)}: go on as it was begun, remove it, or name "
            "another --output."
        )
