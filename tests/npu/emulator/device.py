# SPDX-License-Identifier: Apache-2.0
"""Numbers for the operators of emulated NPU devices.

The stand-in libraries let the real torch_npu run on host memory, with kernels that compute nothing.
`EmulatedDevice` sees every operator call on npu tensors and
  1. computes the result on CPU tensors that share the memory: aten operators by torch itself, npu::
     and atb:: operators by `operators.REFERENCES`, which also raise the limits of the real device;
  2. runs the real torch_npu kernel, so that its own checks of arguments, shapes and dtypes fire;
  3. compares both in shape and dtype and writes the numbers into what the kernel returned.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .operators import REFERENCES, DeviceLimit

# Memory management: the real implementation is right as it is.
REAL = {
    *("aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty"),
    *("aten::new_empty_strided", "aten::set_", "aten::resize_", "aten::detach"),
    *("aten::record_stream", "aten::is_pinned", "aten::_pin_memory"),
    *("npu::empty_with_format", "npu::get_npu_format", "npu::get_storage_size"),
    "npu::_npu_fused_infer_attention_score_get_max_workspace",
    "npu::_npu_fused_infer_attention_score_infer_output",
}
# What waits for the device or leaves it, and so cannot be captured.
NOT_CAPTURED = {
    *("aten::nonzero", "aten::masked_select", "aten::unique_consecutive", "aten::_unique2"),
    *("aten::_local_scalar_dense", "aten::equal", "aten::multinomial", "aten::is_nonzero"),
}
# The shape of the result depends on values, which a kernel that computes nothing cannot give.
VALUE_DEPENDENT = {
    *("aten::nonzero", "aten::masked_select", "aten::index", "aten::index_put_", "aten::index_put"),
    *("aten::unique_consecutive", "aten::_unique2", "aten::_local_scalar_dense", "aten::equal"),
    *("aten::multinomial", "aten::is_nonzero", "aten::repeat_interleave", "aten::masked_fill_"),
}
# The device returns another float dtype for a by-product: the statistics of layer_norm are fp32.
BY_PRODUCTS = {"aten::native_layer_norm"}


def is_npu(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "npu"


def on_host(tensor: Tensor) -> Tensor:
    """A CPU tensor over the memory of an npu tensor."""
    storage = tensor.untyped_storage()
    size = storage.nbytes()
    if size == 0:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    memory = (ctypes.c_char * size).from_address(storage.data_ptr())
    base = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    with torch.inference_mode(False):  # gloo of torch 2.5 writes none of inference mode's
        out = torch.empty(0, dtype=tensor.dtype)
        return out.set_(base, tensor.storage_offset(), tensor.shape, tensor.stride())


def leaves_of(values: Iterable[Any]) -> list[Any]:
    """These arguments of an operator, with what is in lists; collectives have lists of lists."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, (list, tuple)):
            found += leaves_of(value)
        else:
            found.append(value)
    return found


class Operator:
    """What never changes about an operator; to ask torch takes longer than most operators do."""

    def __init__(self, func: Any) -> None:
        schema, has_kernel = func._schema, torch._C._dispatch_has_kernel_for_dispatch_key
        self.name: str = schema.name
        self.arguments = [a.name for a in schema.arguments]
        self.written = {a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write}
        self.is_decomposed = not has_kernel(func.name(), "PrivateUse1") and has_kernel(
            func.name(), "CompositeImplicitAutograd"
        )
        # a view, or an operator that copies if it must
        self.may_be_view = any(r.alias_info and not r.alias_info.is_write for r in schema.returns)


operator = functools.cache(Operator)


def concerns_npu(leaves: list[Any]) -> bool:
    """A call has npu tensors or makes one, and none of its tensors is a FakeTensor."""
    if any(isinstance(leaf, FakeTensor) for leaf in leaves):
        return False
    return any(
        is_npu(x) or (isinstance(x, (torch.device, str)) and str(x).startswith("npu"))
        for x in leaves
    )


