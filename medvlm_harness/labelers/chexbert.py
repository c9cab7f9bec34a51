"""`chexbert`: CheXbert's published weights as a labeler, from local files (Smit et al. 2020, arXiv 2004.09167).

A BERT with a head per observation on its first token, as in stanfordmlgroup/CheXbert (src/models/bert_labeler.py,
src/constants.py, src/bert_tokenizer.py). Nothing is downloaded: the weights are licensed for research, and commercial
use needs a licence of Stanford's.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medvlm_harness.data.chexpert import CHEXPERT_14
from medvlm_harness.data.records import file_sha256
from medvlm_harness.errors import UserError
from medvlm_harness.labelers.text import Sections, checked_sections, stretches_to_read

if TYPE_CHECKING:
    import torch

__all__ = ["CHEXBERT_ORDER", "CheXbertLabeler"]

# Not CheXpert's order: Lung Opacity and Lung Lesion change places, and No Finding ends it.
CHEXBERT_ORDER = (
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
    "No Finding",
)
_VALUES: tuple[int | None, ...] = (None, 1, 0, -1)  # of a head's classes; No Finding has the first two alone
_MAX_TOKENS = 512
_HEAD_WIDTH = 64  # of attention, in every BERT that was published
_PUBLISHED = (
    "chexbert.pth of StanfordAIMI/RRG_scorers on the Hugging Face Hub, or the checkpoint named in "
    "github.com/stanfordmlgroup/CheXbert"
)
_FALLBACK = "The labeler `rules` needs no file."
# What torch.load(weights_only=True) raises on a file that is damaged, foreign or holds code.
_LOAD_ERRORS = (pickle.UnpicklingError, RuntimeError, OSError, ValueError, EOFError, TypeError, LookupError)


class CheXbertLabeler:
    """CheXbert, one report at a time, so that no report's labels depend on another.

    Args:
        weights: the published checkpoint; without it, the file that MEDVLM_CHEXBERT names.
        vocab: `vocab.txt` of bert-base-uncased, or a folder that holds it; without it, the file that
            MEDVLM_CHEXBERT_VOCAB names, or `vocab.txt` beside the weights.
        sections: which sections of a report with heads are read. CheXbert was trained on impressions.

    Raises:
        UserError: naming the file that is missing or does not fit, where it is published, and what does without it.
    """

    name = "chexbert"

    def __init__(self, weights: str = "", vocab: str = "", sections: str = "both") -> None:
        self.sections: Sections = checked_sections(sections)
        checkpoint = _weights_file(weights)
        vocabulary = _vocabulary_file(vocab, checkpoint)
        tokens = _read_vocabulary(vocabulary)
        state = _read_state(checkpoint)
        self._encoder, self._heads = _build(state, checkpoint, len(tokens), vocabulary)
        self._tokenizer = _tokenizer(tokens, vocabulary)
        self.version = f"{file_sha256(checkpoint)[:12]}-{file_sha256(vocabulary)[:8]}"

    def label(self, text: str) -> dict[str, int | None]:
        """The fourteen observations; see `Labeler.label`."""
        read = " ".join(text[stretch.start : stretch.end] for stretch in stretches_to_read(text, self.sections))
        if not read.strip():
            return dict.fromkeys(CHEXPERT_14)
        classes = [int(logits.argmax()) for logits in self.logits(" ".join(read.split()))]
        labels = dict(zip(CHEXBERT_ORDER, (_VALUES[k] for k in classes), strict=True))
        return {name: labels[name] for name in CHEXPERT_14}

    def logits(self, text: str) -> list[torch.Tensor]:
        """The heads' outputs in CheXbert's order: 13 of (4,): blank, positive, negative, uncertain; one of (2,)."""
        import torch

        ids = self._tokenizer(text, truncation=True, max_length=_MAX_TOKENS, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            first = self._encoder(input_ids=ids).last_hidden_state[0, 0]
            return [head(first) for head in self._heads]


def _weights_file(given: str) -> Path:
    named = given or os.environ.get("MEDVLM_CHEXBERT", "")
    path = Path(named).expanduser()
    if not named:
        raise UserError(
            "The labeler chexbert needs its checkpoint: weights=FILE, or the variable MEDVLM_CHEXBERT. It is published "
            f"as {_PUBLISHED}. {_FALLBACK}"
        )
    if not path.is_file():
        raise UserError(
            f"Expected CheXbert's checkpoint, but {path} is no file. It is published as {_PUBLISHED}. {_FALLBACK}"
        )
    return path


def _vocabulary_file(given: str, checkpoint: Path) -> Path:
    named = given or os.environ.get("MEDVLM_CHEXBERT_VOCAB", "") or str(checkpoint.parent)
    path = Path(named).expanduser()
    path = path / "vocab.txt" if path.is_dir() else path
    if not path.is_file():
        raise UserError(
            f"CheXbert needs BERT's vocabulary, but {path} is no file: give vocab=FILE, the vocab.txt of "
            f"google-bert/bert-base-uncased on the Hugging Face Hub. {_FALLBACK}"
        )
    return path


def _read_vocabulary(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"Expected a vocabulary in UTF-8, but byte {error.start} of {path} is none.") from error
    tokens = {token: number for number, token in enumerate(lines)}
    missing = [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if token not in tokens]
    if missing or len(tokens) != len(lines):
        what = f"{', '.join(missing)} is missing" if missing else "a token is there twice"
        raise UserError(f"Expected BERT's vocabulary (a token a line) in {path}, but {what}.")
    return tokens


def _tokenizer(tokens: dict[str, int], path: Path) -> Any:
    from transformers import BertTokenizer

    tokenizer = BertTokenizer(vocab=tokens, do_lower_case=True)
    # A release that calls the argument otherwise would drop it without a word, and every word would be unknown.
    if len(tokenizer) != len(tokens):
        raise UserError(f"This release of transformers builds no tokenizer from {path}: {len(tokenizer)} tokens of it.")
    return tokenizer


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    """The weights by name, without the prefix of DataParallel.

    The file holds `model_state_dict` beside what training left there; it is read without running code in it.
    """
    import torch

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except _LOAD_ERRORS as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is no checkpoint that loads safely (weights only): {first} {_FALLBACK}") from error
    state = loaded.get("model_state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise UserError(f"Expected CheXbert's checkpoint (model_state_dict), but {path} holds something else.")
    state = {name.removeprefix("module."): value.float() if value.is_floating_point() else value
             for name, value in state.items()}  # fmt: skip
    state.pop("bert.embeddings.position_ids", None)  # a constant that older releases of transformers saved
    return state


def _build(state: dict[str, torch.Tensor], path: Path, tokens: int, vocabulary: Path) -> tuple[Any, Any]:
    """The encoder and the heads with these weights, their sizes read from them."""
    import torch
    from transformers import BertConfig, BertModel

    def shape(name: str) -> torch.Size:
        if name not in state:
            raise UserError(f"{path} is no CheXbert checkpoint: it has no {name}. {_FALLBACK}")
        return state[name].shape

    rows, width = shape("bert.embeddings.word_embeddings.weight")
    layers = sum(name.endswith(".attention.self.query.weight") for name in state)
    if rows != tokens:
        raise UserError(f"Expected a vocabulary of {rows} tokens for {path}, but {vocabulary} has {tokens}.")
    config = BertConfig(
        vocab_size=rows,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // _HEAD_WIDTH),
        intermediate_size=shape("bert.encoder.layer.0.intermediate.dense.weight")[0],
        max_position_embeddings=shape("bert.embeddings.position_embeddings.weight")[0],
        type_vocab_size=shape("bert.embeddings.token_type_embeddings.weight")[0],
    )
    encoder = BertModel(config, add_pooling_layer="bert.pooler.dense.weight" in state)
    classes = [len(_VALUES)] * (len(CHEXBERT_ORDER) - 1) + [2]
    heads = torch.nn.ModuleList(torch.nn.Linear(width, n) for n in classes)
    model = torch.nn.ModuleDict({"bert": encoder, "linear_heads": heads})
    try:
        info = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # a shape differs
        line = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{path} does not fit CheXbert: {line} {_FALLBACK}") from error
    if info.missing_keys or info.unexpected_keys:
        sample = (*info.unexpected_keys, *info.missing_keys)[0]
        raise UserError(
            f"{path} does not fit CheXbert: {len(info.missing_keys)} weights missing, "
            f"{len(info.unexpected_keys)} unexpected ({sample}, ...). {_FALLBACK}"
        )
    model.eval()
    return encoder, heads
