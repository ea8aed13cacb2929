"""Paging on the device: page table, victim choice and fetch as Triton code, with no host in the loop."""
