# SPDX-License-Identifier: Apache-2.0
"""`python -m masktrain.cli`: what torchrun needs where it starts modules."""

from masktrain.cli import main

main()
