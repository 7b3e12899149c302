"""The layer kinds that come with peftkit, offered through the same hook as a plugin's.

One file a family of layers. Nothing here knows a method, and nothing here imports a package other than torch:
a kind for another package's layer names that layer's class by a string.
"""

from peftkit.hookspecs import hookimpl
from peftkit.layers.attention import MultiheadAttention
from peftkit.layers.conv import Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from peftkit.layers.embedding import Embedding, EmbeddingBag
from peftkit.layers.kind import LayerKind, Parameter
from peftkit.layers.linear import Bilinear, Conv1D, Linear
from peftkit.layers.recurrent import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

_KINDS: tuple[type[LayerKind], ...] = (
    Linear, Conv1D, Bilinear, Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d,
    Embedding, EmbeddingBag, MultiheadAttention, LSTM, GRU, RNN, LSTMCell, GRUCell, RNNCell,
)  # fmt: skip

__all__ = [
    "GRU", "LSTM", "RNN", "Bilinear", "Conv1D", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d",
    "ConvTranspose3d", "Embedding", "EmbeddingBag", "GRUCell", "LSTMCell", "LayerKind", "Linear", "MultiheadAttention",
    "Parameter", "RNNCell",
]  # fmt: skip


@hookimpl
def peftkit_layers() -> list[type[LayerKind]]:
    """The kinds of this package."""
    return list(_KINDS)
