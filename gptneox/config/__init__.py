# SPDX-License-Identifier: Apache-2.0
"""What a run goes by: config.json (`model`), flags and config.ini (`settings`), the environment."""
