"""Triton kernels of the captured decode step; each is checked against float64 in Triton's interpreter.

Every kernel takes PDL (programmatic dependent launch): with it a kernel starts while the one before drains, loads the
weights that do not depend on it, and only then waits. The wait is unconditional in every program, so that a kernel's
end implies the end of all before it; a kernel that lets its successor read *its predecessor's* results early (the
experts' second product reads the router's work list before its wait) is launched only after its own predecessor's
wait.
"""
