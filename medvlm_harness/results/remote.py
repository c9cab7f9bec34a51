"""What of a run would leave this machine: to a server that answers for a model, or by lm-eval's own push to the Hub."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import urlsplit

from medvlm_harness.errors import UserError

__all__ = ["refuse_hub_push", "refuse_remote", "remote_host"]

# Modules of lm-eval 0.4.13 whose classes send requests to a server, and what it is if no address is on the model.
# The OpenAI, Azure, LiteLLM, SGLang and Anthropic chat classes descend from the first.
SERVERS = {
    "lm_eval.models.api_models": "a server",
    "lm_eval.models.gguf": "a server",
    "lm_eval.models.anthropic_llms": "api.anthropic.com",
    "lm_eval.models.textsynth": "api.textsynth.com",
    "lm_eval.models.ibm_watsonx_ai": "watsonx",
}
# It finds the provider by the model's name, and its address decides nothing.
ROUTED = "lm_eval.models.litellm_llms"


def remote_host(lm: Any) -> str | None:
    """The host that a model sends its requests to; None if that is this machine.

    A class of somebody else's counts as a server's client if it has a `base_url`.
    """
    from lm_eval.api.model import CachingLM

    if isinstance(lm, CachingLM):  # --use_cache
        lm = lm.lm
    modules = [owner.__module__ for owner in type(lm).__mro__]
    if ROUTED in modules:
        return "the provider that LiteLLM chooses"
    address = getattr(lm, "base_url", None)
    server = next((SERVERS[module] for module in modules if module in SERVERS), None)
    if not address:
        return server
    host = urlsplit(address if "://" in str(address) else f"//{address}").hostname
    return None if _is_this_machine(host) else host or server or "a server"


def refuse_remote(task: Any, lm: Any) -> str | None:
    """The host that a task's data will go to, which --metadata allowed; None if it stays on this machine.

    Raises:
        UserError: if the data set does not share everything and nobody allowed it.
    """
    host = remote_host(lm)
    allowed = task.runtime.get("allow_remote", False)
    if not isinstance(allowed, bool):
        raise UserError(f"{task.task_name}: expected allow_remote to be true or false, but got {allowed!r}.")
    if host is not None and task.sharing != "full" and not allowed:
        raise UserError(
            f"{task.task_name}: this model answers from {host}, and {task.declared['dataset']} may not be sent to "
            f"others (sharing: {task.sharing}). Use a model or a server on this machine (localhost), or, if you have "
            """the right to send it, --metadata '{"allow_remote": true}' (the result will say so)."""
        )
    return host


def refuse_hub_push(tasks: Iterable[Any], pushes: Sequence[str]) -> None:
    """Refuse lm-eval's own ways of sending a run away whose data may not be shared in full.

    They send documents, prompts and answers, to the Hub the whole output folder; of results alone the small counts.

    Args:
        tasks: of the run.
        pushes: the options that ask for it.

    Raises:
        UserError: naming the first such task.
    """
    for task in tasks:
        if pushes and task.sharing != "full":
            raise UserError(
                f"{task.task_name}: {', '.join(pushes)} would send reports, answers or small counts elsewhere, and "
                f"{task.declared['dataset']} may not be shared so (sharing: {task.sharing}). "
                "Leave it out, and publish with `medvlm push RUN --repo ORG/NAME`, which sends what may go."
            )


def _is_this_machine(host: str | None) -> bool:
    if host == "localhost":
        return True
    try:
        return host is not None and ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False
