"""What tracks share that show a study's images beside the prompt: which ones, where they stand, and who opens them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, SupportsIndex, get_args

from PIL.Image import Image as Picture

from medvlm_harness.data.images import open_reference
from medvlm_harness.data.records import Image, Study, Views
from medvlm_harness.errors import UserError, near_matches
from medvlm_harness.requests import ImageRef
from medvlm_harness.tracks.perturbed import Perturbable
from medvlm_harness.tracks.prompts import PromptedTask

__all__ = ["ImagePrompts", "OpenedImages"]

MARK = "<image>"  # lm-eval's own; each backend puts its tokens there
CHOICES: Mapping[str, Views] = {views: views for views in get_args(Views)}
NOTHING_STATED = "not stated"


class OpenedImages(list[ImageRef]):
    """References that are pictures to whoever takes them out, decoded then and kept by nobody.

    Backends of lm-eval take PIL images, batch by batch; a list of opened ones would hold those of the whole run.
    """

    def __iter__(self) -> Iterator[Picture]:  # type: ignore[override]  # that is what it is for
        return map(_opened, super().__iter__())

    def __getitem__(self, place: SupportsIndex | slice) -> Any:
        found = super().__getitem__(place)
        return OpenedImages(found) if isinstance(found, list) else _opened(found)

    def __reduce__(self) -> tuple[Any, ...]:
        return OpenedImages._of, (tuple(super().__iter__()),)

    @classmethod
    def _of(cls, refs: Iterable[ImageRef]) -> OpenedImages:
        return cls(refs)


def _opened(ref: ImageRef) -> Picture:
    return open_reference(ref).convert("RGB")


class ImagePrompts(PromptedTask):
    """A prompt with images of the study: the first frontal one by file name, or all of them, frontal ones first.

    YAML: `images` (frontal by default, or all; --metadata images=... goes before it), and `prompt`, a text with
    {images}, where `<image>` stands once for each, and optionally {indication} and {comparison}.
    """

    MULTIMODAL = True  # lm-eval then wants a model that takes images
    KEYS: ClassVar[frozenset[str]] = PromptedTask.KEYS | {"images"}
    RUNTIME_KEYS: ClassVar[frozenset[str]] = PromptedTask.RUNTIME_KEYS | {"images"}
    FIELDS: ClassVar[tuple[str, ...]] = ("images", "indication", "comparison")
    PERTURBS: ClassVar[frozenset[Perturbable]] = PromptedTask.PERTURBS | {"image"}

    def read_declaration(self) -> None:
        """Check the choice of images, and that the prompt has a place for them."""
        super().read_declaration()
        self.opens_images = False
        asked = str(self.runtime.get("images", self.declared.get("images", "frontal")))
        if asked not in CHOICES:
            raise UserError(
                f"{self.task_name}: expected images to be frontal or all, but got {asked!r}."
                f"{near_matches(asked, CHOICES)}"
            )
        self.images: Views = CHOICES[asked]
        if "images" not in self.prompt_fields:
            raise UserError(f"{self.task_name}: expected the prompt to hold {{images}}, the place of the images.")

    def prepare_for(self, lm: Any) -> None:
        """Backends of ours take references, all others take pictures."""
        self.opens_images = not hasattr(lm, "CAPABILITIES")

    def chosen_images(self, study: Study) -> list[Image]:
        """What is shown of a study; may be empty."""
        return study.shown(self.images)

    def prompt_field(self, study: Study, name: str) -> str:
        """The marks of the images, or a section; an empty section says so, as nothing would read as a cut prompt."""
        if name == "images":
            return "\n".join([MARK] * len(self.chosen_images(study)))
        return super().prompt_field(study, name) or NOTHING_STATED

    def visual(self, refs: Sequence[ImageRef]) -> dict[str, list[ImageRef]]:
        """The argument behind the generation options."""
        return {"visual": OpenedImages(refs) if self.opens_images else list(refs)}

    def refs_of(self, study: Study) -> list[ImageRef]:
        """References to what is shown of a study, perturbed if it is to be."""
        change = self.image_perturbation(study.split)
        return [ImageRef(image.sha256, self.data.path(image), change) for image in self.chosen_images(study)]

    def details(self) -> dict[str, Any]:
        """Adds which images are shown."""
        return {**super().details(), "images": self.images}
