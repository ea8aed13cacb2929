"""Triton kernels of the captured decode step; each is checked against float64 in Triton's interpreter.

Every kernel has the option PDL (programmatic dependent launch): with it a kernel starts while the one before ends,
loads the weights that do not depend on it, and then waits for it. Invariant: every program of a kernel waits, so the
end of a kernel implies the end of all kernels before it. One kernel reads results of the kernel before its predecessor
without waiting (the experts' second product reads the router's work list); so the predecessor launches it only after
its own wait.
"""
