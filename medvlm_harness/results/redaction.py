"""What must not stand in the files of a run: secrets, and where things lie on the machine.

lm-eval writes --model_args and --metadata as they came, tokens and home folders among them. Of options, those named
here keep their values; a local path keeps its last component; a secret goes wherever it stands.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

__all__ = [
    "HOME_PATHS",
    "LOCAL",
    "OPTIONS",
    "REDACTED",
    "SECRETS",
    "is_redacted",
    "redact",
    "redact_options",
    "redact_text",
    "secrets_in",
    "without_secrets",
]

REDACTED = "<redacted>"
LOCAL = "<local>/"  # before the last component of a path

# Not every `..._token`: tokenizers have an eos_token.
_NAMES = (
    r"(?:(?:[a-z]+_)?api[_-]?key|(?:hf_|hub_|auth_|access_|bearer_|github_)?token|(?:client_)?secret|passw(?:or)?d"
    r"|(?:[a-z]+_)*(?:secret|access|private)_key|authorization)"
)
_SECRET_NAME = re.compile(_NAMES, re.IGNORECASE)

SECRETS: Mapping[str, re.Pattern[str]] = {
    "a Hugging Face token": re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}"),
    "an API key": re.compile(r"\bsk-[A-Za-z0-9_-]{16,}"),
    "a GitHub token": re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,})"),
    "a GitLab token": re.compile(r"\bglpat-[A-Za-z0-9_-]{16,}"),
    "an AWS key": re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a Google API key": re.compile(r"\bAIza[A-Za-z0-9_-]{35}"),
    "a Slack token": re.compile(r"\bxox[abeprs]-[A-Za-z0-9-]{10,}"),
    "a JSON web token": re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?:.*?-----END [A-Z ]*PRIVATE KEY-----|.*)", re.S),
    "an authorization header": re.compile(r"\b[Bb](?:earer|asic) +[A-Za-z0-9._~+/-]{16,}=*"),
    "credentials in an address": re.compile(r"(?<=://)[^/\s@\"'<>]+(?=@)"),
    # The value alone; what was redacted already is none.
    "a secret by its name": re.compile(
        rf"(?i)(?<![a-z0-9_-]){_NAMES}[\"']?\s*[=:]\s*[\"']?(?P<value>[^\s,;\"'&<>{{}}()\[\]]{{6,}})"
    ),
}
"""What it is -> how it looks."""

_PLAIN = re.compile(r"[-+.0-9a-f]*")  # numbers and hashes
_BEGIN = r"(?<![A-Za-z0-9_.~<>/\\-])"  # not within a word, an address or another path
_REST = r"[^\s,;\"'`<>|]*"
HOME_PATHS = re.compile(
    rf"{_BEGIN}(?:file://)?(?:/(?:home|Users)/{_REST}|/root/{_REST}|~[A-Za-z0-9_-]*/(?=[A-Za-z_.]){_REST}"
    rf"|[A-Za-z]:[\\/]{{1,2}}Users[\\/]{{1,2}}{_REST})"
)
"""Paths under a home folder, anywhere in a text."""
_PATH = re.compile(rf"{_BEGIN}(?:file://)?(?:~|\.\.?|[A-Za-z]:)?[\\/](?!/)[^\s,;\"'`<>|=]*")  # any path, in an option
_HOME = re.compile(r"(?:file://)?(?:/(?:home|Users)/[^/]+|/root|~[^/]*|[A-Za-z]:[\\/]+Users[\\/]+[^\\/]+)[\\/]*")
_ABSOLUTE = re.compile(r"(?:file://)?(?:/(?!/)|~/|[A-Za-z]:[\\/])[^\n<>]*[\\/][^\n<>]*")  # nothing but a path

# Looked for first, in lower case: most texts, of which samples have very many, hold nothing of the kind.
_SIGNS = (
    *(
        "hf_",
        "api_org_",
        "sk-",
        "ghp_",
        "gho_",
        "ghu_",
        "ghs_",
        "ghr_",
        "github_pat_",
        "glpat-",
        "akia",
        "asia",
        "aiza",
    ),
    *("xox", "eyj", "private key", "bearer", "basic", "://", "token", "secret", "key", "passw", "authorization"),
    *("/home/", "/users/", "/root/", "~", "users", "\\", "file:"),
)

OPTIONS = frozenset(
    {
        # of our models
        *("answer_scoring", "architecture", "batch_size", "blip2", "card", "chat_template", "checkpoint"),
        *("classify_by", "decode_threads", "device", "encoder", "encoder_args", "encoder_pretrained", "eva", "experts"),
        *("extractive", "gguf_file", "kind", "language_model", "lower_case", "max_batch_size", "max_length", "mean"),
        *("minigpt4", "model_revision", "peft", "pooling", "precision", "preprocessing", "pretrained", "prompts"),
        *("prompts_file", "quantization", "seed", "std", "stock_tower", "store", "system", "text", "tokenizer"),
        *("tower", "vicuna"),
        # of lm-eval's models
        *("add_bos_token", "autogptq", "backend", "base_url", "custom_prefix_token_id", "data_parallel_size", "delta"),
        *("do_sample", "dtype", "enable_thinking", "engine", "eos_string", "gpu_memory_utilization", "gptqmodel"),
        *("image_height", "image_width", "interleave", "load_in_4bit", "load_in_8bit", "logits_cache"),
        *("max_gen_toks", "max_images", "max_lora_rank", "max_model_len", "max_pixels", "max_retries"),
        *("min_pixels", "mixed_precision_dtype", "model", "num_concurrent", "parallelize", "path", "prefix_token_id"),
        *("processor", "revision", "softmax_dtype", "subfolder", "swap_space", "tensor_parallel_size"),
        *("think_end_token", "timeout", "tokenized_requests", "tokenizer_backend", "tokenizer_mode"),
        *("tokenizer_revision", "tp_plan", "truncate", "truncation", "truncation_side", "trust_remote_code"),
        *("use_fast_tokenizer", "verify_certificate"),
        # of generation
        *("max_new_tokens", "max_tokens", "min_p", "min_tokens", "num_beams", "presence_penalty"),
        *("repetition_penalty", "stop", "temperature", "top_k", "top_p", "until"),
        # of --metadata
        *(
            "allow_contaminated",
            "allow_remote",
            "class_subsets",
            "data_dir",
            "gold",
            "hub_id",
            "images",
            "label_source",
        ),
        *("labeler", "perturbation", "perturbation_seed", "profile", "radgraph", "reference", "scaling", "split"),
        *("studies", "substitution_seed", "suite", "uncertain", "version"),
    }
)
"""Names of options whose values say nothing but how a model was run or a task asked."""

_OPTION_PLACES = ("model_args", "gen_kwargs", "generation_kwargs")


def redact(results: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of lm-eval's results without secrets, unknown options and paths; the same as it was where it had none."""
    redacted: dict[str, Any] = _mapped(results, _clean)
    config = redacted.get("config")
    if isinstance(config, dict):
        given = results["config"]
        redacted["config"] = config | {name: redact_options(given[name]) for name in _OPTION_PLACES if name in given}
    for task, declared in redacted.get("configs", {}).items():
        metadata = results["configs"][task].get("metadata") if isinstance(declared, dict) else None
        if isinstance(metadata, Mapping):
            declared["metadata"] = redact_options(metadata)
    asked = results.get("medvlm", {}).get("asked")
    if isinstance(asked, Mapping) and "metadata" in asked:
        redacted["medvlm"]["asked"]["metadata"] = redact_options(asked["metadata"])
    return redacted


