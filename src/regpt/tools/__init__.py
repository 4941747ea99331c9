"""What is known before and beside a run: the plan, the doctor, the benchmarks."""
