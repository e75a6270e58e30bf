# SPDX-License-Identifier: Apache-2.0
"""GPT-NeoX inference on Ascend NPU, CUDA and CPU."""

__version__ = "0.1.0"
