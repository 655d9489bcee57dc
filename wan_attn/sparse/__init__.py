# SPDX-License-Identifier: Apache-2.0
"""sparse - self-attention that leaves out blocks of keys which hardly matter, within a budget.

order.py puts near tokens into one block, routing.py says which blocks may matter, steer.py how many
the budget needs, lists.py and kernel.py have them computed; watch.py decides, verdict.py judges,
record.py and report.py know what came of it, state.py and wishes.py who asks for it.
"""

from wan_attn.observe.place import at
from wan_attn.sparse.call import sdpa
from wan_attn.sparse.lists import BlockLists, block_lists
from wan_attn.sparse.state import Use, current_report, use

__all__ = ["BlockLists", "Use", "at", "block_lists", "current_report", "sdpa", "use"]
