"""What the benchmarks share: the workloads, the timing by turns, and the examination of zoo
entries.
"""
