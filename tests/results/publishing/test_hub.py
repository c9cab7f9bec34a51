"""The Hub as it should be, and as it is on a bad day: down, refusing, slow, busy, and pushed to by others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from medvlm_harness.errors import UserError
from medvlm_harness.results.publishing.hub import Head, Hub, HubError

REPO = "acme/results"
FILES = {"README.md": b"---\nlicense: cc0-1.0\n---\n", "runs/a/results.json": b"{}"}


def publish(hub: Hub, files: Mapping[str, bytes] = FILES, *, public: bool = False) -> str | None:
    return hub.publish(REPO, public=public, build=lambda head: dict(files), message="results")


@pytest.mark.parametrize(("public", "visibility"), [(False, "private"), (True, "public")])
def test_one_commit_to_a_repo_as_visible_as_asked(hub: Hub, fake_hub: Any, public: bool, visibility: str) -> None:
    assert publish(hub, public=public)
    (created,) = fake_hub.created
    assert created["visibility"] == visibility
    assert fake_hub.results.private is not public
    (commit,) = fake_hub.results.commits
    assert commit["files"] == FILES
    assert commit["parent"] == fake_hub.results.shas[0]
    assert {token for _, token in fake_hub.log} == {f"Bearer {hub.token}"}


@pytest.mark.parametrize("public", [False, True])
def test_a_repo_of_another_visibility_is_refused(hub: Hub, fake_hub: Any, public: bool) -> None:
    publish(hub, public=not public)
    with pytest.raises(UserError, match=f"is {'private' if public else 'public'}, but this push is"):
        publish(hub, {"other": b"2"}, public=public)
    assert len(fake_hub.results.commits) == 1


@pytest.mark.parametrize(
    ("part", "status", "advice"),
    [
        ("/commit", 401, "hf auth login"),
        ("/commit", 403, "this token may not do that"),
        ("/api/datasets", 401, "hf auth login"),
        ("/repos/create", 403, "this token may not do that"),
        ("/commit", 404, "check its name"),
        ("/preupload", 403, "this token may not do that"),
        ("/commit", 400, "Nothing was pushed"),
    ],
)
def test_a_refusal_is_told_at_once(hub: Hub, told: Any, fake_hub: Any, part: str, status: int, advice: str) -> None:
    fake_hub.fail(part, status)
    with pytest.raises(HubError, match=advice):
        publish(hub)
    assert told.waits == []
    assert not any(repo.commits for repo in fake_hub.repos.values())


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_what_passes_is_waited_for(hub: Hub, told: Any, fake_hub: Any, status: int) -> None:
    fake_hub.fail("/commit", status, times=2)
    assert publish(hub)
    assert told.waits == [1.0, 2.0]
    assert f"the Hub answered {status}" in told.lines[0]
    assert "attempt 2 of 3 in 1 s" in told.lines[0]
    assert len(fake_hub.results.commits) == 1


def test_a_server_that_says_how_long_is_heard(hub: Hub, told: Any, fake_hub: Any) -> None:
    fake_hub.fail("/commit", 429, times=1, headers={"Retry-After": "7"})
    fake_hub.fail("/commit", 429, times=1, headers={"Retry-After": "86400"})
    assert publish(hub)
    assert told.waits == [7.0, 120.0]


@pytest.mark.parametrize("part", ["/commit", "/validate-yaml", "/preupload", "/repos/create"])
def test_500_for_ever_ends_and_nothing_is_half_pushed(hub: Hub, fake_hub: Any, part: str) -> None:
    fake_hub.fail(part, 500, body=b"<html>oops</html>")
    with pytest.raises(HubError, match="3 times; nothing was pushed"):
        publish(hub)
    assert not any(repo.commits for repo in fake_hub.repos.values())


def test_a_hub_that_is_down(told: Any, fake_hub: Any) -> None:
    down = Hub("http://127.0.0.1:9", "token", timeout=1, waits=(1.0,), sleep=told.waits.append)
    with pytest.raises(HubError, match="gave no answer"):
        publish(down)
    assert told.waits == [1.0]


def test_a_slow_hub_is_waited_for_no_longer_than_said(fake_hub: Any, hub: Hub, told: Any) -> None:
    fake_hub.fail("/commit", delay=0.5)
    hub.timeout = 0.1
    with pytest.raises(HubError, match="gave no answer"):
        publish(hub)
    assert told.waits == [1.0, 2.0]


def test_a_commit_whose_answer_was_lost_is_not_made_twice(fake_hub: Any, hub: Hub) -> None:
    fake_hub.fail("/commit", delay=0.5, times=1)
    hub.timeout, hub.sleep = 0.2, lambda seconds: time.sleep(0.5)

    def build(head: Head) -> Mapping[str, bytes]:
        return {} if "only" in head.files else {"only": b"1"}

    assert hub.publish(REPO, public=False, build=build, message="once") is None
    assert [commit["files"] for commit in fake_hub.results.commits] == [{"only": b"1"}]


def test_offline_mode_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        publish(hub)


def test_the_timeout_of_others_is_left_as_it_was(hub: Hub) -> None:
    from huggingface_hub import get_session

    before = get_session().timeout
    publish(hub)
    assert get_session().timeout == before


@pytest.mark.parametrize("status", [None, 409, 412])
def test_a_commit_of_another_in_between_is_merged_with(hub: Hub, fake_hub: Any, told: Any, status: int | None) -> None:
    publish(hub, {"first": b"1"})
    other = Hub(fake_hub.url, hub.token)
    if status is None:
        fake_hub.before_commit.append(lambda: publish(other, {"theirs": b"2"}))
    else:
        fake_hub.fail("/commit", status, times=1)
    heads: list[frozenset[str]] = []

    def build(head: Head) -> dict[str, bytes]:
        heads.append(head.files)
        return {"mine": b"3"}

    hub.publish(REPO, public=False, build=build, message="mine")
    assert len(heads) == 2
    assert ("theirs" in heads[1]) is (status is None)
    assert fake_hub.results.files["mine"] == b"3"
    assert "another commit" in told.lines[0]


def test_parallel_pushers_are_all_there_at_the_end(fake_hub: Any, hub: Hub) -> None:
    def index(name: str) -> Callable[[Head], dict[str, bytes]]:
        """One shared file that lists all others, as the README does."""
        return lambda head: {name: b"", "index": " ".join(sorted({*head.files, name} - {"index"})).encode()}

    def push(name: str) -> None:
        own = Hub(fake_hub.url, hub.token, sleep=lambda seconds: None)
        own.publish(REPO, public=False, build=index(name), message=name)

    threads = [threading.Thread(target=push, args=(f"run{k}",)) for k in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fake_hub.results.files["index"].decode().split() == [".gitattributes", *(f"run{k}" for k in range(5))]
    assert len(fake_hub.results.commits) == 5


def test_without_anything_to_do_nothing_is_committed(hub: Hub, fake_hub: Any) -> None:
    assert publish(hub, {}) is None
    assert fake_hub.results.commits == []


def propose(hub: Hub) -> str | None:
    return hub.propose("acme/model", build=lambda head: {".eval_results/a.yaml": b"[]"}, title="Results (1234)")


def test_a_pull_request_is_one_commit_and_is_opened_once(hub: Hub, model_repo: Any) -> None:
    first = propose(hub)
    (request,) = model_repo.requests
    assert request["parent"] == model_repo.shas[0]
    assert model_repo.commits == []
    assert propose(hub) == first
    assert len(model_repo.requests) == 1


def test_a_pull_request_whose_answer_was_lost_is_found_again(hub: Hub, fake_hub: Any, model_repo: Any) -> None:
    fake_hub.fail("/commit", delay=0.5, times=1)
    hub.timeout, hub.sleep = 0.2, lambda seconds: time.sleep(0.5)
    assert propose(hub)
    assert len(model_repo.requests) == 1


def test_a_model_that_is_not_there(hub: Hub) -> None:
    with pytest.raises(HubError, match="404"):
        hub.propose("acme/none", build=lambda head: {"a": b""}, title="t")