class Call:
    """One operator call with its arguments moved to the host."""

    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        own = operator(func)
        self.name = own.name
        self.is_collective = self.name.startswith("c10d::")
        if self.is_collective:  # gloo carries it, so no kernel is launched that writes itself down
            ctypes.CDLL("libascendcl.so").fake_kernel(self.name.encode("ascii"))
        self.written: list[tuple[Tensor, Tensor]] = []  # (tensor, its new value on the host)
        self.given = dict(zip(own.arguments, args, strict=False)) | kwargs  # by name, as they came
        self.host = {
            name: self._all_to_host(value, name in own.written)
            for name, value in self.given.items()
        }
        self.num_positional = len(args)

    def _all_to_host(self, value: Any, is_written: bool) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(self._all_to_host(x, is_written) for x in value)
        return self._to_host(value, is_written)

    def _to_host(self, value: Any, is_written: bool) -> Any:
        if is_npu(value):
            host = on_host(value)
            if self.is_collective:  # works in place on the shared memory
                self.written.append((value, host))
            elif is_written:  # into a copy: the kernel still has to see the old content
                host = host.clone()
                self.written.append((value, host))
            return host
        if isinstance(value, Tensor) and is_written:  # a copy to the host, which the kernel spoils
            self.written.append((value, value.clone()))
            return self.written[-1][1]
        if isinstance(value, torch.device) and value.type == "npu":
            return torch.device("cpu")
        if isinstance(value, torch.Generator) and value.device.type == "npu":
            return None
        return value

    def reference(self) -> Any:
        """The right result, on the host."""
        if self.name in REFERENCES:
            return REFERENCES[self.name](self.given, **self.host)
        if self.name.startswith(("npu::", "atb::")):
            raise NotImplementedError(f"the emulator has no reference for {self.name}")
        values = list(self.host.values())
        n = self.num_positional
        return self.func(*values[:n], **dict(list(self.host.items())[n:]))

    def store_written(self) -> None:
        """What the operator changed in place reaches its tensors."""
        if not self.is_collective:
            for tensor, host in self.written:
                on_host(tensor).copy_(host)

    def to_device(self, want: Any, got: Any) -> Any:
        """`want` as the caller shall see it, in the memory of the kernel's own result `got`."""
        if isinstance(want, (list, tuple)):
            parts = got if isinstance(got, (list, tuple)) else [None] * len(want)
            made = [self.to_device(w, g) for w, g in zip(want, parts, strict=True)]
            return made if isinstance(want, list) else tuple(made)
        if want is None:  # nothing, or what has no meaning: its size differs between releases
            return got
        if not isinstance(want, Tensor):
            return want
        for tensor, host in self.written:
            if want is host:
                return tensor
        if any(isinstance(v, torch.device) and v.type == "cpu" for v in self.kwargs.values()):
            return want.clone()  # a copy to the host; `aten::to` alone gives the same memory
        if not is_npu(got):
            got = torch.empty_strided(want.shape, want.stride(), dtype=want.dtype, device="npu")
        if want.dtype == torch.float64 or self.name in BY_PRODUCTS:  # the device has no double
            want = want.to(got.dtype)
        if (want.shape, want.dtype) != (got.shape, got.dtype):
            raise AssertionError(
                f"{self.name}: the reference gives {tuple(want.shape)} {want.dtype}, "
                f"torch_npu {tuple(got.shape)} {got.dtype}"
            )
        on_host(got).copy_(want)
        return got


