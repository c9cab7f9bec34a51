"""Benchmark small medical vision-language models with lm-eval.

Importing this package imports nothing else: a line in a .pth file does so at every start of Python.
"""

__all__ = [
    "DualEncoder",
    "Efficiency",
    "Entities",
    "EntityProbe",
    "ImageProbe",
    "ImageUseLabels",
    "ImageUseReports",
    "ImpressionChoice",
    "LabelSet",
    "MedicalLM",
    "ModelCard",
    "RadGraphEntities",
    "ReportGeneration",
    "ReportGenerationRobustness",
    "Retrieval",
    "RetrievalRobustness",
    "Summarization",
    "SummarizationRobustness",
    "TextProbe",
    "TextRetrieval",
    "TextZeroShot",
    "TextZeroShotRobustness",
    "ZeroShot",
    "ZeroShotRobustness",
    "__version__",
]

_LAZY = {
    "DualEncoder": "medvlm_harness.model_backends.dual_encoder",
    "Efficiency": "medvlm_harness.tracks.efficiency",
    "Entities": "medvlm_harness.tracks.entities",
    "EntityProbe": "medvlm_harness.tracks.entity_probe",
    "ImageProbe": "medvlm_harness.tracks.image_probe",
    "ImageUseLabels": "medvlm_harness.tracks.image_use",
    "ImageUseReports": "medvlm_harness.tracks.image_use",
    "ImpressionChoice": "medvlm_harness.tracks.choice",
    "LabelSet": "medvlm_harness.requests",
    "MedicalLM": "medvlm_harness.model_backends.base",
    "ModelCard": "medvlm_harness.model_backends.cards",
    "RadGraphEntities": "medvlm_harness.tracks.radgraph_entities",
    "ReportGeneration": "medvlm_harness.tracks.report_generation",
    "ReportGenerationRobustness": "medvlm_harness.tracks.writing_robustness",
    "Retrieval": "medvlm_harness.tracks.retrieval",
    "RetrievalRobustness": "medvlm_harness.tracks.retrieval_robustness",
    "Summarization": "medvlm_harness.tracks.summarization",
    "SummarizationRobustness": "medvlm_harness.tracks.writing_robustness",
    "TextProbe": "medvlm_harness.tracks.text_probe",
    "TextRetrieval": "medvlm_harness.tracks.text_retrieval",
    "TextZeroShot": "medvlm_harness.tracks.text_zero_shot",
    "TextZeroShotRobustness": "medvlm_harness.tracks.zero_shot_robustness",
    "ZeroShot": "medvlm_harness.tracks.zero_shot",
    "ZeroShotRobustness": "medvlm_harness.tracks.zero_shot_robustness",
}


def __getattr__(name):  # type: ignore[no-untyped-def]  # annotations would import typing at every start
    if name == "__version__":
        from importlib.metadata import version

        return version("medvlm-harness")
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
