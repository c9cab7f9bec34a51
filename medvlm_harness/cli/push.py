"""`medvlm push`: results, card and plots to a data set repo on the Hub, after everybody could look at them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medvlm_harness.errors import UserError

if TYPE_CHECKING:
    from medvlm_harness.results.publishing.entries import Entry
    from medvlm_harness.results.publishing.hub import Head, Hub
    from medvlm_harness.results.publishing.release import Release

__all__ = ["app"]

app = typer.Typer()
Build = Callable[["Head"], Mapping[str, bytes]]


@app.command()
def push(
    runs: Annotated[list[Path], typer.Argument(help="Results files, or folders that hold one run.")],
    repo: Annotated[str, typer.Option(help="The data set repo for results: ORG/NAME.")],
    yes: Annotated[bool, typer.Option("--yes", help="Push; without it everything is shown and nothing sent.")] = False,
    public: Annotated[
        bool, typer.Option("--public", help="A repo that everybody may read; private if not said.")
    ] = False,
    model_card: Annotated[
        str | None, typer.Option("--model-card", "--model_card", help="Also open a pull request on this model repo.")
    ] = None,
    model_index: Annotated[
        bool,
        typer.Option("--model-index", "--model_index", help="In its README, not in .eval_results (the older form)."),
    ] = False,
    benchmark: Annotated[
        str | None, typer.Option(help="The data set's id on the Hub, for --model-card, where the data came from files.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Propose to replace other values on the model's page.")
    ] = False,
    samples: Annotated[
        bool, typer.Option("--samples", help="Also scores by study, as far as the data set permits: hashed, or all.")
    ] = False,
    licence: Annotated[
        str | None, typer.Option("--licence", "--license", help="Of the results; cc-by-4.0, or that of the repo.")
    ] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Push a limited, failed or changed run; its card says what is wrong.")
    ] = False,
    stage: Annotated[Path | None, typer.Option(help="Also write what would be sent into this new folder.")] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option("--data-dir", "--data_dir", help="The prepared data, whose reports must not be in any file."),
    ] = None,
    endpoint: Annotated[str | None, typer.Option(help="Another Hub; HF_ENDPOINT, or huggingface.co.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds of silence that end a request.", min=0.1)] = 60.0,
) -> None:
    """Publish results, or show what would be published.

    Nothing is sent without --yes. The token is that of `hf auth login`, or HF_TOKEN. Exit status: 0 done or shown, 1
    the Hub did not take it, 2 something to mend here.
    """
    from medvlm_harness.results.publishing.entries import check_repo_id, entries_of
    from medvlm_harness.results.publishing.hub import repo_url
    from medvlm_harness.results.publishing.outgoing import only_run, prepare_releases, refuse_findings
    from medvlm_harness.results.publishing.repository import README, repository_readme

    check_repo_id(repo, "--repo")
    if (model_index or overwrite or benchmark) and model_card is None:
        raise UserError(
            "--model-index, --overwrite and --benchmark are about a model's page: name it with --model-card."
        )
    if model_card is not None and len(runs) != 1:
        raise UserError(f"--model-card takes the results of one run, but {len(runs)} are named.")
    releases = prepare_releases([only_run(path) for path in runs], data_dir=data_dir, samples=samples, force=force)
    hub = _hub(endpoint, timeout)
    entries: list[Entry] = []
    told: list[str] = []
    if model_card is not None:
        url = f"{repo_url(hub.endpoint, repo, 'dataset')}/blob/main/{releases[0].folder}/card.md"
        entries, told = entries_of(releases[0].run, benchmark=benchmark, url=url)
        check_repo_id(model_card, "--model-card")
    files = {path: data for release in releases for path, data in release.files.items()}
    new = repository_readme([one.summary for one in releases], repo=repo, licence=licence, existing=None)
    refuse_findings({README: new.encode()})
    if stage is not None:
        _write(stage, {README: new.encode(), **files})
    _show(releases, {README: new.encode(), **files}, f"{repo_url(hub.endpoint, repo, 'dataset')}", public, new, stage)
    if model_card is not None:
        _show_entries(entries, told, model_card, model_index=model_index)
    if not yes:
        typer.echo(
            "\nNothing was sent. "
            + ("Read the card, then" if stage else "--stage DIR writes it for reading;")
            + " --yes pushes."
        )
        return
    _push(hub, releases, repo, public=public, licence=licence, message=message)
    if model_card is not None:
        _propose(hub, entries, model_card, releases[0], model_index=model_index, overwrite=overwrite)


def _hub(endpoint: str | None, timeout: float) -> Hub:
    from huggingface_hub import constants, get_token

    from medvlm_harness.results.publishing.hub import Hub

    # huggingface_hub reads the variable when it is imported, which may have been long ago.
    address = endpoint or os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
    return Hub(address.rstrip("/"), get_token(), timeout=timeout, tell=lambda line: typer.echo(line, err=True))


def _push(
    hub: Hub, releases: Sequence[Release], repo: str, *, public: bool, licence: str | None, message: str | None
) -> None:
    from medvlm_harness.results.publishing.hub import repo_url

    if hub.token is None:
        raise UserError("No token: log in with `hf auth login`, or set HF_TOKEN to a token that may write.")
    names = ", ".join(release.folder.removeprefix("runs/") for release in releases)
    done = hub.publish(
        repo,
        public=public,
        build=_build(hub, releases, repo, licence),
        message=message or f"Results of {names}",
    )
    where = repo_url(hub.endpoint, repo, "dataset")
    typer.echo(f"\npushed in one commit: {done}" if done else f"\nall of it is in {where} already; nothing was sent")
    typer.echo(f"see {where}")


def _build(hub: Hub, releases: Sequence[Release], repo: str, licence: str | None) -> Build:
    """What to commit upon a head: the folders that it has not, and the README over all runs."""
    from medvlm_harness.results.publishing.outgoing import refuse_findings
    from medvlm_harness.results.publishing.repository import (
        README,
        SUMMARY,
        is_summary,
        read_summary,
        repository_readme,
    )

    def build(head: Head) -> Mapping[str, bytes]:
        new = [release for release in releases if not release.files.keys() <= head.files]
        if not new:
            return {}
        replaced = {f"{release.folder}/{SUMMARY}" for release in new}
        present = [
            read_summary(path, hub.read(repo, "dataset", path, head.sha))
            for path in sorted(head.files - replaced)
            if is_summary(path)
        ]
        existing = _text(hub.read(repo, "dataset", README, head.sha), repo) if README in head.files else None
        readme = repository_readme(
            [*present, *(one.summary for one in new)], repo=repo, licence=licence, existing=existing
        )
        refuse_findings({README: readme.encode()})
        return {README: readme.encode()} | {path: data for one in new for path, data in one.files.items()}

    return build


def _text(data: bytes, repo: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"The README of {repo} is not UTF-8: mend it first.") from error


def _propose(
    hub: Hub, entries: Sequence[Entry], model: str, release: Release, *, model_index: bool, overwrite: bool
) -> None:
    from medvlm_harness.results.publishing.entries import eval_results_files, readme_with_model_index
    from medvlm_harness.results.publishing.outgoing import refuse_findings

    def build(head: Head) -> Mapping[str, bytes]:
        def read(path: str) -> bytes:
            return hub.read(model, "model", path, head.sha)

        if not model_index:
            files = eval_results_files(entries, sorted(head.files), read, overwrite=overwrite)
            refuse_findings(files)
            return files
        before = _text(read("README.md"), model) if "README.md" in head.files else None
        name = model.partition("/")[2]
        after = readme_with_model_index(before, entries, name=name, overwrite=overwrite)
        return {} if after is None else {"README.md": after.encode()}

    url = _propose_or_say(
        hub, model, build=build, title=f"Results measured with medvlm-harness ({release.folder[-12:]})"
    )
    typer.echo(f"pull request: {url}" if url else f"{model} has these values already; no pull request was opened")


def _propose_or_say(hub: Hub, model: str, *, build: Build, title: str) -> str | None:
    """The results have been pushed by now, whatever becomes of the pull request."""
    from medvlm_harness.results.publishing.hub import HubError

    try:
        return hub.propose(model, build=build, title=title)
    except HubError as error:
        why = str(error).replace("Nothing was pushed.", "").replace("nothing was pushed", "given up").strip()
        raise HubError(f"The results were pushed, but no pull request was opened: {why}") from error
    except UserError as error:
        raise UserError(f"The results were pushed, but no pull request was opened: {error}") from error


def _show(
    releases: Sequence[Release], files: Mapping[str, bytes], url: str, public: bool, readme: str, stage: Path | None
) -> None:
    """Every file with its size, and what to know before it is sent."""
    from medvlm_harness.results.sharing import sharing_of

    licence = next(line for line in readme.splitlines() if line.startswith("license: ")).removeprefix("license: ")
    typer.echo(f"to {url} ({'public' if public else 'private'}), results under {licence}:")
    for path, data in files.items():
        typer.echo(f"{len(data):>10,}  {path}")
    typer.echo(f"{sum(map(len, files.values())):>10,}  bytes in {len(files)} files")
    for release in releases:
        sharing = sharing_of(release.run.tasks)
        more = "" if sharing == "full" else " and for words of reports; counts below 10 are withheld"
        typer.echo(f"{release.folder}: sharing {sharing}; searched for tokens and paths of this machine{more}")
        if sharing != "full" and f"{release.folder}/scores.parquet" in release.files:
            typer.echo("  scores by study, under salted hashes: counts below 10 can be made from them again")
        for mark in release.marks:
            typer.echo(f"  marked on its card: {mark}")
        if release.left_out:
            typer.echo(f"  left out: {', '.join(release.left_out)}")
        if stage is not None:
            typer.echo(f"  card: {stage / release.folder / 'card.md'}")


def _show_entries(entries: Sequence[Entry], told: Sequence[str], model: str, *, model_index: bool) -> None:
    where = "the model-index of its README" if model_index else ".eval_results"
    typer.echo(f"\na pull request on {model}, into {where}:")
    for entry in entries:
        typer.echo(f"  {entry.dataset} {entry.task_id} = {entry.value:.6g}  ({entry.notes})")
    for line in told:
        typer.echo(f"  left out: {line}")


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    from medvlm_harness.files import write_whole

    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"Expected --stage to name a new or empty folder, but {folder} holds files.")
    for path, data in files.items():
        write_whole(folder / path, data)
