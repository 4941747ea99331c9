"""Before and next to a run: the plan, the doctor, the benchmarks."""
