# SPDX-License-Identifier: Apache-2.0
"""backends - the libraries that can compute one attention call, each behind one interface."""
