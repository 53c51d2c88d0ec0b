"""The most bytes that storages of tensors take at a time, whoever holds them."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(TorchDispatchMode):
    """Follows the storage of every tensor that an operation makes while active; not those of the tensors `apart`."""

    def __init__(self, apart: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.peak = 0
        self._apart = {tensor.untyped_storage()._cdata for tensor in apart}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self._at_most = 0
        """Bytes of all in `_made`, some of which may be gone: they are looked through only where this is a new peak."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self._apart:
                self._note(leaf)
        if self._at_most > self.peak:
            self.peak = max(self.peak, self.alive_bytes())
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        _, known = self._made.get(storage._cdata, (None, 0))
        self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._at_most += storage.nbytes() - known

    def alive_bytes(self) -> int:
        """Bytes there now."""
        self._made = {key: one for key, one in self._made.items() if not one[0].expired()}
        self._at_most = sum(size for _, size in self._made.values())
        return self._at_most
