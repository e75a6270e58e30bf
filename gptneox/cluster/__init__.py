# SPDX-License-Identifier: Apache-2.0
"""Many machines: Ray places the groups of ranks that our launcher starts. See docs/cluster.md."""
