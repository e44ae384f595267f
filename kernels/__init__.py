# SPDX-License-Identifier: Apache-2.0
"""Stateless ops on tensors, one folder each: `reference.py` is the definition, `op.py` the public face.

Import the folder of the op that is wanted (`from masktrain.kernels.philox import philox_words`); importing this
package alone loads nothing.
"""
