"""A GPU for machines without one: tensors that say `cuda`, hold their values in CPU memory, and
refuse what CUDA would refuse.

torch's own FakeTensorMode cannot do this in a build without CUDA: its tensors have no values, which
a loop that reads its loss needs, and their backward pass ends the process ("PyTorch is not linked
with support for cuda devices"). Here Python sees a device `cuda:0`, and torch's C++, which would
ask a driver, sees `meta`; so a factory with the device `meta` inside an operation on such a tensor
is that operation's own.

Refused, as by CUDA: an operation on tensors of both devices, except where a tensor of one number
is on the CPU; indices on the GPU into a tensor on the CPU; a generator of the CPU that draws on the
GPU; numpy, and pointers. Autocast is done here, by CUDA's lists. Copies to the CPU that do not
wait arrive with the next synchronization, and are wrong until then.
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")

ACROSS = {
    aten._to_copy.default,
    aten.copy_.default,
    aten._foreach_copy_.default,
    aten.set_.source_Tensor,
}
"""Operations between devices."""
INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}
"""The index may be on the CPU where the indexed tensor is on the GPU."""
EXACT_PLACE = {"cat", "stack", "gather", "scatter_", "scatter", "index_select", "embedding", "mm"}
"""Operations that take no tensor of the other device, not even of one number."""

LOWER = (
    F.linear,
    F.conv1d,
    F.scaled_dot_product_attention,
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    Tensor.__rmatmul__,
    torch.bmm,
    torch.mm,
    torch.addmm,
    torch.baddbmm,
)
"""What CUDA's autocast does in the lower precision."""
FULL = (
    torch.softmax,
    F.softmax,
    F.log_softmax,
    torch.log_softmax,
    F.layer_norm,
    F.rms_norm,
    F.cross_entropy,
    F.nll_loss,
    torch.exp,
    Tensor.exp,
    torch.log,
    Tensor.log,
    torch.pow,
    Tensor.pow,
    torch.sum,
    Tensor.sum,
    torch.cumsum,
    Tensor.cumsum,
    F.softplus,
    torch.rsqrt,
    Tensor.rsqrt,
)
"""And in float32."""


class MixedDevicesError(RuntimeError):
    """What CUDA would refuse."""


