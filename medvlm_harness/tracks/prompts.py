"""What tracks share that put a study's report into words for a language model: the prompt, and its chat template."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from string import Formatter
from typing import Any, ClassVar

from medvlm_harness.data.records import Study
from medvlm_harness.errors import UserError, near_matches
from medvlm_harness.tracks.base import COMMON_KEYS, MedicalTask

__all__ = ["PromptedTask"]


class PromptedTask(MedicalTask):
    """A task whose requests begin with its prompt, filled from the study's report; any backend of lm-eval answers.

    YAML: `prompt`, a text with {findings}, {impression}, {indication}, {comparison}. --apply_chat_template and
    --system_instruction are honoured; there are no few-shot examples.
    """

    KEYS: ClassVar[frozenset[str]] = COMMON_KEYS | {"prompt"}
    FIELDS: ClassVar[tuple[str, ...]] = ("findings", "impression", "indication", "comparison")

    def read_declaration(self) -> None:
        """Check the prompt's fields."""
        self.prompt = self._checked_prompt(self.declared.get("prompt"))
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

    def prompt_for(self, study: Study) -> str:
        """The prompt of a study."""
        return self.prompt.format(**{name: self.prompt_field(study, name) for name in self.FIELDS})

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
