# SPDX-License-Identifier: Apache-2.0
"""Weights of the reference projects under their own names, to ours and back: one module each."""
