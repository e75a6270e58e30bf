# SPDX-License-Identifier: Apache-2.0
"""Accuracy and speed tasks over either path."""
