"""The results file as it goes out: an allow-list of what is said of a run, without small cells.

Of lm-eval's own file almost nothing is taken: its configuration of tasks and its table of scalars say again what the
block `medvlm` says, but with the user's paths and without regard to small counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from medvlm_harness.results.publishing.privacy import without_small_cells
from medvlm_harness.results.redaction import redact
from medvlm_harness.results.run_files import RunFiles

__all__ = ["left_out", "public_results", "public_run"]

TOP = (
    *("date", "n-samples", "versions", "n-shot", "higher_is_better", "lm_eval_version", "transformers_version"),
    *("git_hash", "total_evaluation_time_seconds"),
)
CONFIG = (
    *("model", "model_args", "model_num_parameters", "batch_size", "device", "limit", "gen_kwargs", "bootstrap_iters"),
    *("random_seed", "numpy_seed", "torch_seed", "fewshot_seed"),
)
# Not among them: `text` of a baseline and `system` of a chat model, which may be anything.
MODEL = (
    *(
        "class",
        "kind",
        "card",
        "weights_sha256",
        "weight_files_sha256",
        "precision",
        "precision_asked",
        "weights_bytes",
    ),
    *("quantization", "adapter", "batch_size", "image_batch_size", "generation_batch_size", "device", "store", "seed"),
    *("preprocessing", "prompts", "prompts_sha256", "prompts_lacking", "probability_scale", "logit_scale", "pooling"),
    *("max_length", "chat_template", "classify_by", "answer_scoring", "image_tokens", "world_size"),
    *("images_encoded", "images_recalled", "texts_encoded", "texts_recalled", "generated", "generations_recalled"),
    *("generations_unfinished", "scored", "scores_recalled", "prompts_cut", "images_classified"),
    "classifications_recalled",
)
CARD = (
    *("name", "family", "summary", "source", "licence", "parameters", "counted", "billions", "trained_on"),
    *("preprocessing", "probability_scale", "prompts", "traps", "reference"),
)
# Not among them: `constant_floor`, which is an answer made of the training data.
TASK = (
    *("dataset", "split", "version", "perturbation", "documents", "scored", "label_set", "label_source", "uncertain"),
    *("compared_label_sources", "mesh_findings_version", "label_frequency", "counts", "fitted_on", "prompt", "filters"),
    *("generation_kwargs", "abnormal_by", "read_by", "compared", "truth", "distractors", "answered_by", "right_places"),
    *("answers_cut", "truncated_share", "contamination", "remote", "metrics", "label_f1", "calibration", "selective"),
    *("operating_points", "subgroups", "thresholds", "robustness", "conditions", "groups", "others", "measures"),
    *("suite", "substitution_seed", "comparable", "probe", "workload", "protocol", "hardware", "batch_sizes", "single"),
    *("best", "search_ended", "images", "modal_share_of_references", "template_version", "reports_learnt_from"),
    *("reports_read_by_two", "words_cut_by_the_tokenizer"),
)
DATASET = ("name", "source", "sha256", "revision", "licence", "sharing", "policies")


def public_run(run: RunFiles) -> RunFiles:
    """The run as everybody may see it; cards and tables are made of this one alone, without per-study scores."""
    return RunFiles(run.path, public_results(run), None)


def public_results(run: RunFiles) -> dict[str, Any]:
    """The results file that goes out: plain JSON."""
    results = redact(run.results)
    block = results["medvlm"]
    model = _only(block["model"], MODEL)
    if model.get("card"):
        model["card"] = _only(model["card"], CARD) | {"training": None}  # it may name anything
    tasks = {name: _task(details) for name, details in block["tasks"].items()}
    return {
        # lm-eval's table has its place in the format; its numbers are the block's.
        "results": {name: _row(name, details["metrics"]) for name, details in tasks.items()},
        **_only(results, TOP),
        "config": _only(results.get("config") or {}, CONFIG),
        "medvlm": {
            "schema_version": block["schema_version"],
            "versions": block.get("versions", {}),
            "model": model,
            "efficiency": block.get("efficiency"),
            "tasks": tasks,
            "unsupported": block.get("unsupported", {}),
        },
    }


def left_out(run: RunFiles) -> list[str]:
    """What a task says that does not go out, as task.key."""
    return sorted(f"{name}.{key}" for name, details in run.tasks.items() for key in details if key not in TASK)


def _task(details: Mapping[str, Any]) -> dict[str, Any]:
    shown = _only(details, TASK) | {"dataset": _only(details["dataset"], DATASET)}
    return without_small_cells(shown)


def _row(task: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    values = {name if "," in name else f"{name},none": estimate["value"] for name, estimate in metrics.items()}
    return {"alias": task, **values}


def _only(mapping: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: mapping[key] for key in keys if key in mapping}