class OnGpu(Tensor):
    """A tensor whose device is `cuda:0`; `values` is the CPU tensor beneath it."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> "OnGpu":
        made = Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device="meta",
        )
        made.values = values
        return made

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)
    is_cpu = property(lambda self: False)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnGpu({self.values!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "OnGpu":
        copied = OnGpu(self.values.clone()).requires_grad_(self.requires_grad)
        memo[id(self)] = copied
        return copied

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return PretendedGpu.current().call(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return PretendedGpu.current().dispatch(func, args, kwargs or {})


class Calls(TorchFunctionMode):
    """Shows the pretended GPU every function of torch before C++ sees it."""

    def __init__(self, gpu: "PretendedGpu") -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.gpu.call(func, args, kwargs or {})


class PretendedGpu(TorchDispatchMode):
    """While it is entered, `cuda` is a device.

    `operations` counts what ran on it, by the operation's name.
    """

    entered: "list[PretendedGpu]" = []

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.depth = 0
        self.draws = False
        self.late: list[Callable[[], Any]] = []
        self.patch = pytest.MonkeyPatch()
        self.calls = Calls(self)

    @classmethod
    def current(cls) -> "PretendedGpu":
        """The one that is entered."""
        if not cls.entered:
            raise RuntimeError("a pretended GPU's tensor was used after the GPU was gone")
        return cls.entered[-1]

    def __enter__(self) -> "PretendedGpu":
        self.lifting = torch._C._only_lift_cpu_tensors()
        # torch.tensor(..., device=cuda) makes a tensor of the CPU first, and moves it where the
        # mode sees it.
        torch._C._set_only_lift_cpu_tensors(True)
        pretend_driver(self.patch, self)
        self.entered.append(self)
        self.calls.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.calls.__exit__(*error)
        self.entered.pop()
        self.patch.undo()
        torch._C._set_only_lift_cpu_tensors(self.lifting)

    def synchronize(self, device: Any = None) -> None:
        """Let every copy arrive."""
        late, self.late = self.late, []
        for copy in late:
            copy()

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """One function of torch."""
        name = getattr(func, "__name__", "")
        if func is torch.device:
            return func(*args, **kwargs)
        first = args[0] if args else None
        if isinstance(first, OnGpu):
            if func is Tensor.tolist:
                return first.values.tolist()
            if func in (Tensor.numpy, Tensor.data_ptr, Tensor.__array__):
                raise MixedDevicesError(f"no {name} of a tensor on cuda:0; use Tensor.cpu() first")
            if func in (Tensor.pin_memory, Tensor.record_stream):
                return first
            if func is Tensor.backward:
                return self.backward(*args, **kwargs)
            if func == Tensor.data.__set__:  # a new object whenever it is asked for
                first.values = args[1].values
            if func in (Tensor.__getitem__, Tensor.__setitem__):
                args = (first, indices_of(args[1]), *args[2:])
        if func in (torch.tensor, torch.as_tensor) and is_gpu(kwargs.get("device")):
            return self.moved(func, args, kwargs)
        if func is Tensor.cuda:
            func, args = Tensor.to, (first, GPU)
        if func is Tensor.to and isinstance(first, OnGpu):
            args, kwargs = without_gpu(args, kwargs)
            if len(args) == 1 and not kwargs:
                return args[0]
        # C++ asks the driver for the number of a device that has none.
        args = tuple(GPU if is_gpu(value) else value for value in args)
        kwargs = {key: GPU if is_gpu(value) else value for key, value in kwargs.items()}
        args, kwargs = self.cast(func, args, kwargs)
        inside = any(isinstance(tensor, OnGpu) for tensor in tensors_of(args, kwargs))
        self.depth += inside
        # C++ shows the dispatcher another object than it was given.
        self.draws = isinstance(kwargs.get("generator"), PretendedGenerator)
        try:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        finally:
            self.depth -= inside

    def backward(self, tensor: Tensor, gradient: Any = None, **options: Any) -> None:
        """`Tensor.backward`, in which functions are seen as in the forward pass: blocks may be
        recomputed there."""
        with Calls(self):
            gradient = torch.ones_like(tensor) if gradient is None else gradient
            torch.autograd.graph._engine_run_backward(
                (tensor,),
                (gradient,),
                bool(options.get("retain_graph")),
                False,
                (),
                allow_unreachable=True,
                accumulate_grad=True,
            )

    def moved(self, make: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """A tensor of Python's numbers, made on the CPU and moved."""
        options = {key: value for key, value in kwargs.items() if key != "device"}
        held = args[0] if isinstance(args[0], OnGpu) else make(*args, **options)
        return held.to(device=GPU, dtype=options.get("dtype"))

    def cast(self, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The arguments as autocast gives them to a function."""
        if not torch.is_autocast_enabled("cuda"):
            return args, kwargs
        dtype = None
        if func in LOWER:
            dtype = torch.get_autocast_dtype("cuda")
        elif func in FULL and kwargs.get("dtype") is None:
            dtype = torch.float32
        if dtype is None:
            return args, kwargs

        def to(tensor: Tensor) -> Tensor:
            wide = tensor.dtype is torch.float64 or not tensor.is_floating_point()
            return tensor if wide or not isinstance(tensor, OnGpu) else tensor.to(dtype)

        args, kwargs = mapped(to, (args, kwargs))
        return args, kwargs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.dispatch(func, args, kwargs or {})

    def dispatch(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """One operation, by the CPU's kernel on the values."""
        tensors = tensors_of(args, kwargs)
        here = [tensor for tensor in tensors if isinstance(tensor, OnGpu)]
        asked = self.place(kwargs.get("device"), bool(here))
        if not here and asked is not GPU:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        self.operations[name] += 1
        if func is aten._fused_sdp_choice.default:
            return 0
        if here:
            # The kernel of `meta` would do nothing, without a word.
            assert not any(tensor.is_meta for tensor in tensors), f"{func} with a tensor of meta"
            require_one_place(func, args, tensors)
        if kwargs.get("generator") is not None and asked is not CPU and not self.draws:
            raise MixedDevicesError("Expected a 'cuda' device type for generator but found 'cpu'")
        owners = {id(tensor.values): tensor for tensor in here}
        plain_args, plain = mapped(values_of, (args, kwargs))
        if "device" in plain and asked is not None:
            plain["device"] = CPU
        plain.pop("pin_memory", None)
        if func is aten.copy_.default and not isinstance(args[0], OnGpu):
            return self.copy_back(args, kwargs)
        out = func(*plain_args, **plain)
        if asked is CPU or (func in ACROSS and not isinstance(args[0], OnGpu) and asked is None):
            return out

        def held(tensor: Tensor) -> Tensor:
            return owners[id(tensor)] if id(tensor) in owners else OnGpu(tensor)

        return mapped(held, out)

    def place(self, device: Any, among: bool) -> torch.device | None:
        """Where an operation was asked to put its result."""
        if device is None:
            return None
        kind = torch.device(device).type
        if kind == "meta":
            # C++ repeats the device that it sees in our tensors.
            inside = among or self.depth or torch._C._current_graph_task_id() != -1
            return GPU if inside else None
        return GPU if kind == "cuda" else CPU

    def copy_back(self, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """A copy to the CPU: at once, or with the next synchronization."""
        target, source, *rest = args
        waits = not (rest[0] if rest else kwargs.get("non_blocking", False))
        if waits:
            self.synchronize()
            return target.copy_(source.values)
        kept = source.values.clone()
        with torch.no_grad():
            target.copy_(torch.full_like(target, 85))
        self.late.append(lambda: target.detach().copy_(kept))
        return target


def tensors_of(args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among the arguments, and in lists among them."""
    found = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [each for each in value if isinstance(each, Tensor)]
    return found


def mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The value with every tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list):
        return [mapped(change, each) for each in value]
    if type(value) is tuple:
        return tuple(mapped(change, each) for each in value)
    if isinstance(value, dict):
        return {name: mapped(change, each) for name, each in value.items()}
    return value


def values_of(tensor: Tensor) -> Tensor:
    """What a kernel of the CPU reads."""
    return tensor.values if isinstance(tensor, OnGpu) else tensor


def require_one_place(func: Any, args: Any, tensors: list[Tensor]) -> None:
    """Raises  MixedDevicesError for tensors of two devices."""
    elsewhere = [tensor for tensor in tensors if not isinstance(tensor, OnGpu)]
    if not elsewhere or func in ACROSS:
        return
    name = func.overloadpacket.__name__
    if func in INDEXING and isinstance(args[0], OnGpu):
        indices = args[1]
        elsewhere = [t for t in elsewhere if not any(t is index for index in indices)]
    scalars = all(tensor.ndim == 0 for tensor in elsewhere) and name not in EXACT_PLACE
    written = bool(args) and name.endswith("_") and not isinstance(args[0], OnGpu)
    if elsewhere and (written or not scalars):
        shapes = [tuple(tensor.shape) for tensor in elsewhere]
        raise MixedDevicesError(
            f"{func}: expected all tensors to be on the same device, cuda:0; on the CPU are"
            f" tensors of shapes {shapes}"
        )


def indices_of(place: Any) -> Any:
    """What stands between brackets, lists as tensors: C++ would make them where it sees us."""
    if isinstance(place, tuple):
        return tuple(indices_of(each) for each in place)
    if isinstance(place, list):
        return torch.tensor(place, dtype=None if place else torch.int64)
    return place


def is_gpu(value: Any) -> bool:
    """Whether a value names the GPU."""
    return isinstance(value, str | torch.device) and str(value).startswith("cuda")


def without_gpu(args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The arguments of `to` without a device that the tensor is on already."""
    kept = tuple(value for value in args if not is_gpu(value))
    named = {name: value for name, value in kwargs.items() if not is_gpu(value)}
    if len(kept) == 1:
        named.pop("non_blocking", None)
    return kept, named


class PretendedStream:
    """A queue of the pretended GPU; copies on it arrive when someone waits for it."""

    def __init__(self, device: Any = None, **options: Any) -> None:
        self.device = GPU

    def wait_stream(self, other: "PretendedStream") -> None:
        """What the other has queued comes first."""
        PretendedGpu.current().synchronize()

    synchronize = wait_stream


class PretendedEvent(PretendedStream):
    """A place in a queue."""

    def record(self, stream: Any = None) -> None:
        """Nothing is measured."""

    def wait(self, stream: Any = None) -> None:
        """Nothing is ahead of the host."""


class PretendedGenerator(torch.Generator):
    """A generator of the GPU, or of the CPU where that is asked for."""

    device = property(lambda self: GPU)

    def __new__(cls, device: Any = "cpu") -> torch.Generator:
        """`torch.Generator(device)`."""
        if not is_gpu(device):
            return GENERATOR(device)
        return super().__new__(cls, "cpu")


GENERATOR = torch.Generator


def pretend_driver(patch: pytest.MonkeyPatch, gpu: PretendedGpu) -> None:
    """torch.cuda as on a machine with one GPU of Hopper's kind."""
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "_lazy_init": lambda: None,
        "empty_cache": lambda: None,
        "synchronize": gpu.synchronize,
        "get_device_name": lambda device=None: "pretended GPU",
        "get_device_capability": lambda device=None: (9, 0),
        "is_bf16_supported": lambda including_emulation=True: True,
        "max_memory_allocated": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "mem_get_info": lambda device=None: (2**36, 2**37),
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "Stream": PretendedStream,
        "Event": PretendedEvent,
        "current_stream": lambda device=None: PretendedStream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
    }
    for name, answer in answers.items():
        patch.setattr(torch.cuda, name, answer)
    patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    patch.setattr(torch.amp.autocast_mode, "is_bf16_supported", lambda: True, raising=False)
    # A tensor subclass cannot be made an inference tensor; without gradients it computes the same.
    patch.setattr(torch.inference_mode, "__enter__", enter_without_gradients)
    patch.setattr(
        torch.inference_mode, "__exit__", lambda self, *error: self.block.__exit__(*error)
    )
    patch.setattr(torch, "Generator", PretendedGenerator)
    patch.setattr(torch, "empty", functools.partial(unpinned, torch.empty))


def enter_without_gradients(mode: Any) -> None:
    """`torch.no_grad` for `torch.inference_mode`."""
    mode.block = torch.no_grad() if mode.mode else contextlib.nullcontext()
    mode.block.__enter__()


def unpinned(make: Any, *args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
    """Page-locked memory needs a driver; ordinary memory stands for it."""
    return make(*args, **kwargs)


@contextlib.contextmanager
def pretended_gpu() -> Iterator[PretendedGpu]:
    """A GPU for the time of the context."""
    with PretendedGpu() as gpu:
        yield gpu