class Tape:
    """What a graph captured: calls in order, and the task groups among them that are updated.

    A group waits for an event that its update records; the next replay waits for the next one.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.groups: dict[int, int] = {}  # handle -> index of its call
        self.updated: set[int] = set()

    def replay(self) -> None:
        if missing := self.groups.keys() - self.updated:
            raise DeviceLimit(f"the replay would wait for ever: {len(missing)} tasks not updated")
        self.updated = set()
        for func, args, kwargs, out in self.calls:
            call = Call(func, args, kwargs)
            want = call.reference()
            if call.is_collective:  # in place
                want[-1].wait()
                continue
            call.store_written()
            for made, value in zip(tree_leaves(out), tree_leaves(want), strict=True):
                is_stored = any(value is host for _, host in call.written)
                if is_npu(made) and value is not None and not is_stored:
                    on_host(made).copy_(value)


class EmulatedDevice(TorchDispatchMode):
    """While active, npu tensors of this thread hold real numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.tape: Tape | None = None  # of the graph that is being captured
        self.tapes: dict[int, Tape] = {}  # task handle -> its graph's
        self.group_start = 0
        self.updating: int | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves, own = leaves_of((*args, *kwargs.values())), operator(func)
        name = own.name
        if name in REAL or not concerns_npu(leaves):
            return func(*args, **kwargs)
        if own.is_decomposed:
            with self:
                return func.decompose(*args, **kwargs)
        if self.tape is not None:
            self.check_capture(name, leaves)
        got = None
        if own.may_be_view:
            got = func(*args, **kwargs)
            memory = {x.untyped_storage().data_ptr() for x in leaves if isinstance(x, Tensor)}
            made = [x for x in tree_leaves(got) if isinstance(x, Tensor)]
            if all(x.untyped_storage().data_ptr() in memory for x in made):
                return got
        if self.updating is not None:  # new arguments for a captured task, which is not run now
            func(*args, **kwargs)
            tape = self.tapes[self.updating]
            place = tape.groups[self.updating]
            tape.calls[place] = (func, args, kwargs, tape.calls[place][3])
            tape.updated.add(self.updating)
            return tape.calls[place][3]
        call = Call(func, args, kwargs)
        want = call.reference()
        if got is None and name not in VALUE_DEPENDENT and not call.is_collective:
            got = func(*args, **kwargs)
        call.store_written()
        out = call.to_device(want, got)
        if self.tape is not None:
            self.tape.calls.append((func, args, kwargs, out))
        return out

    @staticmethod
    def check_capture(name: str, leaves: list[Any]) -> None:
        if name in NOT_CAPTURED:
            raise DeviceLimit(f"{name} waits for the device and cannot be captured")
        on_cpu = [x for x in leaves if isinstance(x, Tensor) and not is_npu(x) and x.dim()]
        leaves_device = any(isinstance(x, torch.device) and x.type == "cpu" for x in leaves)
        if name in ("aten::copy_", "aten::_to_copy") and (on_cpu or leaves_device):
            raise DeviceLimit(f"{name} between host and device cannot be captured")

    def emulate_graphs(self) -> None:
        """Real graphs are begun and ended, tasks too; what they hold is kept here."""
        import torch_npu.npu.graphs as graphs

        graph_class = torch.npu.NPUGraph
        real = {n: getattr(graph_class, n) for n in ("capture_begin", "capture_end", "replay")}
        task = {n: getattr(graphs, f"graph_task_{n}") for n in TASK_CALLS}

        def capture_begin(graph: Any, *args: Any, **kwargs: Any) -> None:
            real["capture_begin"](graph, *args, **kwargs)
            graph.tape = self.tape = Tape()

        def capture_end(graph: Any) -> None:
            self.tape = None
            real["capture_end"](graph)

        def replay(graph: Any) -> None:
            real["replay"](graph)
            graph.tape.replay()

        def group_begin(stream: Any) -> None:
            task["group_begin"](stream)
            assert self.tape is not None, "a task group outside of a capture"
            self.group_start = len(self.tape.calls)

        def group_end(stream: Any) -> Any:
            real_handle = task["group_end"](stream)
            assert self.tape is not None
            assert len(self.tape.calls) == self.group_start + 1, "one operator per task group"
            handle = Handle(len(self.tapes) + 1, real_handle)
            self.tapes[handle.number] = self.tape
            self.tape.groups[handle.number] = self.group_start
            return handle

        def update_begin(stream: Any, handle: Any) -> None:
            task["update_begin"](stream, handle.real)
            self.updating = handle.number

        def update_end(stream: Any) -> None:
            self.updating = None
            task["update_end"](stream)

        graph_class.capture_begin, graph_class.capture_end = capture_begin, capture_end
        graph_class.replay = replay
        for name, function in zip(
            TASK_CALLS, (group_begin, group_end, update_begin, update_end), strict=True
        ):
            setattr(graphs, f"graph_task_{name}", function)


TASK_CALLS = ("group_begin", "group_end", "update_begin", "update_end")


class Handle(NamedTuple):
    """A captured task: our number, and torch_npu's handle."""

    number: int
    real: Any
