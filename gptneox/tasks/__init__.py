# SPDX-License-Identifier: Apache-2.0
"""What main.py can be asked to do, a file for each task."""
