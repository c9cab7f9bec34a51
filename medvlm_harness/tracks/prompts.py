"""What tracks share that put a study's report into words for a language model: the prompt, and its chat template."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from string import Formatter
from typing import Any, ClassVar

from medvlm_harness.data.records import Study
from medvlm_harness.errors import UserError, near_matches
from medvlm_harness.tracks.base import COMMON_KEYS, MedicalTask
from medvlm_harness.tracks.perturbed import Perturbable, UnfitPerturbation

__all__ = ["PromptedTask"]

SECTIONS = ("findings", "impression", "indication", "comparison")


class PromptedTask(MedicalTask):
    """A task whose requests begin with its prompt, filled from the study's report; any backend of lm-eval answers.

    YAML: `prompt`, a text with {findings}, {impression}, {indication}, {comparison}. --apply_chat_template and
    --system_instruction are honoured; there are no few-shot examples.
    """

    KEYS: ClassVar[frozenset[str]] = COMMON_KEYS | {"prompt"}
    FIELDS: ClassVar[tuple[str, ...]] = SECTIONS
    PERTURBS: ClassVar[frozenset[Perturbable]] = frozenset({"report", "prompt"})

    def read_declaration(self) -> None:
        """Check the prompt's fields."""
        self.prompt = self._in_other_words(self._checked_prompt(self.declared.get("prompt")))
        self.as_chat: Callable[[str], str] = str
        self.templated = False

    def _checked_prompt(self, prompt: Any) -> str:
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"{self.task_name}: expected `prompt:` to be a text, but got {prompt!r}.")
        try:
            fields = [name for _, name, _, _ in Formatter().parse(prompt) if name is not None]
        except ValueError as error:
            raise UserError(
                f"{self.task_name}: the prompt's braces do not match ({error}); double a literal one."
            ) from error
        for name in fields:
            if name not in self.FIELDS:
                raise UserError(f"{self.task_name}: the prompt asks for {{{name}}}.{near_matches(name, self.FIELDS)}")
        self.prompt_fields = frozenset(fields)
        return prompt

    def _in_other_words(self, prompt: str) -> str:
        """The prompt with its own words perturbed, if they are to be; its fields stay."""
        case = self.perturbation.prompt
        if case is None:
            return prompt
        perturbed = case(prompt)
        if not perturbed.changed:
            unfit = UnfitPerturbation(
                f"{self.task_name}: {case.perturbation.name} at severity {case.severity} has no other words for the "
                "prompt, whose sentences are not among the instructions of perturbations/text/terms.yaml."
            )
            self.perturbation = self._without_perturbation(unfit)
        return perturbed.text

    def input_sections(self) -> tuple[str, ...]:
        """Those that the prompt asks for."""
        return tuple(name for name in SECTIONS if name in self.prompt_fields)

    def prompt_for(self, study: Study) -> str:
        """The prompt of a study."""
        asked = self.as_asked(study)
        return self.prompt.format(**{name: self.prompt_field(asked, name) for name in self.prompt_fields})

    def prompt_field(self, study: Study, name: str) -> str:
        """What stands in the prompt for one of `FIELDS`."""
        return str(getattr(study, name)).strip()

    def doc_to_text(self, doc: Mapping[str, Any]) -> str:
        """The prompt."""
        return str(doc["prompt"])

    def build_all_requests(
        self,
        *,
        system_instruction: str | None = None,
        chat_template: Callable[..., str] | None = None,
        **options: Any,
    ) -> None:
        """As for all tasks, and with the model's chat template where one is asked for."""
        system = [{"role": "system", "content": system_instruction}] if system_instruction else []

        def as_chat(prompt: str) -> str:
            if chat_template is None:
                return f"{system_instruction}\n\n{prompt}" if system_instruction else prompt
            return chat_template([*system, {"role": "user", "content": prompt}], add_generation_prompt=True)

        self.as_chat, self.templated = as_chat, chat_template is not None
        super().build_all_requests(**options)

    def details(self) -> dict[str, Any]:
        """Adds how the model was asked."""
        return {**super().details(), "prompt": self.prompt}
