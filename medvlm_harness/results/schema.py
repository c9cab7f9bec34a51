"""The format of results files, typed: what `results.schema.json` is generated from and every reader checks with.

What is ours and closed refuses unknown keys. Open are, by design:

- `Results` and `Config`, which are lm-eval's: what is read here is typed, the rest is whatever its version writes;
- `Task`: a track adds details of its own (`tracks/*.py`, `details()`), each plain JSON;
- `Model`: a backend adds what it says of itself (`describe()`).

Pydantic is imported with this module, which is imported where a file is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

__all__ = [
    "READABLE",
    "Asked",
    "Block",
    "Dataset",
    "Efficiency",
    "EstimateFields",
    "Model",
    "Results",
    "Task",
    "json_schema",
    "shape_errors",
]

READABLE = (1, 2)  # versions of the block
SCHEMA_ID = "https://medvlm-harness/schemas/results-2.json"  # a name, not an address
# What no version left out; of the rest, an earlier one may not have written all. None stands for any name.
ESSENTIAL = {
    ("results",),
    *(("medvlm", key) for key in ("schema_version", "model", "tasks")),
    *(("medvlm", "tasks", None, key) for key in ("dataset", "metrics")),
    *(("medvlm", "tasks", None, "metrics", None, key) for key in ("value", "ci95", "reason")),
}

_MAPPING = re.compile(r"valid dictionary( or instance of \w+)?")  # in pydantic's words

Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Json = dict[str, Any]


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, protected_namespaces=())


class EstimateFields(_Closed):
    """What `Estimate.to_dict` gives; null where a number is undefined, with the reason."""

    value: Finite | None
    stderr: Finite | None
    ci95: Annotated[list[Finite], Field(min_length=2, max_length=2)] | None
    n: Count
    positives: Finite | None
    floor: Finite | None
    ceiling: Finite | None
    method: str
    reason: str | None
    extra: Json


class Card(_Closed):
    """What a model is; `model_backends.cards.ModelCard`."""

    name: str
    family: str
    summary: str
    source: Json | None
    licence: str | None
    parameters: Count | None
    counted: str
    billions: Finite | None
    trained_on: list[Any] | None
    preprocessing: str
    probability_scale: str | None
    prompts: Json | None
    traps: list[str]
    reference: str
    training: Json | None


class Model(_Open):
    """What the model says of itself, and what its backend adds; `card` is null for a model that is none of ours."""

    card: Card | None
    weights_sha256: Sha256 | None = None
    weight_files_sha256: dict[str, Sha256] | None = None
    weights_bytes: Count | None = None
    precision: str | None = None
    precision_asked: str | None = None
    device: str | None = None
    store: Literal["on", "off"] | None = None
    world_size: Count


class MsPerItem(_Closed):
    """Milliseconds per item: a batch's time by its size."""

    mean: Finite | None
    p50: Finite | None
    p90: Finite | None


class Stage(_Closed):
    """What one stage of a run did."""

    seconds: Finite
    batches: Count
    items: Count
    tokens: Count | None
    items_per_second: Finite | None
    tokens_per_second: Finite | None
    ms_per_item: MsPerItem


class Hardware(_Closed):
    """The machine of a run's first process."""

    cpu: str | None
    cores: Count | None
    threads: Count | None
    ram_mib: Count | None
    device: str
    gpu: str | None
    gpu_memory_mib: Count | None


class Efficiency(_Closed):
    """What a run cost."""

    seconds: Finite
    processes: Count
    stages: dict[str, Stage] | None
    reason: str | None
    peak_ram_mib: Finite | None
    ram_mib: Finite | None
    vram_allocated_mib: Finite | None
    vram_reserved_mib: Finite | None
    vram_process_mib: Finite | None
    vram_reason: str | None
    hardware: Hardware | None


class Dataset(_Closed):
    """The data of a task."""

    name: str
    source: str | None
    sha256: Sha256
    revision: str | None
    licence: str | None
    sharing: Literal["aggregate", "hashed", "full"]
    policies: Json


class Contamination(_Closed):
    """What is known of a model's training on the task's data."""

    trained_on: list[Any] | None
    splits_seen: list[str] | None
    note: str | None


class Task(_Open):
    """What every track says of a task, and what some of them do; others of their own are allowed."""

    dataset: Dataset
    split: str
    version: int | Finite | str | None
    perturbation: Json | None
    documents: Count
    scored: Count
    contamination: Contamination
    remote: str | None
    metrics: dict[str, EstimateFields]
    label_set: str | None = None
    label_source: str | None = None
    compared_label_sources: list[str] | None = None
    uncertain: str | None = None
    counts: dict[str, Count] | None = None
    prompt: str | None = None
    generation_kwargs: Json | None = None
    filters: list[str] | None = None


class Asked(_Closed):
    """What of a command line lm-eval itself does not write down; without secrets and paths."""

    tasks: list[str]  # in the order in which they ran; lm-eval sorts them
    metadata: Json  # of --metadata, what the tasks read
    samples: dict[str, list[int]] | None
    apply_chat_template: bool | str
    include_path: list[str]


class Block(_Closed):
    """The block `medvlm`."""

    schema_version: Literal[1, 2]
    versions: dict[str, str | None]
    asked: Asked | None = None  # from version 2 on
    model: Model
    efficiency: Efficiency
    tasks: dict[str, Task]
    unsupported: dict[str, str]


class Config(_Open):
    """What lm-eval writes of a run's options."""

    model: str | None = None
    model_args: Json | str | None = None
    batch_size: int | str | None = None
    device: str | None = None
    limit: Finite | None = None
    gen_kwargs: Json | str | None = None
    random_seed: int | None = None
    numpy_seed: int | None = None
    torch_seed: int | None = None
    fewshot_seed: int | None = None


class Results(_Open):
    """A results file of lm-eval 0.4.3 or later; `medvlm` is null or missing where this package had no part in it."""

    results: dict[str, Json]
    configs: dict[str, Json] | None = None
    versions: Json | None = None
    higher_is_better: dict[str, Json] | None = None
    config: Config | None = None
    date: Finite | None = None
    lm_eval_version: str | None = None
    medvlm: Block | None = None


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a results file."""
    draft = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": draft, "$id": SCHEMA_ID, **Results.model_json_schema()}


def shape_errors(results: Any, *, complete: bool) -> Iterator[str]:
    """What has not the shape it should, one line each that names the place.

    Args:
        results: a results file, parsed.
        complete: whether all that the present version writes must be there, and hashes be hashes; else only what no
            version left out, which is what readers need.
    """
    try:
        Results.model_validate(results)
    except ValidationError as error:
        for one in error.errors(include_url=False, include_context=False):
            place = [part for part in one["loc"] if not _is_branch(part)]
            if one["type"] == "missing":
                kind = tuple(None if depth in (2, 4) else part for depth, part in enumerate(place))
                if complete or kind in ESSENTIAL:
                    yield f"{'.'.join(map(str, place))} is missing"
            elif complete or one["type"] != "string_pattern_mismatch":
                got = repr(one["input"])
                what = _MAPPING.sub("mapping", one["msg"].removeprefix("Input should be "))
                shown = got if len(got) <= 60 else f"{got[:60]}..."
                yield f"{'.'.join(map(str, place)) or 'the file'}: expected {what}, but got {shown}"


def _is_branch(part: int | str) -> bool:
    """Whether pydantic names one of several allowed types with it, not a place in the file."""
    return isinstance(part, str) and ("[" in part or part in ("int", "str", "float", "bool"))
