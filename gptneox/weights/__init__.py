# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: their files, loading them, cutting them for several ranks."""
