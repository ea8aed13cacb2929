"""Routing policy on top of the gates: availability masks, the gating rule of each model family, the usage ledger."""
