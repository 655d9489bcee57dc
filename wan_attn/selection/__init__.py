# SPDX-License-Identifier: Apache-2.0
"""selection - which backend runs a call, and the call itself: choose, run, trace, profile."""
