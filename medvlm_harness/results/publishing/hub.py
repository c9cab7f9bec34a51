"""The Hub, as far as publishing needs it: one repo, one atomic commit, and what to do when either is refused."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal, TypeVar

from medvlm_harness.errors import UserError, first_line

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["Head", "Hub", "HubError", "repo_url"]

RepoType = Literal["model", "dataset"]
Result = TypeVar("Result")
PASSING = (408, 429, 500, 502, 503, 504)  # an answer that may be another one later
CONFLICTS = (409, 412)  # another commit is in progress, or came first
LONGEST_WAIT = 120.0  # of what a server asks for with Retry-After
PACE = 0.2  # seconds between attempts of pushers that meet, times the attempt
RACES = 20  # commits of others that a push waits out


class HubError(OSError):
    """The Hub did not take it: one line that says what to do. The command line ends with status 1."""


class _ConflictError(Exception):
    """Another commit came first."""


@dataclass(frozen=True)
class Head:
    """The newest commit of a repo: its hash, 40 hexadecimal digits, and the paths it holds."""

    sha: str
    files: frozenset[str]


def repo_url(endpoint: str, repo: str, kind: RepoType) -> str:
    """Where people see a repo."""
    return f"{endpoint}/{'datasets/' if kind == 'dataset' else ''}{repo}"


@dataclass
class Hub:
    """A Hub, and the patience to have with it.

    Attributes:
        endpoint: its address.
        token: of the user, who may be anonymous where only reading is asked for.
        timeout: seconds of silence after which a request has failed.
        waits: seconds between attempts, so that there is one more of these; a server's Retry-After goes before.
        sleep: how to wait.
        tell: is told what is waited for.
    """

    endpoint: str
    token: str | None
    timeout: float = 60.0
    waits: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0)
    sleep: Callable[[float], None] = time.sleep
    tell: Callable[[str], None] = field(default=lambda line: None)

    @cached_property
    def api(self) -> HfApi:
        """One client for all: those of huggingface_hub's own functions go elsewhere than a given endpoint."""
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.endpoint, token=self.token or False, library_name="medvlm-harness")

    def publish(
        self,
        repo: str,
        *,
        public: bool,
        build: Callable[[Head], Mapping[str, bytes]],
        message: str,
    ) -> str | None:
        """One commit to a data set repo, made where there is none; the commit's URL, None if nothing was to be done.

        Args:
            repo: ORG/NAME.
            public: whether everybody may read it.
            build: what to commit upon a head; called again when another pusher came first.
            message: of the commit.

        Raises:
            UserError: if the repo is there, and is public where a private one was asked for, or the other way round.
            HubError: if the Hub cannot be reached, refuses, or others go on committing.
        """
        self._ensure(repo, public=public)
        for attempt in range(1, RACES + 1):
            head = self.head(repo, "dataset")
            files = build(head)
            if not files:
                return None
            try:
                return self._commit(repo, "dataset", files, message, parent=head.sha)
            except _ConflictError:
                self.tell(f"another commit to {repo} came first; merging with it (attempt {attempt} of {RACES})")
                self.sleep(PACE * attempt)
        raise HubError(f"{repo}: others committed {RACES} times in a row while this push waited; nothing was pushed.")

    def propose(self, repo: str, *, build: Callable[[Head], Mapping[str, bytes]], title: str) -> str | None:
        """One pull request on a model repo, its URL; that of the open one with this title where there is one already.

        Raises:
            HubError: if the Hub cannot be reached, or refuses.
        """
        head = self.head(repo, "model")
        files = build(head)
        if not files:
            return None
        # A commit whose answer was lost is not made twice: before each attempt the open ones are looked at.
        return self._retried(f"a pull request on {repo}", lambda: self._open_request(repo, files, title, head.sha))

    def head(self, repo: str, kind: RepoType) -> Head:
        """The newest commit.

        Raises:
            HubError: if there is no such repo, or it cannot be read.
        """
        ask = self.api.dataset_info if kind == "dataset" else self.api.model_info
        info = self._retried(f"reading {repo}", lambda: ask(repo))
        if info.sha is None:
            raise HubError(f"{repo} has no commit yet: expected the one that the Hub makes with a repo.")
        return Head(info.sha, frozenset(one.rfilename for one in info.siblings or ()))

    def read(self, repo: str, kind: RepoType, path: str, revision: str) -> bytes:
        """A file of a repo at a commit.

        Raises:
            HubError: if it cannot be read.
        """
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

        url = hf_hub_url(repo, path, repo_type=kind, revision=revision, endpoint=self.endpoint)
        headers = build_hf_headers(token=self.token or False)

        def get() -> bytes:
            answer = get_session().get(url, headers=headers)
            hf_raise_for_status(answer)
            return bytes(answer.content)

        return self._retried(f"reading {path} of {repo}", get)

    def _ensure(self, repo: str, *, public: bool) -> None:
        asked = "public" if public else "private"
        private = self._visibility(repo)
        if private is None:
            self._retried(
                f"creating {repo}",
                lambda: self.api.create_repo(
                    repo, repo_type="dataset", visibility="public" if public else "private", exist_ok=True
                ),
            )
            private = self._visibility(repo)
        if private is None or private == public:
            found = "unknown" if private is None else "private" if private else "public"
            raise UserError(
                f"{repo} is there and is {found}, but this push is {asked}: nothing was pushed. "
                f"{'Leave out --public' if public else 'Say --public'}, or name another --repo; the visibility of a "
                "repo is changed in its settings on the Hub."
            )

    def _visibility(self, repo: str) -> bool | None:
        """Whether a data set repo is private; None if there is none that this user can see."""
        from huggingface_hub.errors import RepositoryNotFoundError

        def private() -> bool | None:
            try:
                info = self.api.repo_info(repo, repo_type="dataset")
            except RepositoryNotFoundError as error:
                if error.response.status_code == 404:
                    return None
                raise
            return None if info.private is None else bool(info.private)

        return self._retried(f"looking for {repo}", private)

    def _commit(
        self,
        repo: str,
        kind: RepoType,
        files: Mapping[str, bytes],
        message: str,
        *,
        parent: str,
    ) -> str:
        from huggingface_hub import CommitOperationAdd

        def commit() -> str:
            # An operation that was used once is spent.
            adds = [CommitOperationAdd(path_in_repo=path, path_or_fileobj=data) for path, data in files.items()]
            made = self.api.create_commit(repo, adds, commit_message=message, repo_type=kind, parent_commit=parent)
            return str(made.commit_url)

        return self._retried(f"the commit to {repo}", commit, races=True)

    def _open_request(self, repo: str, files: Mapping[str, bytes], title: str, parent: str) -> str:
        from huggingface_hub import CommitOperationAdd

        for one in self.api.get_repo_discussions(repo, discussion_type="pull_request", discussion_status="open"):
            if one.title == title:
                return str(one.url)
        adds = [CommitOperationAdd(path_in_repo=path, path_or_fileobj=data) for path, data in files.items()]
        made = self.api.create_commit(
            repo, adds, commit_message=title, repo_type="model", parent_commit=parent, create_pr=True
        )
        return str(made.pr_url)

    def _retried(self, what: str, call: Callable[[], Result], *, races: bool = False) -> Result:
        """Call again while what fails may pass; errors of the Hub become ours.

        Args:
            what: is done, for messages.
            call: does it.
            races: whether another commit may come first.
        """
        from huggingface_hub import get_session
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        transport: type[Exception] = HfHubHTTPError.__bases__[0]  # HTTPError of httpx or httpx2, by its version
        for attempt in range(len(self.waits) + 1):
            session = get_session()
            before, session.timeout = session.timeout, self.timeout
            try:
                return call()
            except HfHubHTTPError as error:
                status = error.response.status_code
                if races and status in CONFLICTS:
                    raise _ConflictError from error
                if status not in PASSING:
                    raise HubError(_refused(what, status, error.server_message, self.endpoint)) from error
                reason, asked = f"the Hub answered {status}", error.response.headers.get("Retry-After", "")
            except OfflineModeIsEnabled as error:
                raise HubError(f"{what}: HF_HUB_OFFLINE is set, so nothing can be pushed; unset it.") from error
            except transport as error:
                reason, asked = f"{self.endpoint} gave no answer ({first_line(error)})", ""
            except json.JSONDecodeError:  # of an error page, which the client takes for an answer
                reason, asked = "the Hub's answer is no JSON", ""
            except ValueError as error:  # metadata that the Hub found invalid
                raise HubError(f"{what}: {' '.join(str(error).split())} Nothing was pushed.") from error
            finally:
                session.timeout = before
            if attempt < len(self.waits):
                wait = min(float(asked), LONGEST_WAIT) if asked.isdigit() else self.waits[attempt]
                self.tell(f"{what}: {reason}; attempt {attempt + 2} of {len(self.waits) + 1} in {wait:g} s")
                self.sleep(wait)
        raise HubError(
            f"{what}: {reason}, {len(self.waits) + 1} times; nothing was pushed. Local files are as they were: try "
            "again later."
        )


def _refused(what: str, status: int, said: str | None, endpoint: str) -> str:
    """What to do about an answer that will not change by itself."""
    advice = {
        401: "the token is missing, wrong or expired: log in with `hf auth login`, or set HF_TOKEN to a token that may "
        "write (https://huggingface.co/settings/tokens)",
        403: "this token may not do that: it needs to write to repos of this organisation or user, and for a pull "
        "request to open discussions (https://huggingface.co/settings/tokens)",
        404: f"there is no such repo at {endpoint}, or this token may not see it: check its name",
    }.get(status, " ".join((said or "no reason given").split())[:300])
    return f"{what}: the Hub answered {status}: {advice}. Nothing was pushed."
