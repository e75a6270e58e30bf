# SPDX-License-Identifier: Apache-2.0
"""Settings of a run: config.json (`model`), flags, config.ini (`settings`), `environment`."""
