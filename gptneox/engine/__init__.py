# SPDX-License-Identifier: Apache-2.0
"""Both engines: requests, blocks, schedule, sampling, text."""
