# SPDX-License-Identifier: Apache-2.0
"""store - files in the user's cache folder: private, whole or not at all, safe with any number of
processes; and which file is one process's own. Knows neither torch nor what the files hold."""
