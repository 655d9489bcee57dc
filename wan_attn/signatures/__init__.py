# SPDX-License-Identifier: Apache-2.0
"""signatures - functions with the names and arguments of other attention libraries."""
