# SPDX-License-Identifier: Apache-2.0
"""fuzz - the campaign against faults: see run.py."""
