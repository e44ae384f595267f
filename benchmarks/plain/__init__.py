# SPDX-License-Identifier: Apache-2.0
"""Plain PyTorch transcriptions of the published methods, written from their description: what a step is compared with.

Batch first and padded, all patches embedded, tokens shuffled and gathered, attention weights as a tensor, every row
through every layer, eager. Parameters carry the names of the reference projects, so that masktrain's adapters hand
over the weights and both sides compute the same loss.
"""
