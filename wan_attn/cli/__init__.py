# SPDX-License-Identifier: Apache-2.0
"""cli - the commands behind `python -m wan_attn`; alone in printing. Nothing else imports it."""
