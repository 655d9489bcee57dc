# SPDX-License-Identifier: Apache-2.0
"""observe - what is known of a run while it goes on: where a call stands (place.py), what it takes
(timed.py, pace.py), how far it is off (sampling.py, later.py), and how it is told (names.py,
table.py). Whoever computes less than all of attention reads it: precision, and sparse.
"""
