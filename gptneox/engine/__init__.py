# SPDX-License-Identifier: Apache-2.0
"""The paged path: requests, blocks, schedule, sampling."""
