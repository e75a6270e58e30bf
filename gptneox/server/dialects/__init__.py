# SPDX-License-Identifier: Apache-2.0
"""The APIs that the service speaks, one module each, all over `gptneox.server.service`."""
