"""The Simple Recurrent Unit for PyTorch, with kernels in Python: no compiler needed."""

from .autograd import sru_recurrence
from .backend import use_backend
from .nn import SRU, SRUCell
from .warmup import warmup

__version__ = "0.1.0"
__all__ = ["SRU", "SRUCell", "sru_recurrence", "use_backend", "warmup"]
