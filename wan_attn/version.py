# SPDX-License-Identifier: Apache-2.0
"""version.py - the one place that states the package's version; setup.py reads it as text."""

__version__ = "0.1.0"
