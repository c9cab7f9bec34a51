"""Linear probe of image encoders: what a linear classifier reads off their frozen vectors of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from medvlm_harness.data.records import Image, Study
from medvlm_harness.requests import Capability
from medvlm_harness.tracks.probe import Probe
from medvlm_harness.tracks.zero_shot import ZeroShot

__all__ = ["ImageProbe"]


class ImageProbe(Probe):
    """`Probe` of one image per study: the first frontal one by file name. Studies without are left out and counted.

    YAML: as for `ZeroShot`, of which phrases and questions go unused; multilabel alone. `views` (frontal by default)
    names the views that are taken, the ones named first before the others.
    """

    NEEDS: ClassVar[frozenset[Capability]] = frozenset({"embed:image"})
    KEYS: ClassVar[frozenset[str]] = ZeroShot.KEYS - {"target"}

    def read_declaration(self) -> None:
        """As for every probe; without `views`, frontal images."""
        super().read_declaration()
        self.views = self.views or ("frontal",)

    def inputs(self, study: Study) -> Sequence[Image | None]:
        """The one image, where there is any."""
        fitting = [image for image in study.images if image.view in self.views]
        return sorted(fitting, key=lambda image: (self.views.index(image.view), image.file))[:1]

    @property
    def input_name(self) -> str:
        """An image of one of the views."""
        return f"a {' or '.join(self.views)} image"

    def counts(self) -> dict[str, int]:
        """What is scored, what was left out, and what was learnt from."""
        without = sum(not self.inputs(study) for study in self.studies)
        return {
            "studies": len(self.documents),
            f"studies_without_{'_or_'.join(self.views)}_image": without,
            "training_studies": len(self._train_studies),
        }
