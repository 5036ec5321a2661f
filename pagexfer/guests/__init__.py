"""What is migrated. Every guest has the same two sides: memory, gate and tracker for the SVSM, a hypervisor for
the engine.
"""
