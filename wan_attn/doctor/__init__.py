# SPDX-License-Identifier: Apache-2.0
"""doctor - what this machine has, what can run on it and why not, and what to do next."""
