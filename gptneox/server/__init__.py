# SPDX-License-Identifier: Apache-2.0
"""The HTTP service: a front process that takes requests, and the ranks that answer them."""
