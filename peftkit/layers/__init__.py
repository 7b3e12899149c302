"""The layer kinds that come with peftkit, offered through the same hook as a plugin's.

One file a family of layers. Nothing here knows a method, and nothing here imports a package other than torch:
a kind for another package's layer names that layer's class by a string.
"""

from peftkit.hookspecs import hookimpl
from peftkit.layers.conv import Conv1d, Conv2d, Conv3d
from peftkit.layers.embedding import Embedding
from peftkit.layers.kind import LayerKind, Parameter
from peftkit.layers.linear import Conv1D, Linear

__all__ = ["Conv1D", "Conv1d", "Conv2d", "Conv3d", "Embedding", "LayerKind", "Linear", "Parameter"]


@hookimpl
def peftkit_layers() -> list[type[LayerKind]]:
    """The kinds of this package."""
    return [Linear, Conv1D, Conv1d, Conv2d, Conv3d, Embedding]
