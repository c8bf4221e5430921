"""``python -m foveate_vit.convert --trust-this-file checkpoint.bin model.safetensors``

Unpickles a checkpoint that ``torch.load(weights_only=True)`` refuses, which may run any code it contains,
and writes its tensors as safetensors. Meant to be run once, by somebody who trusts the file's author.
"""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.option(
    "--trust-this-file", is_flag=True, required=True, help="I know that unpickling runs the file's code."
)
@click.argument("source", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("target", type=click.Path(dir_okay=False, path_type=Path))
def main(trust_this_file: bool, source: Path, target: Path) -> None:
    """Write the tensors of the pickled checkpoint SOURCE to the safetensors file TARGET."""
    import torch
    from safetensors.torch import save_file

    if not trust_this_file:
        raise click.UsageError("unpickling runs the file's code; say --trust-this-file")
    loaded = torch.load(source, map_location="cpu", weights_only=False)
    if hasattr(loaded, "state_dict"):
        loaded = loaded.state_dict()
    nested = next((loaded[key] for key in ("state_dict", "model") if key in loaded), loaded)
    # clone: tied weights share memory, which safetensors refuses
    tensors = {k: v.detach().clone().contiguous() for k, v in nested.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        raise click.ClickException(f"{source} holds no tensors")
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target, metadata={"format": "pt"})
    click.echo(f"{len(tensors)} tensors written to {target}", err=True)


if __name__ == "__main__":
    main()
