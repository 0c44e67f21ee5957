"""Dropout of models that others wrote, which draws from torch's generators: as the shards need it.

Ranks with equally seeded generators draw the same masks, which is right where activations are replicated and wrong
where each rank holds other heads, features or tokens. (weft's own layers use `tensor.dropout`, whose masks do not
depend on the layout at all.)
"""

import hashlib

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh


class SplitRandom:
    """Random numbers of a rank's own between `enter` and `leave`; afterwards the ranks draw alike again.

    The own numbers follow from the shared generator's state and the rank, so that a recomputed forward, which starts
    from the same state, draws the same ones. On a GPU nothing waits for the device.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self._shared: torch.Tensor | None = None
        self._device = torch.device("cpu")

    def enter(self, device: torch.device) -> None:
        """Draw this rank's own numbers from now on; nothing happens when it does so already."""
        if self._shared is not None:
            return
        torch.rand((), device=device)  # two regions must not start from the same state
        self._device, self._shared = device, _get_state(device)
        key = self._shared.numpy().tobytes() + bytes([self.mesh.get_local_rank() % 256])
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1
        _seed(device, seed)

    def leave(self) -> None:
        """Draw as all ranks do."""
        if self._shared is not None:
            shared, self._shared = self._shared, None
            _set_state(self._device, shared)


def drops(module: nn.Module) -> bool:
    """Whether a module drops anything when it trains: it has an nn.Dropout, or a number called so."""
    layers = any(isinstance(child, nn.Dropout) and child.p > 0 for child in module.children())
    return layers or any("drop" in name and isinstance(p, float) and p > 0 for name, p in vars(module).items())


def _get_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_state(device: torch.device, state: torch.Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def _seed(device: torch.device, seed: int) -> None:
    generator = torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator
    generator.manual_seed(seed)
