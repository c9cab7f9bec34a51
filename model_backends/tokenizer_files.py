"""Tokenizers without their model: loaded from files, and asked where each token stands in a text."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from medvlm_harness.errors import UserError, first_line, near_matches
from medvlm_harness.metrics.tokenization import Encoded
from medvlm_harness.model_backends.checkpoints import find_folder

__all__ = ["OPEN_CLIP", "ReportTokenizer", "load_tokenizer", "report_tokenizer", "tokenizer_sha256"]

OPEN_CLIP = "open_clip:"
WHAT = "a folder with a tokenizer, a tokenizer.json, a .gguf file, or a name on the Hub"


def load_tokenizer(name: str) -> Any:
    """A tokenizer of transformers that the `tokenizers` library backs; no remote code runs.

    Args:
        name: a folder as transformers saves it, a tokenizer.json, a .gguf file, or a name on the Hub.

    Raises:
        UserError: if there is none, it cannot be read, or it is one in Python, whose tokens have no place in the text.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = Path(name).expanduser()
    if path.is_file() and path.suffix not in (".gguf", ".json"):
        raise UserError(f"Expected {WHAT}, but got the file {path.name}.")
    try:
        if path.is_file() and path.suffix == ".json":
            loaded: Any = PreTrainedTokenizerFast(tokenizer_file=str(path))
        else:
            folder = path.parent if path.is_file() else find_folder(name, WHAT)[0]
            gguf = {"gguf_file": path.name} if path.is_file() else {}
            loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **gguf)
    except UserError:
        raise
    except Exception as error:  # the parser of tokenizer.json raises no narrower one
        raise UserError(f"Cannot load a tokenizer from {name} with transformers: {first_line(error)}") from error
    if not getattr(loaded, "is_fast", False):
        raise UserError(
            f"Expected {name} to have a tokenizer of the `tokenizers` library, but {type(loaded).__name__} is one in "
            "Python: save it as tokenizer.json."
        )
    return loaded


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash of all that decides which tokens a text has, in the form that the `tokenizers` library writes."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


class ReportTokenizer(ABC):
    """A tokenizer, asked for the tokens of texts and where they stand."""

    vocabulary: int  # tokens, added ones included
    special: int  # tokens added to each text
    knows_bytes: bool  # a byte is a token: no text is unknown
    sha256: str

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """The tokens of texts without special ones, never cut."""

    @abstractmethod
    def pieces(self, text: str) -> list[str]:
        """The tokens as the vocabulary writes them."""


def report_tokenizer(name: str) -> ReportTokenizer:
    """A tokenizer by what `load_tokenizer` takes, or `open_clip:MODEL`.

    Raises:
        UserError: as there; for a model that open_clip does not know, or whose tokenizer is not its own BPE.
    """
    if name.startswith(OPEN_CLIP):
        return _OpenClipTokenizer(name.removeprefix(OPEN_CLIP))
    return _BackedTokenizer(load_tokenizer(name))


class _BackedTokenizer(ReportTokenizer):
    """One of the `tokenizers` library."""

    def __init__(self, loaded: Any) -> None:
        self.sha256 = tokenizer_sha256(loaded)
        self.backend = loaded.backend_tokenizer
        # Some tokenizer.json cut and pad by themselves.
        self.backend.no_truncation()
        self.backend.no_padding()
        written = json.loads(self.backend.to_str())
        self.vocabulary = len(loaded)
        self.special = int(self.backend.num_special_tokens_to_add(False))
        model = written["model"]
        parts = [*_types(written.get("pre_tokenizer")), *_types(written.get("normalizer"))]
        self.knows_bytes = bool(model.get("byte_fallback")) or "ByteLevel" in parts
        named = model.get("unk_token")
        self.unknown = model.get("unk_id") if named is None else self.backend.token_to_id(named)

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """See `ReportTokenizer`."""
        return [
            Encoded(
                text,
                np.array(found.offsets, dtype=np.int64).reshape(-1, 2),
                np.array([token == self.unknown for token in found.ids], dtype=bool),
            )
            for text, found in zip(texts, self.backend.encode_batch(list(texts), add_special_tokens=False), strict=True)
        ]

    def pieces(self, text: str) -> list[str]:
        """See `ReportTokenizer`."""
        tokens: list[str] = self.backend.encode(text, add_special_tokens=False).tokens
        return tokens


class _OpenClipTokenizer(ReportTokenizer):
    """Open_clip's own BPE of bytes, in Python: it says no places, so its words are cut here one by one, as it does.

    Spans are those of the text as it cleans it: mended, in lower case, with single blanks.
    """

    knows_bytes = True

    def __init__(self, model: str) -> None:
        import open_clip
        from open_clip.tokenizer import SimpleTokenizer

        known = open_clip.list_models()
        if model not in known:
            raise UserError(f"open_clip knows no model {model!r}.{near_matches(model, known)}")
        try:
            loaded: Any = open_clip.get_tokenizer(model)
        except (OSError, ImportError, ValueError) as error:
            raise UserError(f"Cannot load the tokenizer of {OPEN_CLIP}{model}: {first_line(error)}") from error
        if not isinstance(loaded, SimpleTokenizer):
            raise UserError(f"{model} has another's tokenizer, not open_clip's own BPE: name its folder instead.")
        self.own, self.vocabulary, self.special = loaded, int(loaded.vocab_size), 2
        merges = json.dumps([loaded.encoder, [list(pair) for pair in loaded.bpe_ranks]])
        self.sha256 = hashlib.sha256(merges.encode()).hexdigest()
        self._cut = lru_cache(maxsize=2**16)(self._pieces)

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """See `ReportTokenizer`."""
        return [self._encoded(self.own.clean_fn(text)) for text in texts]

    def pieces(self, text: str) -> list[str]:
        """See `ReportTokenizer`."""
        return [piece for match in self.own.pat.finditer(self.own.clean_fn(text)) for piece in self._cut(match.group())]

    def _encoded(self, text: str) -> Encoded:
        spans = [span for match in self.own.pat.finditer(text) for span in self._spans(match.group(), match.start())]
        return Encoded(text, np.array(spans, dtype=np.int64).reshape(-1, 2), np.zeros(len(spans), dtype=bool))

    def _spans(self, word: str, start: int) -> Iterator[tuple[int, int]]:
        of_byte = [start + place for place, letter in enumerate(word) for _ in letter.encode()]
        at = 0
        for piece in self._cut(word):
            length = len(piece.removesuffix("</w>"))  # one letter for each byte
            yield of_byte[at], of_byte[at + length - 1] + 1
            at += length

    def _pieces(self, word: str) -> tuple[str, ...]:
        letters = "".join(self.own.byte_encoder[byte] for byte in word.encode())
        return tuple(self.own.bpe(letters).split(" "))


def _types(part: Any) -> Iterator[str]:
    """The kinds of a component of tokenizer.json and of what it is made of."""
    if isinstance(part, dict):
        yield str(part.get("type"))
        for value in part.values():
            yield from _types(value)
    elif isinstance(part, list):
        for value in part:
            yield from _types(value)
