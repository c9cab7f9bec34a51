"""What memory a model will take at a precision, predicted from its card before anything is downloaded.

    memory = parameters x (share x bytes of a rounded weight + (1 - share) x bytes of the others) + working + libraries

The share of all weights that rounding reaches depends on the architecture (embeddings and convolutions stay as they
are). It is that of the nearest model of the same family that was counted. A prediction, not a measurement: it holds for
the default batch size, and a card's own count of parameters is taken as it stands.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from medvlm_harness.errors import UserError

__all__ = ["BYTES", "PRECISIONS", "REFERENCES", "Prediction", "Reference", "parse_size", "predict"]

Precision = Literal["fp32", "bf16", "int8", "nf4"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
MIB = 2**20

# Of one weight. Rounded: bytes of the rounded matrices of CLIP ViT-B/32 (122,683,392 weights) with their scales, as
# `footprint` counts them, bitsandbytes 0.50.2: a float32 per row (int8), or per 64 weights (nf4).
BYTES: Mapping[Precision, float] = {"fp32": 4.0, "bf16": 2.0, "int8": 1.005, "nf4": 0.563}
# What stays as it is, has the default precision of the family's backends; published generators are stored in 16 bits.
REST: Mapping[str, Precision] = {"generative": "bf16"}

# A batch of 64 images or texts through CLIP ViT-B/32 in float32: growth of the resident memory, the larger of both.
ENCODER_WORKING = 383 * MIB
# What keys, values and logits of a batch may take (`CPU_BYTES` of generative.py); on a GPU a batch takes what is left.
GENERATOR_WORKING = 2048 * MIB
# Resident memory of a process that imported torch, open_clip and transformers, before any model. Of a CUDA context,
# which takes its place on a card, nothing was measured: it is taken to be no larger.
LIBRARIES = 811 * MIB


@dataclass(frozen=True, slots=True)
class Reference:
    """An architecture whose weights were counted, layer by layer (docs/quantization.md)."""

    name: str
    family: str
    parameters: int
    share: float  # of all weights, those that `quantization=int8` and `nf4` round


REFERENCES = (
    Reference("CLIP ViT-B/32", "dual encoder", 151_277_313, 0.811),
    Reference("Swin-T and BERT base (MedCLIP)", "dual encoder", 136_616_059, 0.833),
    Reference("ResNet-50 and BERT base (MedCLIP)", "dual encoder", 133_260_097, 0.653),
    Reference("ViT-B/16 and BERT base (BiomedCLIP)", "dual encoder", 195_902_721, 0.874),
    Reference("ResNet-50 and CLIP's text tower (MedFILIP)", "dual encoder", 88_640_833, 0.448),
    Reference("EVA-02 B/14 and CLIP's text tower (MedFILIP)", "dual encoder", 149_907_713, 0.821),
    Reference("ViT-B/16", "image encoder", 86_389_248, 0.990),
    Reference("BERT base", "text encoder", 108_340_804, 0.789),
    Reference("DistilBERT", "text encoder", 66_985_530, 0.643),
    Reference("MiniLM-L6", "text encoder", 22_713_216, 0.474),
    Reference("T5 small", "generative", 60_506_624, 0.520),
    Reference("Gemma 3 270M", "generative", 268_098_176, 0.374),
    Reference("LLaVA-Med 1.5 (CLIP ViT-L/14, Mistral 7B)", "generative", 7_566_219_264, 0.965),
)


class Prediction(NamedTuple):
    """Bytes of each term."""

    weights: int
    working: int
    libraries: int
    reference: Reference | None  # whose share of rounded weights was taken; None where nothing is rounded

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.working + self.libraries


def predict(family: str, parameters: int, precision: Precision) -> Prediction:
    """The memory of a model of a family.

    Args:
        family: as its card says.
        parameters: how many weights it has.
        precision: what it is run in.

    Raises:
        UserError: if no model of the family was counted.
    """
    reference = None if precision in ("fp32", "bf16") else _nearest(family, parameters)
    if reference is None:
        of_a_weight = BYTES[precision]
    else:
        rest = BYTES[REST.get(family, "fp32")]
        of_a_weight = reference.share * BYTES[precision] + (1 - reference.share) * rest
    working = GENERATOR_WORKING if family == "generative" else ENCODER_WORKING
    return Prediction(round(parameters * of_a_weight), working, LIBRARIES, reference)


def parse_size(text: str) -> int:
    """Bytes of `16GB`, `24GiB`, `8000MB`: powers of 1000, with an i of 1024.

    Raises:
        UserError: if it is no such size.

    >>> parse_size("16GB"), parse_size("1.5 GiB")
    (16000000000, 1610612736)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])(i?)B?\s*", text, re.IGNORECASE)
    if match is None:
        raise UserError(f"Expected a size such as 16GB, 24GiB or 8000MB, but got {text!r}.")
    number, prefix, binary = match.groups()
    unit = math.prod([1024 if binary else 1000] * (1 + "KMGT".index(prefix.upper())))
    size = round(float(number) * unit)
    if size <= 0:
        raise UserError(f"Expected a size above 0, but got {text!r}.")
    return size


def _nearest(family: str, parameters: int) -> Reference:
    known = [reference for reference in REFERENCES if reference.family == family]
    if not known:
        raise UserError(f"No model of the family {family!r} was counted: what rounding leaves of it is not known.")
    return min(known, key=lambda reference: abs(math.log(reference.parameters / parameters)))
