"""What tracks share in which a model writes: lm-eval's filters over the answers, and rows of texts."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lm_eval.api.instance import Instance
from lm_eval.filters import build_filter_ensemble

from medvlm_harness.data.records import Study
from medvlm_harness.errors import UserError
from medvlm_harness.requests import Capability, Exemplar, Generation, PromptWithFloors
from medvlm_harness.tracks.prompts import PromptedTask
from medvlm_harness.tracks.rows import NO_FILTER, Row

__all__ = ["FilteredText", "GenerationTask", "TextRow"]


class FilteredText(Generation):
    """A generated text as a filter pipeline left it; `finished` is that of the text before."""

    __slots__ = ("pipeline",)
    pipeline: str

    @classmethod
    def of(cls, text: str, pipeline: str) -> FilteredText:
        """The text, which some filters hand on as a plain string."""
        filtered = cls(str(text), getattr(text, "finished", None))
        filtered.pipeline = pipeline
        return filtered

    def __reduce__(self) -> tuple[Any, ...]:
        return FilteredText.of, (Generation(str(self), self.finished), self.pipeline)


@dataclass(frozen=True, slots=True)
class TextRow(Row):
    """What a model wrote about one study."""

    text: str
    finished: bool | None  # False where the longest allowed length ended it; None where the backend does not say
    filter: str = NO_FILTER

    __str__ = Row.__str__

    @property
    def text_id(self) -> str:
        """Tells texts apart without holding them: 16 hex digits of the SHA-256."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


class GenerationTask(PromptedTask):
    """`generate_until` requests: the task's prompt.

    YAML: as for `PromptedTask`, `dataset`, and optionally `generation_kwargs` and `filter_list`, both as in lm-eval's
    own tasks. Metrics of the first filter pipeline are the task's; those of further ones stand beside them.
    """

    OUTPUT_TYPE: ClassVar[str] = "generate_until"
    NEEDS: ClassVar[frozenset[Capability]] = frozenset({"generate_until"})
    KEYS: ClassVar[frozenset[str]] = PromptedTask.KEYS | {"generation_kwargs", "filter_list"}
    FLOORS: ClassVar[frozenset[str]] = frozenset()  # the kinds that `floors_of` and `exemplars` have something for

    def read_declaration(self) -> None:
        """Check the prompt's fields, the generation options and the filters."""
        super().read_declaration()
        options = self.declared.get("generation_kwargs") or {}
        if not isinstance(options, Mapping):
            raise UserError(f"{self.task_name}: expected generation_kwargs to be a mapping, but got {options!r}.")
        if "filter_list" in self.declared:
            self._filters = [self._pipeline(one) for one in self._filter_list(self.declared["filter_list"])]

    def _filter_list(self, declared: Any) -> Sequence[Mapping[str, Any]]:
        if not isinstance(declared, list) or not declared or not all(isinstance(one, Mapping) for one in declared):
            raise UserError(
                f"{self.task_name}: expected filter_list to be a list of mappings with name and filter, "
                f"but got {declared!r}."
            )
        names = [one.get("name") for one in declared]
        if len(set(map(str, names))) < len(names):
            raise UserError(f"{self.task_name}: expected each name in filter_list once, but got {names}.")
        return declared

    def _pipeline(self, declared: Mapping[str, Any]) -> Any:
        steps = declared.get("filter")
        known = isinstance(steps, list) and all(isinstance(step, Mapping) and "function" in step for step in steps)
        if set(declared) != {"name", "filter"} or not known or not steps:
            raise UserError(
                f"{self.task_name}: expected each entry of filter_list to have a name and a filter, a list of "
                f"{{function: ...}}, but got {dict(declared)!r}."
            )
        components = [[step["function"], {k: v for k, v in step.items() if k != "function"}] for step in steps]
        try:
            return build_filter_ensemble(str(declared["name"]), components)
        except KeyError as error:
            raise UserError(
                f"{self.task_name}: filter_list names a filter that lm-eval does not know: {error}."
            ) from error

    def generation_options(self) -> dict[str, Any]:
        """The YAML's; `read_declaration` refuses what is no mapping."""
        options = self.declared.get("generation_kwargs")
        return dict(options) if isinstance(options, Mapping) else {}

    @property
    def generation_kwargs(self) -> dict[str, Any]:
        """The YAML's, with what --gen_kwargs says; a new copy each time, as stock backends take keys out."""
        return dict(self._config.generation_kwargs or {})

    # --- for subclasses

    @abstractmethod
    def make_documents(self) -> Iterator[dict[str, Any]]:
        """Documents with `source`, what the text is written from, and `target`, the reference (see `document`)."""

    def floors_of(self, doc: Mapping[str, Any]) -> Mapping[str, str]:
        """Kind of floor -> what it writes for a document; for `medvlm-baseline`, and extractive encoders (`copy`)."""
        return {}

    @property
    def exemplars(self) -> Sequence[Exemplar]:
        """Train images with what is written of them, for the floor `neighbour`; the same object for every request."""
        return ()

    # --- documents and requests

    def document(self, study: Study, *, source: str, target: str, **more: Any) -> dict[str, Any]:
        """A document of a study, with the prompt filled in."""
        ids = self.document_ids(study)
        return {**ids, "prompt": self.prompt_for(study), "source": source, "target": target, **more}

    def construct_requests(self, doc: Mapping[str, Any], ctx: str, **kwargs: Any) -> Instance | list[Instance]:
        """The prompt, with what floors would answer beside it."""
        arguments = (self.prompt_of(doc), self.generation_kwargs)
        return Instance("generate_until", doc, arguments, 0, metadata=kwargs["metadata"])

    def prompt_of(self, doc: Mapping[str, Any]) -> Any:
        """The prompt as sent, with what floors need beside it.

        Lm-eval's chat clients take their messages in an object that is no text; it is handed on as it is.
        """
        prompt: Any = self.as_chat(doc["prompt"])
        return PromptWithFloors(prompt, self.floors_of(doc), self.exemplars) if isinstance(prompt, str) else prompt

    def apply_filters(self) -> None:
        """Each pipeline's answers, which say of which pipeline they are."""
        super().apply_filters()
        for instance in self._instances or ():
            filtered = instance.filtered_resps
            instance.filtered_resps = {name: FilteredText.of(text, name) for name, text in filtered.items()}

    def make_row(self, doc: Mapping[str, Any], results: Sequence[str]) -> TextRow:
        """What was written about one study."""
        text = results[0]
        ids = doc["study_id"], doc["patient_id"], doc["split"]
        # Models begin with the blank after "Impression:".
        return TextRow(
            *ids,
            doc.get("file", ""),
            text.strip(),
            getattr(text, "finished", None),
            getattr(text, "pipeline", NO_FILTER),
        )

    def details(self) -> dict[str, Any]:
        """Adds how the model was asked."""
        return {
            **super().details(),
            "generation_kwargs": self.generation_kwargs,
            "filters": [pipeline.name for pipeline in self._filters],
        }

    def dump_config(self) -> dict[str, Any]:
        """Adds the generation options as run."""
        return {**super().dump_config(), "generation_kwargs": self.generation_kwargs}
