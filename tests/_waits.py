"""Operations for which the host waits for an accelerator, found on a CPU."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# They read a value on the host, or wait for the status of a decomposition.
WAITING = ("_local_scalar_dense", "nonzero", "equal", "_linalg_eigh", "_linalg_svd", "linalg_qr", "linalg_cholesky")


class Waits(TorchDispatchMode):
    """Lists such operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITING:
            self.found.append(name)
        return func(*args, **(kwargs or {}))
