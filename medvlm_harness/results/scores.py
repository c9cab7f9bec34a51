"""scores.parquet: what the model answered, per study, image and label; ids and numbers, no pixels and no vectors."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from lm_eval.utils import handle_non_serializable, sanitize_model_name

from medvlm_harness.errors import UserError
from medvlm_harness.files import replacing
from medvlm_harness.results.manifest import record_files

__all__ = ["SCHEMA", "finite", "name_folder", "results_file", "write_beside_results", "write_scores"]

SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("study", pa.string()),
        ("patient", pa.string()),
        ("image", pa.string()),  # file, relative to the data set's image root
        ("split", pa.string()),
        ("label", pa.string()),  # the label, the direction of a search (i2t, t2i, ...), or the metric of one text
        ("target", pa.int8()),  # 1, 0; null where unlabelled or left out
        ("margin", pa.float64()),
        ("probability", pa.float64()),
        ("rank", pa.float64()),  # expected rank of the study's own counterpart, from 1
        ("tied", pa.int32()),  # items exactly as similar as the counterpart, itself included
        ("value", pa.float64()),  # of a metric of one text
        ("answer", pa.string()),  # places of the chosen options, or the start of a text's SHA-256: whether it changed
    ]
)


def write_scores(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write the file whole or not at all."""
    with replacing(path) as partial:
        pq.write_table(pa.Table.from_pylist(list(records), schema=SCHEMA), partial, compression="zstd")


def name_folder(tracker: Any, results: Mapping[str, Any]) -> None:
    """Name the output folder after the model where lm-eval would make a poor name of `pretrained=`.

    Without that option it draws random letters; of a local path it makes a folder that is hidden where the path is
    relative (`..__weights`), and tells where the user's files lie. A model that is none of ours has no card: its folder
    is named by the last component of the path.
    """
    config = tracker.general_config_tracker
    card = results["medvlm"]["model"].get("card")
    named = type(config)._get_model_name(results["config"]["model_args"])
    path = None if named is None else Path(named.removeprefix("local-dir:")).expanduser()
    if path is not None and not path.exists():
        return
    name = card["name"] if card is not None else path and path.resolve().name
    if name:
        config.model_name, config.model_name_sanitized = name, sanitize_model_name(name)


def finite(value: Any) -> Any:
    """A copy in which null stands for NaN and infinity, which lm-eval would write as words that are no JSON."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    return [finite(one) for one in value] if isinstance(value, list | tuple) else value


def results_file(tracker: Any) -> Path:
    """Where lm-eval writes its results: a file that is not there where it could not."""
    # The tracker sets its date when it writes; without one it failed before.
    output, date = Path(tracker.output_path), getattr(tracker, "date_id", None)
    if output.suffix == ".json":
        return output.with_name(f"{output.stem}_{date}.json")
    folder: Path = output / tracker.general_config_tracker.model_name_sanitized
    return folder / f"results_{date}.json"


def write_beside_results(tracker: Any, results: Mapping[str, Any], records: Sequence[dict[str, Any]]) -> Path:
    """Write `run_<date>/scores.parquet` beside lm-eval's `results_<date>.json`: a later run never overwrites it.

    Raises:
        UserError: if lm-eval could not write its results there, which it says only in its log. They are then kept in a
            temporary folder: a run may have taken days.
    """
    written = results_file(tracker)
    if not written.is_file():
        kept = Path(tempfile.mkdtemp(prefix="medvlm-results-"))
        (kept / "results.json").write_text(json.dumps(results, default=handle_non_serializable), encoding="utf-8")
        write_scores(kept / "scores.parquet", records)
        raise UserError(f"The results could not be written to {written}: is the folder writable? They are in {kept}.")
    path = written.parent / f"run_{tracker.date_id}" / "scores.parquet"
    if records:
        write_scores(path, records)
    record_files(written, path)
    return path
