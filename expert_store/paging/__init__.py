"""Paging on the device: page table, victim choice and fetch as Triton code, without the host."""
