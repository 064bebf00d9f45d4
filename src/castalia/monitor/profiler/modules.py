"""Parts of a model as parts of a step: the embedding, each layer, and what a layer is made of."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from castalia.monitor.parts import part

Remove = Callable[[], None]


class MarkedModules:
    """Marks the calls of a model's modules until `remove`.

    A compiled layer is marked from outside, as one part: a hook inside would be traced, and the
    layer compiled anew in the middle of what is measured.
    """

    def __init__(self, roots: list[nn.Module]) -> None:
        self.removes: list[Remove] = []
        self.open: list[AbstractContextManager[Any]] = []
        for root in roots:
            for name, module in marked(root):
                if is_compiled(module):
                    self.removes.append(mark_compiled(name, module))
                else:
                    self.mark(name, module)

    def mark(self, name: str, module: nn.Module) -> None:
        """Enter and leave a part by the hooks of a module."""

        def enter(*_: Any) -> None:
            context = part(name)
            context.__enter__()
            self.open.append(context)

        def leave(*_: Any) -> None:
            # Recomputation in a backward pass ends within a forward pass, by an exception.
            if self.open:
                self.open.pop().__exit__(None, None, None)

        # In front of FSDP's own hook, which gathers the layer's weights.
        first = module.register_forward_pre_hook(enter, prepend=True)
        last = module.register_forward_hook(leave, always_call=True)
        self.removes += [first.remove, last.remove]

    def remove(self) -> None:
        """Leave the modules as they were."""
        for remove in self.removes:
            remove()
        self.removes.clear()


def marked(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a decoder that are parts of their own: `embed`, `layers.3`, `layers.3.attn`,
    `norm`."""
    for name, module in root.named_children():
        if name != "layers":
            yield name, module
            continue
        for number, layer in module.named_children():
            yield f"layers.{number}", layer
            # What is inside compiled code is not called module by module.
            if is_compiled(layer):
                continue
            for inner, child in layer.named_children():
                yield f"layers.{number}.{inner}", child


def is_compiled(module: nn.Module) -> bool:
    """Whether `module.compile()` was called."""
    return getattr(module, "_compiled_call_impl", None) is not None


def mark_compiled(name: str, module: nn.Module) -> Remove:
    """Mark the calls of a compiled module, from outside."""
    compiled: Any = module._compiled_call_impl

    def call(*args: Any, **kwargs: Any) -> Any:
        with part(name):
            return compiled(*args, **kwargs)

    def remove() -> None:
        module._compiled_call_impl = compiled

    module._compiled_call_impl = call
    return remove
