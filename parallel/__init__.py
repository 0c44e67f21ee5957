"""The engine: parallel layers, collectives, pipeline schedules and their executor, for models of any make.

The public names are listed in `__init__.pyi`; each is imported on first use, so that the schedules and their
simulator can be used without loading torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
