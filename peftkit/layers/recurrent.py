"""Recurrent layers and their cells: up to twelve weights a layer, each a matrix of its own.

An LSTM's input-to-hidden matrix stacks its gates, `[4 * hidden, in]`, and an update to it is one to all of them.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from peftkit.layers.kind import LayerKind

_GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}


class _Recurrent(LayerKind):
    """What the multi-layer networks share. Their forward reads the weights from a list that repeats them."""

    family = "recurrent"
    lists: ClassVar[Mapping[str, str]] = {"_flat_weights": "_flat_weights_names"}

    def weights(self, layer: Any) -> Mapping[str, str | None]:
        """Input-to-hidden, hidden-to-hidden and projection weights of every layer and direction, with their biases."""
        names = layer._flat_weights_names
        biases = {name.replace("bias", "weight", 1): name for name in names if name.startswith("bias")}
        return {name: biases.get(name) for name in names if name.startswith("weight")}

    def shape(self, layer: Any, weight: str) -> tuple[int, ...]:
        """`[gates * hidden, in]`, `[gates * hidden, out]`, or `[proj, hidden]` for a projection."""
        directions = 2 if layer.bidirectional else 1
        out = layer.proj_size or layer.hidden_size
        _, kind, level = weight.removesuffix("_reverse").split("_")
        if kind == "hr":
            return (layer.proj_size, layer.hidden_size)
        fan_in = out if kind == "hh" else layer.input_size if level == "l0" else out * directions
        return (_GATES[layer.mode] * layer.hidden_size, fan_in)

    def features(self, layer: Any) -> int:
        """Of its first output: hidden or projected states, of both directions side by side."""
        return int(layer.proj_size or layer.hidden_size) * (2 if layer.bidirectional else 1)


class LSTM(_Recurrent):
    """`nn.LSTM`, with layers, directions and projections."""

    serves = "torch.nn.modules.rnn.LSTM"


class GRU(_Recurrent):
    """`nn.GRU`, with layers and directions."""

    serves = "torch.nn.modules.rnn.GRU"


class RNN(_Recurrent):
    """`nn.RNN`, with layers and directions."""

    serves = "torch.nn.modules.rnn.RNN"


class _Cell(LayerKind):
    """What the cells share."""

    family = "recurrent"
    gates: ClassVar[int]

    def weights(self, layer: Any) -> Mapping[str, str | None]:
        """Both weights, with their biases."""
        return {"weight_ih": "bias_ih", "weight_hh": "bias_hh"}

    def shape(self, layer: Any, weight: str) -> tuple[int, ...]:
        """`[gates * hidden, in]`."""
        return (self.gates * layer.hidden_size, layer.input_size if weight == "weight_ih" else layer.hidden_size)

    def features(self, layer: Any) -> int:
        """The hidden state."""
        return int(layer.hidden_size)


class LSTMCell(_Cell):
    """`nn.LSTMCell`."""

    serves = "torch.nn.modules.rnn.LSTMCell"
    gates = 4


class GRUCell(_Cell):
    """`nn.GRUCell`."""

    serves = "torch.nn.modules.rnn.GRUCell"
    gates = 3


class RNNCell(_Cell):
    """`nn.RNNCell`."""

    serves = "torch.nn.modules.rnn.RNNCell"
    gates = 1
