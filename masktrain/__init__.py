# SPDX-License-Identifier: Apache-2.0
"""masktrain: pretraining of masked and contrastive models on audio spectrograms.

Importing the package touches no GPU and loads neither torch, triton nor DALI.
"""

__version__ = "0.1.0"
