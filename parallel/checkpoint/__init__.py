"""Checkpoints that any layout can load: tensors as checked pieces in safetensors files, and a JSON manifest.

A checkpoint is a directory. Every writing rank has one file with pieces of the tensors; `manifest.json` says which
block of which tensor each piece is, and its checksum. Nothing is pickled; nothing loaded can run code.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
