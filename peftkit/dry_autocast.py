"""Autocast on the meta device, which torch's own autocast does not serve.

The state is torch's own for the CPU, so that whoever asks for it, switches it off or restores it (checkpointing) is
served. What autocast does, casting what some operations take, is done by kernels under a dispatch key that no device
uses here. Which operations these are, torch's dispatcher says for each device; how each of them casts is documented.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from peftkit.dry_kernels import replaced

_KEY: Any = torch._C.DispatchKey.AutocastIPU  # type: ignore[attr-defined]
"""Of a device that torch has no code for."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_LOWER = _names(
    "_convolution _convolution.deprecated conv1d conv1d.padding conv2d conv2d.padding conv3d conv3d.padding "
    "conv_tbc conv_transpose1d conv_transpose2d.input conv_transpose3d.input convolution prelu addmm addmv "
    "addr matmul einsum mm mv linalg_vecdot linear addbmm baddbmm bmm chain_matmul linalg_multi_dot lstm_cell "
    "gru_cell rnn_tanh_cell rnn_relu_cell scaled_dot_product_attention _scaled_dot_product_flash_attention "
    "mkldnn_rnn_layer _native_multi_head_attention _addmm_activation _thnn_fused_gru_cell "
    "_thnn_fused_lstm_cell"
)
"""What runs in the lower precision."""
_WIDEST = _names(
    "cat stack index_copy addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add"
)
"""What runs in the widest precision among its arguments; on CUDA all of them, on the CPU only the first three."""
_BY_DTYPE = _names(
    "prod prod.dim_int softmax.int log_softmax.int cumprod cumsum linalg_vector_norm sum sum.dim_IntList"
)
"""On CUDA these take `dtype=float32` and cast inside. Everything else gets its arguments in float32."""


def cast(tensor: Any, dtype: torch.dtype, cache: dict[int, tuple[Tensor, Tensor]]) -> Any:
    """A meta tensor in this dtype, if autocast would cast it; the cast of a leaf that trains is made once."""
    if not isinstance(tensor, Tensor) or not tensor.is_meta or not tensor.is_floating_point():
        return tensor
    if tensor.dtype in (dtype, torch.float64):
        return tensor
    keeps = tensor.dtype is torch.float32 and tensor.requires_grad and tensor.is_leaf and not tensor._is_view()
    if not keeps:
        return tensor.to(dtype)
    if id(tensor) not in cache:
        cache[id(tensor)] = tensor, tensor.to(dtype)
    return cache[id(tensor)][1]


class _Autocast:
    """Autocast for meta tensors, as it is on a device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.cache: dict[int, tuple[Tensor, Tensor]] = {}
        """Until autocast ends."""
        self.depth = 0

    def kernel(self, name: str, operation: Any) -> Callable[..., Any]:
        """What stands before an operation: casts, and the operation itself with autocast out of the way."""
        names = [argument.name for argument in operation._schema.arguments]

        def inside(*args: Any, **kwargs: Any) -> Any:
            given = dict(zip(names, args, strict=False)) | kwargs
            if given.get("dtype") is None:
                given["dtype"] = torch.float32
            positional = [given.pop(name) for name in names[: len(args)]]
            return operation(*positional, **given)

        def run(*args: Any, **kwargs: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(_KEY)):
                if self.device != "cpu" and name in _BY_DTYPE:
                    return operation(*args, **kwargs) if not args[0].is_floating_point() else inside(*args, **kwargs)
                dtype = torch.get_autocast_dtype("cpu") if name in _LOWER else torch.float32
                if name in _WIDEST:
                    dtypes = {t.dtype for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
                    if torch.float32 not in dtypes:
                        return operation(*args, **kwargs)
                args, kwargs = tree_map(functools.partial(cast, dtype=dtype, cache=self.cache), (args, kwargs))
                return operation(*args, **kwargs)

        return run

    def register(self, library: Any) -> None:
        """Put such a kernel before every operation that autocast has one for on this device."""
        key = "AutocastCPU" if self.device == "cpu" else "AutocastCUDA"
        for full in torch._C._dispatch_get_all_op_names():
            if full.startswith("aten::") and torch._C._dispatch_has_kernel_for_dispatch_key(full, key):
                name, _, overload = full.removeprefix("aten::").partition(".")
                operation = getattr(getattr(torch.ops.aten, name), overload or "default")
                library.impl(
                    full.removeprefix("aten::"), self.kernel(full.removeprefix("aten::"), operation), _KEY.name
                )


def _reach(*, wanted: bool) -> None:
    torch._C._dispatch_tls_set_dispatch_key_included(_KEY, wanted)
    torch._C._dispatch_tls_set_dispatch_key_excluded(_KEY, not wanted)


@contextmanager
def autocasting(device: str, dtype: torch.dtype | None) -> Iterator[Callable[[], AbstractContextManager[Any]]]:
    """Let code ask whether autocast is on for meta tensors; what the block gets switches it on, if there is a dtype."""
    state = _Autocast(device)
    original = torch.autocast

    class Region(original):  # type: ignore[misc, valid-type]
        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            super().__init__("cpu" if device_type == "meta" else device_type, *args, **kwargs)

        def __enter__(self) -> Any:
            state.depth += 1
            entered = super().__enter__()
            _reach(wanted=dtype is not None and torch.is_autocast_enabled("cpu"))
            return entered

        def __exit__(self, *exception: object) -> Any:
            result = super().__exit__(*exception)
            _reach(wanted=dtype is not None and torch.is_autocast_enabled("cpu"))
            state.depth -= 1
            if not state.depth:
                state.cache.clear()
            return result

    def of_cpu(function: Any) -> Any:
        return lambda *on: function(*("cpu" if each == "meta" else each for each in on))

    changes = [
        (torch, "is_autocast_enabled", of_cpu(torch.is_autocast_enabled)),
        (torch, "get_autocast_dtype", of_cpu(torch.get_autocast_dtype)),
        (torch.amp, "is_autocast_available", of_cpu(torch.amp.is_autocast_available)),
        (torch, "autocast", Region),
        (torch.amp, "autocast", Region),
    ]
    with replaced(*changes):
        if dtype is None:
            yield nullcontext
            return
        with (
            torch.library._scoped_library("_", "IMPL") as rest,
            torch.library._scoped_library("aten", "IMPL") as library,
        ):
            rest.fallback(torch.library.fallthrough_kernel, _KEY.name)
            state.register(library)
            yield lambda: Region("cpu", dtype=dtype)
