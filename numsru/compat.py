"""The authors' package `sru` on numsru's recurrence: its classes, arguments, results and checkpoints.

`from numsru.compat import SRU` takes the place of `from sru import SRU`. Arguments are those of `sru` 2.6.0, in its
order; those of 1.x, 2.1 and 3.0-dev are taken by keyword. SRU++ is that of 3.0-dev. What differs stands in
docs/migrating.md.
"""

from .compat_cell import SRUCell
from .compat_convert import convert_state_dict
from .compat_sru import SRU
from .compat_srupp import SRUpp, SRUppAttention, SRUppCell, SRUppProjectedLinear

__all__ = ["SRU", "SRUCell", "SRUpp", "SRUppAttention", "SRUppCell", "SRUppProjectedLinear", "convert_state_dict"]
