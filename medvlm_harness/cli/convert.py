"""`medvlm convert`: a pickled checkpoint as safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["app"]

app = typer.Typer()


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A .pt, .pth, .bin or .ckpt file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .safetensors file to write; must not exist.")],
    key: Annotated[
        str | None, typer.Option("--key", help="Where in the file the weights lie, such as model or state_dict.")
    ] = None,
    trust_pickle: Annotated[
        bool, typer.Option("--trust-pickle", help="Run the code in the file. Only for files whose maker you trust.")
    ] = False,
) -> None:
    """Turn a pickled checkpoint into safetensors, once, so that no run ever unpickles it."""
    from medvlm_harness.model_backends.convert import convert as convert_file

    done = convert_file(source, output, key=key, trust_pickle=trust_pickle)
    for name, kind in done.left_out.items():
        typer.echo(f"left out: {name} ({kind})")
    if done.copied:
        typer.echo(f"copied: {', '.join(done.copied)} shared memory with another tensor")
    typer.echo(f"source sha256 {done.sha256}")
    typer.echo(f"wrote {done.tensors} tensors to {done.target}, and read them back")
