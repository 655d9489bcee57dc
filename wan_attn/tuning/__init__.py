# SPDX-License-Identifier: Apache-2.0
"""tuning - which candidate is the fastest right one for a kind of call on this machine: measured
once, on a slice of a real call, and kept in a file. docs/cards.md says when, and what it costs."""
