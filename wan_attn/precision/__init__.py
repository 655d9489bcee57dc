# SPDX-License-Identifier: Apache-2.0
"""precision - where attention may be computed in 8 bits, what guards it, and what it cost.

schedule.py has the rules, guard.py what watches a call, watch.py what decides, record.py and
report.py what is known at the end, state.py who asks for it; observe/ where a call stands and how
far it is off.
"""

from wan_attn.observe.place import at
from wan_attn.precision.state import Use, current_report, use

__all__ = ["Use", "at", "current_report", "use"]
