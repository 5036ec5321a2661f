"""The trusted side: what runs at VMPL0. Sans-I/O; it imports formats, bitmaps and attestation, and nothing of the host."""
