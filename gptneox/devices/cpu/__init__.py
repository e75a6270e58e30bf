# SPDX-License-Identifier: Apache-2.0
"""Any CPU: plain torch, or kernels of our own."""
