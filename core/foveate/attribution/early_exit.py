"""A plain transformer that answers from an earlier layer: the final norm and head on the tokens of that layer.

Nothing is rebuilt: while :func:`answering_from` is open, the last block gives what the chosen block gave in the
same forward, and the model's own code does the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from foveate.errors import UsageError
from foveate.interfaces import Site


def blocks_of(module: nn.Module, site: Site) -> dict[int, nn.Module]:
    """The block around each layer's attention: the members of one ``ModuleList`` or ``Sequential``, to its end.

    Raises UsageError where the attention modules of ``site`` do not lie in such a list.
    """
    paths = {layer: path.split(".") for path, layer in site.modules.items()}
    depth = next((i for i, names in enumerate(zip(*paths.values(), strict=False)) if len(set(names)) > 1), 0)
    lists = module.get_submodule(".".join(next(iter(paths.values()))[:depth]))
    found = {layer: names[depth] for layer, names in paths.items()}
    children = dict(lists.named_children())
    in_order = [found[layer] for layer in sorted(found)]
    if not isinstance(lists, nn.ModuleList | nn.Sequential) or in_order != list(children)[-len(in_order) :]:
        raise UsageError(
            f"early exit: the layers of {site.id} are not the last members of one list of blocks",
            remedy="use legrad, which needs the model's own score only",
        )
    return {layer: children[name] for layer, name in found.items()}


@contextmanager
def answering_from(blocks: Mapping[int, nn.Module], layer: int) -> Iterator[None]:
    """Inside the block, the model's answer is read from the tokens that block ``layer`` gives.

    Raises UsageError inside the forward where that block's tokens are not of the last one's shape.
    """
    last = max(blocks)
    kept: list[Tensor] = []

    def keep(block: nn.Module, inputs: Any, output: Any) -> None:
        kept[:] = [_tokens(output)]

    def exchange(block: nn.Module, inputs: Any, output: Any) -> Any:
        if kept[0].shape != _tokens(output).shape:
            raise UsageError(
                f"early exit: layer {layer} gives {tuple(kept[0].shape)}, "
                f"the head wants {tuple(_tokens(output).shape)}",
                remedy="use legrad, which needs the model's own score only",
            )
        return (kept[0], *output[1:]) if isinstance(output, tuple) else kept[0]

    hooks = []
    try:
        if layer != last:
            hooks.append(blocks[layer].register_forward_hook(keep))
            hooks.append(blocks[last].register_forward_hook(exchange))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _tokens(output: Any) -> Tensor:
    """A block's tokens: what it gives, or the first of what it gives."""
    found = output[0] if isinstance(output, tuple) else output
    if not isinstance(found, Tensor):
        raise UsageError(f"early exit: a block gave a {type(output).__name__}, expected tokens or a tuple")
    return found
