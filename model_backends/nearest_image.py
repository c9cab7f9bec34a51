"""The text of the nearest image: what the floor `neighbour` of `medvlm-baseline` answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from numpy.typing import NDArray

from medvlm_harness.errors import UserError, near_matches
from medvlm_harness.model_backends.base import MedicalLM
from medvlm_harness.requests import Exemplar, ImageRef

__all__ = ["image_encoder", "nearest_texts"]


def image_encoder(name: str, options: str | Mapping[str, Any]) -> MedicalLM:
    """A model of this package that embeds images.

    Args:
        name: as for --model.
        options: as for --model_args, with ; between them where it is one text.

    Raises:
        UserError: if there is no such model, it embeds no images, or an option is wrong.
    """
    from lm_eval.api.registry import get_model

    from medvlm_harness.plugin import model_targets

    if name not in model_targets():
        raise UserError(f"Unknown encoder {name!r}.{near_matches(name, model_targets())}")
    backend = get_model(name)
    if isinstance(options, str):
        options = dict(_option(one) for one in options.split(";") if one)
    if "embed:image" not in backend.CAPABILITIES or name == "medvlm-baseline":
        raise UserError(f"Expected an encoder that embeds images, but {name} does not.")
    encoder: MedicalLM = backend.create_from_arg_obj(options)
    return encoder


def nearest_texts(encoder: MedicalLM, requests: Sequence[Instance]) -> list[str]:
    """For each request the text of the exemplar whose image is nearest, by cosine, to one of the request's images.

    Of equally near ones the first is taken.

    Raises:
        UserError: if a task hands over no exemplars, or no image.
    """
    by_task: dict[int, list[int]] = {}
    for place, request in enumerate(requests):
        by_task.setdefault(id(getattr(request.arguments[0], "exemplars", None)), []).append(place)
    texts = [""] * len(requests)
    for places in by_task.values():
        own = [requests[place] for place in places]
        exemplars: Sequence[Exemplar] = getattr(own[0].arguments[0], "exemplars", ())
        if not exemplars or len(own[0].arguments) < 3:
            raise UserError(f"Task {own[0].task_name} hands over no images with texts for kind=neighbour.")
        known = _vectors(encoder, [exemplar.image for exemplar in exemplars])
        asked = [request.arguments[2]["visual"] for request in own]
        vectors = _vectors(encoder, [image for images in asked for image in images])
        starts = np.cumsum([0, *(len(images) for images in asked)])
        for place, start, end in zip(places, starts, starts[1:], strict=False):
            nearest = int((vectors[start:end] @ known.T).max(axis=0).argmax())
            texts[place] = exemplars[nearest].text
    return texts


def _vectors(encoder: MedicalLM, images: Sequence[ImageRef]) -> NDArray[np.float32]:
    """Unit vectors, (n, d); each distinct image is encoded once, or comes from the store."""
    requests = [Instance("embed", {}, (image,), k) for k, image in enumerate(images)]
    return np.stack([embedding.vector for embedding in encoder.embed(requests)])


def _option(text: str) -> tuple[str, str]:
    key, _, value = text.partition("=")
    return key.strip(), value.strip()
