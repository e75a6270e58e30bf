# SPDX-License-Identifier: Apache-2.0
"""One module per engine; each runs in a process, and if need be an environment, of its own."""
