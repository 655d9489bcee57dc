# SPDX-License-Identifier: Apache-2.0
"""precision - where attention may be computed in 8 bits, what guards it, and what it cost.

schedule.py has the rules, place.py where a call stands, guard.py and sampling.py what watches it,
watch.py what decides, record.py and report.py what is known at the end, state.py who asks for it.
"""

from wan_attn.precision.place import at
from wan_attn.precision.state import Use, current_report, use

__all__ = ["Use", "at", "current_report", "use"]
