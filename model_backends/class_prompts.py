"""Long lists of class prompts: the user's copy of a publication's, or our own wording of the same structure.

Of a publication we keep where its list lies, not the list.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import as_file, files
from itertools import product
from pathlib import Path
from typing import Any, Literal

import yaml

from medvlm_harness.data.records import file_sha256
from medvlm_harness.errors import UserError
from medvlm_harness.model_backends.cards import Prompts
from medvlm_harness.requests import Label

__all__ = ["ClassPrompts", "PromptChoice", "PromptList", "choose_prompts"]

PromptChoice = Literal["task", "published", "ours"]
OURS_FILE = "class_prompts.yaml"


@dataclass(frozen=True, slots=True)
class PromptList:
    """Where a publication keeps its class prompts, and which of our lists has the same structure."""

    file: str  # for people, with its licence
    assignment: str  # the dictionary's name in a Python file
    ours: str  # key in class_prompts.yaml
    names: Mapping[str, str] = field(default_factory=dict)  # label, lower case -> the list's word


@dataclass(frozen=True, slots=True)
class ClassPrompts:
    """Phrases that say that a class is there; nothing says that it is not."""

    phrases: Mapping[str, tuple[str, ...]]  # by class, lower case
    sha256: str  # of the file they come from
    names: Mapping[str, str]

    def of(self, label: Label) -> tuple[str, ...]:
        """The phrases of a label, matched by name whatever its case; empty if the list lacks it."""
        name = label.key.replace("_", " ")
        return self.phrases.get(self.names.get(name, name), ())


def choose_prompts(
    choice: PromptChoice, file: str | None, *, model: str, templates: Prompts | None, listed: PromptList | None
) -> ClassPrompts | None:
    """The list that `prompts=` and `prompts_file=` ask for; None where phrases or short templates do.

    Raises:
        UserError: for an unknown choice, one that the model does not have, or a file that is no such list.
    """
    if choice not in ("task", "published", "ours"):
        raise UserError(f"Expected prompts to be task, published or ours, but got {choice!r}.")
    if file is not None and (choice != "published" or listed is None):
        reason = "goes with prompts=published" if listed else f"is not for {model}, which was published without a list"
        raise UserError(f"prompts_file={file} {reason}: leave it out, or change it.")
    if choice == "ours":
        if listed is None:
            raise UserError(f"{model} has no list of class prompts that could be worded anew: use prompts=task.")
        return _ours(listed)
    if choice == "published" and file is not None and listed is not None:
        return _published(Path(file).expanduser(), listed)
    if choice == "published" and templates is None:
        if listed is None:
            raise UserError(f"{model} has no published prompts on its card: use prompts=task.")
        raise UserError(
            f"The published prompts of {model} are a list that we do not copy: name your copy of {listed.file} by "
            "prompts_file=FILE, or use prompts=ours for our own wording of its structure."
        )
    return None


def _published(path: Path, listed: PromptList) -> ClassPrompts:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Expected prompts_file to be your copy of {listed.file}, but {path}: {error}.") from error
    if path.suffix == ".json":
        try:
            found = json.loads(text)
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON: {error}.") from error
    else:
        found = _literal(path, text, listed.assignment)
    return ClassPrompts(_phrases(found, str(path)), file_sha256(path), listed.names)


def _literal(path: Path, source: str, assignment: str) -> Any:
    """The value of a top-level `name = {...}` of a Python file, which is parsed and never run."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{path}: expected JSON (.json) or Python with {assignment} = {{...}}: {error}.") from error
    values: dict[str, ast.expr] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            values |= {target.id: node.value for target in node.targets if isinstance(target, ast.Name)}
    if assignment not in values:
        there = ", ".join(values) or "none"
        raise UserError(f"{path}: expected an assignment to {assignment} at its top level; it has: {there}.")
    try:
        return ast.literal_eval(values[assignment])
    except (ValueError, TypeError, MemoryError, RecursionError) as error:
        raise UserError(f"{path}: {assignment} is no plain dictionary of texts; it is read, never run.") from error


@cache
def _our_lists() -> tuple[Mapping[str, Any], str]:
    with as_file(files("medvlm_harness.model_backends") / OURS_FILE) as path:
        return yaml.safe_load(path.read_text(encoding="utf-8")), file_sha256(path)


def _ours(listed: PromptList) -> ClassPrompts:
    lists, sha256 = _our_lists()
    return ClassPrompts(_phrases(lists[listed.ours], OURS_FILE), sha256, listed.names)


def _phrases(found: Any, where: str) -> dict[str, tuple[str, ...]]:
    """Phrases by lower-case class, from one of three forms.

    A description gives "{class}. {description}" (MedFILIP, train.py); groups of words give all their combinations in
    the order of the groups, joined by spaces, empty words included (MedCLIP, prompts.py); a list is the phrases.
    """
    if not isinstance(found, Mapping) or not found:
        raise UserError(f"{where}: expected classes with their prompts, but got {type(found).__name__} {found!r:.60}.")
    phrases: dict[str, tuple[str, ...]] = {}
    for name, value in found.items():
        if isinstance(value, str) and value.strip():
            phrases[str(name).lower()] = (f"{name}. {value}",)
        elif _texts(value):
            phrases[str(name).lower()] = tuple(value)
        elif isinstance(value, Mapping) and value and all(_texts(group) for group in value.values()):
            phrases[str(name).lower()] = tuple(" ".join(words) for words in product(*value.values()))
        else:
            raise UserError(
                f"{where}: expected {name!r} to have a description, a list of phrases, or groups of words to combine, "
                f"but got {value!r:.60}."
            )
    return phrases


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)