def redact_options(options: Any) -> Any:
    """Options of a model or of --metadata, as mapping or as lm-eval's text `name=value,...`."""
    if isinstance(options, str):
        return ",".join(_option_text(part) for part in options.split(","))
    if isinstance(options, Mapping):
        return {str(name): _option(str(name), value) for name, value in options.items()}
    return _mapped(options, _clean)


def _option(name: str, value: Any) -> Any:
    if value is None:
        return None
    if name not in OPTIONS:
        return REDACTED
    return redact_options(value) if isinstance(value, Mapping) else _mapped(value, _clean_option)


def _option_text(part: str) -> str:
    name, equals, value = part.partition("=")
    return f"{name}={_option(name.strip(), value)}" if equals else (REDACTED if part else "")


def redact_text(value: Any) -> Any:
    """Any plain JSON, such as one logged sample, without secrets and paths under a home folder."""
    return _mapped(value, _clean)


def is_redacted(value: Any) -> bool:
    """Whether something was taken out of a value, or of an option in it."""
    return any(REDACTED in text or LOCAL in text for text in _strings(value))


def secrets_in(value: Any) -> list[str]:
    """What kinds of secrets stand in a text or in plain JSON, by the names of `SECRETS`."""
    texts = list(_strings(value))
    return [kind for kind, pattern in SECRETS.items() if any(pattern.search(text) for text in texts)]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from _strings(key)
            yield from _strings(one)
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        for one in value:
            yield from _strings(one)


def _mapped(value: Any, clean: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, Mapping):
        return {
            clean(key) if isinstance(key, str) else key: REDACTED if _is_secret(key, one) else _mapped(one, clean)
            for key, one in value.items()
        }
    if isinstance(value, list | tuple):
        return [_mapped(one, clean) for one in value]
    return value


def _clean(text: str) -> str:
    if _PLAIN.fullmatch(text) or not _has_sign(text):
        return text
    if _ABSOLUTE.fullmatch(text) and not re.search(r"\s", text):
        return _shown(text)
    return HOME_PATHS.sub(lambda found: _shown(found[0]), without_secrets(text))


@lru_cache(maxsize=4096)  # names of keys and labels come again and again
def _has_sign(text: str) -> bool:
    lower = text.lower()
    return lower.startswith("/") or any(sign in lower for sign in _SIGNS)


def _clean_option(text: str) -> str:
    if _ABSOLUTE.fullmatch(text) and not set(text) & set(",;="):  # it may hold spaces
        return _shown(text)
    if "/" in text and "://" not in text and _exists(text):
        return _shown(text)
    return _PATH.sub(lambda found: _shown(found[0]), without_secrets(text))


def without_secrets(text: str) -> str:
    """A text with the secrets in it taken out."""
    for pattern in SECRETS.values():
        text = pattern.sub(_redacted, text)
    return text


def _redacted(found: re.Match[str]) -> str:
    value = found.groupdict().get("value")
    return found[0].replace(value, REDACTED) if value else REDACTED


def _is_secret(key: Any, value: Any) -> bool:
    return isinstance(key, str) and isinstance(value, str) and bool(value) and bool(_SECRET_NAME.fullmatch(key))


def _shown(path: str) -> str:
    """The last component alone, which for a home folder is nothing."""
    parts = [part for part in re.split(r"[\\/]+", path) if part not in ("", "~", ".", "..", "file:")]
    home = _HOME.fullmatch(path) or not parts
    return LOCAL + ("" if home else without_secrets(parts[-1]))


def _exists(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    except OSError:  # such as a text that is too long for a name
        return False
