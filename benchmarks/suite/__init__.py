# SPDX-License-Identifier: Apache-2.0
"""The checks of benchmarks/gpu_suite.py, one file for each kind of question."""
